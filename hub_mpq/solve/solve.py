"""The solver: from a table to the provably best policy."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.checks import seconds
from ..errors import HubMPQError, InfeasibleBudget, InvalidArgument
from . import exact
from .incumbent import repair
from .lagrangian import Dual, solve_dual
from .meet_in_the_middle import Accept, Progress, search
from .reduce import Core, NoPolicy, reduce
from .scip import search_scip
from .solution import Solution
from .table import ParsedTable, parse

LARGE = 50_000
"""Number of costs above which a first policy is computed before the search, which may use up all the time."""


def solve_table(
    table: Mapping[str, Any], *, time_limit: float | None = None, start: Mapping[str, str] | None = None
) -> Solution:
    """Find the provably best choice for every layer under the limits.

    Sums of integer costs are exact; a sum of fractional costs may exceed its limit by a relative 1e-12, for rounding.
    Two policies whose scores differ by less than 1e-12 of the sum of the scores' magnitudes count as equally good. If
    integer costs, divided by their greatest common divisor, still add up beyond 2^53, the answer is checked exactly and
    is optimal up to 1e-12 of the limit.

    Args:
        table: {"sense": "min" | "max", "layers": {name: {choice: {"score": float, "cost": {limit: number}}}},
            "limits": {limit: number}, "ties": [[name, …], …]}. An omitted cost is 0, and an omitted choice is not
            available. Tied layers take the same choice, which all of them must have.
        time_limit: Seconds, after which the best policy so far is returned as "feasible", with a valid bound. Reading
            the table and computing a first policy are not interrupted: seconds for a table of 100,000 layers. None for
            no limit.
        start: A policy to start from, {layer: choice}; ignored if it violates a limit or a tie.

    Returns:
        The solution.

    Raises:
        InvalidArgument: The table or `start` is not valid; the error names the layer.
        InfeasibleBudget: No policy meets the limits; the error reports the minimum of each.
        HubMPQError: The time limit was reached before any policy was found.

    Example:
        >>> from hub_mpq import solve_table
        >>> layers = {
        ...     "conv": {"4": {"score": 3.0, "cost": {"bytes": 4}}, "8": {"score": 1.0, "cost": {"bytes": 8}}},
        ...     "fc": {"4": {"score": 2.0, "cost": {"bytes": 2}}, "8": {"score": 1.0, "cost": {"bytes": 4}}},
        ... }
        >>> solution = solve_table({"sense": "min", "layers": layers, "limits": {"bytes": 10}})
        >>> solution.choices, solution.objective, solution.usage
        ({'conv': '8', 'fc': '4'}, 3.0, {'bytes': 10})
    """
    begin = time.perf_counter()
    deadline = begin + seconds("time_limit", time_limit)
    problem = parse(table)
    try:
        picks, short = _decide(table, problem, _start(table, problem, start), deadline)
    except NoPolicy:
        least = exact.least(table, problem)
        raise InfeasibleBudget(problem.limits, least, exact.over(least, problem.limits)) from None
    if picks is None:
        spent = time.perf_counter() - begin
        raise HubMPQError(f"no policy was found or proved impossible in {spent:.2g} s; increase time_limit")

    policy = problem.policy(picks)
    choices = {name: policy[name] for name in table["layers"]}
    objective, used = exact.score(table, choices), exact.usage(table, choices, problem.limits)
    if exact.over(used, problem.limits):
        raise HubMPQError(f"the solver's policy exceeds {exact.over(used, problem.limits)}; please report this table")
    bound = objective + short if problem.maximise else objective - short
    gap = short / max(abs(objective), abs(bound)) if short else 0.0
    status = "feasible" if short else "optimal"
    return Solution(status, objective, bound, gap, time.perf_counter() - begin, choices, used)


def _decide(
    table: Mapping[str, Any], problem: ParsedTable, first: NDArray[np.intp] | None, deadline: float
) -> tuple[NDArray[np.intp] | None, float]:
    """The best picks when the search ends (None if there are none), and their maximum distance from the optimum."""
    core = reduce(problem, deadline)

    def accept(choice: NDArray[np.intp]) -> bool:
        used = exact.usage(table, problem.policy(core.picks(choice)), problem.limits)
        return not exact.over(used, problem.limits)

    if not len(core.rows):
        if not accept(core.rows):
            raise NoPolicy
        return core.fixed, 0.0
    dual = solve_dual(core, deadline)
    above = math.inf
    if first is None and core.cost.size > LARGE:
        choice = repair(core, dual, deadline)
        first = core.picks(choice) if choice is not None and accept(choice) else None
    if first is not None:
        started = float(problem.score[np.arange(len(first)), first].sum()) - core.offset
        above = max(started / core.unit - dual.bound, 0.0)
    found = search(core, dual, accept, deadline, above)
    if not found.done:
        _repair(core, dual, accept, found, deadline)
        found.done = found.above - found.proved <= dual.slop
    if not (found.done or found.out_of_time):
        search_scip(core, dual, accept, deadline - time.perf_counter(), found)
    picks = first if found.choice is None else core.picks(found.choice)
    return picks, 0.0 if found.done else (found.above - found.proved) * core.unit


def _repair(core: Core, dual: Dual, accept: Accept, found: Progress, deadline: float) -> None:
    choice = repair(core, dual, deadline) if math.isinf(found.above) else None
    if choice is not None and accept(choice):
        rows = np.arange(len(choice))
        slack = core.caps - core.cost[:, rows, choice].sum(1)
        found.take(choice, float(dual.reduced[rows, choice].sum() + dual.prices @ slack))


def _start(table: Mapping[str, Any], problem: ParsedTable, start: Mapping[str, str] | None) -> NDArray[np.intp] | None:
    """The picks of the policy to start from; None if it violates a tie or a limit."""
    if start is None:
        return None
    layers = table["layers"]
    if set(start) != set(layers):
        odd = sorted(set(start) ^ set(layers))
        raise InvalidArgument(f"start must name the same layers as the table; they differ in {odd}")
    for name, choice in start.items():
        if choice not in layers[name]:
            raise InvalidArgument(f"start: layer {name!r} has no choice {choice!r}")
    if any(len({start[name] for name in names}) > 1 for names in problem.names):
        return None
    if exact.over(exact.usage(table, start, problem.limits), problem.limits):
        return None
    rows = zip(problem.names, problem.choices, strict=True)
    return np.array([choices.index(start[names[0]]) for names, choices in rows])
