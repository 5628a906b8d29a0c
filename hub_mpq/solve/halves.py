"""All part-policies of half of the rows whose reduced costs stay within a window."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .lagrangian import Dual
from .reduce import Core
from .table import Floats

MAX_STATES = 2_000_000
"""More part-policies than this in one half, and the core goes to SCIP."""


class TooMany(Exception):
    """The window holds more part-policies than are worth listing."""


class OutOfTime(Exception):
    """The time limit struck."""


def check_time(deadline: float) -> None:
    if time.perf_counter() > deadline:
        raise OutOfTime


@dataclass
class Half:
    """Part-policies as columns of `state` (1 + m, N): sum of reduced costs, then costs above the base policy's.

    `trail`: per row added, its index in the core, the choices it offered, and where each block of columns came from.
    """

    state: Floats
    trail: list[tuple[int, NDArray[np.intp], list[NDArray[np.intp]]]] = field(default_factory=list)

    @classmethod
    def empty(cls, m: int) -> Half:
        return cls(np.zeros((1 + m, 1)))

    def add(self, row: int, choices: NDArray[np.intp], steps: Floats, window: float) -> None:
        """Let `row` also take each of `choices` (q,), which changes the state by `steps` (1 + m, q)."""
        blocks, origins = [self.state], []
        for step in steps.T:
            origins.append(np.flatnonzero(self.state[0] <= window - step[0]))
            blocks.append(np.take(self.state, origins[-1], axis=1) + step[:, None])
        if sum(block.shape[1] for block in blocks) > MAX_STATES:
            raise TooMany
        self.state = np.concatenate(blocks, axis=1)
        self.trail.append((row, choices, origins))

    def recall(self, column: int, choice: NDArray[np.intp]) -> None:
        """Write the choices of one part-policy into `choice` (n,)."""
        size = self.state.shape[1]
        for row, choices, origins in reversed(self.trail):
            size -= sum(map(len, origins))
            if column < size:
                continue  # the row keeps its base choice
            column -= size
            for pick, origin in zip(choices, origins, strict=True):
                if column < len(origin):
                    choice[row], column = pick, int(origin[column])
                    break
                column -= len(origin)


def list_halves(core: Core, dual: Dual, window: float, deadline: float) -> tuple[Half, Half]:
    """Split the rows that can leave their base choice within `window` in two, and list both halves.

    Rows whose alternatives are dear come first (they add few part-policies), always to the smaller half.
    """
    m, n = len(core.caps), len(core.score)
    near = dual.reduced <= window
    near[np.arange(n), dual.base] = False
    rows = np.flatnonzero(near.any(1))
    rows = rows[np.argsort(-np.where(near[rows], dual.reduced[rows], np.inf).min(1), kind="stable")]
    left, right = Half.empty(m), Half.empty(m)
    for row in map(int, rows):
        check_time(deadline)
        choices = np.flatnonzero(near[row])
        costs = core.cost[:, row, choices] - core.cost[:, row, dual.base[row], None]
        half = left if left.state.shape[1] <= right.state.shape[1] else right
        half.add(row, choices, np.vstack([dual.reduced[row, choices], costs]), window)
    return left, right
