"""Modules that replace the layers of a network: integer layers, their float form, and their codes."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import call_only, first_operand
from .fused_layer import FusedLayer
from .integer_layer import Grid

_SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "nf",
    "nx",
)
MAGIC = 1.5 * 2.0**23
"""Added to a small float32, it removes the fraction and leaves the integer in the lowest bits."""


class Codes(nn.Module):
    """From float32 to the codes of a grid, uint8, rounded half to even."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.odd = grid.zero_point % 2  # only an even number is added before rounding, which keeps ties in place
        low = MAGIC - self.odd
        self.register_buffer("start", torch.tensor(low + grid.zero_point), persistent=False)
        self.inverse = 1.0 / grid.scale
        self.low, self.high = low, low + grid.top

    def forward(self, x: Tensor) -> Tensor:
        shifted = torch.add(self.start, x.float(), alpha=self.inverse).clamp_(self.low, self.high)
        codes = shifted.view(torch.int32).to(torch.uint8)
        return codes.add_(1) if self.odd else codes

    def extra_repr(self) -> str:
        return str(self.grid)


def without_codes(plan: FusedLayer) -> FusedLayer:
    """The same plan without the codes of the weight, which a module stores in its own form; keeps their shape."""
    return replace(plan, layer=replace(plan.layer, weight=plan.layer.weight.to("meta")))


class FloatLayer(nn.Module):
    """The same layer computed in float32 on its grids: from float32 and an optional residual to float32."""

    def __init__(self, plan: FusedLayer) -> None:
        super().__init__()
        layer = plan.layer
        self.plan, self.shape = without_codes(plan), layer.weight.shape
        self.low, self.high = -float(layer.grid.zero_point), float(layer.grid.top - layer.grid.zero_point)
        axes = (-1,) + (1,) * (layer.weight.dim() - 1)
        # the input is integers, so its scale goes into the weight
        weight = layer.weight.double() * layer.scale.double().view(axes) * layer.grid.scale
        weight = weight.float()
        if layer.convolution:  # makes the output channels-last, as integer layers do; pooling is many times faster
            weight = weight.contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)

    def forward(self, x: Tensor, summand: Tensor | None = None) -> Tensor:
        layer = self.plan.layer
        x = x.float().mul(1.0 / layer.grid.scale).round_().clamp_(self.low, self.high)
        if layer.convolution:
            x = layer.padded(x)
            y = F.conv2d(x, self.weight, self.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            y = F.linear(x, self.weight, self.bias)
        if summand is not None:
            y = y + summand
        return y if self.plan.activation is None else self.plan.activation(y)


class Exchanged(nn.Module):
    """An integer layer in place of the layer that it was made from."""

    def __init__(self, layer: nn.Module, codes: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.codes = layer, codes
        call_only(self)

    @property
    def weight(self) -> Tensor:
        """Placeholder (NaN) for models that read the type or shape of the weight."""
        shape: torch.Size = self.layer.shape
        return torch.full((), torch.nan).expand(shape)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer."""
        return self.layer.bias  # type: ignore[return-value]

    def describe(self, layer: nn.Module) -> None:
        """Copy the size attributes of a layer, which models may read."""
        vars(self).update({key: value for key, value in vars(layer).items() if key in _SIZES})

    def _apply(self, fn: Any, recurse: bool = True) -> Exchanged:
        """Keep float32 and integers when the model around it is cast."""
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        with torch.autocast("cpu", enabled=False):
            return self.layer(x if self.codes is None else self.codes(x))


class SharedCodes(Codes):
    """Codes of a tensor that several layers read in succession, computed once."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self._last: tuple[Any, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        # neither of these reveals whether it was overwritten; the second is memory of NumPy or another library
        if x.is_inference() or not x.untyped_storage().resizable():
            return super().forward(x)
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version:
            return last[2]
        codes = super().forward(x)
        self._last = (weakref.ref(x), x._version, codes)
        return codes

    def forget(self) -> None:
        """Free the codes."""
        self._last = None
