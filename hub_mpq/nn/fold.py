"""Fold weights that a layer recomputes at each call: they are computed once, and the layer becomes a plain one.

This covers torch's weight and spectral normalization, in both of their forms, and the convolutions of timm and
transformers that standardise their weight. The float function stays the same up to rounding; the tensors that the
weight was computed from are removed from the model.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import FloatOp
from ..core.layer_kind import layer_kinds
from ..errors import HubMPQError
from .layers import replace_layer, take_over
from .types import type_name

_STANDARDIZED = (
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
    "transformers.models.bit.modeling_bit.WeightStandardizedConv2d",
)
_NORMS = "torch.nn.utils.parametrizations."
_HOOKS = ("torch.nn.utils.weight_norm.WeightNorm", "torch.nn.utils.spectral_norm.SpectralNorm")
_HOOK_MODULES = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm", "torch.nn.utils.parametrizations")


class Folded(NamedTuple):
    """The original form of a folded layer.

    Attributes:
        form: "weight_norm", "spectral_norm" or the name of a convolution class.
        hook: For norms: whether it was a hook, torch's older form, rather than a parametrization.
        dim: For weight normalization: the axis whose slices have separate magnitudes.
    """

    form: str
    hook: bool = False
    dim: int | None = None

    @property
    def is_standardized(self) -> bool:
        """Whether it was a convolution that standardises its weight."""
        return self.form not in ("weight_norm", "spectral_norm")


def _hook_of(module: nn.Module) -> Any:
    """The hook that computes the weight of a layer, and nothing else, before each call; None if there is none."""
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if _named(hook) in _HOOKS]
    return hooks[0] if [hook.name for hook in hooks] == ["weight"] else None


def _named(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _foldable(module: nn.Module) -> Folded | None:
    """What would be folded into the weight of a module; None if it is not such a layer or not of a known kind."""
    name = type_name(module)
    if name in _STANDARDIZED:
        return Folded(type(module).__name__)
    if (lists := module._modules.get("parametrizations")) is not None:
        base = type(module).__mro__[1]
        if set(lists._modules) != {"weight"} or not _is_kind(f"{base.__module__}.{base.__qualname__}"):
            return None
        norms = list(lists.weight)  # type: ignore[arg-type]
        if len(norms) != 1 or _named(norms[0]) not in (f"{_NORMS}_WeightNorm", f"{_NORMS}_SpectralNorm"):
            return None
        weight = _named(norms[0]).endswith("_WeightNorm")
        return Folded("weight_norm", dim=norms[0].dim) if weight else Folded("spectral_norm")
    if _is_kind(name) and (hook := _hook_of(module)) is not None:
        return Folded("weight_norm", True, hook.dim) if _named(hook) == _HOOKS[0] else Folded("spectral_norm", True)
    return None


def _is_kind(name: str) -> bool:
    return any(name in kind.types for kind in layer_kinds)


def has_layers_to_fold(model: nn.Module) -> bool:
    """Whether `fold_layers` would change a model.

    Args:
        model: The model.
    """
    return any(_foldable(module) is not None for module in model.modules())


@torch.no_grad()
def fold_layers(model: nn.Module) -> None:
    """Compute the weights of layers once and turn them into plain layers, in place; `folded_layers` finds them.

    Their Parameters are not written to, so another model may hold them too. On the meta device, only shapes are folded.

    Args:
        model: The model. It must not be such a layer itself.
    """
    found = [(name, module, what) for name, module in model.named_modules() if (what := _foldable(module)) is not None]
    for name, module, what in found:
        new = _standardized(module) if what.is_standardized else _normalized(module, what)
        new.folded = what
        replace_layer(model, name, new)


def _plain(cls: type[nn.Module], module: nn.Module, weight: Tensor, needs_grad: bool) -> Any:
    """A layer of another class with all other attributes of a module; its weight comes first."""
    out = take_over(cls, module)
    out._parameters.pop("weight", None)
    vars(out).pop("weight", None)
    parameter = nn.Parameter(weight.detach().clone(), requires_grad=needs_grad)
    out._parameters = {"weight": parameter, **out._parameters}
    return out


def _standardized(module: Any) -> nn.Module:
    """A convolution with the weight and the padding of one of `_STANDARDIZED`."""
    from timm.layers import Conv2dSame

    gain = module._parameters.get("gain")
    flat = module.weight.reshape(1, module.out_channels, -1)
    factor = None if gain is None else (gain * module.scale).view(-1)
    weight = F.batch_norm(flat, None, None, weight=factor, training=True, momentum=0.0, eps=module.eps)
    same = getattr(module, "same_pad", False) or module._modules.get("pad") is not None
    out = _plain(Conv2dSame if same else nn.Conv2d, module, weight.view_as(module.weight), module.weight.requires_grad)
    out._parameters.pop("gain", None)
    out._modules.pop("pad", None)
    for name in ("eps", "scale", "gain_init", "same_pad", "pad"):
        vars(out).pop(name, None)
    return out  # type: ignore[no-any-return]


def _normalized(module: Any, what: Folded) -> nn.Module:
    """A layer with the weight that a norm computes from its Parameters in evaluation mode."""
    if not what.hook:
        norms = module.parametrizations.weight
        training = norms.training
        try:
            weight = norms.eval()()
        finally:
            norms.train(training)
        out = _plain(type(module).__mro__[1], module, weight, any(p.requires_grad for p in norms.parameters()))
        del out._modules["parametrizations"]
        return _without_hooks(out)
    hook = _hook_of(module)
    spectral = what.form == "spectral_norm"
    weight = hook.compute_weight(module, do_power_iteration=False) if spectral else hook.compute_weight(module)
    parts = ("weight_orig",) if spectral else ("weight_g", "weight_v")
    out = _plain(type(module), module, weight, any(module._parameters[part].requires_grad for part in parts))
    for part in (*parts, "weight_u", "weight_v"):
        out._parameters.pop(part, None)
        out._buffers.pop(part, None)
    return _without_hooks(out)


def _without_hooks(module: nn.Module) -> nn.Module:
    """Remove the hooks of torch's norms from a module."""
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        # torch wraps the loading hooks
        for key in [k for k, h in hooks.items() if getattr(h, "hook", h).__module__ in _HOOK_MODULES]:
            del hooks[key]
    return module


def folded_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Folded]]:
    """(name, layer, its original form) of all folded layers, float, quantized or packed.

    Args:
        model: The model.
    """
    for name, module in model.named_modules():
        if (what := vars(module).get("folded")) is not None:
            yield name, module, what


def fold_notes(model: nn.Module) -> list[str]:
    """The notes of a report on what was folded.

    Args:
        model: The model.
    """
    counts = Counter(what.form for _, _, what in folded_layers(model))
    return [f"folded: weights of {n} layer{'s' * (n > 1)} computed once ({form})" for form, n in counts.items()]


def check_folded(model: nn.Module, floats: Iterable[FloatOp]) -> str | None:
    """Why a file with these float operations cannot be loaded into a model; None if it can.

    Files from before 2026-11-28 hold standardised convolutions unfolded, under the same name.

    Args:
        model: The model.
        floats: The float operations listed in the file.
    """
    there = {name: what for name, _, what in folded_layers(model) if what.is_standardized}
    old = [op.name for op in floats if op.name in there and op.kind == there[op.name].form]
    return f"layer {old[0]!r} was saved before weights were folded; quantize the float model again" if old else None


def why_not_unfolded(model: nn.Module) -> str | None:
    """Why no float weights make the model's own class compute the same as the model; None if some do.

    Args:
        model: The model.
    """
    for name, _, what in folded_layers(model):
        if what.form != "weight_norm":
            return (
                f"layer {name!r} computes its weight ({what.form}), so the quantized weights cannot be written as "
                f"float weights of {type(model).__name__}; use the packed file"
            )
    return None


@torch.no_grad()
def unfolded_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float state dict for the model's own class, with the two tensors of weight normalization restored.

    Args:
        model: The model, with float, quantized or packed layers.
        state: {name: tensor}.

    Raises:
        HubMPQError: A weight was computed in a way that cannot be inverted.
    """
    if (why := why_not_unfolded(model)) is not None:
        raise HubMPQError(why)
    out = dict(state)
    for name, _, what in folded_layers(model):
        prefix = f"{name}." if name else ""
        if f"{prefix}weight" not in out:
            continue
        weight = out.pop(f"{prefix}weight")
        first, second = (
            ("weight_g", "weight_v") if what.hook else (f"parametrizations.weight.original{i}" for i in (0, 1))
        )
        out[f"{prefix}{first}"] = magnitude = _magnitude(weight, what.dim)
        out[f"{prefix}{second}"] = _direction(weight, magnitude)
    return out


def _magnitude(weight: Tensor, dim: int | None) -> Tensor:
    """The norm of each slice along an axis, in the shape of torch's weight normalization; None for one norm of all."""
    return torch.norm_except_dim(weight, 2, -1 if dim is None else dim)


def _direction(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The weight, with ones where the magnitude is zero, because weight normalization divides by the norm of this."""
    return torch.where(magnitude == 0, torch.ones_like(weight), weight)


@torch.no_grad()
def unfold_layers(model: nn.Module) -> None:
    """Restore weight normalization in the layers that had it, in place, so that the state dict fits the model's own
    class; warns about layers that cannot be restored.

    Args:
        model: A model whose folded layers are all float.
    """
    kept = []
    for name, module, what in list(folded_layers(model)):
        if what.form != "weight_norm":
            kept.append((name, what.form))
            continue
        del module.folded
        norm: Callable[..., Any] = nn.utils.weight_norm if what.hook else nn.utils.parametrizations.weight_norm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm(module, "weight", what.dim)
        both: Any = module if what.hook else module.parametrizations.weight  # type: ignore[union-attr]
        first, second = ("weight_g", "weight_v") if what.hook else ("original0", "original1")
        getattr(both, second).copy_(_direction(getattr(both, second), getattr(both, first)))
    if kept:
        warnings.warn(
            f"{len(kept)} layers (first {kept[0][0]!r}) keep the weight computed by {kept[0][1]}; do not load this "
            f"state dict into another {type(model).__name__}, which would apply {kept[0][1]} a second time",
            stacklevel=3,
        )
