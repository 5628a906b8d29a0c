"""torch's own int8 operators (oneDNN), in this process and without a compiler."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .fused_graph import Activation, FusedLayer
from .integer_layer import INT16, INT32, Grid, IntegerLayer

MAGIC = 1.5 * 2.0**23
"""Added to a small float32 it leaves no bits behind the point, and the integer in the lowest ones."""


class Codes(nn.Module):
    """Float32 to the codes of a grid, uint8, rounded half to even."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.start = torch.tensor(MAGIC + grid.zero_point)
        self.inverse = 1.0 / grid.scale
        self.low, self.high = MAGIC, MAGIC + grid.top

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.add(self.start, x, alpha=self.inverse).clamp_(self.low, self.high)
        return shifted.view(torch.int32).to(torch.uint8)

    def extra_repr(self) -> str:
        return str(self.grid)


@lru_cache
def saturates() -> bool:
    """Whether this CPU adds two products in 16 bits. Tried out: 255 · 127 twice."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    out = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return float(out[0, 0]) != 64 * 255 * 127


def inexact(layer: IntegerLayer) -> str | None:
    """Why a layer's sums would not be exact here; None when they are."""
    if layer.largest_sum() > INT32:
        return "sums of its products can exceed 32 bits"
    if saturates() and layer.largest_pair() > INT16:
        return f"without VNNI, sums of two products of {layer.grid.bits}-bit inputs and {layer.weight_bits}-bit weights saturate"
    return None


def _post(activation: Activation | None, output: Grid | None) -> tuple[str, list[Any], str, int | None]:
    """(name, scalars, algorithm) of oneDNN's post-operation, and what codes are cut at afterwards."""
    top = None if output is None or output.bits == 8 else output.top
    name = None if activation is None else activation.name
    if name in ("relu", "clip", None) and (name == "clip" or top is not None):
        low, high = (0.0, float("inf")) if name == "relu" else (-float("inf"), float("inf"))
        if name == "clip":
            low, high = activation.low, activation.high
        if output is not None:
            low = max(low, -output.zero_point * output.scale)
            high = min(high, (output.top - output.zero_point) * output.scale)
        return "hardtanh", [low, high], "", None
    if name == "gelu":
        return "gelu", [], activation.approximate, top
    return {None: "none", "relu": "relu", "hardswish": "hardswish", "silu": "swish"}[name], [], "", top


class OnednnLayer(nn.Module):
    """An integer layer: codes of the input [, summand] to float32 or to codes."""

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.layer = plan, layer
        self.name, self.scalars, self.algorithm, self.cut = _post(plan.activation, plan.output)
        self.dtype = torch.float32 if plan.output is None else torch.uint8
        self.out_scale = 1.0 if plan.output is None else plan.output.scale
        self.out_zero = 0 if plan.output is None else plan.output.zero_point
        self.register_buffer("scale", layer.scale, persistent=False)
        self.register_buffer("zero", torch.zeros(len(layer.scale), dtype=torch.int32), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)
        if layer.convolution:
            self.convolution = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
            self.packed = torch.ops.onednn.qconv_prepack(
                layer.weight, layer.scale, layer.grid.scale, layer.grid.zero_point, *self.convolution, list(plan.shape)
            )
        else:
            self.packed = torch.ops.onednn.qlinear_prepack(layer.weight, None)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        grid = self.layer.grid
        head = (x, grid.scale, grid.zero_point, self.packed, self.scale, self.zero)
        out = (self.out_scale, self.out_zero, self.dtype)
        if self.layer.convolution:
            if summand is None:
                y = torch.ops.onednn.qconv2d_pointwise(
                    *head, self.bias, *self.convolution, *out, self.name, self.scalars, self.algorithm
                )
            else:
                summand = summand if self.plan.overwrites else summand.clone()
                summand = summand.contiguous(memory_format=torch.channels_last)
                y = torch.ops.onednn.qconv2d_pointwise.binary(
                    *head, summand, self.bias, *self.convolution, *out, 1.0, 0, "sum", 1.0, self.name, [], ""
                )
        elif summand is None:
            y = torch.ops.onednn.qlinear_pointwise(*head, self.bias, *out, self.name, self.scalars, self.algorithm)
        else:
            y = torch.ops.onednn.qlinear_pointwise.binary(
                *head, summand, self.bias, *out, 1.0, 0, "add", 1.0, self.name, [], ""
            )
        return y if self.cut is None else y.clamp_(max=self.cut)


class Onednn:
    """What fills a fused graph."""

    def layer(self, plan: FusedLayer) -> nn.Module:
        return OnednnLayer(plan)

    def codes(self, grid: Grid) -> nn.Module:
        return Codes(grid)
