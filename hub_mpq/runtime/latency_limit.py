"""Meet a latency limit: time the whole model at the policy found, and correct the latency table accordingly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core import Budget, LatencyTable, LayerGraph, Policy, SearchResult, human_seconds, runtimes
from ..errors import HubMPQError, InfeasibleBudget, InvalidArgument
from .machine import machine
from .timing import Timing

SEARCHES = 4
"""The first search, and up to three with a corrected table."""
CLOSE = 0.03
"""Relative error of a prediction below which no correction is needed, and tolerance of the limit."""


def check_table(table: LatencyTable, graph: LayerGraph, target: str | None = None) -> None:
    """Check that a latency table was measured for this model and on this machine.

    Args:
        table: The table.
        graph: The layers of the model.
        target: The model's target; if it is a runtime, the table must be of that runtime.

    Raises:
        InvalidArgument: The table is of another model, input size, machine or runtime. The message contains the command
            that measures the right one.

    Example:
        >>> from hub_mpq import HubMPQ
        >>> from hub_mpq.runtime import check_table
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> table = mpq.measure_latency("torch")
        >>> check_table(table, mpq.graph)
        >>> check_table(table, mpq.graph, target="onednn")
        Traceback (most recent call last):
        ...
        hub_mpq.errors.InvalidArgument: ...
    """
    table.check(graph)
    if target in runtimes and target != table.runtime:
        command = replace(table, runtime=str(target)).command(graph.model_id)
        raise InvalidArgument(
            f"expected a latency table of runtime {str(target)!r}, got one of {table.runtime!r}; run `{command}`"
        )
    if table.machine != (here := machine()):
        raise InvalidArgument(
            f"the latency table was measured on another machine ({table.machine}, this is {here}); "
            f"run `{table.command(graph.model_id)}`"
        )


@dataclass(frozen=True)
class MetLatency:
    """A policy whose measured latency is within the limit.

    Args:
        result: The search that found the policy.
        budget: The budget of that search, with the table as corrected by then.
        timing: Measured time of the whole model at the policy.
        predicted: The table's prediction, in seconds.
        searches: Number of searches.

    Example:
        >>> from hub_mpq import Budget, HubMPQ, LayerBits
        >>> from hub_mpq.runtime import Timing, meet_latency
        >>> from hub_mpq.search.policy_search import search_policy
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> scores = {layer.name: {LayerBits(8, 8): 0.0} for layer in mpq.graph.searched}
        >>> met = meet_latency(
        ...     lambda budget: search_policy(mpq.graph, scores, budget, base_bytes=0),
        ...     Budget(latency="1s", latency_table=mpq.measure_latency("torch")),
        ...     lambda policy: Timing(seconds=0.0049, spread=0.0001, counts=51),
        ... )
        >>> met.timing.seconds
        0.0049
    """

    result: SearchResult
    budget: Budget
    timing: Timing
    predicted: float
    searches: int

    def facts(self) -> dict[str, Any]:
        """Convert to JSON values.

        Returns:
            The limit, measured and predicted seconds, the spread, and what they were measured on.
        """
        table: LatencyTable = self.budget.latency_table  # type: ignore[assignment]
        return {
            "limit": self.budget.limits["latency"],
            "measured": self.timing.seconds,
            "spread": self.timing.spread,
            "predicted": self.predicted,
            "searches": self.searches,
            "runtime": table.runtime,
            "engine": table.engine,
            "machine": table.machine,
            "batch_size": table.batch_size,
            "threads": table.threads,
        }


def meet_latency(
    search: Callable[[Budget], SearchResult], budget: Budget, measure: Callable[[Policy], Timing]
) -> MetLatency:
    """Search until the policy's measured time is within the limit and agrees with the table.

    After each search, the table is multiplied by measured over predicted time, whether above or below one: if the
    layers' sum was too high, a policy that uses the remaining time is found. There are at most four searches.

    Args:
        search: Finds the policy of a budget.
        budget: A budget with `latency` and `latency_table`.
        measure: Times the whole model at a policy.

    Returns:
        The last policy whose time is within the limit, with a tolerance of the spread of its measurement, at most 3 %.

    Raises:
        InfeasibleBudget: No policy meets the budget according to the given table.
        HubMPQError: No measured policy is within the limit; the message reports the shortest measured time.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from hub_mpq import Budget, HubMPQ, LayerBits
        >>> from hub_mpq.runtime import meet_latency, policy_latency
        >>> from hub_mpq.search.policy_search import search_policy
        >>> mpq = HubMPQ.from_pretrained("test_resnet", pretrained=False, input_size=(3, 32, 32))
        >>> table = mpq.measure_latency("torch")
        >>> scores = {layer.name: {LayerBits(2, 2): 1.0, LayerBits(8, 8): 0.0} for layer in mpq.graph.searched}
        >>> met = meet_latency(
        ...     lambda budget: search_policy(mpq.graph, scores, budget, base_bytes=0),
        ...     Budget(latency="1s", latency_table=table),
        ...     partial(policy_latency, mpq.model, mpq.graph, table, torch.zeros(1, 3, 32, 32)),
        ... )
        >>> met.timing.seconds < 1
        True
    """
    cap = float(budget.limits["latency"])  # type: ignore[arg-type]
    met: MetLatency | None = None
    tried: list[Timing] = []
    for count in range(1, SEARCHES + 1):
        try:
            result = search(budget)
        except InfeasibleBudget:
            if not tried:
                raise
            break
        timing, predicted = measure(result.policy), result.usage["latency"]
        tried.append(timing)
        factor = timing.seconds / predicted
        table: LatencyTable = budget.latency_table  # type: ignore[assignment]
        corrected = Budget(**budget.given, **{**budget.tables, "latency_table": table.times(factor)})
        if timing.seconds - min(timing.spread, CLOSE * cap) <= cap:
            same = met is not None and met.result.policy == result.policy
            met = MetLatency(result, budget, timing, predicted, count)
            if same or abs(factor - 1) < CLOSE:
                break
        budget = corrected
    if met is None:
        least = min(tried, key=lambda timing: timing.seconds)
        raise HubMPQError(
            f"no policy found whose measured time meets latency {human_seconds(cap)}; the minimum measured is "
            f"{human_seconds(least.seconds)} ± {human_seconds(least.spread)} on runtime {_runtime(budget)!r}, over "
            f"{len(tried)} policies"
        )
    return replace(met, searches=len(tried))


def _runtime(budget: Budget) -> str:
    return budget.latency_table.runtime if budget.latency_table is not None else ""
