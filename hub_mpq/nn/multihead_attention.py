"""nn.MultiheadAttention whose projections are layers that its forward calls, where torch's own reads their weights.

torch keeps the projections of query, key and value in one Parameter, `in_proj_weight`. Here they are three linear
layers around views of it (our construction), so they can read different tensors, as in cross-attention.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import InvalidArgument
from .joined import joined
from .layers import pad_only

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Projection(nn.Linear):
    """An nn.Linear of attention whose weight the float form reads without calling it.

    It is a separate kind of layer because only this package can compute with its quantized form.
    """


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    *,
    batch_first: bool = True,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    zero: bool = False,
    dropout: float = 0.0,
    need_weights: bool = True,
    average: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `torch.nn.functional.multi_head_attention_forward` computes between its projections.

    Args:
        query: [batch, length, features], or [length, features].
        key: [batch, source length, features], or [source length, features].
        value: As `key`.
        heads: Number of heads that the features are split into.
        batch_first: False if the length axis comes before the batch axis.
        mask: Added to the scores if float, positions to ignore if bool; [length, source length] or
            [batch * heads, length, source length].
        padding: The same for keys; [batch, source length] or [source length].
        bias: An additional key and value.
        zero: Append a key and value of zeros.
        dropout: Dropout probability of the attention weights.
        need_weights: Return the attention weights too.
        average: Average the returned weights over heads.
        is_causal: Whether `mask` is the causal mask.

    Returns:
        The output before its projection, in the layout of `query`, and the weights [batch, length, source length], with
        a heads axis after the batch if not averaged; None if not needed.

    Raises:
        InvalidArgument: A mask has the wrong shape or dtype.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
        padding = None if padding is None else padding[None]
    elif not batch_first:
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    batch, length = query.shape[:2]
    source = key.shape[1]
    if is_causal and mask is None:
        raise InvalidArgument("is_causal=True requires attn_mask, the causal mask")
    if is_causal and padding is None and not need_weights:
        mask = None
    else:
        is_causal = is_causal and padding is None
    if mask is not None:
        if tuple(mask.shape) not in ((length, source), (batch * heads, length, source)):
            shape = tuple(mask.shape)
            raise InvalidArgument(f"attn_mask must have shape {(length, source)}, or one per head, got {shape}")
        mask = _added(mask, query.dtype).unflatten(0, (batch, heads) if mask.dim() == 3 else (1, length))
        mask = mask if mask.dim() == 4 else mask[None]
    if padding is not None:
        if tuple(padding.shape) != (batch, source):
            raise InvalidArgument(f"key_padding_mask must have shape {(batch, source)}, got {tuple(padding.shape)}")
        padding = _added(padding, query.dtype)[:, None, None]
    if bias is not None:
        key, value = (torch.cat([x, more.expand(batch, 1, -1)], 1) for x, more in zip((key, value), bias, strict=True))
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if zero:
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
    more = key.shape[2] - source
    mask, padding = (None if x is None else F.pad(x, (0, more)) for x in (mask, padding))
    if padding is not None:
        mask = padding if mask is None else mask + padding
    weights = None
    if need_weights:
        scores = (query * math.sqrt(1.0 / query.shape[-1])) @ key.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ value
        weights = weights.mean(1) if average else weights
    else:
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        return out[0], None if weights is None else weights[0]
    return out if batch_first else out.transpose(0, 1), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the form that is added to the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise InvalidArgument(f"attention masks must be bool or floating point, got {mask.dtype}")
    return mask


class SplitMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention as calls of the layers q_proj, k_proj, v_proj and out_proj.

    While these are float, its state dict is that of nn.MultiheadAttention, which can always be loaded.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    _is_hf_initialized = True  # transformers must not draw random weights into it

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in nn.MultiheadAttention.

        Raises:
            InvalidArgument: A mask does not fit, or a tensor is nested.
        """
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):  # not tensors when tracing
            raise InvalidArgument("quantized attention takes no nested tensors; pad them and pass key_padding_mask")
        out, weights = attend(
            self.q_proj(query),
            self.k_proj(key),
            self.v_proj(value),
            self.num_heads,
            batch_first=self.batch_first,
            mask=attn_mask,
            padding=key_padding_mask,
            bias=None if self.bias_k is None else (self.bias_k, self.bias_v),
            zero=self.add_zero_attn,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
            average=average_attn_weights,
            is_causal=is_causal,
        )
        return self.out_proj(out), weights

    @property
    def layers(self) -> dict[str, Any]:
        """The four layers by name."""
        return {name: getattr(self, name) for name in (*_PROJECTIONS, "out_proj")}

    @property
    def is_float(self) -> bool:
        """Whether no layer is quantized, packed or wrapped by an adapter."""
        return all(type(layer) in (Projection, NonDynamicallyQuantizableLinear) for layer in self.layers.values())

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """The concatenated weights of the three projections, read-only; None if the inputs differ in size."""
        return _read_only(self.parameters_of().get("in_proj_weight"))

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """The concatenated biases of the three projections, read-only; None if there are none."""
        return _read_only(self.parameters_of().get("in_proj_bias"))

    def parameters_of(self) -> dict[str, nn.Parameter]:
        """The Parameters of nn.MultiheadAttention that the projections replace."""
        if self.kdim == self.embed_dim == self.vdim:
            out = {"in_proj_weight": self._fused("weight")}
        else:
            out = {f"{name}_weight": getattr(self, name).weight for name in _PROJECTIONS}
        return out if self.q_proj.bias is None else {**out, "in_proj_bias": self._fused("bias")}

    def _fused(self, key: str) -> nn.Parameter:
        parts: list[Tensor] = [getattr(getattr(self, name), key) for name in _PROJECTIONS]
        return nn.Parameter(joined(parts).detach(), parts[0].requires_grad)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        if self.is_float:
            fused = {f"{prefix}{name}": parameter for name, parameter in self.parameters_of().items()}
            destination.update(fused if keep_vars else {name: p.detach() for name, p in fused.items()})
        super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.is_float:
            for key in self.state_of_layers(prefix):
                destination.pop(key, None)
        return destination

    def state_of_layers(self, prefix: str) -> dict[str, Tensor]:
        """{key: Parameter} of the projections in a state dict in which they are layers."""
        return {f"{prefix}{n}.{k}": p for n in _PROJECTIONS for k, p in getattr(self, n).named_parameters()}

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in _PROJECTIONS:
            if (weight := state_dict.pop(f"{prefix}{name}_weight", None)) is not None:
                state_dict[f"{prefix}{name}.weight"] = weight
        for key in ("weight", "bias"):
            if (fused := state_dict.pop(f"{prefix}in_proj_{key}", None)) is not None:
                parts = zip(_PROJECTIONS, fused.chunk(3), strict=True)
                state_dict.update({f"{prefix}{name}.{key}": part for name, part in parts})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def to_parameters(self, state: dict[str, Tensor], name: str) -> None:
        """Rename the float projections in a state dict to the names of nn.MultiheadAttention.

        Args:
            state: The state dict, changed in place.
            name: Name of this module in it.
        """
        same = self.kdim == self.embed_dim == self.vdim
        for key in ("weight", "bias"):
            keys = [f"{name}.{projection}.{key}" for projection in _PROJECTIONS]
            if not all(k in state for k in keys):
                continue
            parts = [state.pop(k) for k in keys]
            if same or key == "bias":
                state[f"{name}.in_proj_{key}"] = torch.cat(parts)
            else:
                state.update(zip((f"{name}.{p}_weight" for p in _PROJECTIONS), parts, strict=True))


def _read_only(weight: nn.Parameter | None) -> Tensor | None:
    """A weight that is recomputed at each call; transformers must not draw random values into it."""
    if weight is None:
        return None
    out = weight.detach()
    out._is_hf_initialized = True  # type: ignore[attr-defined]
    return out


def _can_split(module: nn.Module, holders: dict[int, int]) -> bool:
    """Whether a module is an unmodified nn.MultiheadAttention that shares its Parameters with no other module."""
    if type(module) is not nn.MultiheadAttention or "forward" in vars(module):
        return False
    names = ["in_proj_weight"] if module._qkv_same_embed_dim else [f"{name}_weight" for name in _PROJECTIONS]
    weights = [module._parameters.get(name) for name in names]
    fit = "in_proj_bias" in module._parameters and type(module.out_proj) is NonDynamicallyQuantizableLinear
    return fit and all(weight is not None and holders[id(weight)] == 1 for weight in weights)


def _found(model: nn.Module) -> list[nn.MultiheadAttention]:
    modules = list(model.modules())
    holders: dict[int, int] = {}
    for module in modules:
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return [module for module in modules if _can_split(module, holders)]  # type: ignore[misc]


def has_fused_attention(model: nn.Module) -> bool:
    """Whether `split_attention` would change a model.

    Args:
        model: The model.
    """
    return bool(_found(model))


def split_attention(model: nn.Module) -> None:
    """Turn the projections of each nn.MultiheadAttention into layers, in place; `join_attention` undoes it.

    Only exact types are changed, and none whose weight is shared with another module or computed by a hook.

    Args:
        model: The model.
    """
    for module in _found(model):
        held = module._parameters
        if module._qkv_same_embed_dim:
            weights = list(held["in_proj_weight"].chunk(3))  # type: ignore[union-attr]
        else:
            weights = [held[f"{name}_weight"] for name in _PROJECTIONS]  # type: ignore[misc]
        bias = held["in_proj_bias"]
        biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
        for name in ("in_proj_weight", "in_proj_bias", *(f"{name}_weight" for name in _PROJECTIONS)):
            del held[name]
        module.__class__ = SplitMultiheadAttention
        module._qkv_same_embed_dim = False  # torch checks it before it reads weights in a fused operator
        for name, weight, of_bias in zip(_PROJECTIONS, weights, biases, strict=True):
            with torch.device("meta"):
                layer = Projection(weight.shape[1], weight.shape[0], bias=bias is not None)
            layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
            if bias is not None:
                layer.bias = nn.Parameter(of_bias.detach(), bias.requires_grad)
            module.add_module(name, layer.train(module.training))
    pad_only(model, SplitMultiheadAttention)


def join_attention(model: nn.Module) -> None:
    """Turn each attention whose layers are float back into an nn.MultiheadAttention, in place.

    Args:
        model: The model.
    """
    for module in model.modules():
        if not isinstance(module, SplitMultiheadAttention) or not module.is_float:
            continue
        found = module.parameters_of()
        for name in _PROJECTIONS:
            delattr(module, name)
        module.__class__ = nn.MultiheadAttention
        module._qkv_same_embed_dim = "in_proj_weight" in found
        for name in (*(f"{name}_weight" for name in _PROJECTIONS), "in_proj_weight", "in_proj_bias"):
            module.register_parameter(name, found.get(name))
