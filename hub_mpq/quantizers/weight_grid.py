"""Grids of weights: a scale, and optionally a zero point, per output channel or group of weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.bits import check_width
from ..errors import InvalidArgument
from .lsq import NO_START

CLIP_RATIOS = tuple(1 - 0.04 * i for i in range(18))
"""Fractions of a range to keep, tried in this order. Our construction."""
_PIECE = 1 << 18  # elements processed at once: a search needs only a few buffers of this size


class WeightGrid(NamedTuple):
    """The grid of a 2-D weight [rows, columns]: weight ≈ (v − zero point)·scale.

    v is from −2^(b−1) to 2^(b−1)−1; at 1 bit it is −1 or +1.

    Args:
        bits: Bit-width, 1 to 8.
        scale: [rows, G], with G = 1 without groups.
        zero_point: Integers [rows, G] from −2^(b−1) to 2^(b−1)−1; None for 0 everywhere.
        group_size: Consecutive columns that share a scale; the last group may be smaller. None for all columns.
    """

    bits: int
    scale: Tensor
    zero_point: Tensor | None = None
    group_size: int | None = None

    def steps(self) -> tuple[Tensor, Tensor]:
        """(step, offset), float32 [rows, G]: weight = (code − offset)·step with codes from 0 to 2^b−1, see `codes`."""
        scale, half = self.scale.float(), 2.0 ** (self.bits - 1)
        if self.bits == 1:
            return scale * 2, torch.full_like(scale, 0.5)
        return scale, half + (torch.zeros_like(scale) if self.zero_point is None else self.zero_point.to(scale))

    def of_columns(self, x: Tensor, columns: int) -> Tensor:
        """[rows, G] as [rows, columns], or [rows, 1] without groups."""
        return x if self.group_size is None else x.repeat_interleave(self.group_size, 1)[:, :columns]

    @torch.no_grad()
    def nearest(self, weight: Tensor) -> Tensor:
        """The nearest integers v of a weight [rows, columns], as int8."""
        step, offset = (self.of_columns(x, weight.shape[1]) for x in self.steps())
        return self.signed(codes(weight.float(), step, offset).clamp_(max=2**self.bits - 1))

    def signed(self, code: Tensor) -> Tensor:
        """The integers v, int8, of float codes 0 to 2^b−1."""
        return (code * 2 - 1 if self.bits == 1 else code - 2 ** (self.bits - 1)).to(torch.int8)

    @torch.no_grad()
    def dequantize(self, values: Tensor) -> Tensor:
        """The float32 weight of integers v [rows, columns]."""
        scale = self.of_columns(self.scale.float(), values.shape[1])
        if self.zero_point is None:
            return values.float() * scale
        return (values.float() - self.of_columns(self.zero_point.float(), values.shape[1])) * scale


def codes(w: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """Codes, from 0, of the points nearest to w; the offset is added after rounding, so that ties are those of a
    quantizer."""
    whole = offset.floor()
    return torch.div(w, step).add_(offset - whole).round_().add_(whole).clamp_(min=0)


@torch.no_grad()
def weight_grid(
    weight: Tensor,
    bits: int,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the scales and zero points of a weight.

    Among the scales that keep a fraction of each range (`CLIP_RATIOS`), the one with the least Σ_j h_j (w_j − q_j)² is
    chosen; with h_j the mean square of the input of column j, that is the layer's output error up to correlations
    between inputs. Without h, it is the one with the least Σ_j (w_j − q_j)⁴ (our construction): squares would clip the
    few large weights that matter most, especially in decoders. At 1 bit the scale is the mean of |w|, weighted by h.

    Args:
        weight: [rows, columns]; rows are output channels.
        bits: Bit-width, 1 to 8.
        group_size: Consecutive columns that share a scale; the last group may be smaller. None for all columns.
        symmetric: False for a zero point beside each scale, so that the codes span min(w, 0) to max(w, 0); ignored for
            1-bit weights.
        importance: h, [columns], or [n, columns] for n equal parts of the rows (the experts of a stack), in any unit.

    Returns:
        (scale, zero point). Scales are positive, [rows, G]: float32 without groups; with groups float16, or bfloat16 if
        a scale is outside float16's normal range. Zero points are int32 [rows, G] from −2^(b−1) to 2^(b−1)−1, or None.
        If all weights of a group are zero, the scale is the smallest that can be stored (`NO_START` without groups).

    Raises:
        InvalidArgument: The weight is not 2-D, or `importance` has the wrong number of columns or parts.
    """
    check_width(bits)
    if weight.dim() != 2:
        raise InvalidArgument(f"weight must be [rows, columns], got shape {tuple(weight.shape)}")
    rows, columns = weight.shape
    size = min(group_size or columns, columns)
    groups = -(-columns // size)
    h = _importance(importance, weight)
    if groups * size > columns:
        h = torch.nn.functional.pad(h, (0, groups * size - columns))
    h = h.view(len(h), groups, size)
    h = torch.where(h.sum(2, keepdim=True) > 0, h, torch.ones_like(h))  # inputs that were never seen
    scale = torch.empty(rows, groups, device=weight.device)
    zeros = None if symmetric or bits == 1 else torch.empty_like(scale)
    power = 4 if importance is None else 2
    part = rows // len(h)
    step = max(min(_PIECE // max(columns, 1), part), 1)
    for first in range(0, rows, part):
        for start in range(first, first + part, step):
            chosen = slice(start, min(start + step, first + part))
            w = weight[chosen].float()
            if groups * size > columns:
                w = torch.nn.functional.pad(w, (0, groups * size - columns))
            found = _search(w.view(-1, groups, size), h[first // part], bits, zeros is not None, power)
            scale[chosen] = found[0].squeeze(2)
            if zeros is not None:
                zeros[chosen] = found[1].squeeze(2)
    if zeros is not None:
        zeros = zeros.sub_(2 ** (bits - 1)).to(torch.int32)
    return _stored(scale, group_size is not None), zeros


def _importance(importance: Tensor | None, weight: Tensor) -> Tensor:
    """h as float32 [parts, columns], scaled to a maximum of 1."""
    rows, columns = weight.shape
    if importance is None:
        return torch.ones(1, columns, device=weight.device)
    h = importance.detach().to(weight.device, torch.float32)
    h = h[None] if h.dim() == 1 else h
    if h.dim() != 2 or h.shape[1] != columns or rows % max(len(h), 1):
        raise InvalidArgument(
            f"importance must be [{columns}], or [parts, {columns}] for equal parts of {rows} rows, "
            f"got {list(importance.shape)}"
        )
    return h / h.max().clamp_min(torch.finfo(torch.float32).tiny)


def _search(w: Tensor, h: Tensor, bits: int, asymmetric: bool, power: int) -> tuple[Tensor, Tensor]:
    """(scale, zero point as a code), [rows, groups, 1], of w [rows, groups, size]; scale 0 if all of w is zero."""
    largest = w.abs().amax(2, keepdim=True)
    # dividing by a power of two is exact, and keeps squares of tiny values from underflowing
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    w = w / unit
    zero = torch.full_like(largest, 2.0 ** (bits - 1))
    if bits == 1:
        return torch.where(largest > 0, (w.abs() * h).sum(2, keepdim=True) / h.sum(1)[:, None] * unit, 0.0), zero
    most = 2**bits - 1
    if asymmetric:
        low, high = w.amin(2, keepdim=True).clamp_max(0), w.amax(2, keepdim=True).clamp_min(0)
        top = (high - low) / most
        zero = torch.where(largest > 0, (-low / top).round_(), zero)
    else:
        top = largest / unit / (2 ** (bits - 1) - 1)
    best, scale = torch.full_like(top, math.inf), top.clone()
    q = torch.empty_like(w)
    for ratio in CLIP_RATIOS:
        trial = top * ratio
        torch.div(w, trial, out=q).round_()
        if asymmetric:
            q.clamp_(min=-zero).clamp_(max=most - zero)
        else:
            q.clamp_(-(2.0 ** (bits - 1)), 2 ** (bits - 1) - 1)
        q.mul_(trial).sub_(w).square_()
        if power == 4:
            q.square_()
        error = q.mul_(h).sum(2, keepdim=True)
        scale = torch.where(error < best, trial, scale)
        best = torch.minimum(error, best)
    return torch.where(largest > 0, scale * unit, 0.0), zero


def _stored(scale: Tensor, grouped: bool) -> Tensor:
    """Scales in their storage type; 0 becomes the smallest positive value that represents it."""
    if not grouped:
        return torch.where(scale > 0, scale.clamp_min(torch.finfo(torch.float32).tiny), NO_START)
    half = torch.finfo(torch.float16)
    above = scale > 0
    fits = bool(((scale.half() >= half.tiny) & (scale.half() <= half.max) | ~above).all())
    dtype = torch.float16 if fits else torch.bfloat16
    return scale.to(dtype).clamp_min(torch.finfo(dtype).tiny)
