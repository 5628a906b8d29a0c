"""Dequantized weights for the float model, which then computes with the quantized values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..core.library import Library
from ..nn.expose import names_of_parameters
from ..nn.packed import packed_layers
from ..nn.packing import float_state, layer_names
from ..nn.quantize import quantized_layers
from ..pack.layout import INPUT_PARTS, WEIGHT_PARTS, key


@torch.no_grad()
def float_copy_state(model: nn.Module, library: Library) -> dict[str, Tensor]:
    """State dict of the float model with dequantized weights: contiguous CPU tensors that do not share memory.

    Names and dtypes are those that the library reads from model.safetensors: quantizers are omitted, a tied weight
    occurs once if transformers ties it again, and names that the library changes on loading are changed back
    (otherwise a plain load would find no weights and initialise them randomly). Activations are not quantized.

    Args:
        model: The quantized network, with quantizers or packed weights.
        library: The library whose naming is used.

    Returns:
        {name on disk: tensor}.
    """
    state = float_state(model)
    quantized, packed = dict(quantized_layers(model)), dict(packed_layers(model))
    weights = {name: module.weight_quantizer(module.weight) for name, module in quantized.items()}
    weights |= {name: module.weight for name, module in packed.items() if not module.owner}
    for name, first in layer_names(model, [*quantized, *packed]).items():
        if first in packed:
            for part in (*WEIGHT_PARTS, *INPUT_PARTS):
                state.pop(key(name, part), None)
        if first in weights:
            state[key(name, "weight")] = weights[first]
    return {k: v.detach().cpu().contiguous().clone() for k, v in _on_disk(model, state, library).items()}


def float_copy_shapes(model: Any, library: Library) -> dict[str, Tensor]:
    """The same tensors on the meta device, of a transformers model in any state."""
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    return _on_disk(skeleton, skeleton.state_dict(), library)


def _on_disk(model: nn.Module, state: dict[str, Tensor], library: Library) -> dict[str, Tensor]:
    """A float state dict with the names on disk, and tied weights once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {k: v for k, v in state.items() if tied.get(k) not in state}
    return library.names_on_disk(model, names_of_parameters(model, state))
