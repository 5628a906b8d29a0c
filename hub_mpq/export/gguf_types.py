"""Tensor types of GGUF files as choices of a policy, their sizes, and the target that offers them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec
from ..core.target import Target

ALIGNMENT = 32
"""The data of each tensor is padded to a multiple of this many bytes."""
GROUP = 32
"""Weights per block of the types that hub_mpq writes."""
SUPER_BLOCK = 256
"""Weights per block of the K-quants."""


@dataclass(frozen=True)
class TensorType:
    """A type of quantized tensors.

    Args:
        name: GGUF's name of the type.
        bits: The grid whose score is used for the type; the type's own grid if `exact`.
        block: Weights per block; a row must consist of whole blocks.
        block_nbytes: Bytes per block.
        exact: Whether `bits` is the type's grid, so that weights are written exactly; with zero points, up to the
            rounding of each block's minimum to float16.
    """

    name: str
    bits: LayerBits
    block: int
    block_nbytes: int
    exact: bool


def _type(name: str, weight: int, nbytes: int, *, group: int = GROUP, symmetric: bool = True) -> TensorType:
    k = name.endswith("_K")
    bits = LayerBits(weight, FLOAT_BITS, group, symmetric)
    return TensorType(name, bits, SUPER_BLOCK if k else GROUP, nbytes, not k)


TYPES = (
    _type("Q2_K", 2, 84, group=16, symmetric=False),
    _type("Q3_K", 3, 110, group=16),
    _type("Q4_K", 4, 144, symmetric=False),
    _type("Q5_K", 5, 176, symmetric=False),
    _type("Q6_K", 6, 210, group=16),
    _type("Q4_0", 4, 18),
    _type("Q4_1", 4, 20, symmetric=False),
    _type("Q5_0", 5, 22),
    _type("Q5_1", 5, 24, symmetric=False),
    _type("Q8_0", 8, 34),
)
"""All types of the menu, with the sizes of llama.cpp's blocks (ggml-common.h). If a K-quant fits a layer, it is used
for its grid, because it is smaller than the older type."""


def types_of(layer: LayerSpec) -> dict[LayerBits, TensorType]:
    """{choice: type} of a layer's weight, for the types whose blocks fill its rows; empty for layers that are neither
    Linear nor Embedding."""
    if layer.kind not in ("linear", "embedding"):
        return {}
    out: dict[LayerBits, TensorType] = {}
    for one in TYPES:
        if layer.weight_shape[1] % one.block == 0:
            out.setdefault(one.bits, one)
    return dict(sorted(out.items()))


def padded(nbytes: int) -> int:
    """Size of a tensor's data in a file, with padding."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class GGUF(Target):
    """A GGUF file for llama.cpp and programs built on it, with a type for each tensor.

    The score of a choice is that of its nearest grid, and its cost is the type's own size; this is our construction.
    Q4_0, Q5_0 and Q8_0 are exactly hub_mpq's symmetric grids with groups of 32, and Q4_1 and Q5_1 those with zero
    points. K-quants, whose scales are quantized again, are scored by the grid of their inner blocks, and made by
    llama-quantize from the exported file.
    """

    name = "gguf"
    own_size = "GGUF file"

    def menu(self, layer: LayerSpec) -> tuple[LayerBits, ...]:
        return tuple(types_of(layer))

    def nbytes(self, layer: LayerSpec, bits: LayerBits) -> int:
        if layer.weight_owner is not None:
            return 0
        found = types_of(layer)[bits.of_weight]
        return padded(math.prod(layer.weight_shape) // found.block * found.block_nbytes)

    def beside_nbytes(self, model: Any, graph: LayerGraph) -> int | None:
        from .gguf import beside_nbytes

        return beside_nbytes(model, graph)

    def notes(self, graph: LayerGraph) -> tuple[str, ...]:
        own = [layer for layer in graph if layer.weight_owner is None]
        odd = [layer.name for layer in own if layer.kind in ("linear", "embedding") and not types_of(layer)]
        without = [x.name for x in own if types_of(x) and x.weight_shape[1] % SUPER_BLOCK]
        out = []
        if odd:
            out.append(f"GGUF has no type for rows that are not multiples of 32; leave float: {', '.join(odd)}.")
        if without:
            out.append(
                f"K-quants require rows that are multiples of 256; {len(without)} layers ({without[0]}, …) can only "
                "use the types with blocks of 32."
            )
        return tuple(out)
