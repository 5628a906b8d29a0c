"""BSQ: the bits of a weight as parameters of their own (Yang et al., ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calibrate import weight_range
from .fake_quantize import straight

SMALL = 1e-8


class BitPlanes(nn.Module):
    """w = step · round(Σ_i (p_i − n_i)·2^i), p and n in [0, 2]; i counts from the least plane [sure].

    `planes`: [2, n, *weight shape], p first; plane 0 is the least. `step` = scale/(2^n − 1) is what is stored, so that
    dropping a plane changes no value, not even its last bit. One plane above the n that start is kept for carries:
    n planes of [0, 2] reach 2·(2^n − 1). `low`, `high`: planes low … high−1 are alive; those below are zero and
    the grid is step·2^low; those above are zero. Dropped planes keep their place, so that shapes, and with them
    checkpoints, stay [ours]. A weight of zeros has the range that `weight_range` says.
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
        """(low, high) as numbers."""
        return int(self.low), int(self.high)

    @property
    def bits(self) -> int:
        """Alive planes and the sign; 1 when every plane is gone (a layer of zeros)."""
        return self.span[1] - self.span[0] + 1

    def _factors(self) -> Tensor:
        """2^i of the planes, zero for dropped ones, shaped to multiply `planes[0]`."""
        index = torch.arange(self.planes.shape[1], device=self.planes.device)
        alive = (index >= self.low) & (index < self.high)
        return (torch.exp2(index.float()) * alive).view(-1, *[1] * (self.planes.dim() - 2))

    def values(self) -> Tensor:
        """Σ_i (p_i − n_i)·2^i, before rounding."""
        return ((self.planes[0] - self.planes[1]) * self._factors()).sum(0)

    def codes(self) -> Tensor:
        """Integers on the grid step·2^low, as floats, straight-through gradient; within the planes there are."""
        grid = torch.exp2(self.low.float())
        value = self.values()
        most = (2 ** self.planes.shape[1] - 1) >> int(self.low)
        return straight(value / grid, (value / grid).round().clamp(-most, most))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the planes hold; the layer's own `weight` only gives the dtype."""
        return (self.codes() * (self.step * torch.exp2(self.low.float()))).to(weight.dtype)

    def norms(self) -> Tensor:
        """sqrt(‖[p_i; n_i]‖² + 1e-8) of every plane, [n + 1], dropped ones zero (the group lasso's terms)."""
        index = torch.arange(self.planes.shape[1], device=self.planes.device)
        alive = (index >= self.low) & (index < self.high)
        return (self.planes.square().flatten(2).sum((0, 2)) + SMALL).sqrt() * alive

    @torch.no_grad()
    def clip(self) -> None:
        """Keep p and n in [0, 2]."""
        self.planes.clamp_(0, 2)

    @torch.no_grad()
    def requantize(self) -> bool:
        """Planes become exact zeros and ones of the same integers; then empty planes at both ends are dropped.

        The function stays the same to the last bit. True when a plane was dropped or a carry opened one.
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
        """Exact bit planes of integers."""
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
