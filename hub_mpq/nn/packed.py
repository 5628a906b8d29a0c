"""Layers that keep their weight packed in memory and unpack it when they run. Their weight is never trained; gradients
pass through them to adapters, and to the layers before.

They compute what the layers of layers.py compute, bit for bit, and their state-dict keys are the names of the packed
file (weight_packed, weight_scale, weight_shape, input_scale, …). A PackedLayer has the quantizers of the other form as
functions, so that it can use the same forward.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from ..core import FLOAT_BITS, LayerBits, LayerSpec
from ..errors import HubMPQError, InvalidArgument, UnsupportedLayer
from ..pack import PackedTensor
from ..quantizers.base import keep_dtype
from ..quantizers.fake_quantize import fake_quantize, quantize_traced
from ..versions import warn_if_untested
from .fused import Operation, Product, no_view
from .layers import call_only, first_operand, scaled, take_over
from .types import layer_kind

_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "input_scale", "input_zero_point")


_WRITES = re.compile(r"__set(item)?__|__i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__|.*[^_]_")


_FIXED = (
    "packed weights can't be changed, so an adapter can't be merged into them or start from a part of them "
    "(PiSSA, OLoRA): keep it beside them, or call dequantize() on the model before the adapter is added"
)


class _ReadOnly(Tensor):
    """A weight that is made anew at each call: what is written into it would be lost, as a merged adapter would.

    So are its views. What is computed with it is a plain tensor.
    """

    _is_hf_initialized = True  # transformers must not draw random weights into it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        freezes = name in ("__set__", "requires_grad_") and (args[1] is False or args[1] is None)
        into = tree_leaves((args[:1] if _WRITES.fullmatch(name) and not freezes else (), kwargs.get("out")))
        if any(isinstance(x, cls) for x in into):
            raise HubMPQError(_FIXED)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
            if name == "as_subclass":
                return out
            mine = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, cls)} - {0}
            return tree_map(lambda x: x.as_subclass(cls) if isinstance(x, Tensor) and _memory(x) in mine else x, out)


def _memory(x: Tensor) -> int:
    """Where the elements of a tensor and of all its views are; 0 for none."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


class PackedLayer(nn.Module):
    """What the packed forms share. `bits`: their widths; `owner`: (the layer whose weight this one reads,) or ().

    `kept`: the dequantized weight while it is resident, see `set_resident`; None: it is made anew at each call.
    """

    bits: LayerBits
    kind: str
    shape: tuple[int, ...]
    owner: tuple[PackedLayer, ...]
    compute: Tensor
    float_class: type[nn.Module]
    kept: Tensor | None = None

    @property
    def source(self) -> PackedLayer:
        """The layer whose weight this one reads: itself, or its owner."""
        return self.owner[0] if self.owner else self

    @property
    def packed(self) -> PackedTensor:
        """The packed weight; InvalidArgument when the buffers do not fit together."""
        source = self.source
        zero = source._buffers.get("weight_zero_point")
        return PackedTensor(
            source._buffers["weight_packed"],
            source._buffers["weight_scale"],
            source.shape,
            source.bits.weight,
            source.kind,
            zero,
            source.bits.group_size,
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the dtype that the model computes in; HubMPQError for who writes into it."""
        weight = self.unpacked(self.compute.dtype)
        return weight if _traced() else weight.as_subclass(_ReadOnly)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not torch.equal(value, self.weight):  # PEFT gives a layer its own weight back
            self.weight.copy_(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Raises HubMPQError for a weight."""
        if name == "weight":
            raise HubMPQError(_FIXED)
        super().register_parameter(name, param)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight as a plain tensor, in the precision that the model computes in and as `dtype`."""
        kept = self.source.kept
        return (self.packed.dequantize(self.compute.dtype) if kept is None else kept).to(dtype)

    def weight_quantizer(self, weight: Tensor) -> Tensor:
        """The weight is on its grid already."""
        return weight.as_subclass(Tensor)

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
        """Casts to another float type (`.to(torch.bfloat16)`) leave the scales as they are, or the grid would move."""
        scales = (self._buffers.get(name) for name in ("weight_scale", "input_scale"))
        resident, self.kept = self.kept is not None, None
        super()._apply(keep_dtype(fn, scales), recurse)
        if resident:
            self.kept = self.unpacked(self.compute.dtype)
        return self

    def extra_repr(self) -> str:
        return f"{self.kind} {list(self.shape)}, {self.bits}"


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class _Product(torch.autograd.Function):
    """A product with a packed weight that is unpacked again on the way back: to keep it would take the memory of a
    float model."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, unpacked: Callable[[torch.dtype], Tensor], operation: Operation
    ) -> Tensor:
        out = no_view(operation.run(x, unpacked(x.dtype), bias))
        ctx.unpacked, ctx.operation, ctx.shape, ctx.dtype = unpacked, operation, x.shape, out.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_bias = ctx.needs_input_grad[:2]
        x = grads[0].new_zeros(()).expand(ctx.shape)  # only its shape counts
        dx, _, db = ctx.operation.back(grads[0], x, ctx.unpacked(ctx.dtype), (of_x, False, of_bias))
        return dx, db, None, None


def packed_product(
    layer: Any, operation: Operation, x: Tensor, unpacked: Callable[[torch.dtype], Tensor] | None = None
) -> Tensor:
    """The output of a packed layer.

    Args:
        layer: The layer.
        operation: What it does with its input and its weight.
        x: The input. What biases and other layers compute in may be another dtype than the weight's.
        unpacked: What makes the weight in a dtype; None: all of the layer's.
    """
    unpacked = unpacked or layer.unpacked
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if torch.is_grad_enabled() and not _traced() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        out: Tensor = _Product.apply(x, bias, unpacked, operation)
        return out
    return operation.run(x, unpacked(x.dtype), bias)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override]
    """x [..., in] to [..., out]."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return packed_product(self, Product(), first_operand(args, kwargs))


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override]
    """Unpacks only the rows it is asked for."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids = first_operand(args, kwargs)
        if self.source.kept is not None:
            return scaled(self, self.source.kept[ids])
        rows = self.packed.dequantize(self.compute.dtype, ids.reshape(-1)).view(*ids.shape, self.shape[1])
        return scaled(self, rows)


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
    for name in ("kind", "shape", "bits", "float_class", "owner", "kept"):
        out.__dict__.pop(name, None)
    shared = nn.Parameter(module.packed.dequantize(dtype)) if weight is None else weight
    out._parameters = {"weight": shared, **out._parameters}
    return out


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    """(name, layer) of every packed layer, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLayer):
            yield name, module


RESIDENT = ("packed", "float")
"""In which form packed layers may keep their weights in memory."""


@torch.no_grad()
def set_resident(model: nn.Module, resident: str) -> None:
    """Choose how the packed layers of a model keep their weights in memory. What they compute is the same to the bit.

    Args:
        model: A model with packed layers: what `AutoModel*.from_pretrained` makes of a packed folder, or `HubMPQ` with
            `resident=`.
        resident: "packed": every call unpacks the weight of its layer, so that the model takes little more memory than
            its packed bytes, and is slow where few tokens share a call, as in generation. "float": weights are unpacked
            once and kept beside their packed form, for the speed and the memory of the float model.

    Raises:
        InvalidArgument: Another word, or the model has no packed layers.
    """
    if resident not in RESIDENT:
        raise InvalidArgument(f"resident is 'packed' or 'float', not {resident!r}")
    layers = [layer for _, layer in packed_layers(model) if not layer.owner]
    if not layers:
        raise InvalidArgument(
            f"{type(model).__name__} has no packed layers; load a packed folder by AutoModel, or by "
            "HubMPQ.from_pretrained(folder, resident=…)"
        )
    for layer in layers:
        layer.kept = layer.unpacked(layer.compute.dtype) if resident == "float" else None
