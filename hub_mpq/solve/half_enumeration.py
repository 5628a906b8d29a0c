"""Enumeration of the partial policies of half of the rows whose reduced costs stay within a window."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .lagrangian import Dual
from .reduce import Core
from .table import Floats

MAX_STATES = 3_000_000
"""With more partial policies than this in one half, SCIP takes over."""
MAX_WORK = 50_000_000
"""With more partial policies than this in all windows together (a sorted one counts as ten), SCIP takes over."""


@dataclass
class Work:
    """The work done so far, and its limits.

    `deadline` is a time of `time.perf_counter`; `done` counts the partial policies written. The count, not the clock,
    decides when SCIP takes over, so that a slow machine gives the same answer.
    """

    deadline: float
    done: int = 0

    def add(self, amount: int) -> None:
        self.check(amount)
        self.done += amount

    def check(self, amount: int = 0) -> None:
        """Raise TooMany if `amount` more would exceed the limit, OutOfTime after the deadline."""
        if self.done + amount > MAX_WORK:
            raise TooMany
        if time.perf_counter() > self.deadline:
            raise OutOfTime


class TooMany(Exception):
    """The window holds too many partial policies to list."""


class OutOfTime(Exception):
    """The time limit was reached."""


@dataclass
class _Step:
    """How one row was added.

    `row` and `choices` of the core; `before`: number of columns before it; `origins`: per choice, the column that each
    new one was derived from; `kept`: which of all these columns were kept (None: all).
    """

    row: int
    choices: NDArray[np.intp]
    before: int
    origins: list[NDArray[np.intp]]
    kept: NDArray[np.intp] | None = None


@dataclass
class Half:
    """Partial policies as columns of `state` (1 + m, N): sum of reduced costs, then costs above the base policy's."""

    state: Floats
    trail: list[_Step] = field(default_factory=list)
    merge_at: int = 512  # columns

    @classmethod
    def empty(cls, m: int) -> Half:
        return cls(np.zeros((1 + m, 1)))

    def add(self, row: int, choices: NDArray[np.intp], steps: Floats, window: float, work: Work) -> None:
        """Let `row` also take each of `choices` (q,); each changes the state by a column of `steps` (1 + m, q)."""
        before = self.state
        blocks, origins, size = [before], [], before.shape[1]
        for step in steps.T:
            origins.append(np.flatnonzero(before[0] <= window - step[0]))
            size += len(origins[-1])
            work.check(size)
            blocks.append(np.take(before, origins[-1], axis=1) + step[:, None])
        self.state = np.concatenate(blocks, axis=1)
        self.trail.append(_Step(row, choices, before.shape[1], origins))
        work.add(self.state.shape[1])
        if self.state.shape[1] > self.merge_at:
            work.add(10 * self.state.shape[1])
            self._merge()
        if self.state.shape[1] > MAX_STATES:
            raise TooMany

    def _merge(self) -> None:
        """Keep the best of partial policies with equal costs; layers of equal shape make many of them."""
        size = self.state.shape[1]
        weights = np.random.default_rng(0).random(len(self.state) - 1)
        order = np.lexsort((self.state[0], weights @ self.state[1:]))
        state = self.state[:, order]
        fresh = np.ones(size, dtype=bool)
        fresh[1:] = (state[1:, 1:] != state[1:, :-1]).any(0)
        kept = int(fresh.sum())
        if kept < 0.8 * size:
            self.state, self.trail[-1].kept, self.merge_at = state[:, fresh], order[fresh], 2 * kept
        else:
            self.merge_at = 16 * size

    def recall(self, column: int, choice: NDArray[np.intp]) -> None:
        """Write the choices of one partial policy into `choice` (n,)."""
        for step in reversed(self.trail):
            if step.kept is not None:
                column = int(step.kept[column])
            if column < step.before:
                continue  # the row keeps its base choice
            column -= step.before
            for pick, origin in zip(step.choices, step.origins, strict=True):
                if column < len(origin):
                    choice[step.row], column = pick, int(origin[column])
                    break
                column -= len(origin)


def list_halves(core: Core, dual: Dual, window: float, work: Work) -> tuple[Half, Half]:
    """Split the rows that can leave their base choice within `window` into two halves, and enumerate both.

    Rows with expensive alternatives come first, since they add few partial policies; each is added to the smaller half.
    """
    m, n = len(core.caps), len(core.score)
    near = dual.reduced <= window
    near[np.arange(n), dual.base] = False
    rows = np.flatnonzero(near.any(1))
    rows = rows[np.argsort(-np.where(near[rows], dual.reduced[rows], np.inf).min(1), kind="stable")]
    left, right = Half.empty(m), Half.empty(m)
    for row in map(int, rows):
        choices = np.flatnonzero(near[row])
        costs = core.cost[:, row, choices] - core.cost[:, row, dual.base[row], None]
        half = left if left.state.shape[1] <= right.state.shape[1] else right
        half.add(row, choices, np.vstack([dual.reduced[row, choices], costs]), window, work)
    return left, right
