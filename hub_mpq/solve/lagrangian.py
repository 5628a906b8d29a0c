"""The Lagrangian bound: limits moved into the objective with prices.

L(p) = Σ_rows min_choice (score + p·cost) − p·caps is a lower bound of every feasible policy for any prices p ≥ 0
(Geoffrion 1974; for multiple-choice knapsacks its maximum is the LP bound, Sinha and Zoltners 1979). It is concave
but not smooth, so the minimum of each row is replaced by a soft minimum at a falling temperature, which Newton's method
maximises in a few steps each. The bound is then computed with the true minimum, so it is valid for whatever prices
result.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .reduce import Core, NoPolicy
from .table import Floats

_COOLING, _STAGES, _NEWTON = 0.25, 11, 20
MIN_WORK = 20_000_000
"""Costs read before a time limit takes effect: a useful bound is worth a second."""


@dataclass(frozen=True)
class Dual:
    """Prices of the limits, and the bound that they give.

    `prices` (m,): score per unit of cost. `bound`: lower bound on the score of any policy of the core. `base` (n,): the
    best choice of each row at these prices. `reduced` (n, k): the minimum that another choice adds, 0 at `base`.
    `slop`: rounding error that sums of these may have.
    """

    prices: Floats
    bound: float
    base: NDArray[np.intp]
    reduced: Floats
    slop: float


def solve_dual(core: Core, deadline: float = math.inf) -> Dual:
    """Nearly optimal prices; NoPolicy if the bound exceeds the worst possible score.

    After `deadline`, a time of `time.perf_counter`, and after `MIN_WORK`, the best prices so far are used.
    """
    scale = np.where(core.caps > 0, core.caps, 1.0)
    cost = core.cost / scale[:, None, None]
    caps = core.caps / scale
    prices = _maximise(core.score, cost, caps, deadline)

    value = core.score + np.tensordot(prices, cost, 1)
    base = value.argmin(1)
    low = value[np.arange(len(base)), base]
    worst = np.where(np.isfinite(core.score), core.score, -np.inf).max(1)
    bound = float(low.sum() - prices @ caps)
    size = float(np.abs(low).sum() + prices @ caps)
    if bound > worst.sum() + 1e-9 * (size + np.abs(worst).sum()):
        raise NoPolicy
    return Dual(prices / scale, bound, base, value - low[:, None], 1e-13 * size)


def _maximise(score: Floats, cost: Floats, caps: Floats, deadline: float) -> Floats:
    """Prices (m,) that maximise the bound, for costs in units of their cap."""
    finite = np.isfinite(score)
    spans = np.where(finite, score, -np.inf).max(1) - score.min(1)
    heat = 0.3 * float(np.median(spans[spans > 0])) if (spans > 0).any() else 1.0
    unit = float(spans.sum()) or 1.0
    ceiling = float(np.where(finite, score, -np.inf).max(1).sum())
    prices = np.zeros(len(caps))
    work = 0

    def late() -> bool:
        nonlocal work
        work += score.size * (len(caps) + 1)
        return work > MIN_WORK and time.perf_counter() > deadline

    best, found = -np.inf, prices
    for _ in range(_STAGES):
        value, slope, curve, bound = _soft(score, cost, caps, prices, heat)
        for _ in range(_NEWTON):
            if bound > best:
                best, found = bound, prices
            if late():
                return found
            step = _newton(slope, curve, prices, unit)
            if slope @ step < 1e-3 * heat or best > ceiling + abs(ceiling) + unit:
                break
            length = 1.0
            while length > 1e-6 and not late():
                trial = np.maximum(prices + length * step, 0.0)
                after = _soft(score, cost, caps, trial, heat)
                if after[0] >= value + 1e-4 * float(slope @ (trial - prices)):
                    break
                length *= 0.4
            else:
                break
            prices, (value, slope, curve, bound) = trial, after
        heat *= _COOLING
    return found


def _soft(
    score: Floats, cost: Floats, caps: Floats, prices: Floats, heat: float
) -> tuple[float, Floats, Floats, float]:
    """Softened bound, its gradient (m,) and negated Hessian (m, m), and the true bound."""
    value = score + np.tensordot(prices, cost, 1)
    low = value.min(1)
    weight = np.exp((low[:, None] - value) / heat)
    total = weight.sum(1)
    weight /= total[:, None]
    weighted = cost * weight
    mean = weighted.sum(2)
    m = len(caps)
    curve = weighted.reshape(m, -1) @ cost.reshape(m, -1).T - mean @ mean.T
    spent = float(prices @ caps)
    soft = float(low.sum() - heat * np.log(total).sum()) - spent
    return soft, mean.sum(1) - caps, curve / heat, float(low.sum()) - spent


def _newton(slope: Floats, curve: Floats, prices: Floats, unit: float) -> Floats:
    """Ascent step in the prices that can change: positive ones, and those with a positive slope."""
    step = np.zeros_like(prices)
    free = np.flatnonzero((prices > 0) | (slope > 0))
    if len(free):
        matrix = curve[np.ix_(free, free)]
        # where the soft minimum is flat (no policy meets the limits at all) a step grows the prices a thousandfold
        ridge = 1e-12 * np.trace(matrix) + 1e-3 * np.abs(slope).max() / (prices.max() + unit) + 1e-300
        step[free] = np.linalg.solve(matrix + ridge * np.eye(len(free)), slope[free])
    return step
