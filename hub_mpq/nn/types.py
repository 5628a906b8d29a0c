"""Which modules have a quantized form: those whose exact type a LayerKind names.

Modules are never matched with isinstance: timm's StdConv2d is an nn.Conv2d with its own forward, which would silently
change.
"""

from __future__ import annotations

import torch
from torch import nn

from ..core.layer_kind import LayerKind, layer_kinds

_REASONS: dict[str, str] = {
    "torch.nn.modules.activation.MultiheadAttention": "its query, key and value weights are shared with another module "
    "or recomputed at each call",
}

_FAMILIES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.RNNBase, "recurrent layers have no quantized form: one operator reads all of their weights"),
    (nn.RNNCellBase, "recurrent cells have no quantized form: one operator reads both of their weights"),
    (nn.EmbeddingBag, "EmbeddingBag layers have no quantized form"),
    (nn.Bilinear, "bilinear layers have no quantized form"),
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's Parameters, or of its buffers if it has none; the CPU for a model with neither."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def type_name(module: nn.Module) -> str:
    """The qualified name of the module's exact type, such as "torch.nn.modules.conv.Conv2d"."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind of a quantizable layer; None for every other module (see `why_not`)."""
    kind = _kind_of_type(type_name(module))
    return None if kind is None or _odd(module) else kind


def _kind_of_type(name: str) -> LayerKind | None:
    return next((kind for kind in layer_kinds if name in kind.types), None)


def _odd(module: nn.Module) -> str:
    """Why this particular module of a known type cannot be quantized, or ""."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a Parameter but computed by a hook (weight_norm, spectral_norm)"
    if not weight.is_floating_point():
        return f"its weight has dtype {weight.dtype}, which is not floating point"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it renormalises its weight while it runs (max_norm)"
    return ""


def why_not(module: nn.Module, default: str = "") -> str:
    """Why a module with its own weights has no quantized form, in a few words; "" if it has one.

    Args:
        module: The module.
        default: The answer for an unknown type.
    """
    name = type_name(module)
    if _kind_of_type(name) is not None:
        return _odd(module)
    if name in _REASONS:
        return _REASONS[name]
    for base, reason in _FAMILIES:
        if isinstance(module, base):
            return reason
    for plain in (*_CONVOLUTIONS, nn.Linear, nn.Embedding):
        if isinstance(module, plain):
            if type(module).forward is plain.forward:
                return f"{type(module).__name__} is an unknown subclass of nn.{plain.__name__}"
            return f"{type(module).__name__} is a subclass of nn.{plain.__name__} with its own forward"
    return default or f"no quantized form of {type(module).__name__} is known"
