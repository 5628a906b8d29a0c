"""DQ: learned step and dynamic range, which determine the bit-width (Uhlich et al., ICLR 2020)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from .fake_quantize import straight

PARAMETRIZATIONS = ("step-range", "bits-step", "bits-range")
GRIDS = ("uniform", "power-of-two")
_SLACK = 1e-4  # a range of exactly 2^b − 1 steps must not round up to b + 1 bits
OCTAVES = 63  # of qmax over qmin: all of a signed bit-width of 7; smaller codes are negligible beside the others


class _Uniform(torch.autograd.Function):
    """sign(x)·{ d·floor(|x|/d + ½) if |x| ≤ qmax; qmax otherwise }; unsigned: 0 below 0. As in the paper.

    Inside the range ∂d = (Q − x)/d and ∂qmax = 0; outside ∂d = 0 and ∂qmax = sign(x). No element has both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, top: Tensor, signed: bool) -> Tensor:
        inside = (x.abs() <= top) if signed else (x >= 0) & (x <= top)
        clipped = top * x.sign() if signed else top * (x > 0)
        q = torch.where(inside, step * (x.abs() / step + 0.5).floor() * x.sign(), clipped)
        ctx.save_for_backward(x, q, step, inside)
        ctx.signed = signed
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        x, q, step, inside = ctx.saved_tensors
        kept = g * inside
        dstep = (kept * (q - x)).sum() / step
        side = x.sign() if ctx.signed else (x > 0).to(x)
        return kept, dstep, ((g - kept) * side).sum(), None


class _PowerOfTwo(torch.autograd.Function):
    """sign(x)·{ qmin if |x| ≤ qmin; 2^round(log2|x|) between; qmax above }, 0 at 0, as in the paper.

    ∂qmin and ∂qmax are sign(x) on their own elements, and ∂x = 1 between. Unsigned: 0 below 0 (our construction).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, least: Tensor, top: Tensor, signed: bool) -> Tensor:
        size = x.abs()
        middle = torch.exp2(torch.log2(size.clamp_min(1e-38)).round()).clamp(least, top)
        q = torch.where(size <= least, least, torch.where(size > top, top, middle)) * x.sign()
        ctx.save_for_backward(x, least, top)
        ctx.signed = signed
        return q if signed else q * (x > 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, least, top = ctx.saved_tensors
        g = grads[0] if ctx.signed else grads[0] * (x > 0)
        size, side = x.abs(), x.sign()
        low, high = size <= least, size > top
        return g * ~(low | high), (g * side * low).sum(), (g * side * high).sum(), None


def span(bits: Tensor | float, signed: bool, grid: str) -> Any:
    """qmax over the step (uniform) or over qmin (power-of-two) at a bit-width, which may be real.

    An unsigned power-of-two grid uses one of its 2^b codes for zero, which the uniform grid has among its steps; a
    signed one has no zero. Its octaves are limited to OCTAVES, since 2^254 (8 bits, unsigned) exceeds float32 (our
    construction).
    """
    codes = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    if grid == "uniform":
        return codes
    octaves = codes if signed else codes - 1
    return 2 ** (octaves.clamp_max(OCTAVES) if isinstance(octaves, Tensor) else min(octaves, OCTAVES))


def real_width(low: Tensor, top: Tensor, signed: bool, grid: str) -> Tensor:
    """The bit-width before it is rounded up, from the step (or qmin) and qmax."""
    if grid == "uniform":
        return torch.log2(top / low + 1) + signed
    octaves = (torch.log2(top) - torch.log2(low)).clamp_min(0.0)  # the ratio's gradient, qmax/qmin², may overflow
    return torch.log2(octaves + (1 if signed else 2)) + signed


class DQ(nn.Module):
    """A per-tensor quantizer that learns two of step d (or qmin), range qmax and bit-width b.

    `parametrization`: "step-range" (d, qmax), the paper's choice; "bits-step" (b, d) and "bits-range" (b, qmax), which
    train worse according to the paper. `power_of_two_step`: round d to a power of two. `bounds`: minimum and maximum
    bit-width, enforced by `project` (our construction).
    """

    step: Tensor
    range: Tensor
    bits: Tensor

    def __init__(
        self,
        *,
        signed: bool,
        bounds: tuple[int, int],
        parametrization: str = "step-range",
        grid: str = "uniform",
        power_of_two_step: bool = False,
    ) -> None:
        super().__init__()
        if parametrization not in PARAMETRIZATIONS:
            raise InvalidArgument(
                f"unknown parametrization {parametrization!r}; choose from {', '.join(PARAMETRIZATIONS)}"
            )
        if grid not in GRIDS:
            raise InvalidArgument(f"unknown grid {grid!r}; choose from {', '.join(GRIDS)}")
        # a sign bit alone is not a uniform grid: the minimum signed bit-width is 2
        self.signed, self.bounds = signed, (max(bounds[0], 1 + signed), max(bounds[1], 1 + signed))
        self.parametrization, self.grid, self.power_of_two_step = parametrization, grid, power_of_two_step
        self.least = 2.0**-100  # of a parameter; OCTAVES below any range
        for name in parametrization.split("-"):
            self.register_parameter(name, nn.Parameter(torch.ones(())))

    @torch.no_grad()
    def init(self, bits: int, top: Tensor | float) -> None:
        """Initialize to a bit-width and the range `top` (positive)."""
        values = {
            "bits": float(bits),
            "range": float(top),
            "step": float(top) / span(float(bits), self.signed, self.grid),
        }
        for name in self.parametrization.split("-"):
            getattr(self, name).fill_(max(values[name], self.least))

    def _operands(self) -> tuple[Tensor, Tensor]:
        """The current (step or qmin, qmax), differentiable in the two parameters."""
        if self.parametrization == "step-range":
            low, top = self.step, self.range
        else:
            ratio = span(straight(self.bits, self.bits.round()), self.signed, self.grid)
            low, top = (
                (self.step, self.step * ratio) if "step" in self._parameters else (self.range / ratio, self.range)
            )
        if self.grid == "power-of-two":
            return straight(low, _nearest_power(low)), straight(top, _nearest_power(top))
        return (straight(low, _nearest_power(low)) if self.power_of_two_step else low), top

    def real_width(self) -> Tensor:
        """The bit-width before rounding, differentiable."""
        if self.parametrization != "step-range":
            return self.bits
        low, top = self._operands()
        return real_width(low, top, self.signed, self.grid)

    def width(self) -> Tensor:
        """The bit-width b = ceil(log2(qmax/d + 1) + 1), unsigned without the + 1, with a straight-through gradient.

        On the power-of-two grid: ceil(log2(K + 1) + 1), unsigned ceil(log2(K + 2)), with K = log2(qmax/qmin).
        """
        real = self.real_width()
        whole = real.round() if self.parametrization != "step-range" else (real - _SLACK).ceil()
        return straight(real, whole.clamp_min(self.bounds[0]))  # where OCTAVES end before the bound

    def forward(self, x: Tensor) -> Tensor:
        low, top = self._operands()
        grid = _Uniform if self.grid == "uniform" else _PowerOfTwo
        out: Tensor = grid.apply(x.float(), low, top, self.signed)
        return out.to(x.dtype)

    @torch.no_grad()
    def clip_gradients(self) -> None:
        """Clip the gradients of d and qmax to [−d, d], as in the paper: an SGD step then changes d only slightly.

        On the power-of-two grid, where qmin is far below qmax, each is clipped by its own size (our construction).
        """
        low, top = self._operands()
        for name in ("step", "range"):
            parameter = self._parameters.get(name)
            if parameter is not None and parameter.grad is not None:
                bound = low if self.grid == "uniform" or name == "step" else top
                parameter.grad.clamp_(-bound, bound)

    @torch.no_grad()
    def project(self) -> None:
        """Project the parameters back into the bounds, with qmax at least d."""
        least, most = (float(span(b, self.signed, self.grid)) for b in self.bounds)
        if "bits" in self._parameters:
            self.bits.clamp_(*self.bounds)
        for name in ("step", "range"):
            if name in self._parameters:
                self._parameters[name].clamp_(min=self.least)  # type: ignore[union-attr]
        if self.parametrization == "step-range":
            low = self.step if not self.power_of_two_step else _nearest_power(self.step)
            self.range.clamp_(low * max(least, 1.0), low * min(most, 1e30))

    def extra_repr(self) -> str:
        return f"{self.parametrization}, {self.grid}, signed={self.signed}, bounds={self.bounds}"


def _nearest_power(x: Tensor) -> Tensor:
    """2^round(log2 x)."""
    return torch.exp2(torch.log2(x.detach().clamp_min(math.ldexp(1.0, -120))).round())
