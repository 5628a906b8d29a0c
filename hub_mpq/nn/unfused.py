"""State space mixers of transformers pass the weights of their layers to a fused kernel in training, if installed. This
module makes them call their layers instead, as in evaluation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

_KERNELS = ("mamba_inner_fn", "mamba2_split_conv1d_scan_combined", "mamba_split_conv1d_scan_combined")


def _as_evaluated(module: Any, args: Any) -> None:
    """A forward pre-hook that puts the mixer itself, but none of its layers, in evaluation mode."""
    module.training = False


def _as_before(module: Any, args: Any, output: Any) -> None:
    """A forward hook that restores the mode of the mixer."""
    module.training = module.out_proj.training


def fused_mixers(model: nn.Module) -> Iterator[nn.Module]:
    """The mixers that may still use the fused kernel.

    Args:
        model: The model.
    """
    for module in model.modules():
        home = type(module).__module__
        if not home.startswith("transformers.models.") or _as_evaluated in module._forward_pre_hooks.values():
            continue
        layers = {"in_proj", "conv1d", "out_proj"} <= module._modules.keys()
        if layers and any(hasattr(sys.modules[home], name) for name in _KERNELS):
            yield module


def call_layers_in_training(model: nn.Module) -> None:
    """Keep the mixers of a model from reading the weights of their layers, in place.

    Args:
        model: The model.
    """
    for module in list(fused_mixers(model)):
        module.register_forward_pre_hook(_as_evaluated)
        module.register_forward_hook(_as_before, always_call=True)
