"""Weights that a layer computes anew at each call, computed once: the layer becomes a plain one with that weight.

These are weight normalization and spectral normalization of torch, in both of their forms, and the convolutions of timm
and transformers that standardise their weight. The float function stays the same up to rounding; what the weight was
computed from is no part of the model any more.
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
    """What a plain layer was made of.

    Attributes:
        form: "weight_norm", "spectral_norm" or the name of a class of convolutions.
        hook: Of a norm: whether it was a hook, torch's older form, and not a parametrization.
        dim: Of weight normalization: the axis whose slices have a magnitude of their own.
    """

    form: str
    hook: bool = False
    dim: int | None = None

    @property
    def is_standardized(self) -> bool:
        """Whether it was a convolution that standardises its weight."""
        return self.form not in ("weight_norm", "spectral_norm")


def _hook_of(module: nn.Module) -> Any:
    """The hook that computes the weight of a layer, and nothing else of it, before each call; None."""
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if _named(hook) in _HOOKS]
    return hooks[0] if [hook.name for hook in hooks] == ["weight"] else None


def _named(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _foldable(module: nn.Module) -> Folded | None:
    """What would be folded into the weight of a module; None: it is no such layer, or not of a known kind."""
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
    """Compute the weights of layers once, in place, and make plain layers of them, which `folded_layers` finds.

    Their Parameters are not written into, so that another model may hold them too. Of a model on the meta device the
    shapes are folded.

    Args:
        model: The model. It must not be such a layer itself.
    """
    found = [(name, module, what) for name, module in model.named_modules() if (what := _foldable(module)) is not None]
    for name, module, what in found:
        new = _standardized(module) if what.is_standardized else _normalized(module, what)
        new.folded = what
        replace_layer(model, name, new)


def _plain(cls: type[nn.Module], module: nn.Module, weight: Tensor, needs_grad: bool) -> Any:
    """A layer of another class with the rest of a module; its weight comes first."""
    out = take_over(cls, module)
    out._parameters.pop("weight", None)
    vars(out).pop("weight", None)
    parameter = nn.Parameter(weight.detach().clone(), requires_grad=needs_grad)
    out._parameters = {"weight": parameter, **out._parameters}
    return out


def _standardized(module: Any) -> nn.Module:
    """A convolution with the weight that one of `_STANDARDIZED` computes, and its padding."""
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
    """A layer with the weight that a norm computes of its Parameters, as in evaluation."""
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
    """A module without the hooks that torch's norms put on it."""
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        # torch wraps those of loading
        for key in [k for k, h in hooks.items() if getattr(h, "hook", h).__module__ in _HOOK_MODULES]:
            del hooks[key]
    return module


def folded_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Folded]]:
    """(name, layer, what it was made of) of all layers that were folded, float, quantized or packed.

    Args:
        model: The model.
    """
    for name, module in model.named_modules():
        if (what := vars(module).get("folded")) is not None:
            yield name, module, what


def fold_notes(model: nn.Module) -> list[str]:
    """What was folded, in sentences for a report.

    Args:
        model: The model.
    """
    counts = Counter(what.form for _, _, what in folded_layers(model))
    return [f"folded: the weights of {n} layer{'s' * (n > 1)} are computed once ({form})" for form, n in counts.items()]


def check_folded(model: nn.Module, floats: Iterable[FloatOp]) -> str | None:
    """Why a file that says what stayed float can't be read into a model; None where it can.

    Files of before 2026-11-28 hold standardised convolutions as they were, under the same name.

    Args:
        model: The model.
        floats: What stayed float.
    """
    there = {name: what for name, _, what in folded_layers(model) if what.is_standardized}
    old = [op.name for op in floats if op.name in there and op.kind == there[op.name].form]
    return f"layer {old[0]!r} is of before weights were folded; quantize the float model anew" if old else None


def why_not_unfolded(model: nn.Module) -> str | None:
    """Why no float weights make the model's own class compute what the model computes; None where some do.

    Args:
        model: The model.
    """
    for name, _, what in folded_layers(model):
        if what.form != "weight_norm":
            return (
                f"layer {name!r} computes its weight ({what.form}), so no float weights make a {type(model).__name__} "
                "compute with the quantized ones; the packed file does"
            )
    return None


@torch.no_grad()
def unfolded_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A float state dict as the model's own class reads it: weight normalization has its two tensors again.

    Args:
        model: The model, whatever form its layers have.
        state: {name: tensor}.

    Raises:
        HubMPQError: A weight was computed in a way that can't be turned round.
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
    """The norm of each slice along an axis, as torch's weight normalization keeps it; -1: of all."""
    return torch.norm_except_dim(weight, 2, -1 if dim is None else dim)


def _direction(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The weight; ones where the magnitude is zero, for weight normalization divides by the norm of what is here."""
    return torch.where(magnitude == 0, torch.ones_like(weight), weight)


@torch.no_grad()
def unfold_layers(model: nn.Module) -> None:
    """Give weight normalization back to the layers that had it, in place, so that the state dict is that of the model's
    own class; warns of layers where that can't be.

    Args:
        model: A model all of whose folded layers are float.
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
            f"{len(kept)} layers, {kept[0][0]!r} first, keep the weight that {kept[0][1]} computed: don't load this "
            f"state dict into another {type(model).__name__}, which would compute with it once more",
            stacklevel=3,
        )
