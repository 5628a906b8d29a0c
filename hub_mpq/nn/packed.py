"""Layers that keep their weight packed in memory and unpack it when they run. Inference only.

They compute what the layers of layers.py compute, bit for bit, and their state-dict keys are the names of the packed
file (weight_packed, weight_scale, weight_shape, input_scale, …). A PackedLayer has the quantizers of the other form as
functions, so that it can use the same forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import FLOAT_BITS, LayerBits, LayerSpec
from ..errors import UnsupportedLayer
from ..pack import PackedTensor
from ..quantizers.base import keep_dtype
from ..quantizers.fake_quantize import fake_quantize, quantize_traced
from ..versions import warn_if_untested
from .layers import QuantConv1D, QuantConv2d, QuantLinear, call_only, first_operand, take_over
from .types import layer_kind

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale", "input_zero_point")


class PackedLayer(nn.Module):
    """What the packed forms share. `bits`: their widths; `owner`: (the layer whose weight this one reads,) or ()."""

    bits: LayerBits
    kind: str
    shape: tuple[int, ...]
    owner: tuple[PackedLayer, ...]
    compute: Tensor
    float_class: type[nn.Module]

    @property
    def packed(self) -> PackedTensor:
        """The packed weight; InvalidArgument when the buffers do not fit together."""
        source = self.owner[0] if self.owner else self
        zero = source._buffers.get("weight_zero_point")
        return PackedTensor(
            source._buffers["weight_packed"],
            source._buffers["weight_scale"],
            source.shape,
            source.bits.weight,
            source.kind,
            zero,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the dtype that the model computes in, made anew at each call."""
        return self.packed.dequantize(self.compute.dtype)

    def weight_quantizer(self, weight: Tensor) -> Tensor:
        """The weight is on its grid already."""
        return weight

    @property
    def input_quantizer(self) -> Callable[[Tensor], Tensor] | None:
        """The function that puts an input on its grid; None when inputs stay float."""
        return None if self.bits.activation == FLOAT_BITS else self._on_grid

    def _on_grid(self, x: Tensor) -> Tensor:
        zero, top = self._buffers.get("input_zero_point"), 2**self.bits.activation - 1
        if torch.compiler.is_compiling() and zero is not None:
            return quantize_traced(x, self._buffers["input_scale"].reshape(1), -zero, top - zero)
        low = 0 if zero is None else -int(zero)
        return fake_quantize(x, self._buffers["input_scale"].reshape(1), low, low + top)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Casts to another float type (`.to(torch.bfloat16)`) leave the scales float32, or the grid would move."""
        scales = (self._buffers.get(name) for name in ("weight_scale", "input_scale"))
        super()._apply(keep_dtype(fn, scales), recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.kind} {list(self.shape)}, {self.bits}"


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override]
    """x [N, C, H, W]."""

    same_padding = QuantConv2d.same_padding
    forward = QuantConv2d.forward


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]
    """x [..., in] to [..., out]."""

    forward = QuantLinear.forward


class PackedConv1D(PackedLayer):
    """GPT-2's linear layer; x [..., in] to [..., out]."""

    nf: int
    forward = QuantConv1D.forward


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override]
    """Unpacks only the rows it is asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        table, given = self.packed, first_operand(args, kwargs)
        scale, zero, ids = table.weight_scale, table.weight_zero_point, given.reshape(-1)
        if scale.numel() > 1:
            scale, zero = scale[ids], None if zero is None else zero[ids]
        rows = PackedTensor(
            table.weight_packed[ids], scale, (ids.numel(), self.shape[1]), table.num_bits, self.kind, zero
        )
        return rows.dequantize(self.compute.dtype).view(*given.shape, self.shape[1])


def packed_layer(
    module: nn.Module,
    layer: LayerSpec,
    bits: LayerBits,
    parts: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    owner: PackedLayer | None = None,
) -> PackedLayer:
    """The packed form of `module`: everything of it but its weight, and `parts` as buffers.

    parts: what a packed file holds of the layer, by the last part of the names, as a state dict has it. dtype: what
    the model computes in; `.to(…)` changes it. owner: the layer whose weight this one reads. Raises UnsupportedLayer
    unless the module's exact type has a packed form.
    """
    warn_if_untested("torch")
    kind = layer_kind(module)
    if kind is None or kind.name != layer.kind:
        raise UnsupportedLayer(layer.name, type(module).__qualname__)
    out = take_over(kind.packed_class, module)
    device = out._parameters.pop("weight").device
    out.kind, out.shape, out.bits, out.float_class = kind.name, layer.weight_shape, bits, type(module)
    out.owner = () if owner is None else (owner,)  # in a tuple: no submodule, its buffers belong to the owner
    for name in _PARTS:
        if name in parts:
            out.register_buffer(name, parts[name].to(device))
    out.register_buffer("compute", torch.empty(0, dtype=dtype, device=device), persistent=False)
    call_only(out)
    out._is_hf_initialized = True  # transformers must not draw random weights into it
    return out


def float_layer(module: PackedLayer, dtype: torch.dtype, weight: nn.Parameter | None = None) -> nn.Module:
    """The float form of a packed layer, of its first type; `weight`: a Parameter to share, else the dequantized one."""
    out = take_over(module.float_class, module)
    call_only(out, False)
    for name in (*_PARTS, "compute"):
        out._buffers.pop(name, None)
    for name in ("kind", "shape", "bits", "float_class", "owner"):
        out.__dict__.pop(name, None)
    shared = nn.Parameter(module.packed.dequantize(dtype)) if weight is None else weight
    out._parameters = {"weight": shared, **out._parameters}
    return out


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """(name, layer) of every packed layer, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            yield name, module
