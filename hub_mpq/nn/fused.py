"""A layer and its two quantizers as one node of the autograd graph.

For the backward pass, only the float input and weight are kept, which earlier layers and the optimizer hold anyway; the
quantized ones are recomputed. A quantized step thus takes hardly more memory than a float one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..quantizers.fake_quantize_kernels import Grid, on_grid, pull_back

Operand = tuple[Tensor, Grid]
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Operation(Protocol):
    """A product of an input and a weight."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output."""

    def back(self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
        """Gradients of input, weight and bias from the gradient `g` of the output; None where not wanted."""


class Convolution(NamedTuple):
    """Convolution with zero padding over as many axes as `stride` has; see torch.nn.functional.conv2d.

    `output_padding`: for a transposed convolution, whose weight is [in, out/groups, …]; None for an ordinary one.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] | None = None

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        axes = len(self.stride)
        if self.output_padding is None:
            plain = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
            return plain(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        wide = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        return wide(x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def back(self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
        found: Gradients = torch.ops.aten.convolution_backward.default(
            g,
            x,
            weight,
            [g.shape[1]] if wanted[2] else None,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding is not None,
            self.output_padding or (0,) * len(self.stride),
            self.groups,
            list(wanted),
        )
        return found


class Product(NamedTuple):
    """x [..., in] to [..., out]; weight [out, in], or [in, out] if `transposed` (GPT-2)."""

    transposed: bool = False

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.transposed:
            return F.linear(x, weight, bias)
        if bias is None:
            return x @ weight
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])

    def back(self, g: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> Gradients:
        g2, x2 = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (g2 @ (weight.t() if self.transposed else weight)).view(x.shape) if wanted[0] else None
        dw = (x2.t() @ g2 if self.transposed else g2.t() @ x2) if wanted[1] else None
        return dx, dw, g2.sum(0) if wanted[2] else None


def no_view(out: Tensor) -> Tensor:
    """`out` as a Function must return it: autograd forbids writing into a view that a Function returns."""
    return out if out._base is None else torch.ops.aten._unsafe_view.default(out, out.shape)


def _run(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    x_grid: Grid,
    w_grid: Grid,
) -> Tensor:
    qx = x if x_scale is None else on_grid(x, x_scale, x_grid)
    qw = weight if w_scale is None else on_grid(weight, w_scale, w_grid)
    return operation.run(qx, qw.to(qx.dtype), bias)


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_scale: Tensor | None,
        w_scale: Tensor | None,
        x_grid: Grid,
        w_grid: Grid,
        operation: Operation,
    ) -> Tensor:
        out = no_view(_run(operation, x, weight, bias, x_scale, w_scale, x_grid, w_grid))
        ctx.save_for_backward(x, weight, x_scale, w_scale)
        ctx.x_grid, ctx.w_grid, ctx.operation, ctx.dtype = x_grid, w_grid, operation, out.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, w_scale = ctx.saved_tensors
        of_x, of_w, of_bias, of_xs, of_ws = ctx.needs_input_grad[:5]
        # in the dtype that the forward pass computed in (autocast)
        qx = (x if x_scale is None else on_grid(x, x_scale, ctx.x_grid)).to(ctx.dtype)
        qw = (weight if w_scale is None else on_grid(weight, w_scale, ctx.w_grid)).to(ctx.dtype)
        dx, dw, db = ctx.operation.back(grads[0], qx, qw, (of_x or of_xs, of_w or of_ws, of_bias))
        del qx, qw
        dxs = dws = None
        if x_scale is not None and dx is not None:
            dx, dxs = pull_back(dx, x, x_scale, ctx.x_grid, of_x=of_x, of_scale=of_xs, spare=True)
        if w_scale is not None and dw is not None:
            dw, dws = pull_back(dw, weight, w_scale, ctx.w_grid, of_x=of_w, of_scale=of_ws, spare=True)
        return dx, dw, db, dxs, dws, None, None, None


_OFF: tuple[None, Grid] = (None, Grid(0, 0))


def quantized(
    operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, of_x: Operand | None, of_w: Operand | None
) -> Tensor:
    """`operation` on the quantized input and weight; differentiable once in all five tensors."""
    x_scale, x_grid = of_x or _OFF
    w_scale, w_grid = of_w or _OFF
    if not torch.is_grad_enabled():
        return _run(operation, x, weight, bias, x_scale, w_scale, x_grid, w_grid)
    out: Tensor = _Quantized.apply(x, weight, bias, x_scale, w_scale, x_grid, w_grid, operation)
    return out
