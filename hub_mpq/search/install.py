"""Put any kind of quantizers into the searched layers of a model, and see what those layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import LayerGraph, LayerSpec
from ..nn.swap import quantize_layer
from ..train.batch import forward

SAMPLE = 1 << 16  # values kept per layer and batch, as LIMPQ's calibration does

Made = tuple[nn.Module, "nn.Module | None"]


def install(model: nn.Module, graph: LayerGraph, make: Callable[[LayerSpec, nn.Module], Made]) -> dict[str, nn.Module]:
    """Quantize every searched layer in place with what `make(layer, module)` gives: (weight, input) quantizers.

    Layers that share a Parameter share the weight quantizer. Returns {name: quantized layer} in the order they run.
    """
    made: dict[str, nn.Module] = {}
    for layer in sorted(graph.searched, key=lambda x: x.weight_owner is not None):
        parent, _, leaf = layer.name.rpartition(".")
        owner = model.get_submodule(parent)
        weight, activation = make(layer, getattr(owner, leaf))
        weight = made.get(layer.weight_owner or "", weight)
        made[layer.name] = weight
        inputs = None if layer.weight_only else activation
        setattr(owner, leaf, quantize_layer(getattr(owner, leaf), layer.name, weight, inputs))  # type: ignore[arg-type]
    return {layer.name: model.get_submodule(layer.name) for layer in graph.searched}


@torch.no_grad()
def layer_inputs(model: nn.Module, graph: LayerGraph, batches: Iterable[Any]) -> dict[str, Tensor]:
    """{searched layer: evenly spaced sample of the values it reads}, float32, from forwards in eval mode."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for layer in graph.searched:
        if layer.weight_only:
            continue

        def hook(_module: nn.Module, args: tuple[Any, ...], name: str = layer.name) -> None:
            flat = args[0].detach().flatten()
            found.setdefault(name, []).append(flat[:: max(flat.numel() // SAMPLE, 1) | 1].float())

        handles.append(model.get_submodule(layer.name).register_forward_pre_hook(hook))
    training = model.training
    model.eval()
    try:
        for batch in batches:
            forward(model, batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def signed_inputs(inputs: Mapping[str, Tensor]) -> dict[str, bool]:
    """{layer: whether it reads negative values}."""
    return {name: bool((x < 0).any()) for name, x in inputs.items()}
