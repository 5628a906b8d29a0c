"""A first policy when the exact search has not found one yet: repair, then exchanges in one row at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .lagrangian import Dual
from .reduce import Core
from .table import Floats


def repair(core: Core, dual: Dual) -> NDArray[np.intp] | None:
    """A feasible policy (n,) near the dual's base policy, or None when none is met on the way.

    Each step takes the exchange that costs the least score per unit of violation it removes, violations counted in
    parts of their cap; then exchanges that fit and lower the score, the largest first, until none is left.
    """
    rows = np.arange(len(dual.base))
    choice = dual.base.copy()
    scale = np.where(core.caps > 0, core.caps, 1.0)[:, None, None]
    cost, caps = core.cost / scale, (core.caps / scale[:, 0, 0])[:, None, None]
    there = np.isfinite(core.score)
    for _ in range(core.score.size):
        gain = core.score - core.score[rows, choice][:, None]
        used = cost[:, rows, choice].sum(1)[:, None, None]
        after = used + cost - cost[:, rows, choice][:, :, None]
        violation = np.maximum(after - caps, 0.0).sum(0)
        now = float(np.maximum(used - caps, 0.0).sum())
        if now <= 0:
            better = np.where((violation <= 0) & there, gain, 0.0)
            if better.min() >= 0:
                break
            row, pick = _where(better)
        else:
            removed = now - violation
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where((removed > 1e-15) & there, np.maximum(gain, 0.0) / removed, np.inf)
            # among free exchanges the one that removes the most
            price = np.where(price <= 0, -removed, price)
            if np.isinf(price.min()):
                return None
            row, pick = _where(price)
        choice[row] = pick
    return choice if (core.cost[:, rows, choice].sum(1) <= core.caps).all() else None


def _where(values: Floats) -> tuple[int, int]:
    row, pick = np.unravel_index(values.argmin(), values.shape)
    return int(row), int(pick)
