"""One budget, one policy; or a front of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

from ..core import Budget, LayerBits, LayerGraph, Policy, SearchResult, Usage
from ..cost.bitops import graph_bitops, layer_bitops
from ..cost.memory import activation_memory, activation_peak, mean_weight_bits, weight_bits
from ..cost.size import layer_nbytes
from ..errors import InfeasibleBudget, InvalidArgument
from .problem import build
from .scores import Scores


def usage_of(graph: LayerGraph, policy: Policy, budget: Budget | None, base_bytes: int) -> Usage:
    """Whole-model cost of a policy: bitops, size and activation bytes, mean weight bits, compression, named costs."""
    owned = [layer for layer in graph if layer.weight_owner is None]
    packed_bits = sum(weight_bits(layer, policy.bits[layer.name]) for layer in owned)
    amounts: dict[str, float] = {
        "bitops": graph_bitops(graph, policy),
        "searched_bitops": sum(layer_bitops(layer, policy.bits[layer.name]) for layer in graph.searched),
        "size": base_bytes + sum(layer_nbytes(layer, policy.bits[layer.name]) for layer in graph.searched),
        "compression": 32 * sum(layer.weight_count for layer in owned) / packed_bits,
        "activation_memory": activation_memory(graph, policy),
        "activation_peak": activation_peak(graph, policy),
    }
    if graph.searched:
        amounts["weight_bits"] = mean_weight_bits(graph, policy)
    for name, (_, table) in (budget.costs if budget else {}).items():
        amounts[name] = sum(row[str(policy.bits[layer])] for layer, row in table.items())
    return Usage(amounts)


def search_policy(
    graph: LayerGraph,
    scores: Scores,
    budget: Budget,
    *,
    base_bytes: int,
    sense: str = "min",
    strategy: str = "limpq",
    seed: int = 0,
    time_limit: float | None = None,
    details: Mapping[str, object] | None = None,
) -> SearchResult:
    """The policy of least (or greatest) total score within the budget, proved by the solver.

    Raises InfeasibleBudget with the least reachable value of each limit.
    """
    began = time.perf_counter()
    problem = build(graph, scores, budget, base_bytes=base_bytes, sense=sense)
    solution, bits = problem.solve(time_limit)
    fixed = {layer.name: layer.fixed for layer in graph if layer.fixed is not None}
    policy = Policy({layer.name: fixed.get(layer.name) or bits[layer.name] for layer in graph}, graph.digest)
    return SearchResult(
        policy=policy,
        usage=usage_of(graph, policy, budget, base_bytes),
        status=solution.status,
        objective=solution.objective,
        bound=solution.bound,
        gap=solution.gap,
        seconds=time.perf_counter() - began,
        strategy=strategy,
        seed=seed,
        details=dict(details or {}),
    )


def _ends(graph: LayerGraph, scores: Scores, limit: str, base_bytes: int) -> tuple[float, float]:
    """Least and greatest whole-model amount of a limit over the available widths."""
    low: dict[str, LayerBits] = {}
    high: dict[str, LayerBits] = {}
    for layer in graph.searched:
        ordered = sorted(scores[layer.name])
        low[layer.name] = LayerBits(ordered[0].weight, min(b.activation for b in ordered))
        high[layer.name] = LayerBits(ordered[-1].weight, max(b.activation for b in ordered))
    fixed = {layer.name: layer.fixed for layer in graph if layer.fixed is not None}
    ends = [usage_of(graph, Policy({**fixed, **side}, graph.digest), None, base_bytes) for side in (low, high)]
    if limit not in ends[0].amounts or limit in ("searched_bitops", "compression", "activation_peak"):
        raise InvalidArgument(f"a front can run over bitops, size, weight_bits or activation_memory, not {limit!r}")
    return ends[0][limit], ends[1][limit]


def pareto_front(
    graph: LayerGraph,
    scores: Scores,
    *,
    limit: str,
    points: int,
    base_bytes: int,
    others: Budget | None = None,
    sense: str = "min",
    strategy: str = "limpq",
    seed: int = 0,
) -> list[SearchResult]:
    """Best policies at `points` budgets of one limit, spaced evenly in ratio between the least and the greatest.

    Points that the other limits make unreachable are left out; equal policies stand once.
    """
    if points < 2:
        raise InvalidArgument(f"a front needs at least 2 points, not {points}")
    low, high = _ends(graph, scores, limit, base_bytes)
    results: list[SearchResult] = []
    for i in range(points):
        cap = low * (high / low) ** (i / (points - 1)) if high > low else low
        # rounding up keeps the least point reachable
        value = cap * (1 + 1e-12) if limit == "weight_bits" else float(math.ceil(cap))
        budget = replace(others, **{limit: value}) if others else Budget(**{limit: value})
        try:
            result = search_policy(
                graph, scores, budget, base_bytes=base_bytes, sense=sense, strategy=strategy, seed=seed
            )
        except InfeasibleBudget:
            continue
        if not results or results[-1].policy.bits != result.policy.bits:
            results.append(result)
    return results
