"""Turn a budget and scores into a table for the solver, and its solution into bit-widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core import Budget, LayerBits, LayerGraph, Limit, Value
from ..core.limit import fixed_of
from ..cost import limits_of
from ..errors import InfeasibleBudget, InvalidArgument
from ..solve import Solution, solve_table
from .scores import Scores
from .tied_layers import merge_inputs


@dataclass(frozen=True)
class Problem:
    """The multiple-choice knapsack problem of a budget.

    Args:
        table: The table for `solve_table`.
        meaning: `{table row: {choice: {layer: bit-widths}}}`.
        graph: The layers of the model.
        limits: The limits in the table by name, which convert amounts to whole-model terms.
        base_bytes: Bytes of the packed file apart from the searched layers.
    """

    table: dict[str, Any]
    meaning: dict[str, dict[str, dict[str, LayerBits]]]
    graph: LayerGraph
    limits: dict[str, Limit]
    base_bytes: int

    def solve(self, time_limit: float | None = None) -> tuple[Solution, dict[str, LayerBits]]:
        """Solve the problem.

        Returns:
            The solution and the bit-widths of the searched layers.

        Raises:
            InfeasibleBudget: No policy meets the budget; the error is in whole-model terms.
        """
        limits = self.table["limits"]
        # a limit below the cost of fixed layers leaves a negative amount, which the solver does not accept
        possible = {**self.table, "limits": {name: max(cap, 0) for name, cap in limits.items()}}
        try:
            solution = solve_table(possible, time_limit=time_limit)
        except InfeasibleBudget as error:
            raise self._infeasible(error.least) from None
        if below := [name for name, cap in limits.items() if cap < 0]:
            raise self._infeasible({**limits, **dict.fromkeys(below, 0.0)})
        bits: dict[str, LayerBits] = {}
        for row, choice in solution.choices.items():
            bits.update(self.meaning[row][choice])
        return solution, bits

    def _infeasible(self, least: Mapping[str, float]) -> InfeasibleBudget:
        caps = self.table["limits"]

        def whole(amounts: Mapping[str, float]) -> dict[str, float]:
            return {n: x.whole(self.graph, amounts[n], self.base_bytes) or 0.0 for n, x in self.limits.items()}

        binding = [name for name, cap in caps.items() if cap < least[name]]
        return InfeasibleBudget(
            whole(caps),
            whole(least),
            binding,
            at_least=[n for n, x in self.limits.items() if x.at_least],
            units={n: x.unit for n, x in self.limits.items()},
        )


def _checked_limits(graph: LayerGraph, budget: Budget) -> list[tuple[Limit, Value]]:
    """Return the limits of a budget; raise InvalidArgument if one does not fit the model."""
    found = limits_of(budget)
    if not found:
        raise InvalidArgument("latency_table needs a limit, for example latency='5ms'")
    for limit, _ in found:
        limit.check(graph)
    return found


def searched_limits(graph: LayerGraph, budget: Budget, base_bytes: int) -> dict[str, tuple[Limit, float]]:
    """Return the caps on the searched layers, as targets of strategies with soft constraints.

    Returns:
        `{name: (limit, cap on the total of the searched layers)}`, without the fixed and float parts.

    Raises:
        InvalidArgument: A limit does not fit the model.
    """
    return {x.name: (x, x.cap(graph, value, base_bytes)) for x, value in _checked_limits(graph, budget)}


def build(graph: LayerGraph, scores: Scores, budget: Budget, *, base_bytes: int, sense: str = "min") -> Problem:
    """Build the multiple-choice knapsack problem of a budget.

    Args:
        graph: The layers of the model.
        scores: `{searched layer: {bit-widths: score}}`.
        budget: The limits.
        base_bytes: Bytes of the packed file apart from the searched layers (header, fixed layers, float tensors).
        sense: "min" if smaller scores are better, else "max".

    Raises:
        InvalidArgument: A limit does not fit the model.
        InfeasibleBudget: No bit-width meets a limit on the largest layer.
    """
    graph.check_layers()
    parsed = _checked_limits(graph, budget)
    if any(x.one_input for x, _ in parsed):
        graph = graph.with_one_width_per_input()
    fixed, first = fixed_of(graph), {x.buffer: x.name for x in reversed(graph.searched) if not x.weight_only}
    sums = {x.name: x for x, _ in parsed if x.over == "sum"}
    caps = {x.name: x.cap(graph, value, base_bytes) for x, value in parsed if x.over == "sum"}
    peaks = [(x, _peak(x, graph, value, base_bytes)) for x, value in parsed if x.over == "max"]
    rows: dict[str, dict[LayerBits, tuple[float, dict[str, float]]]] = {}
    for layer in graph.searched:
        row = scores[layer.name]
        for limit, cap in peaks:
            costs = {bits: limit.of_layer(layer, bits) for bits in row}
            row = {bits: score for bits, score in row.items() if costs[bits] <= cap}
            if not row:
                raise _exceeded(limit, cap, min(costs.values()))
        rows[layer.name] = {
            bits: (
                score,
                {
                    # layers that share an input have one choice of bit-width; the first one is charged
                    name: 0
                    if limit.one_input and first.get(layer.buffer) != layer.name
                    else limit.together([(layer, bits)], fixed)
                    for name, limit in sums.items()
                },
            )
            for bits, score in row.items()
        }
    merged, meaning = merge_inputs(graph, rows, sense)
    ties: dict[str, list[str]] = {}
    home = {name: row for row, choices in meaning.items() for name in next(iter(choices.values()))}
    for layer in graph.searched:
        if layer.tie is not None and home[layer.name] not in ties.setdefault(layer.tie, []):
            ties[layer.tie].append(home[layer.name])
    table = {
        "sense": sense,
        "layers": merged,
        "limits": caps,
        "ties": [names for names in ties.values() if len(names) > 1],
    }
    return Problem(table, meaning, graph, sums, base_bytes)


def _exceeded(limit: Limit, cap: float, least: float) -> InfeasibleBudget:
    """Return the error of a limit that cannot be met alone."""
    return InfeasibleBudget({limit.name: cap}, {limit.name: least}, [limit.name], units={limit.name: limit.unit})


def _peak(limit: Limit, graph: LayerGraph, value: Value, base_bytes: int) -> float:
    """Return the cap on a single searched layer; raise InfeasibleBudget if a fixed layer exceeds it."""
    cap = limit.cap(graph, value, base_bytes)
    beside = limit.beside(graph, base_bytes)
    if not isinstance(value, LayerBits) and beside > cap:
        raise _exceeded(limit, cap, float(beside))
    return cap
