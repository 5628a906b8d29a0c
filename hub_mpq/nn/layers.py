"""Layers whose weight and input pass through a quantizer; attributes and state-dict keys stay the float form's.

Their constructors never run: `take_over` fills a layer from the float one. Then it gets `weight_quantizer`,
`input_quantizer` (None for a float input) and `float_class`, the exact type whose place it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgument
from ..quantizers import LSQ
from .fused import Operation, Product, quantized


def take_over(cls: type[nn.Module], module: nn.Module) -> Any:
    """An instance of `cls` with the parameters (not copies), buffers, hooks and attributes of `module`.

    `module` stays as it is; what is registered on one of the two later is not seen by the other.
    """
    out = cls.__new__(cls)
    out.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    return out


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Make a layer of a model into `new`. It stays the same object, so that all that refers to it has the new form:
    every name that the model knows it by, and a list or a dict that its forward reads instead.

    Raises:
        InvalidArgument: The model is that layer itself.
    """
    if not name:
        raise InvalidArgument(f"a {type(model).__name__} alone can't be replaced in place; give nn.Sequential(net)")
    old = model.get_submodule(name)
    old.__class__ = type(new)
    vars(old).clear()
    vars(old).update(vars(new))


def first_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called on, by position or by keyword.

    The types of one kind name it differently (`input`, `x`, `hidden_states`), so any name will do.
    """
    operand: Tensor = (*args, *kwargs.values())[0]
    return operand


def _called(_module: nn.Module, _args: Any) -> None:
    """A forward pre-hook that does nothing."""


def call_only(layer: nn.Module, on: bool = True) -> None:
    """Keep nn.TransformerEncoderLayer from reading the weight of a layer instead of calling it.

    In eval mode without gradients it computes all of its layers from their weights in one operator. It does not where
    one of them has a hook. The key is no number, so that no other hook, of an unpickled layer for example, replaces it.

    Args:
        layer: A quantized or packed layer.
        on: False ends it.
    """
    hooks: dict[Any, Any] = layer._forward_pre_hooks
    if on:
        hooks["hub_mpq"] = _called
    else:
        hooks.pop("hub_mpq", None)


def pad_only(model: nn.Module, layers: type | tuple[type, ...]) -> None:
    """Keep each nn.TransformerEncoder that holds one of `layers` from handing them nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, layers) for m in module.modules()):
            module.use_nested_tensor = False


def operands(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Input and weight of a quantized or packed layer on their grids, the weight in the input's dtype."""
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    return x, layer.weight_quantizer(layer.weight).to(x.dtype)


def fused_output(layer: Any, operation: Operation | None, x: Tensor) -> Tensor | None:
    """A layer's output by `fused.quantized`; None where it must be put together from its parts.

    Parts: other quantizers than LSQ; both of them off, so that a float layer has second derivatives; a trace.
    """
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    if operation is None or type(weights) is not LSQ or not (inputs is None or type(inputs) is LSQ):
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    of_x = None if inputs is None else inputs.operand(x)
    of_w = weights.operand(layer.weight)
    if of_x is None and of_w is None:
        return None
    return quantized(operation, x, layer.weight, layer.bias, of_x, of_w)


class QuantLinear(nn.Linear):
    """x [..., in] to [..., out]."""

    weight_quantizer: Any
    input_quantizer: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        if (out := fused_output(self, Product(), x)) is not None:
            return out
        x, weight = operands(self, x)
        return F.linear(x, weight, self.bias)


class QuantConv1D(nn.Module):
    """GPT-2's linear layer with its weight kept as [in, out]; x [..., in] to [..., out]."""

    weight: Tensor
    bias: Tensor
    nf: int
    weight_quantizer: Any
    input_quantizer: Any

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = first_operand(args, kwargs)
        if (out := fused_output(self, Product(transposed=True), x)) is not None:
            return out
        x, weight = operands(self, x)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.nf)


def scaled(layer: Any, rows: Tensor) -> Tensor:
    """Rows of an embedding times the scale of its float form, a number or a buffer; an nn.Embedding has none."""
    if layer.float_class is nn.Embedding:
        return rows
    scale = layer.embed_scale
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class QuantEmbedding(nn.Embedding):
    """Rows of a quantized table: weight-only, indices have no width."""

    weight_quantizer: Any
    input_quantizer: Any
    float_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids, table = first_operand(args, kwargs), self.weight_quantizer(self.weight)
        rows = F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        return scaled(self, rows)
