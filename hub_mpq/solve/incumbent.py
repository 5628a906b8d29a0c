"""A first policy for when the exact search has not found one yet: repair, then improving exchanges."""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from .lagrangian import Dual
from .reduce import Core

MAX_WORK = 50_000_000
"""Maximum number of exchange costs examined in all steps together; a large table then keeps its current policy."""
MIN_STEPS = 50
"""Steps that a large table takes even after the deadline."""


def repair(core: Core, dual: Dual, deadline: float = math.inf) -> NDArray[np.intp] | None:
    """A feasible policy (n,) near the dual's base policy, or None if none is found.

    Each step makes the exchanges that cost the least score per unit of removed violation, with violations relative to
    their cap: as many as remove half of it together, at least one. Exchanges that lower the score follow, the largest
    first, as many as fit together, until there are none.

    After `deadline`, a time of `time.perf_counter`, and after `MIN_STEPS`, a policy that meets the limits is not
    improved any further.
    """
    rows = np.arange(len(dual.base))
    choice = dual.base.copy()
    scale = np.where(core.caps > 0, core.caps, 1.0)[:, None, None]
    cost, caps = core.cost / scale, (core.caps / scale[:, 0, 0])[:, None, None]
    there = np.isfinite(core.score)
    for step in range(min(core.score.size, max(MAX_WORK // cost.size, MIN_STEPS))):
        gain = core.score - core.score[rows, choice][:, None]
        change = cost - cost[:, rows, choice][:, :, None]
        used = cost[:, rows, choice].sum(1)[:, None, None]
        violation = np.maximum(used + change - caps, 0.0).sum(0)
        now = float(np.maximum(used - caps, 0.0).sum())
        if now <= 0:
            price = np.where((violation <= 0) & there, gain, 0.0)
            picks = price.argmin(1)
            order = np.argsort(price[rows, picks], kind="stable")
            order = order[price[order, picks[order]] < 0]
            if not len(order) or (step > MIN_STEPS and time.perf_counter() > deadline):
                break
            more = np.maximum(change[:, order, picks[order]], 0.0).cumsum(1)
            count = int((more <= (caps - used)[:, 0]).all(0).sum())
        else:
            removed = now - violation
            with np.errstate(divide="ignore", invalid="ignore"):
                price = np.where((removed > 1e-15) & there, np.maximum(gain, 0.0) / removed, np.inf)
            # among free exchanges the one that removes the most
            price = np.where(price <= 0, -removed, price)
            picks = price.argmin(1)
            order = np.argsort(price[rows, picks], kind="stable")
            order = order[np.isfinite(price[order, picks[order]])]
            if not len(order):
                return None
            count = int(np.searchsorted(removed[order, picks[order]].cumsum(), now / 2, side="right"))
        taken = order[: max(count, 1)]
        choice[taken] = picks[taken]
    return choice if (core.cost[:, rows, choice].sum(1) <= core.caps).all() else None
