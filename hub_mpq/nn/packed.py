"""Layers that keep their weight packed in memory and unpack it when they run. Their weight is never trained; gradients
pass through them to adapters and to earlier layers.

Their outputs are bit-identical to those of the layers in layers.py, and their state-dict keys are the names in the
packed file (weight_packed, weight_scale, weight_shape, input_scale, …). A PackedLayer has the quantizers of the other
form as functions, so that it can use the same forward.
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
    "packed weights are read-only, so an adapter cannot be merged into them or initialized from them (PiSSA, OLoRA); "
    "keep the adapter separate, or call dequantize() on the model before adding it"
)


class _ReadOnly(Tensor):
    """A weight that is recomputed at each call, so that writing into it, as merging an adapter does, would be lost.

    The same holds for its views. Results of computations are plain tensors.
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
    """Address of the memory that a tensor shares with all its views; 0 for none."""
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else 0


class PackedLayer(nn.Module):
    """Base of the packed forms. `bits`: bit-widths; `owner`: (the layer whose weight this one reads,) or ().

    `kept`: the dequantized weight while it is resident, see `set_resident`; None if it is unpacked at each call.
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
        """The packed weight; raises InvalidArgument if the buffers do not fit together."""
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
        """The dequantized weight in the dtype that the model computes in; writing into it raises HubMPQError."""
        weight = self.unpacked(self.compute.dtype)
        return weight if _traced() else weight.as_subclass(_ReadOnly)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not torch.equal(value, self.weight):  # PEFT assigns a layer its own weight
            self.weight.copy_(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; raises HubMPQError for a weight."""
        if name == "weight":
            raise HubMPQError(_FIXED)
        super().register_parameter(name, param)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight as a plain tensor, computed in the dtype of the model and cast to `dtype`."""
        kept = self.source.kept
        return (self.packed.dequantize(self.compute.dtype) if kept is None else kept).to(dtype)

    def weight_quantizer(self, weight: Tensor) -> Tensor:
        """Return the weight unchanged; it is already on its grid."""
        return weight.as_subclass(Tensor)

    @property
    def input_quantizer(self) -> Callable[[Tensor], Tensor] | None:
        """The function that quantizes an input; None if inputs stay float."""
        return None if self.bits.activation == FLOAT_BITS else self._on_grid

    def _on_grid(self, x: Tensor) -> Tensor:
        zero, top = self._buffers.get("input_zero_point"), 2**self.bits.activation - 1
        if torch.compiler.is_compiling() and zero is not None:
            return quantize_traced(x, self._buffers["input_scale"].reshape(1), -zero, top - zero)
        low = 0 if zero is None else -int(zero)
        return fake_quantize(x, self._buffers["input_scale"].reshape(1), low, low + top)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Keep the scales in casts to another float type (`.to(torch.bfloat16)`), which would move the grid."""
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
    """A product with a packed weight that is unpacked again in the backward pass; storing it would take the memory of
    the float model."""

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
        x = grads[0].new_zeros(()).expand(ctx.shape)  # only its shape matters
        dx, _, db = ctx.operation.back(grads[0], x, ctx.unpacked(ctx.dtype), (of_x, False, of_bias))
        return dx, db, None, None


def packed_product(
    layer: Any, operation: Operation, x: Tensor, unpacked: Callable[[torch.dtype], Tensor] | None = None
) -> Tensor:
    """The output of a packed layer.

    Args:
        layer: The layer.
        operation: The product of input and weight.
        x: The input. Its dtype and the bias's may differ from the weight's.
        unpacked: Function that returns the weight in a given dtype; None for the layer's whole weight.
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
    """An embedding that unpacks only the requested rows."""

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
    """The packed form of `module`: everything but its weight, with `parts` as buffers.

    parts: the layer's tensors in a packed file, by the last part of their names, as in a state dict. dtype: the dtype
    to compute in; `.to(…)` changes it. owner: the layer whose weight this one reads. Raises UnsupportedLayer unless the
    module's exact type has a packed form.
    """
    warn_if_untested("torch")
    kind = layer_kind(module)
    if kind is None or kind.name != layer.kind:
        raise UnsupportedLayer(layer.name, type(module).__qualname__)
    out = take_over(kind.packed_class, module)
    device = out._parameters.pop("weight").device
    out.kind, out.shape, out.bits, out.float_class = kind.name, layer.weight_shape, bits, type(module)
    # a tuple, so that the owner does not become a submodule: its buffers belong to it alone
    out.owner = () if owner is None else (owner,)
    for name in _PARTS:
        if name in parts:
            out.register_buffer(name, parts[name].to(device))
    out.register_buffer("compute", torch.empty(0, dtype=dtype, device=device), persistent=False)
    call_only(out)
    out._is_hf_initialized = True  # transformers must not draw random weights into it
    return out


def float_layer(module: PackedLayer, dtype: torch.dtype, weight: nn.Parameter | None = None) -> nn.Module:
    """The float form of a packed layer in its original type.

    Args:
        module: The layer.
        dtype: Dtype of the dequantized weight.
        weight: A Parameter to use instead of the dequantized weight.
    """
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
"""Forms in which packed layers can keep their weights in memory."""


@torch.no_grad()
def set_resident(model: nn.Module, resident: str) -> None:
    """Choose how the packed layers of a model keep their weights in memory; outputs are bit-identical either way.

    Args:
        model: A model with packed layers, from `AutoModel*.from_pretrained` of a packed folder or from
            `HubMPQ.from_pretrained` with `resident=`.
        resident: `"packed"` unpacks the weight of a layer at each call: the model takes little more memory than its
            packed bytes, but is slow if few tokens share a call, as in generation. `"float"` unpacks all weights once
            and keeps them in addition to the packed ones, for the speed and memory of the float model.

    Raises:
        InvalidArgument: `resident` is neither of these, or the model has no packed layers.

    Example:
        >>> import torch
        >>> from transformers import AutoModel, ViTConfig, ViTModel
        >>> from hub_mpq import HubMPQ, set_resident
        >>> config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> with torch.random.fork_rng():
        ...     ViTModel(config).save_pretrained("float")
        >>> mpq = HubMPQ.from_pretrained("float", weight_only=True).apply_policy("W4A32")
        >>> nbytes = mpq.save_pretrained("packed")
        >>> model = AutoModel.from_pretrained("packed")
        >>> set_resident(model, "float")
    """
    if resident not in RESIDENT:
        raise InvalidArgument(f"resident must be 'packed' or 'float', got {resident!r}")
    layers = [layer for _, layer in packed_layers(model) if not layer.owner]
    if not layers:
        raise InvalidArgument(
            f"{type(model).__name__} has no packed layers; load a packed folder with AutoModel or with "
            "HubMPQ.from_pretrained(folder, resident=…)"
        )
    for layer in layers:
        layer.kept = layer.unpacked(layer.compute.dtype) if resident == "float" else None
