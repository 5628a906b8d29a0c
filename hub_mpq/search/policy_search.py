"""One budget, one policy; or a front of them."""

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
    """Whole-model cost of a policy: every registered limit, BitOps of the searched layers, and the budget's tables.

    Args:
        graph: The layers of the model.
        policy: Their widths.
        budget: Brings costs of its own; may be None.
        base_bytes: Bytes of the packed file beside the searched layers.
    """
    policy.check(graph)
    there = graph.at(policy.bits)
    # base_bytes holds the fixed layers at the graph's own widths
    base_bytes += sum(_stored(layer, policy.bits[layer.name]) - _stored(layer, layer.fixed) for layer in graph)
    amounts: dict[str, float] = {}
    for limit in all_limits(budget):
        amount = limit.of_policy(there, policy, base_bytes)
        if amount is not None:
            amounts[limit.name] = amount
    amounts["searched_bitops"] = sum(layer_bitops(layer, policy.bits[layer.name]) for layer in graph.searched)
    return Usage(amounts)


def longest_header(policy: Policy, scores: Scores) -> Policy:
    """A policy of a table's choices whose header is the longest: with groups and zero points where any choice has them.

    Args:
        policy: What layers without scores take.
        scores: {searched layer: {widths: score}}.
    """

    def entries(bits: LayerBits) -> tuple[Any, ...]:
        return not bits.symmetric, bits.group_size is not None, len(str(bits)), bits

    return replace(policy, bits={**policy.bits, **{name: max(row, key=entries) for name, row in scores.items()}})


def _stored(layer: LayerSpec, bits: LayerBits | None) -> int:
    """Bytes of a fixed layer in a packed file; 0 for a searched one."""
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
        details={**(details or {}), "budget": str(budget)},
    )


def inferred_policy(graph: LayerGraph, indicators: Indicators, candidates: Mapping[str, Candidates]) -> Policy:
    """The policy that a strategy's training settled on, with the candidates' groups and zero points.

    A pair of widths that the menu of a target lacks becomes the nearest one, see `hub_mpq.core.bits.nearest`.

    Raises InvalidArgument for a strategy that needs a budget.
    """
    found = indicators.inferred
    if found is None:
        raise InvalidArgument(
            f"strategy {indicators.strategy!r} infers no widths: name a budget, for example bitops='W4A4'"
        )
    searched = {layer.name for layer in graph.searched}
    if not searched <= set(found) or any(found[name].weight == FLOAT_BITS for name in searched):
        raise InvalidArgument("the widths that the scores say training settled on are not those of this model")
    grouped = {n: next(iter(candidates[n].grouped(found[n])), nearest(candidates[n].pairs, found[n])) for n in searched}
    grouped = graph.with_shared_weights(grouped)
    return Policy({x.name: x.fixed or grouped[x.name] for x in graph}, graph.digest)


def _front_limit(graph: LayerGraph, name: str, others: Budget | None) -> Limit:
    """The limit that a front runs over."""
    own = [limit for limit in all_limits(others) if not isinstance(limit, CostTable)]
    usable = {limit.name: limit for limit in own if limit.over == "sum" and not limit.at_least}
    if name not in usable:
        raise InvalidArgument(f"a front can run over {', '.join(usable)}, not {name!r}")
    usable[name].check(graph)
    return usable[name]


def _ends(graph: LayerGraph, scores: Scores, limit: Limit, base_bytes: int) -> tuple[float, float]:
    """Least and greatest whole-model amount of a limit over the available widths."""
    fixed = fixed_of(graph)
    costs = [(x, {bits: limit.of_layer(x, bits) for bits in scores[x.name]}) for x in graph.searched]
    ends = [
        limit.whole(graph, limit.together([(x, end(row, key=row.__getitem__)) for x, row in costs], fixed), base_bytes)
        for end in (min, max)
    ]
    if None in ends:
        raise InvalidArgument(f"{limit.name} means nothing for this model: no layer is searched")
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
    """Best policies at `points` budgets of one limit, spaced evenly in ratio between the least and the greatest.

    Points that the other limits make unreachable are left out; equal policies stand once. `time_limit`: seconds for all
    points, each of which may take an even share of what is left. `finish` makes of each result and its budget the one
    that is returned.
    """
    deadline = time.perf_counter() + seconds("time_limit", time_limit)
    across = _front_limit(graph, limit, others)
    low, high = _ends(graph, scores, across, base_bytes)
    results: list[SearchResult] = []
    budgets: list[Budget] = []
    for i in range(points):
        part = i / (points - 1)
        cap = low * (high / low) ** part if high > low > 0 else low + (high - low) * part
        # rounding up keeps the least point reachable
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
