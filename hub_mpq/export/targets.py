"""The target of vLLM: what it takes of a compressed-tensors file."""

from __future__ import annotations

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec
from ..core.target import Target

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
