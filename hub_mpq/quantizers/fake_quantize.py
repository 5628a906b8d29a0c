"""Rounding to an integer grid with LSQ's straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fake_quantize_kernels import Grid, on_grid, pull_back, to_int, wide


class _FakeQuantize(torch.autograd.Function):
    """LSQ (Esser et al., 2020, eqs. 1–5). Saves x and s; the backward pass recomputes the mask and the integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.grid = grid
        return on_grid(x, scale, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        of_x, of_scale, _ = ctx.needs_input_grad
        g = grads[0].to_dense() if grads[0].is_sparse else grads[0]  # of an nn.Embedding(sparse=True)
        return *pull_back(g, x, scale, ctx.grid, of_x=of_x, of_scale=of_scale), None


def quantize(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """`x` rounded to the grid, with its shape and dtype (computed in at least float32), differentiable in both."""
    out: Tensor = _FakeQuantize.apply(x, scale, grid)
    return out


def fake_quantize(
    x: Tensor, scale: Tensor, low: int, high: int, *, binary: bool = False, grad_factor: float = 1.0
) -> Tensor:
    """Round a tensor to an integer grid, with LSQ's gradient for both the tensor and the scale.

    Computes clamp(round(x / scale), low, high) · scale in float32 (or float64, if `x` is).

    Args:
        x: The tensor, of any shape.
        scale: The step size(s), positive; broadcasts against `x`.
        low: The smallest integer, qmin − zero point.
        high: The largest integer, qmax − zero point.
        binary: Round to {−scale, +scale} by sign instead.
        grad_factor: Factor of the scale's gradient (LSQ's g).

    Returns:
        The rounded tensor, with the shape and dtype of `x`.

    References:
        LSQ (Esser et al., ICLR 2020), eqs. 1–5.

    Example:
        >>> import torch
        >>> from hub_mpq.quantizers import fake_quantize
        >>> fake_quantize(torch.tensor([-9.0, 0.3, 1.6]), torch.tensor(0.5), -8, 7)
        tensor([-4.0000,  0.5000,  1.5000])
    """
    return quantize(x, scale, Grid(low, high, binary, grad_factor))


def quantize_traced(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, binary: bool = False, factor: Tensor | float = 1.0
) -> Tensor:
    """`quantize` in plain operators, for torch.compile and torch.export, where the ends of a grid with a zero point are
    tensors of unknown values."""
    v = wide(x) / scale
    codes = to_int(wide(x), scale, low, high, binary=binary).detach()
    rounded = (codes * scale).detach()
    if not torch.is_grad_enabled():
        return rounded.to(x.dtype)
    damped = scale * factor + (scale - scale * factor).detach()
    inside = torch.where((v > low) & (v < high), wide(x) - v.detach() * damped, torch.zeros_like(v))
    return straight(inside + codes * damped, rounded).to(x.dtype)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """Exactly `rounded` in the forward pass, with the gradient of `value` in the backward pass."""
    return rounded.detach() + (value - value.detach())
