"""Turn weights that a model uses without calling a layer into layers, which can then be quantized like all others.

Exposed are experts that transformers stacks in one Parameter, attention projections whose weights are read without a
call, timm's query-key-value layers whose weight is read with a separate bias, and the layers of state space mixers,
which a fused kernel may read in training. Layers that recompute their weight at each call are folded (`fold.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .experts import Stack, conceal_experts, expose_experts, has_stacked_experts
from .fold import fold_layers, has_layers_to_fold, unfolded_state
from .multihead_attention import (
    Projection,
    SplitMultiheadAttention,
    has_fused_attention,
    join_attention,
    split_attention,
)
from .split_experts import SplitStack
from .types import type_name
from .unfused import call_layers_in_training, fused_mixers

_WAVLM = "transformers.models.wavlm.modeling_wavlm.WavLMAttention"


def _separate_biases(model: nn.Module) -> Iterator[Any]:
    """Modules of timm that read the weight of their layer `qkv` with a bias built from separate Parameters, unless
    configured to call the layer and add the bias (BEiT, EVA, Swin v2)."""
    for module in model.modules():
        told = vars(module).get("qkv_bias_separate")
        if told is False and type(module).__module__.startswith("timm."):
            yield module


def _wavlm(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if type_name(module) == _WAVLM)


def has_layers_to_expose(model: nn.Module) -> bool:
    """Whether `expose_layers` would change a model.

    Args:
        model: The model.
    """
    if has_layers_to_fold(model) or has_stacked_experts(model) or has_fused_attention(model):
        return True
    readers = (_separate_biases(model), _wavlm(model), fused_mixers(model))
    return any(next(found, None) is not None for found in readers)


def expose_layers(model: nn.Module) -> None:
    """Turn weights that a float model uses without calling a layer into layers, in place.

    The float function stays the same up to the order of sums (at padded positions nn.TransformerEncoder returns the
    values of training mode, where its nested path returns zeros). The names in the state dict stay the same too, except
    for folded layers, which have a plain weight. Existing layers are not changed. `conceal_layers` undoes it where
    names of Parameters have changed and all layers are float.

    Args:
        model: The model.
    """
    fold_layers(model)
    expose_experts(model)
    split_attention(model)
    call_layers_in_training(model)
    for module in _separate_biases(model):
        module.qkv_bias_separate = True
    for module in _wavlm(model):
        from .wavlm_attention import CallingWavLMAttention

        module.__class__ = CallingWavLMAttention
        for layer in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            if type(layer) is nn.Linear:
                layer.__class__ = Projection


def conceal_layers(model: nn.Module) -> None:
    """Turn exposed layers that are float back into Parameters, in place.

    Args:
        model: The model.
    """
    conceal_experts(model)
    join_attention(model)


def names_of_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of float weights in which exposed layers have the names of their original Parameters.

    Args:
        model: The model, with quantized or packed layers.
        state: {name of a layer + ".weight", or any other name: tensor}.

    Raises:
        HubMPQError: A folded weight cannot be converted back.
    """
    out = unfolded_state(model, state)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Stack):
            module.to_parameter(out, name)
        elif isinstance(module, SplitMultiheadAttention):
            module.to_parameters(out, name)
    return out


def layers_in_state(model: nn.Module, state: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """The state dict of a float model with the entries it has once `layers` are quantized: a Parameter that contains
    one of them is split into its parts."""
    out = dict(state)
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = first.setdefault(module, name)  # only the first name of a module has entries
        if isinstance(module, SplitStack) and name in out:
            parts: dict[str, Any] = {f"{own}.{i}": layer.weight for i, layer in module.named_children()}
            if not parts.keys().isdisjoint(layers):
                del out[name]
                out.update(parts)
        elif isinstance(module, SplitMultiheadAttention) and module.is_float:
            prefix, of_layers = (f"{n}." if n else "" for n in (name, own))
            if any(f"{of_layers}{layer}" in layers for layer in module.layers):
                for parameter in module.parameters_of():
                    out.pop(f"{prefix}{parameter}", None)
                out.update(module.state_of_layers(of_layers))
    return out
