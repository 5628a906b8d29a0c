"""Exact reduction before the search: choices that no feasible or no optimal policy can use are removed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .exact import ROUNDING
from .table import Floats, ParsedTable

EXACT = 2.0**53
"""Integers whose sums stay below this add up exactly in float64."""

MAX_WIDTH = 512
"""Choices of longer rows are compared with the best ones only, to avoid k² comparisons."""
MAX_ROUNDS = 100
"""Maximum number of passes that delete what no policy can reach; each may enable another."""

Mask = NDArray[np.bool_]


class NoPolicy(Exception):
    """No policy meets the limits (proved)."""


@dataclass(frozen=True)
class Core:
    """The remaining problem: n rows of up to k choices under m limits.

    `score` (n, k): in multiples of `unit`; the minimum of each row is 0, and +inf marks missing choices. `offset`: what
    is missing from the problem's score. `cost` (m, n, k): in units of the limit's greatest common divisor, or of a
    power of two if costs are not integers; the minimum of each row is 0. `caps` (m,): the available amounts. `rows`
    (n,) and `columns` (n, k): indices into the problem. `fixed` (rows of the problem,): the settled picks. If `exact`
    is False, costs are not integers: caps are rounded up slightly, and a policy must be checked with the table's own
    numbers.
    """

    score: Floats
    cost: Floats
    caps: Floats
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    fixed: NDArray[np.intp]
    offset: float
    exact: bool
    unit: float = 1.0

    def picks(self, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """The problem's picks for one choice (n,) of the core."""
        out: NDArray[np.intp] = self.fixed.copy()
        out[self.rows] = self.columns[np.arange(len(self.rows)), choice]
        return out


def reduce(problem: ParsedTable, deadline: float = math.inf) -> Core:
    """Drop choices that no feasible policy can take, then dominated ones; NoPolicy if a row becomes empty.

    Nothing is dropped after `deadline`, a time of `time.perf_counter`.
    """
    alive = np.isfinite(problem.score)
    cost, caps, sure, whole = _above_least(problem, alive)
    alive = _reachable(cost, caps, alive, deadline)
    most = np.where(alive, cost, 0.0).max(2).sum(1)
    binding, before = np.flatnonzero(most > sure), -1
    while len(binding) != before:  # a limit that can no longer be exceeded is no reason to keep a choice
        alive &= ~_dominated(problem.score, cost[binding], alive, deadline)
        most = np.where(alive, cost, 0.0).max(2).sum(1)
        binding, before = binding[most[binding] > sure[binding]], len(binding)

    counts = alive.sum(1)
    rows = np.flatnonzero(counts > 1)
    low = np.where(alive, cost, np.inf).min(2)
    best = np.where(alive, problem.score, np.inf).min(1)
    order = np.argsort(~alive, axis=1, kind="stable")  # choices that are left come first, in the order of the table
    columns = order[rows, : int(counts.max())]
    kept = np.take_along_axis(alive[rows], columns, 1)
    here = np.ix_(binding, rows)
    score = np.where(kept, np.take_along_axis(problem.score[rows], columns, 1) - best[rows, None], np.inf)
    cost = np.where(kept, np.take_along_axis(cost[here], columns[None], 2) - low[here][:, :, None], 0.0)
    units = np.where(whole[binding], 0, [-_power(values) for values in cost]).astype(int)
    power = _power(score[kept])
    return Core(
        score=np.ldexp(score, -power),
        cost=np.ldexp(cost, units[:, None, None]),
        caps=np.ldexp((caps - low.sum(1))[binding], units),
        rows=rows,
        columns=columns,
        fixed=order[:, 0],
        offset=math.fsum(best),
        exact=bool(whole[binding].all()),
        unit=math.ldexp(1.0, power),
    )


def _above_least(problem: ParsedTable, alive: Mask) -> tuple[Floats, Floats, Floats, Mask]:
    """Costs (m, n, k) above the minimum of their row, and the available amounts (m,), rounded up and rounded down.

    Integer costs are divided by their greatest common divisor, so that sums of BitOps beyond 2^53 stay exact; the last
    mask (m,) tells for which limits they do. For these both roundings are equal.
    """
    low = np.where(alive, problem.cost, np.inf).min(2)
    cost = np.where(alive, problem.cost - low[:, :, None], 0.0)
    up, down = problem.caps * (1 + ROUNDING) - low.sum(1), problem.caps * (1 - ROUNDING) - low.sum(1)
    whole = np.zeros(len(cost), dtype=bool)
    for i, cap in enumerate(problem.limits.values()):
        if not (problem.cost[i] == np.rint(problem.cost[i])).all() or problem.cost[i].max() >= EXACT:
            continue
        unit = int(np.gcd.reduce(cost[i].astype(np.int64), axis=None)) or 1
        whole[i] = cost[i].max(1).sum() / unit < EXACT
        if whole[i]:
            cost[i] /= unit
            spare = EXACT if cap == math.inf else (math.floor(cap) - sum(map(int, low[i].tolist()))) // unit
            up[i] = down[i] = float(min(max(spare, -1), EXACT))
    return cost, up, down, whole


def _power(values: Floats) -> int:
    """The exponent of the power of two just above the largest value, a unit in which tiny and huge values are safe."""
    return int(np.frexp(values.max(initial=0.0))[1])


def _reachable(cost: Floats, caps: Floats, alive: Mask, deadline: float) -> Mask:
    """Delete each choice that exceeds a limit even if every other row takes its minimum cost."""
    for _ in range(MAX_ROUNDS):
        low = np.where(alive, cost, np.inf).min(2)
        spare = caps - low.sum(1)
        if (spare < 0).any():
            raise NoPolicy
        keep: Mask = alive & (cost - low[:, :, None] <= spare[:, None, None]).all(0)
        if not keep.any(1).all():
            raise NoPolicy
        if keep.sum() == alive.sum() or time.perf_counter() > deadline:
            break
        alive = keep
    return alive


def _dominated(score: Floats, cost: Floats, alive: Mask, deadline: float) -> Mask:
    """Choices no better than another of the same row in score and every cost; the first of equal choices is kept."""
    n, k = score.shape
    if not len(cost):
        lone = np.where(alive, score, np.inf).argmin(1)
        out: Mask = np.arange(k) != lone[:, None]
        return out
    out = np.zeros((n, k), dtype=bool)
    if k > MAX_WIDTH:
        for i in range(n):
            if time.perf_counter() > deadline:
                break
            there = np.flatnonzero(alive[i])
            out[i, there] = _dominated_in_row(np.vstack([score[i, there], cost[:, i, there]]))
        return out
    first = np.triu(np.ones((k, k), dtype=bool), 1)  # first[a, b]: a stands before b
    step = max(1, 1_000_000 // (k * k))
    for i in range(0, n, step):
        if time.perf_counter() > deadline:
            break
        columns = [score[i : i + step], *cost[:, i : i + step]]
        better = alive[i : i + step, :, None] & alive[i : i + step, None, :]
        equal = better.copy()
        for values in columns:
            a, b = values[:, :, None], values[:, None, :]
            better &= a <= b
            equal &= a == b
        out[i : i + step] = (better & (~equal | first)).any(1)
    return out


def _dominated_in_row(values: Floats) -> NDArray[np.bool_]:
    """The same for one long row of scores and costs (1 + m, k): finds all under one limit, many under several.

    In the order of scores, a choice can only be dominated by an earlier one.
    """
    order = np.lexsort(values[::-1])
    ranked = values[1:, order]
    out = np.zeros(len(order), dtype=bool)
    if len(ranked) == 1:
        out[1:] = ranked[0, 1:] >= np.minimum.accumulate(ranked[0])[:-1]
    else:
        best = np.argsort(values.argsort(1).argsort(1).sum(0)[order], kind="stable")[:MAX_WIDTH]
        for j in map(int, best):
            out[j + 1 :] |= (ranked[:, j + 1 :] >= ranked[:, j, None]).all(0)
    back = np.empty_like(out)
    back[order] = out
    return back
