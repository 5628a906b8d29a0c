"""GPTQ: the columns of a weight are rounded one by one, and later columns compensate for the errors of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvalidArgument
from .weight_grid import WeightGrid, codes

DAMPING = 0.01
"""Fraction of the mean of H's diagonal that is added to the diagonal."""
_BLOCK = 64  # columns that are rounded before the following ones are updated
_ROWS = 4096  # rows of all grids together that are processed at once: the errors of a block stay in the core's cache


class Factor:
    """The Cholesky factor of a layer's second moments, which rounds weights for any number of grids.

    With errors e = w − q of one row, the layer's mean squared output error is e H eᵀ = |e L|², where H = L Lᵀ with a
    lower triangular L. Column j of e L depends on e_j and the errors of the columns after it, so rounding from the last
    column to the first, each to the point nearest to w_j + Σ_{i>j} e_i L_ij / L_jj, is GPTQ (Frantar et al., ICLR 2023)
    without an inverse. Columns are taken in order of decreasing H_jj (the most important columns are rounded first,
    while all others can still compensate for them); grids refer to the original order, so no order has to be stored.

    Columns can compensate for an error only within their range. A row that ends with a larger error than that of its
    nearest points, including damping, takes these instead (our construction). A column that was never seen (H_jj = 0)
    does not depend on others and is rounded to the nearest point.

    Args:
        moments: H, the mean of x xᵀ over inputs x, [columns, columns], in any unit. It is not modified.
        damping: Added to the diagonal, relative to its mean; increased until H can be factored.

    Raises:
        InvalidArgument: H is not square, or contains NaN or infinite values.
    """

    def __init__(self, moments: Tensor, damping: float = DAMPING) -> None:
        if moments.dim() != 2 or moments.shape[0] != moments.shape[1]:
            raise InvalidArgument(f"second moments must be [columns, columns], got {list(moments.shape)}")
        diagonal = moments.diagonal().float()
        mean = float(diagonal.mean()) if len(diagonal) else 1.0
        if not (mean >= 0 and bool(torch.isfinite(moments).all())):
            raise InvalidArgument("the second moments of a layer's input contain NaN or infinite values")
        self.order = torch.argsort(diagonal, stable=True)  # the last is rounded first
        size = mean or 1.0
        while True:
            lower = _cholesky(moments, self.order, damping * size, size)
            if lower is not None:
                break
            damping *= 10
        self.damping = damping
        """The damping that was finally used."""
        self.pivots = lower.diagonal().square()
        # L_ij / L_jj, without the ones of the diagonal
        self.ratios = lower.div_(lower.diagonal().clone()).tril_(-1)

    @torch.no_grad()
    def round(self, weight: Tensor, grids: Sequence[WeightGrid]) -> list[Tensor]:
        """Round a weight to several grids.

        Args:
            weight: [rows, columns], any float dtype.
            grids: The grids.

        Returns:
            int8 [rows, columns] for each grid.
        """
        out = [torch.empty(weight.shape, dtype=torch.int8, device=weight.device) for _ in grids]
        rows = max(_ROWS // max(len(grids), 1), 1)
        for start in range(0, len(weight), rows):
            chosen = slice(start, start + rows)
            parts = [
                g._replace(scale=g.scale[chosen], zero_point=None if g.zero_point is None else g.zero_point[chosen])
                for g in grids
            ]
            for values, found in zip(out, self._round(weight[chosen], parts), strict=True):
                values[chosen] = found
        return out

    def _round(self, weight: Tensor, grids: Sequence[WeightGrid]) -> list[Tensor]:
        """`round` for a block of rows, stored as [columns, rows of all grids] so that a column is contiguous."""
        rows, columns = weight.shape
        order, device = self.order, weight.device
        w = weight.float().t()[order].repeat(1, len(grids))
        errors, plain = torch.zeros_like(w), torch.zeros_like(w)  # of the codes found, and of the nearest points
        chosen, nearest = (torch.empty(w.shape, dtype=torch.uint8, device=device) for _ in range(2))
        gain = w.new_zeros(w.shape[1])
        steps = [g.steps() for g in grids]
        most = torch.cat([torch.full((rows,), 2.0**g.bits - 1, device=device) for g in grids])
        index = [order // g.group_size if g.group_size else torch.zeros_like(order) for g in grids]
        for last in range(columns, 0, -_BLOCK):
            first = max(last - _BLOCK, 0)
            block = slice(first, last)
            step, offset = (
                torch.cat([x[side].t()[i[block]] for x, i in zip(steps, index, strict=True)], 1) for side in (0, 1)
            )
            code = torch.minimum(codes(w[block], step, offset), most)
            nearest[block] = code
            torch.sub(w[block], code.sub_(offset).mul_(step), out=plain[block])
            moved = torch.addmm(plain[block], self.ratios[first:, block].t(), plain[first:])
            left = torch.empty_like(moved)
            target = torch.addmm(w[block], self.ratios[last:, block].t(), errors[last:])
            for j in range(last - first - 1, -1, -1):
                column, after = target[j], slice(first + j + 1, last)
                if first + j + 1 < last:
                    column.addmv_(errors[after].t(), self.ratios[after, first + j])
                code = torch.minimum(codes(column, step[j], offset[j]), most)
                chosen[first + j] = code
                code.sub_(offset[j]).mul_(step[j])
                torch.sub(w[first + j], code, out=errors[first + j])
                torch.sub(column, code, out=left[j])
            gain += self.pivots[block] @ (moved.square_() - left.square_())
        chosen = torch.where(gain >= 0, chosen, nearest)
        back = torch.argsort(order)
        return [g.signed(c[back].t().float()) for g, c in zip(grids, chosen.split(rows, 1), strict=True)]


def _cholesky(moments: Tensor, order: Tensor, damping: float, size: float) -> Tensor | None:
    """Lower Cholesky factor, float32, of the reordered moments with `damping` on the diagonal; None if there is none.

    Moments have no negative eigenvalues, so no pivot is smaller than the damping. If one is in float32, it was lost to
    rounding, and float64 is tried.
    """
    for dtype in (torch.float32, torch.float64):
        # scaled to size 1, so that float32 holds it for any unit of the input
        h = moments[order][:, order].to(dtype).div_(size)
        h.diagonal().add_(damping / size)
        lower, failed = torch.linalg.cholesky_ex(h)
        del h
        exact = dtype == torch.float64 or float(lower.diagonal().min()) ** 2 > 0.9 * damping / size
        if not int(failed) and exact:
            return lower.float()
    return None
