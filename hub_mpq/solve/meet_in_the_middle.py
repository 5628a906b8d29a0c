"""Exact search by meeting in the middle.

With prices p and bound L, a feasible policy scores exactly L + Σ reduced costs + p·slack. So every policy within a
window W of the bound is a pair of partial policies whose reduced costs sum to at most W and whose slacks lie in a
narrow box with sides W/p; such pairs are found by sorting. If there are none, no policy scores below L + W, so the
window is a proved bound and is widened. Once the best pair lies inside the window, it is the optimum. The split is that
of Horowitz and Sahni (1974), over the core of reduced costs of Balas and Zemel (1980).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .half_enumeration import Half, OutOfTime, TooMany, Work, list_halves
from .lagrangian import Dual
from .pair_join import Pairs
from .reduce import Core, NoPolicy
from .table import Floats

MAX_PAIRS = 100_000_000
"""With more pairs than this in one window, SCIP takes over."""
FEW_PAIRS = 1_000_000
"""Up to this many pairs are examined at any distance from the bound, which finds good policies early at no cost."""

Accept = Callable[[NDArray[np.intp]], bool]


@dataclass
class Progress:
    """The state of the search.

    `choice` (n,): the best policy so far, or None; its score is `above` over the bound. No policy's score is less than
    `proved` over the bound. `done`: the two have met. `out_of_time`: the time limit was reached.
    """

    above: float = math.inf
    choice: NDArray[np.intp] | None = None
    proved: float = 0.0
    done: bool = False
    out_of_time: bool = False

    def take(self, choice: NDArray[np.intp], above: float) -> None:
        """Keep a feasible policy if it is better."""
        if above < self.above:
            self.above, self.choice = above, choice


def search(core: Core, dual: Dual, accept: Accept, deadline: float, above: float = math.inf) -> Progress:
    """Widen the window until it holds the optimum or too many pairs; NoPolicy if the widest window holds no policy.

    `accept(choice)`: exact check of a policy, called only if the core is not exact. `above`: how far an already known
    policy is above the bound.
    """
    out, work = Progress(above), Work(deadline)
    steps = np.sort(dual.reduced[(dual.reduced > dual.slop) & np.isfinite(dual.reduced)])
    widest = float(np.where(np.isfinite(dual.reduced), dual.reduced, 0.0).max(1).sum()) + dual.slop
    window = float(steps[min(len(steps) - 1, 25)]) if len(steps) else widest
    try:
        while True:
            window = min(window, out.above + dual.slop, widest)
            last = window >= widest
            left, right = list_halves(core, dual, window + dual.slop, work)
            sizes = left.state.shape[1], right.state.shape[1]
            # pairs outside the window are not all listed, but those that are listed give good policies early
            reach = math.inf if last or sizes[0] * sizes[1] <= FEW_PAIRS else 1.5 * window
            _join(core, dual, left, right, accept, work, out, reach)
            out.proved = min(window, out.above)
            if out.above <= window or last:
                break
            # partial policies grow like exp(sqrt(window)): this step makes about four times as many
            window *= math.exp(2.5 / (math.log(sum(sizes)) + 1))
    except TooMany:
        return out
    except OutOfTime:
        out.out_of_time = True
        return out
    if math.isinf(out.above):
        raise NoPolicy
    out.done, out.proved = True, out.above
    return out


def _join(
    core: Core, dual: Dual, left: Half, right: Half, accept: Accept, work: Work, out: Progress, reach: float
) -> None:
    """Store in `out` the best feasible pair that is less than `reach` and `out.above` above the bound."""
    if left.state.shape[1] > right.state.shape[1]:
        left, right = right, left
    order_a, order_b = np.argsort(left.state[0]), np.argsort(right.state[0])
    a, b = left.state[:, order_a], right.state[:, order_b]
    spare = core.caps - core.cost[:, np.arange(len(dual.base)), dual.base].sum(1)

    def keep(total: Floats, ia: NDArray[np.intp], ib: NDArray[np.intp]) -> None:
        for j in [total.argmin()] if core.exact else np.argsort(total, kind="stable"):
            if total[j] >= out.above:
                return
            work.check()
            choice = dual.base.copy()
            left.recall(int(order_a[ia[j]]), choice)
            right.recall(int(order_b[ib[j]]), choice)
            if core.exact or accept(choice):
                return out.take(choice, float(total[j]))

    # an expensive partial policy of a only fits cheap ones of b: halve b repeatedly while walking along a
    start, count, seen = 0, b.shape[1], 0
    while start < a.shape[1] and count:
        limit = min(reach, out.above)
        end = a.shape[1] if count <= 64 else int(np.searchsorted(a[0], limit - b[0, count // 2], side="right"))
        if end > start:
            pairs = Pairs(a[:, start:end], b[:, :count], spare, dual.prices, limit)
            seen += pairs.count
            if seen > MAX_PAIRS:
                raise TooMany
            for ia, ib in pairs.chunks():
                work.check()
                limit = min(reach, out.above)
                total = a[0, start + ia] + b[0, ib]
                for price, have, ca, cb in zip(dual.prices, spare, a[1:], b[1:], strict=True):
                    slack = have - ca[start + ia] - cb[ib]
                    total += price * slack
                    fits = np.flatnonzero((slack >= 0) & (total <= limit))
                    total, ia, ib = total[fits], ia[fits], ib[fits]
                if len(total):
                    keep(total, start + ia, ib)
            start = end
        count //= 2
