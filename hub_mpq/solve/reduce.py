"""Exact reduction before any search: what no policy, or no best policy, can use goes away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .exact import ROUNDING
from .table import Floats, ParsedTable

EXACT = 2.0**53
"""Whole numbers whose sums stay below this add up exactly in float64."""

Mask = NDArray[np.bool_]


class NoPolicy(Exception):
    """Proved: no policy meets the limits."""


@dataclass(frozen=True)
class Core:
    """What is left to decide: n rows of up to k choices under m limits.

    `score` (n, k), the least of each row is 0, +inf where there is no choice; `offset`: what is missing from the
    problem's score. `cost` (m, n, k), the least of each row is 0, in units of the limit's greatest common divisor;
    `caps` (m,), what may be spent of it. `rows` (n,) and `columns` (n, k) lead back to the problem, `fixed` (rows of
    the problem,) holds the picks that are settled. Where `exact` is False, costs are not whole: caps are rounded up
    a little, and a policy found here must be checked with the table's own numbers.
    """

    score: Floats
    cost: Floats
    caps: Floats
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]
    fixed: NDArray[np.intp]
    offset: float
    exact: bool

    def picks(self, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """The problem's picks for one choice (n,) of the core."""
        out: NDArray[np.intp] = self.fixed.copy()
        out[self.rows] = self.columns[np.arange(len(self.rows)), choice]
        return out


def reduce(problem: ParsedTable) -> Core:
    """Drop choices that no policy within the limits can take, then those dominated; NoPolicy when a row runs empty."""
    alive = np.isfinite(problem.score)
    cost, caps, sure, whole = _above_least(problem, alive)
    alive = _reachable(cost, caps, alive)
    most = np.where(alive, cost, 0.0).max(2).sum(1)
    binding, before = np.flatnonzero(most > sure), -1
    while len(binding) != before:  # a limit nobody can pass any more is no reason to keep a choice
        alive &= ~_dominated(problem.score, cost[binding], alive)
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
    return Core(
        score=np.where(kept, np.take_along_axis(problem.score[rows], columns, 1), np.inf) - best[rows, None],
        cost=np.where(kept, np.take_along_axis(cost[here], columns[None], 2) - low[here][:, :, None], 0.0),
        caps=(caps - low.sum(1))[binding],
        rows=rows,
        columns=columns,
        fixed=order[:, 0],
        offset=math.fsum(best),
        exact=bool(whole[binding].all()),
    )


def _above_least(problem: ParsedTable, alive: Mask) -> tuple[Floats, Floats, Floats, Mask]:
    """Costs (m, n, k) above the least of their row, and what may be spent on them (m,): rounded up, rounded down.

    Whole costs are divided by their greatest common divisor, so that sums of BitOps beyond 2^53 stay exact; the last
    mask (m,) says for which limits they do. There both roundings are the same.
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


def _reachable(cost: Floats, caps: Floats, alive: Mask) -> Mask:
    """Delete each choice that breaks a limit even when every other row takes its least cost, until none is left."""
    while True:
        if not alive.any(1).all():
            raise NoPolicy
        low = np.where(alive, cost, np.inf).min(2)
        spare = caps - low.sum(1)
        if (spare < 0).any():
            raise NoPolicy
        keep: Mask = alive & (cost - low[:, :, None] <= spare[:, None, None]).all(0)
        if keep.sum() == alive.sum():
            return keep
        alive = keep


def _dominated(score: Floats, cost: Floats, alive: Mask) -> Mask:
    """Choices no better than another of the same row in score and in every cost; of equals the first stays."""
    n, k = score.shape
    out = np.zeros((n, k), dtype=bool)
    first = np.triu(np.ones((k, k), dtype=bool), 1)  # first[a, b]: a stands before b
    step = max(1, 1_000_000 // (k * k))
    for i in range(0, n, step):
        columns = [score[i : i + step], *cost[:, i : i + step]]
        better = alive[i : i + step, :, None] & alive[i : i + step, None, :]
        equal = better.copy()
        for values in columns:
            a, b = values[:, :, None], values[:, None, :]
            better &= a <= b
            equal &= a == b
        out[i : i + step] = (better & (~equal | first)).any(1)
    return out
