"""A budget and scores become the solver's table, and its answer a policy."""

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
    """The multiple-choice knapsack of a budget.

    Args:
        table: What `solve_table` takes.
        meaning: {table row: {choice: {layer: widths}}}.
        graph: The layers of the model.
        limits: The limits that the table holds, by name: they tell amounts in the user's own terms.
        base_bytes: Bytes of the packed file beside the searched layers.
    """

    table: dict[str, Any]
    meaning: dict[str, dict[str, dict[str, LayerBits]]]
    graph: LayerGraph
    limits: dict[str, Limit]
    base_bytes: int

    def solve(self, time_limit: float | None = None) -> tuple[Solution, dict[str, LayerBits]]:
        """(solution, widths of the searched layers). Raises InfeasibleBudget in whole-model terms."""
        limits = self.table["limits"]
        # a limit below what is fixed leaves less than nothing to the searched layers, which is no limit to a solver
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
            whole(caps), whole(least), binding, at_least=[n for n, x in self.limits.items() if x.at_least]
        )


def _checked_limits(graph: LayerGraph, budget: Budget) -> list[tuple[Limit, Value]]:
    """The limits of a budget; InvalidArgument for a table that does not fit the model."""
    found = limits_of(budget)
    if not found:
        raise InvalidArgument("a latency table alone limits nothing: name a limit, for example latency='5ms'")
    for limit, _ in found:
        limit.check(graph)
    return found


def searched_limits(graph: LayerGraph, budget: Budget, base_bytes: int) -> dict[str, tuple[Limit, float]]:
    """{limit: (the limit, cap on what the searched layers take together)}, fixed and float parts off.

    What strategies with a soft constraint aim at. Raises InvalidArgument as `build` does.
    """
    return {x.name: (x, x.cap(graph, value, base_bytes)) for x, value in _checked_limits(graph, budget)}


def build(graph: LayerGraph, scores: Scores, budget: Budget, *, base_bytes: int, sense: str = "min") -> Problem:
    """The multiple-choice knapsack of a budget.

    Args:
        graph: The layers of the model.
        scores: {searched layer: {widths: score}}.
        budget: The limits.
        base_bytes: Bytes of the packed file beside the searched layers (header, fixed layers, float tensors).
        sense: "min" when a smaller score is better.

    Raises:
        InvalidArgument: A limit that makes no sense for this model.
        InfeasibleBudget: A limit on the largest layer that no width meets.
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
                raise InfeasibleBudget({limit.name: cap}, {limit.name: min(costs.values())}, [limit.name])
        rows[layer.name] = {
            bits: (
                score,
                {
                    # of the layers of one input, whose widths are one choice, the first is charged
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


def _peak(limit: Limit, graph: LayerGraph, value: Value, base_bytes: int) -> float:
    """The most a single searched layer may take; InfeasibleBudget when a fixed one takes more."""
    cap = limit.cap(graph, value, base_bytes)
    beside = limit.beside(graph, base_bytes)
    if not isinstance(value, LayerBits) and beside > cap:
        raise InfeasibleBudget({limit.name: cap}, {limit.name: float(beside)}, [limit.name])
    return cap
