"""torch's own int8 operators (oneDNN), in process and without a compiler."""

from __future__ import annotations

import platform
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import LayerBits, LayerSpec
from ..nn.layers import take_over
from .exchanged import without_codes
from .fused_layer import Activation, FusedLayer
from .in_process import InProcess
from .integer_layer import Grid, IntegerLayer, inexact_sums, integer_menu


@lru_cache
def saturates() -> bool:
    """Whether this CPU sums two products in 16 bits; tested with twice 255 · 127."""
    x = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    one, zero = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    out = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return float(out[0, 0]) != 64 * 255 * 127


def _post(activation: Activation | None, output: Grid | None) -> tuple[str, list[Any], str, int | None]:
    """(name, scalars, algorithm) of oneDNN's post-operation, and the maximum that codes are clamped to afterwards."""
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
    """An integer layer: from codes of the input and an optional residual to float32 or codes."""

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.shape = without_codes(plan), layer.weight.shape
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
        layer = self.plan.layer
        if layer.convolution and x.dim() == 3:  # one image without a batch axis
            return self(x[None], None if summand is None else summand[None])[0]
        grid = layer.grid
        x = layer.padded(x, grid.zero_point)
        head = (x, grid.scale, grid.zero_point, self.packed, self.scale, self.zero)
        out = (self.out_scale, self.out_zero, self.dtype)
        if layer.convolution:
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
                *head, summand.contiguous(), self.bias, *out, 1.0, 0, "add", 1.0, self.name, [], ""
            )
        return y if self.cut is None else y.clamp_(max=self.cut)

    def __deepcopy__(self, memo: Any) -> OnednnLayer:
        """Share the weights: their oneDNN form cannot be copied, and never changes."""
        copied: OnednnLayer = take_over(type(self), self)
        return copied


class Onednn(InProcess):
    """torch's own int8 operators on an x86 CPU, in process."""

    name = "onednn"
    generates: ClassVar[bool] = True
    layer_class = OnednnLayer

    def available(self) -> str | None:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return f"its int8 operators require an x86 CPU, got {platform.machine()}"
        if not torch.backends.mkldnn.is_available():
            return "torch was built without oneDNN"
        return None

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return integer_menu(layer, saturates())

    def inexact(self, layer: IntegerLayer) -> str | None:
        return inexact_sums(layer, saturates())

    def takes(self, plan: FusedLayer, activation: Activation) -> bool:
        if plan.adds:
            return activation.name == "relu"
        return activation.name != "gelu" or not plan.layer.convolution
