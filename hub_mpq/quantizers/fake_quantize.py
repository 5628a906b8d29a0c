"""Rounding to an integer grid with the straight-through gradient of LSQ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fake_quantize_kernels import Grid, on_grid, pull_back, to_int, wide


class _FakeQuantize(torch.autograd.Function):
    """LSQ (Esser et al., 2020, eqs. 1–5). Saved: x and s; mask and integers are computed again on the way back."""

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
    """`x` on the grid, of its shape and dtype (computed in float32 or better), differentiable in `x` and `scale`."""
    out: Tensor = _FakeQuantize.apply(x, scale, grid)
    return out


def fake_quantize(
    x: Tensor, scale: Tensor, low: int, high: int, *, binary: bool = False, grad_factor: float = 1.0
) -> Tensor:
    """`quantize` with the parts of its grid written out."""
    return quantize(x, scale, Grid(low, high, binary, grad_factor))


def quantize_traced(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, binary: bool = False, factor: Tensor | float = 1.0
) -> Tensor:
    """`quantize` in plain operators, for torch.compile and torch.export: there the ends of a grid with a zero point are
    tensors whose values are not known."""
    v = wide(x) / scale
    codes = to_int(wide(x), scale, low, high, binary=binary).detach()
    rounded = (codes * scale).detach()
    if not torch.is_grad_enabled():
        return rounded.to(x.dtype)
    damped = scale * factor + (scale - scale * factor).detach()
    inside = torch.where((v > low) & (v < high), wide(x) - v.detach() * damped, torch.zeros_like(v))
    return straight(inside + codes * damped, rounded).to(x.dtype)


def straight(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` to the last bit in the forward pass, the gradient of `value` in the backward pass."""
    return rounded.detach() + (value - value.detach())
