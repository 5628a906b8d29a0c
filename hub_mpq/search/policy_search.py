"""Search the policy of one budget, or a Pareto front of policies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..core import (
    FLOAT_BITS,
    Budget,
    Candidates,
    Indicators,
    LayerBits,
    LayerGraph,
    LayerSpec,
    Limit,
    Policy,
    SearchResult,
    Usage,
)
from ..core.bits import nearest
from ..core.checks import seconds
from ..core.limit import fixed_of
from ..cost import CostTable, all_limits, layer_bitops
from ..cost.size import layer_nbytes
from ..errors import InfeasibleBudget, InvalidArgument
from .problem import build
from .scores import Scores


def usage_of(graph: LayerGraph, policy: Policy, budget: Budget | None, base_bytes: int) -> Usage:
    """Compute the whole-model cost of a policy.

    Args:
        graph: The layers of the model.
        policy: Their bit-widths.
        budget: A budget, whose custom costs are included; may be None.
        base_bytes: Bytes of the packed file apart from the searched layers.

    Returns:
        The amount of every registered limit, the BitOps of the searched layers, and the budget's custom costs.
    """
    policy.check(graph)
    there = graph.at(policy.bits)
    # base_bytes includes the fixed layers at the bit-widths of the graph
    base_bytes += sum(_stored(layer, policy.bits[layer.name]) - _stored(layer, layer.fixed) for layer in graph)
    amounts: dict[str, float] = {}
    for limit in all_limits(budget):
        amount = limit.of_policy(there, policy, base_bytes)
        if amount is not None:
            amounts[limit.name] = amount
    amounts["searched_bitops"] = sum(layer_bitops(layer, policy.bits[layer.name]) for layer in graph.searched)
    return Usage(amounts)


def longest_header(policy: Policy, scores: Scores) -> Policy:
    """Return the policy with the longest header: with groups and zero points wherever a choice has them.

    Args:
        policy: Bit-widths of layers without scores.
        scores: `{searched layer: {bit-widths: score}}`.
    """

    def entries(bits: LayerBits) -> tuple[Any, ...]:
        return not bits.symmetric, bits.group_size is not None, len(str(bits)), bits

    return replace(policy, bits={**policy.bits, **{name: max(row, key=entries) for name, row in scores.items()}})


def _stored(layer: LayerSpec, bits: LayerBits | None) -> int:
    """Return the bytes of a fixed layer in a packed file; 0 for a searched one."""
    return 0 if layer.fixed is None or bits is None else layer_nbytes(layer, bits, input_zero_point=True)


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
    details: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Find the policy with the best total score within a budget, proved by the solver.

    Args:
        graph: The layers of the model.
        scores: `{searched layer: {bit-widths: score}}`.
        budget: The limits.
        base_bytes: Bytes of the packed file apart from the searched layers.
        sense: "min" if smaller scores are better, else "max".
        strategy: Name of the strategy that made the scores.
        seed: Seed of the scores.
        time_limit: Seconds for the solver; None for no limit.
        details: Further details for the result, JSON values only.

    Returns:
        The policy with its cost and its proof.

    Raises:
        InfeasibleBudget: No policy meets the budget; the error reports the minimum of each limit.
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
        details={**(details or {}), "budget": str(budget)},
    )


def inferred_policy(graph: LayerGraph, indicators: Indicators, candidates: Mapping[str, Candidates]) -> Policy:
    """Return the policy that training settled on, with the groups and zero points of the candidates.

    A pair of bit-widths that is not in the menu of a target is replaced by the nearest one, see
    `hub_mpq.core.bits.nearest`.

    Raises:
        InvalidArgument: The strategy needs a budget, or the scores are of another model.
    """
    found = indicators.inferred
    if found is None:
        raise InvalidArgument(f"strategy {indicators.strategy!r} needs a budget, for example bitops='W4A4'")
    searched = {layer.name for layer in graph.searched}
    if not searched <= set(found) or any(found[name].weight == FLOAT_BITS for name in searched):
        raise InvalidArgument("the bit-widths stored with the scores are for another model; score the layers again")
    grouped = {n: next(iter(candidates[n].grouped(found[n])), nearest(candidates[n].pairs, found[n])) for n in searched}
    grouped = graph.with_shared_weights(grouped)
    return Policy({x.name: x.fixed or grouped[x.name] for x in graph}, graph.digest)


def _front_limit(graph: LayerGraph, name: str, others: Budget | None) -> Limit:
    """Return the limit that a front is computed over."""
    own = [limit for limit in all_limits(others) if not isinstance(limit, CostTable)]
    usable = {limit.name: limit for limit in own if limit.over == "sum" and not limit.at_least}
    if name not in usable:
        why = ", which is a minimum or limits a single layer" if name in {limit.name for limit in own} else ""
        raise InvalidArgument(f"limit must be one of {', '.join(usable)}, got {name!r}{why}")
    usable[name].check(graph)
    return usable[name]


def _ends(graph: LayerGraph, scores: Scores, limit: Limit, base_bytes: int) -> tuple[float, float]:
    """Return the minimum and maximum whole-model amount of a limit."""
    fixed = fixed_of(graph)
    costs = [(x, {bits: limit.of_layer(x, bits) for bits in scores[x.name]}) for x in graph.searched]
    ends = [
        limit.whole(graph, limit.together([(x, end(row, key=row.__getitem__)) for x, row in costs], fixed), base_bytes)
        for end in (min, max)
    ]
    if None in ends:
        raise InvalidArgument(f"{limit.name} cannot limit this model, since no layer is searched")
    return ends[0], ends[1]  # type: ignore[return-value]


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
    time_limit: float | None = None,
    finish: Callable[[SearchResult, Budget], SearchResult] | None = None,
) -> list[SearchResult]:
    """Find the best policies at several budgets of one limit, in equal ratios from its minimum to its maximum.

    Args:
        graph: The layers of the model.
        scores: `{searched layer: {bit-widths: score}}`.
        limit: Name of the limit.
        points: Number of budgets.
        base_bytes: Bytes of the packed file apart from the searched layers.
        others: Further limits, which all policies meet.
        sense: "min" if smaller scores are better, else "max".
        strategy: Name of the strategy that made the scores.
        seed: Seed of the scores.
        time_limit: Seconds for all points, each of which may take an equal share of the rest; None for no limit.
        finish: Called with each result and its budget; its result is returned instead.

    Returns:
        The results. Points that the other limits make infeasible and repeated policies are omitted.
    """
    deadline = time.perf_counter() + seconds("time_limit", time_limit)
    across = _front_limit(graph, limit, others)
    low, high = _ends(graph, scores, across, base_bytes)
    results: list[SearchResult] = []
    budgets: list[Budget] = []
    for i in range(points):
        part = i / (points - 1)
        cap = low * (high / low) ** part if high > low > 0 else low + (high - low) * part
        # rounding up keeps the first point feasible
        value = float(math.ceil(cap)) if across.whole_numbers else cap * (1 + 1e-12)
        budget = others.replaced(limit, value) if others else Budget(**{limit: value})
        try:
            left = max(deadline - time.perf_counter(), 1e-3) / (points - i)
            result = search_policy(
                graph, scores, budget, base_bytes=base_bytes, sense=sense, strategy=strategy, seed=seed, time_limit=left
            )
        except InfeasibleBudget:
            continue
        if not results or results[-1].policy.bits != result.policy.bits:
            results.append(result)
            budgets.append(budget)
    return results if finish is None else [finish(*pair) for pair in zip(results, budgets, strict=True)]
