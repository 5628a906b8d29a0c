"""Exact reduction before any search: what no policy, or no best policy, can use goes away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .exact import ROUNDING
from .table import Floats, Problem

EXACT = 2.0**53
"""Whole numbers whose sums stay below this add up exactly in float64."""


class NoPolicy(Exception):
    """Proved: no policy meets the limits."""


@dataclass(frozen=True)
class Core:
    """What is left to decide: n rows of up to k choices under m limits.

    `score` (n, k), the least of each row is 0, +inf where there is no choice; `offset`: what is missing from the
    problem's score. `cost` (m, n, k), the least of each row is 0; `caps` (m,), what may be spent above those. `rows` (n,) and `columns` (n, k) lead back to the problem, `fixed` (rows of the
    problem,) holds the picks that are settled. Where `exact` is False, caps are rounded up a little and a policy
    found here must be checked with the table's own numbers.
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
        out = self.fixed.copy()
        out[self.rows] = self.columns[np.arange(len(self.rows)), choice]
        return out


def reduce(problem: Problem) -> Core:
    """Drop choices that no policy within the limits can take, then those dominated; NoPolicy when a row runs empty."""
    alive = np.isfinite(problem.score)
    cost = problem.cost
    most = np.where(alive, cost, 0.0).max(2, initial=0.0).sum(1)
    whole = (cost == np.rint(cost)).all((1, 2)) & (most < EXACT)
    caps = np.where(whole, np.floor(problem.caps), problem.caps * (1 + ROUNDING))

    alive = _reachable(cost, caps, alive)
    most = np.where(alive, cost, 0.0).max(2).sum(1)
    binding, before = np.flatnonzero(most > caps), -1
    while len(binding) != before:  # a limit nobody can pass any more is no reason to keep a choice
        alive &= ~_dominated(problem.score, cost[binding], alive)
        most = np.where(alive, cost, 0.0).max(2).sum(1)
        binding, before = binding[most[binding] > caps[binding]], len(binding)
    low = np.where(alive, cost, np.inf).min(2)
    counts = alive.sum(1)
    rows = np.flatnonzero(counts > 1)

    order = np.argsort(~alive, axis=1, kind="stable")  # choices that are left come first, in the order of the table
    columns = order[rows, : int(counts.max())]
    kept = np.take_along_axis(alive[rows], columns, 1)
    costs = np.take_along_axis(cost[np.ix_(binding, rows)], columns[None], 2) - low[np.ix_(binding, rows)][:, :, None]
    best = np.where(alive, problem.score, np.inf).min(1)
    return Core(
        score=np.where(kept, np.take_along_axis(problem.score[rows], columns, 1), np.inf) - best[rows, None],
        cost=np.where(kept, costs, 0.0),
        caps=(caps - low.sum(1))[binding],
        rows=rows,
        columns=columns,
        fixed=order[:, 0],
        offset=math.fsum(best),
        exact=bool(whole.all()),
    )


def _reachable(cost: Floats, caps: Floats, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Delete each choice that breaks a limit even when every other row takes its least cost, until none is left."""
    while True:
        if not alive.any(1).all():
            raise NoPolicy
        low = np.where(alive, cost, np.inf).min(2)
        spare = caps - low.sum(1)
        if (spare < 0).any():
            raise NoPolicy
        keep = alive & (cost - low[:, :, None] <= spare[:, None, None]).all(0)
        if keep.sum() == alive.sum():
            return keep
        alive = keep


def _dominated(score: Floats, cost: Floats, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
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
