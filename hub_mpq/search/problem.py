"""A budget and scores become the solver's table, and its answer a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..core import Budget, LayerBits, LayerGraph, LayerSpec, parse_bytes, parse_count, parse_ratio
from ..cost.bitops import float_bitops, layer_bitops
from ..cost.memory import activation_nbytes, weight_bits
from ..cost.size import layer_nbytes
from ..errors import InfeasibleBudget, InvalidArgument
from ..solve import Solution, solve_table
from .scores import Scores
from .tied_layers import merge_inputs


@dataclass(frozen=True)
class Problem:
    """table: what `solve_table` takes. meaning: {table row: {choice: {layer: widths}}}. constant: what the fixed layers
    and float work add to each limit, and counts: weights of the searched and of all layers, so that limits can be told
    in the user's own terms."""

    table: dict[str, Any]
    meaning: dict[str, dict[str, dict[str, LayerBits]]]
    constant: dict[str, float]
    counts: tuple[int, int]

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
        limits = self.table["limits"]
        caps, reach = ({name: self._told(name, amounts[name]) for name in limits} for amounts in (limits, least))
        binding = [name for name, cap in limits.items() if cap < least[name]]
        return InfeasibleBudget(caps, reach, binding, at_least=["compression"])

    def _told(self, name: str, amount: float) -> float:
        """An amount of the searched layers, as the budget has it: whole model, mean bits, or ratio."""
        if name == "weight_bits":
            return amount / max(self.counts[0], 1)
        whole = amount + self.constant.get(name, 0)
        return 32 * self.counts[1] / max(whole, 1) if name == "compression" else whole


def _limits(graph: LayerGraph, budget: Budget, base_bytes: int) -> tuple[dict[str, float], dict[str, float]]:
    """(limits on the searched layers' sums, constants beside them)."""
    fixed = [(layer, layer.fixed) for layer in graph if layer.fixed is not None]
    searched = graph.searched
    limits: dict[str, float] = {}
    constant: dict[str, float] = {}

    def put(name: str, value: str | float, cost: Any, beside: float, absolute: Any) -> None:
        level = Budget.level(value)
        constant[name] = beside
        limits[name] = (
            sum(cost(layer, _level(layer, level, name)) for layer in searched) if level else absolute() - beside
        )

    if budget.bitops is not None:
        beside = sum(layer_bitops(*pair) for pair in fixed) + sum(map(float_bitops, graph.floats))
        put("bitops", budget.bitops, layer_bitops, beside, lambda: parse_count(budget.bitops))  # type: ignore[arg-type]
    if budget.size is not None:
        put("size", budget.size, layer_nbytes, base_bytes, lambda: parse_bytes(budget.size))  # type: ignore[arg-type]
    if budget.activation_memory is not None:
        beside = sum(activation_nbytes(*pair) for pair in fixed)
        memory = budget.activation_memory
        put("activation_memory", memory, activation_nbytes, beside, lambda: parse_bytes(memory, "activation_memory"))
    counts = {layer.name: 0 if layer.weight_owner else layer.weight_count for layer in graph}
    if budget.compression is not None:
        ratio = parse_ratio(budget.compression)
        constant["compression"] = sum(weight_bits(*pair) for pair in fixed)
        limits["compression"] = 32 * sum(counts.values()) / ratio - constant["compression"]
    if budget.weight_bits is not None:
        limits["weight_bits"] = parse_ratio(budget.weight_bits, "weight_bits") * sum(
            counts[layer.name] for layer in searched
        )
    for name, (limit, table) in budget.costs.items():
        if name in {f.name for f in fields(budget)}:  # given or not: reports and penalties go by the name
            raise InvalidArgument(f"cost {name!r} has the name of a built-in limit")
        _check_cost(graph, name, table)
        constant[name] = sum(table[layer.name][str(bits)] for layer, bits in fixed if layer.name in table)
        limits[name] = limit - constant[name]
    return limits, constant


def searched_limits(graph: LayerGraph, budget: Budget, base_bytes: int) -> dict[str, float]:
    """A budget as caps on the searched layers' sums (activation_peak: their largest), fixed and float parts off.

    What strategies with a soft constraint aim at. Raises InvalidArgument as `build` does.
    """
    limits, _ = _limits(graph, budget, base_bytes)
    peak = _peak(graph, budget)
    return limits if peak is None else {**limits, "activation_peak": peak}


def _check_cost(graph: LayerGraph, name: str, table: Mapping[str, Mapping[str, float]]) -> None:
    """InvalidArgument unless a user's cost speaks of layers of the model, fixed ones at their own widths too."""
    if unknown := sorted(set(table) - set(graph.names)):
        raise InvalidArgument(f"cost {name!r} speaks of layers that the model does not have: {unknown}")
    for layer in graph:
        if layer.fixed is not None and layer.name in table and str(layer.fixed) not in table[layer.name]:
            raise InvalidArgument(f"cost {name!r} of fixed layer {layer.name!r} has no entry for {layer.fixed}")


def _level(layer: LayerSpec, level: LayerBits, name: str) -> LayerBits:
    """A level for one layer. A part that a level leaves out stands for 8 bits where the limit does not read it."""
    needs_weight, needs_activation = name in ("bitops", "size"), name in ("bitops", "activation_memory")
    if (needs_weight and level.weight == 32) or (needs_activation and level.activation == 32):
        raise InvalidArgument(f"{name}: level {level} lacks a part; write for example W4A4 (A4 for activations alone)")
    if layer.weight_only:
        return LayerBits(level.weight, 32)
    return LayerBits(min(level.weight, 8), min(level.activation, 8))


def _costs(layer: LayerSpec, bits: LayerBits, budget: Budget, limits: Mapping[str, float]) -> dict[str, float]:
    amounts: dict[str, float] = {
        "bitops": layer_bitops(layer, bits),
        "size": layer_nbytes(layer, bits),
        "activation_memory": activation_nbytes(layer, bits),
        "compression": weight_bits(layer, bits),
        "weight_bits": weight_bits(layer, bits),
    }
    for name, (_, table) in budget.costs.items():
        row = table.get(layer.name, {})
        if row and str(bits) not in row:
            raise InvalidArgument(f"cost {name!r} of layer {layer.name!r} has no entry for {bits}")
        amounts[name] = row.get(str(bits), 0.0)
    return {name: amounts[name] for name in limits}


def build(graph: LayerGraph, scores: Scores, budget: Budget, *, base_bytes: int, sense: str = "min") -> Problem:
    """The multiple-choice knapsack of a budget.

    base_bytes: bytes of the packed file beside the searched layers (header, fixed layers, float tensors).
    Raises InvalidArgument for a limit that makes no sense, InfeasibleBudget for a peak that no width meets.
    """
    if not graph.searched:
        raise InvalidArgument("every layer is fixed: there is nothing to search")
    limits, constant = _limits(graph, budget, base_bytes)
    peak = _peak(graph, budget)
    rows: dict[str, dict[LayerBits, tuple[float, dict[str, float]]]] = {}
    for layer in graph.searched:
        row = {
            bits: (score, _costs(layer, bits, budget, limits))
            for bits, score in scores[layer.name].items()
            if peak is None or activation_nbytes(layer, bits) <= peak
        }
        if not row:
            least = min(activation_nbytes(layer, bits) for bits in scores[layer.name])
            raise InfeasibleBudget(
                {"activation_peak": float(peak or 0)}, {"activation_peak": least}, ["activation_peak"]
            )
        rows[layer.name] = row
    merged, meaning = merge_inputs(graph, rows, sense)
    ties: dict[str, list[str]] = {}
    home = {name: row for row, choices in meaning.items() for name in next(iter(choices.values()))}
    for layer in graph.searched:
        if layer.tie is not None and home[layer.name] not in ties.setdefault(layer.tie, []):
            ties[layer.tie].append(home[layer.name])
    table = {
        "sense": sense,
        "layers": merged,
        "limits": limits,
        "ties": [names for names in ties.values() if len(names) > 1],
    }
    counts = [(layer.fixed is None, 0 if layer.weight_owner else layer.weight_count) for layer in graph]
    return Problem(table, meaning, constant, (sum(n for free, n in counts if free), sum(n for _, n in counts)))


def _peak(graph: LayerGraph, budget: Budget) -> float | None:
    if budget.activation_peak is None:
        return None
    level = Budget.level(budget.activation_peak)
    if level is None:
        peak = parse_bytes(budget.activation_peak, "activation_peak")
        largest = max((activation_nbytes(x, x.fixed) for x in graph if x.fixed is not None), default=0)
        if largest > peak:
            raise InfeasibleBudget({"activation_peak": peak}, {"activation_peak": float(largest)}, ["activation_peak"])
        return peak
    return max(activation_nbytes(x, _level(x, level, "activation_memory")) for x in graph.searched)
