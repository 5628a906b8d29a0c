"""Rounding to an integer grid with the straight-through gradient of LSQ, in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_int(x: Tensor, scale: Tensor, low: int, high: int, *, binary: bool = False) -> Tensor:
    """Integers of `x` on the grid `scale`, as a float tensor of x's shape.

    `low`, `high`: the grid's ends after the zero point was subtracted (qmin − z, qmax − z), so that 0 is
    always an integer of the grid. `binary`: {−1, +1}, no zero. `scale` broadcasts against `x`.
    """
    if binary:
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    return torch.div(x, scale).round_().clamp_(low, high)


class _FakeQuantize(torch.autograd.Function):
    """LSQ (Esser et al., 2020, eqs. 1–5).

    Saved: x, q and s. q is the tensor that the layer saves anyway for its weight gradient, so it costs
    nothing. With m = 1 strictly inside the range: dx = g·m, and since round(x/s) = q/s,
    ds = Σ g·(q − m·x)/s, inside and outside in one expression.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, binary: bool, factor: float) -> Tensor:
        q = to_int(x, scale, low, high, binary=binary).mul_(scale)
        ctx.save_for_backward(x, q, scale)
        ctx.range, ctx.factor = (low, high), factor
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        x, q, scale = ctx.saved_tensors
        low, high = ctx.range
        if scale.numel() == 1 and x.device.type == "cpu":
            # one vectorised pass for mask and product; its bounds are numbers, free to read on a CPU
            s = scale.item()
            dx = torch.ops.aten.hardtanh_backward(g, x, low * s, high * s)
        else:
            dx = g * ((x > low * scale) & (x < high * scale))
        ds = None
        if ctx.needs_input_grad[1]:
            rest = torch.mul(g, q).addcmul_(dx, x, value=-1)
            ds = (rest.sum_to_size(scale.shape) / scale).mul_(ctx.factor)
        return dx if ctx.needs_input_grad[0] else None, ds, None, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, low: int, high: int, *, binary: bool = False, grad_factor: float = 1.0
) -> Tensor:
    """`x` rounded to the grid, as float32, differentiable in `x` and `scale` (both float32)."""
    out: Tensor = _FakeQuantize.apply(x.float(), scale, low, high, binary, grad_factor)
    return out.to(x.dtype)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` to the last bit in the forward pass, the gradient of `value` in the backward pass."""
    return rounded.detach() + (value - value.detach())
