"""BSQ: the bits of a weight as trainable parameters (Yang et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calibrate import weight_range
from .fake_quantize import straight

SMALL = 1e-8


class BitPlanes(nn.Module):
    """w = step · round(Σ_i (p_i − n_i)·2^i) with p and n in [0, 2] and plane 0 the least significant, as in the paper.

    `planes`: [2, n, weight shape …], p first. `step` = scale/(2^n − 1) is stored, so that dropping a plane leaves all
    values bit-identical. One plane above the initial n is kept for carries: n planes of [0, 2] reach 2·(2^n − 1).
    `low`, `high`: planes low … high−1 are active; the others are zero, and the grid is step·2^low. Dropped planes are
    kept in place, so that shapes, and with them checkpoints, stay the same (our construction). A weight of zeros has
    the range given by `weight_range`.
    """

    low: Tensor
    high: Tensor
    step: Tensor

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        self.register_buffer("step", weight_range(weight) / (2**count - 1))
        self.register_buffer("low", torch.zeros((), dtype=torch.int64, device=weight.device))
        self.register_buffer("high", torch.tensor(count, device=weight.device))
        self.planes = nn.Parameter(torch.zeros(2, count + 1, *weight.shape, dtype=torch.float32, device=weight.device))
        self._write(torch.round(weight.detach().float() / self.step))

    @property
    def span(self) -> tuple[int, int]:
        """(low, high) as Python integers."""
        return int(self.low), int(self.high)

    @property
    def bits(self) -> int:
        """The number of active planes plus one for the sign; 1 if there are none (a layer of zeros)."""
        return self.span[1] - self.span[0] + 1

    def _factors(self) -> Tensor:
        """2^i per plane, zero for dropped ones, shaped to broadcast against `planes[0]`."""
        index = torch.arange(self.planes.shape[1], device=self.planes.device)
        alive = (index >= self.low) & (index < self.high)
        return (torch.exp2(index.float()) * alive).view(-1, *[1] * (self.planes.dim() - 2))

    def values(self) -> Tensor:
        """Σ_i (p_i − n_i)·2^i, before rounding."""
        return ((self.planes[0] - self.planes[1]) * self._factors()).sum(0)

    def codes(self) -> Tensor:
        """Integers on the grid step·2^low, as floats with a straight-through gradient, in the range of the planes."""
        grid = torch.exp2(self.low.float())
        value = self.values()
        most = (2 ** self.planes.shape[1] - 1) >> int(self.low)
        return straight(value / grid, (value / grid).round().clamp(-most, most))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the planes represent; the argument only determines the dtype."""
        return (self.codes() * (self.step * torch.exp2(self.low.float()))).to(weight.dtype)

    def norms(self) -> Tensor:
        """sqrt(‖[p_i; n_i]‖² + 1e-8) per plane, [n + 1], zero for dropped ones: the terms of the group lasso."""
        index = torch.arange(self.planes.shape[1], device=self.planes.device)
        alive = (index >= self.low) & (index < self.high)
        return (self.planes.square().flatten(2).sum((0, 2)) + SMALL).sqrt() * alive

    @torch.no_grad()
    def clip(self) -> None:
        """Clamp p and n to [0, 2]."""
        self.planes.clamp_(0, 2)

    @torch.no_grad()
    def requantize(self) -> bool:
        """Replace the planes with the exact bits of the same integers, then drop empty planes at both ends.

        The weight stays bit-identical. Returns True if a plane was dropped, or added by a carry.
        """
        before = self.span
        integers = self.codes().detach().round() * 2 ** before[0]
        size = integers.abs().long()
        if not size.any():
            self.low.zero_()
            self.high.zero_()
        else:
            both = _or_all(size)
            self.low.fill_((both & -both).bit_length() - 1)
            self.high.fill_(both.bit_length())
        self._write(integers)
        return self.span != before

    @torch.no_grad()
    def _write(self, integers: Tensor) -> None:
        """Set the planes to the exact bits of integers."""
        size = integers.abs().long()
        for i in range(self.planes.shape[1]):
            bit = ((size >> i) & 1).to(self.planes)
            self.planes[0, i] = bit * (integers > 0)
            self.planes[1, i] = bit * (integers < 0)


def _or_all(size: Tensor) -> int:
    """Bitwise or of all elements."""
    out = 0
    for value in size.unique().tolist():
        out |= value
    return out
