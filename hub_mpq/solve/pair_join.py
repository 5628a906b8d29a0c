"""Pairs of partial policies whose slack can lie in a narrow box, found by sorting instead of trying all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .table import Floats

_CHUNK = 1_000_000
_EDGE = 1e-9  # of a range: more than the rounding of a sort key, which is below 1e-10 with 1e5 cells


class Pairs:
    """Pairs of columns of `a` (1 + m, N) and `b` (1 + m, M) whose slacks may fit; a superset of those that do.

    A pair fits if each slack = spare − cost_a − cost_b is at least 0 and reduced costs + prices·slacks is at most
    `limit`. The two limits with the narrowest box decide: b is sorted by its cell of box width along the first and by
    its cost along the second, so that each column of a needs two lookups. `count`: number of pairs.
    """

    def __init__(self, a: Floats, b: Floats, spare: Floats, prices: Floats, limit: float) -> None:
        need = spare[:, None] - a[1:]
        low = b[1:].min(1)
        spread = np.ptp(b[1:], axis=1)
        spread = np.where(spread > 0, spread, 1.0)
        room = limit - a[0] - b[0].min()  # for prices·slacks, per column of a
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            box = np.nan_to_num(room.max() / prices, nan=np.inf)
            *cell, last = np.argsort(box / spread)[:2][::-1] if len(prices) > 1 else (0,)
            reach = np.nan_to_num(room / prices[last], nan=np.inf) / spread[last]
        top = (need[last] - low[last]) / spread[last]
        below = np.clip(top - reach, -1.0, 2.0)
        top = np.clip(top, -1.0, 2.0)
        key, looks = (b[1 + last] - low[last]) / spread[last], [np.zeros(a.shape[1])]
        for i in cell:
            if box[i] < spread[i]:
                width = max(box[i] * (1 + _EDGE), spread[i] * 1e-5)
                key = key + 4 * np.floor((b[1 + i] - low[i]) / width)
                here = np.clip(np.floor((need[i] - low[i]) / width), -2, np.floor(spread[i] / width) + 2)
                looks = [here, here - 1]
        self.order = np.argsort(key)
        key = key[self.order]
        self.first = [np.searchsorted(key, 4 * cell + below - _EDGE) for cell in looks]
        lasts = [np.searchsorted(key, 4 * cell + top + _EDGE, side="right") for cell in looks]
        self.sizes = [np.maximum(e - s, 0) for s, e in zip(self.first, lasts, strict=True)]
        self.count = int(sum(size.sum() for size in self.sizes))

    def chunks(self) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """Indices into a and b, about a million pairs at a time."""
        for first, size in zip(self.first, self.sizes, strict=True):
            ends = np.cumsum(size)
            start = 0
            while start < len(size):
                done = int(ends[start - 1]) if start else 0
                stop = max(start + 1, int(np.searchsorted(ends, done + _CHUNK, side="right")))
                part = size[start:stop]
                within = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)
                ia = np.repeat(np.arange(start, stop), part)
                yield ia, self.order[np.repeat(first[start:stop], part) + within]
                start = stop
