"""A latency that is met: the policy of a search is timed as a whole, and the table of its layers corrected by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..core import Budget, LatencyTable, LayerGraph, Policy, SearchResult, human_seconds, runtimes
from ..errors import HubMPQError, InfeasibleBudget, InvalidArgument
from .machine import machine
from .timing import Timing

SEARCHES = 4
"""The first, and up to three with a corrected table."""
CLOSE = 0.03
"""A prediction that is off by less needs no correction, and a measured time is no further above the limit."""


def check_table(table: LatencyTable, graph: LayerGraph, target: str | None = None) -> None:
    """Refuse a table that says nothing about a model here.

    Args:
        table: The table.
        graph: The layers of the model.
        target: The runtime that policies are made for, where the model's target is one.

    Raises:
        InvalidArgument: It is of another model, input size, machine or runtime, with the command that makes the right
            one.
    """
    table.check(graph)
    if target in runtimes and target != table.runtime:
        command = replace(table, runtime=str(target)).command(graph.model_id)
        raise InvalidArgument(f"the latency table is of runtime {table.runtime!r}, not of {target!r}; `{command}`")
    if table.machine != (here := machine()):
        raise InvalidArgument(
            f"the latency table was measured on {table.machine}, and this is {here}; "
            f"`{table.command(graph.model_id)}` measures here"
        )


@dataclass(frozen=True)
class MetLatency:
    """A policy within a latency that was measured.

    Args:
        result: The search that found it.
        budget: That it was searched in, with the table as it was corrected until then.
        timing: Of the whole model at the policy.
        predicted: What the table of its search said, in seconds.
        searches: How many searches it took.
    """

    result: SearchResult
    budget: Budget
    timing: Timing
    predicted: float
    searches: int

    def facts(self) -> dict[str, Any]:
        """What is recorded, JSON values."""
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
    """Search until the policy's measured time is within the limit and the table predicts it.

    After each search the table is multiplied by measured over predicted, upwards and downwards: where the layers' sum
    was too high, a policy that uses the time left is found.

    Args:
        search: The policy of a budget.
        budget: With `latency` and a table.
        measure: Times the whole model at a policy.

    Returns:
        The last policy whose time is within the limit, up to the spread of its measurement and 3 % at most.

    Raises:
        InfeasibleBudget: No policy meets the budget by the table as it was given.
        HubMPQError: No measured policy is within the limit; it tells the least time that was measured.
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
            f"no policy was found whose measured time meets latency {human_seconds(cap)}: the least that was reached "
            f"is {human_seconds(least.seconds)} ± {human_seconds(least.spread)} on runtime {_runtime(budget)!r}, by "
            f"{len(tried)} policies"
        )
    return replace(met, searches=len(tried))


def _runtime(budget: Budget) -> str:
    return budget.latency_table.runtime if budget.latency_table is not None else ""
