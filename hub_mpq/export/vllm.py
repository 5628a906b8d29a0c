"""What vLLM supports of compressed-tensors, according to its source; loading in vLLM was not tested."""

from __future__ import annotations

from dataclasses import replace

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec
from ..core.target import Target
from ..pack import Manifest

GROUP_SIZES = (None, 32, 64, 128)


class VLLM(Target):
    """compressed-tensors' pack-quantized weights, for vLLM.

    Weights of 2 to 8 bits, with one scale per output channel or per group of 32, 64 or 128 weights (which must divide
    the rows), with or without zero points. q, k, v and gate, up are computed as one matrix. This follows the format and
    vLLM's source; loading in vLLM was not tested.
    """

    name = "vllm"
    tied = True

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        if layer.kind not in ("linear", "embedding"):
            return ()
        sizes = [size for size in GROUP_SIZES if size is None or layer.weight_shape[1] % size == 0]
        return tuple(sorted(LayerBits(b, FLOAT_BITS, g, s) for b in range(2, 9) for g in sizes for s in (True, False)))

    def notes(self, graph: LayerGraph) -> tuple[str, ...]:
        shared = {layer.weight_owner for layer in graph}
        stored = [layer.name for layer in graph if layer.kind == "embedding" or layer.name in shared]
        if not stored:
            return ()
        return (
            f"{stored[0]} is written dequantized, because compressed-tensors cannot load packed embeddings or tied "
            f"heads; leave it float with exclude=[{stored[0]!r}].",
        )


def unequal_inputs(manifest: Manifest) -> list[list[str]]:
    """Find layers that share an input (q, k, v; gate, up) but are stored at different bit-widths or groups.

    transformers computes them separately, but vLLM as one matrix, so it can load a policy only without such layers.

    Args:
        manifest: The manifest of the packed model.

    Returns:
        The names of the layers of each such group.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.export import unequal_inputs
        >>> from hub_mpq.pack import Manifest
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> graph = HubMPQ.from_module(net, torch.zeros(1, 32)).graph
        >>> unequal_inputs(Manifest("net", None, "module", graph, Policy.uniform(graph, "W4A8")))
        []
    """
    stored = stored_bits(manifest)
    groups: dict[str, list[str]] = {}
    for layer in manifest.graph:
        if layer.activation_tie is not None:
            groups.setdefault(layer.activation_tie, []).append(layer.name)
    return [names for names in groups.values() if len({stored[name] for name in names}) > 1]


def unread_inputs(manifest: Manifest) -> str | None:
    """Explain why vLLM cannot load a policy that quantizes inputs.

    Args:
        manifest: The manifest of the packed model.

    Returns:
        The reason; None if vLLM can load it, or if all inputs are float.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hub_mpq import HubMPQ, Policy
        >>> from hub_mpq.export import unread_inputs
        >>> from hub_mpq.pack import Manifest
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> graph = HubMPQ.from_module(net, torch.zeros(1, 32)).graph
        >>> unread_inputs(Manifest("net", None, "module", graph, Policy.uniform(graph, "W4A4")))
        'it supports only 8-bit inputs, and weights with one scale per output channel'
        >>> unread_inputs(Manifest("net", None, "module", graph, Policy.uniform(graph, "W4A8")))
    """
    bits = manifest.policy.bits
    inputs = [layer for layer in manifest.graph if bits[layer.name].activation != FLOAT_BITS]
    if heads := [layer.name for layer in inputs if layer.weight_owner is not None]:
        pin = f"fixed={{{heads[0]!r}: 'W{bits[heads[0]].weight}'}}"
        return f"the input of {heads[0]!r}, which is tied to an embedding, is quantized; leave it float with {pin}"
    if any(bits[layer.name].activation != 8 or bits[layer.name].grouped for layer in inputs):
        return "it supports only 8-bit inputs, and weights with one scale per output channel"
    return None


def in_int8(manifest: Manifest) -> bool:
    """Whether inputs are quantized and vLLM has kernels for all of them; then their layers' weights are stored at 8
    bits, whatever their bit-width."""
    inputs = any(bits.activation != FLOAT_BITS for bits in manifest.policy.bits.values())
    return inputs and unread_inputs(manifest) is None


def stored_bits(manifest: Manifest) -> dict[str, LayerBits]:
    """{layer: bit-widths it is stored at}: weights of at least 2 bits, or of 8 if `in_int8` and the input is
    quantized."""
    int8 = in_int8(manifest)
    return {
        name: LayerBits(8, 8) if int8 and bits.activation != FLOAT_BITS else replace(bits, weight=max(bits.weight, 2))
        for name, bits in manifest.policy.bits.items()
    }
