"""Weights that a model computes with in a way of its own become layers, which are quantized as all layers are.

What is exposed: experts that transformers keeps stacked in one Parameter (experts.py).
"""

from __future__ import annotations

from torch import nn

from .experts import conceal_experts, expose_experts, has_stacked_experts


def has_layers_to_expose(model: nn.Module) -> bool:
    """Whether `expose_layers` would change a model.

    Args:
        model: The model.
    """
    return has_stacked_experts(model)


def expose_layers(model: nn.Module) -> None:
    """Make layers of the weights that a float model computes with in a way of its own, in place.

    The float function stays the same, and so do the names of the state dict. Does nothing to what are layers already.
    `conceal_layers` undoes it for layers that are still float.

    Args:
        model: The model.
    """
    expose_experts(model)


def conceal_layers(model: nn.Module) -> None:
    """Undo `expose_layers` for the layers that are float, in place.

    Args:
        model: The model.
    """
    conceal_experts(model)
