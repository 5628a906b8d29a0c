"""What vLLM takes of a compressed-tensors file, read in its source; no load by it was tried."""

from __future__ import annotations

from dataclasses import replace

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec
from ..core.target import Target
from ..pack import Manifest

GROUP_SIZES = (None, 32, 64, 128)


class VLLM(Target):
    """compressed-tensors' pack-quantized weights, for vLLM.

    Widths of 2 to 8 bits, one scale per output channel or per group of 32, 64 or 128 weights that fills the rows, with
    and without zero points. q, k, v and gate, up are computed as one matrix. What the format and vLLM's source allow;
    no load by vLLM was tried.
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
            f"{stored[0]} is written dequantized, in float: compressed-tensors loads no packed embedding or tied head; "
            f"leave it float with exclude=[{stored[0]!r}].",
        )


def unequal_inputs(manifest: Manifest) -> list[list[str]]:
    """Groups of layers that read one input (q, k, v; gate, up) and are stored in different forms.

    transformers computes them apart; vLLM as one matrix, and so reads a policy only where there is no such group.
    """
    stored = stored_bits(manifest)
    groups: dict[str, list[str]] = {}
    for layer in manifest.graph:
        if layer.activation_tie is not None:
            groups.setdefault(layer.activation_tie, []).append(layer.name)
    return [names for names in groups.values() if len({stored[name] for name in names}) > 1]


def unread_inputs(manifest: Manifest) -> str | None:
    """Why vLLM cannot load a policy that quantizes inputs; None where it can, or where all inputs are float."""
    bits = manifest.policy.bits
    inputs = [layer for layer in manifest.graph if bits[layer.name].activation != FLOAT_BITS]
    if heads := [layer.name for layer in inputs if layer.weight_owner is not None]:
        pin = f"fixed={{{heads[0]!r}: 'W{bits[heads[0]].weight}'}}"
        return f"{heads[0]!r} shares the weight of an embedding, and its input is quantized; {pin} leaves that float"
    if any(bits[layer.name].activation != 8 or bits[layer.name].grouped for layer in inputs):
        return "it computes integers of 8-bit inputs, and of weights with one scale for each output channel, alone"
    return None


def in_int8(manifest: Manifest) -> bool:
    """Whether inputs are quantized and vLLM has kernels for all of them; their layers' weights are then stored in 8
    bits, whatever their width."""
    inputs = any(bits.activation != FLOAT_BITS for bits in manifest.policy.bits.values())
    return inputs and unread_inputs(manifest) is None


def stored_bits(manifest: Manifest) -> dict[str, LayerBits]:
    """{layer: what it is stored as}: weights of at least 2 bits, or of 8 where inputs are `in_int8`."""
    int8 = in_int8(manifest)
    return {
        name: LayerBits(8, 8) if int8 and bits.activation != FLOAT_BITS else replace(bits, weight=max(bits.weight, 2))
        for name, bits in manifest.policy.bits.items()
    }
