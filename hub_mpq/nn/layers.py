"""Layers whose weight and input pass through a quantizer; attributes and state-dict keys are those of the float form.

Their constructors never run: `take_over` fills a layer from the float one. It then gets `weight_quantizer`,
`input_quantizer` (None for a float input) and `float_class`, the exact type that it replaces.
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

    `module` is not changed; what is registered later on one of them does not affect the other.
    """
    out = cls.__new__(cls)
    out.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    return out


def replace_layer(model: nn.Module, name: str, new: nn.Module) -> None:
    """Turn a layer of a model into `new`. It stays the same object, so that all references to it get the new form:
    every name in the model, and lists or dicts that a forward reads instead.

    Raises:
        InvalidArgument: The model is that layer itself.
    """
    if not name:
        raise InvalidArgument(f"a single {type(model).__name__} cannot be replaced in place; pass nn.Sequential(net)")
    old = model.get_submodule(name)
    old.__class__ = type(new)
    vars(old).clear()
    vars(old).update(vars(new))


def first_operand(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer, passed by position or by keyword.

    Types of one kind name it differently (`input`, `x`, `hidden_states`), so any name is accepted.
    """
    operand: Tensor = (*args, *kwargs.values())[0]
    return operand


def _called(_module: nn.Module, _args: Any) -> None:
    """A forward pre-hook that does nothing."""


def call_only(layer: nn.Module, on: bool = True) -> None:
    """Keep nn.TransformerEncoderLayer from reading the weight of a layer instead of calling it.

    In eval mode without gradients, it runs all of its layers as one operator on their weights unless one of them has a
    hook. The key of the hook is not a number, so that no other hook, such as that of an unpickled layer, replaces it.

    Args:
        layer: A quantized or packed layer.
        on: If False, undo it.
    """
    hooks: dict[Any, Any] = layer._forward_pre_hooks
    if on:
        hooks["hub_mpq"] = _called
    else:
        hooks.pop("hub_mpq", None)


def pad_only(model: nn.Module, layers: type | tuple[type, ...]) -> None:
    """Keep each nn.TransformerEncoder that contains one of `layers` from passing them nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, layers) for m in module.modules()):
            module.use_nested_tensor = False


def operands(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The quantized input and weight of a quantized or packed layer, the weight in the dtype of the input."""
    if layer.input_quantizer is not None:
        x = layer.input_quantizer(x)
    return x, layer.weight_quantizer(layer.weight).to(x.dtype)


def fused_output(layer: Any, operation: Operation | None, x: Tensor) -> Tensor | None:
    """A layer's output from `fused.quantized`; None if it must be composed of separate operations.

    That is the case for quantizers other than LSQ, if both are off (so that a float layer has second derivatives), and
    when tracing.
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
    """GPT-2's linear layer with weight [in, out]; x [..., in] to [..., out]."""

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
    """Rows of an embedding, multiplied by the scale of its float form (a number or a buffer; none for nn.Embedding)."""
    if layer.float_class is nn.Embedding:
        return rows
    scale = layer.embed_scale
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class QuantEmbedding(nn.Embedding):
    """An embedding with a quantized table. It is weight-only: indices are not quantized."""

    weight_quantizer: Any
    input_quantizer: Any
    float_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        ids, table = first_operand(args, kwargs), self.weight_quantizer(self.weight)
        rows = F.embedding(
            ids, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )
        return scaled(self, rows)
