"""Tensor types of GGUF files as choices of a policy, their bytes, and the target that has them as its menu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec
from ..core.target import Target

ALIGNMENT = 32
"""Bytes that the data of each tensor is padded to."""
GROUP = 32
"""Weights of a block of the types that are written here."""
SUPER_BLOCK = 256
"""Weights of a block of the K-quants."""


@dataclass(frozen=True)
class TensorType:
    """One type of quantized tensors.

    Args:
        name: As GGUF spells it.
        bits: The grid whose score stands for the type's: its own where `exact`.
        block: Weights of a block; a row holds whole blocks.
        block_nbytes: Bytes of a block.
        exact: Whether our grid is the type's, so that our weights are written as they are. With zero points that is up
            to the rounding of each block's minimum to float16.
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
"""All types of the menu, with the sizes of llama.cpp's blocks (ggml-common.h). Where a K-quant fits a layer it stands
for its grid, being smaller than the older type."""


def types_of(layer: LayerSpec) -> dict[LayerBits, TensorType]:
    """{choice: type} of a layer's weight: of the types whose blocks fill its rows; {} for all but Linear and Embedding
    layers."""
    if layer.kind not in ("linear", "embedding"):
        return {}
    out: dict[LayerBits, TensorType] = {}
    for one in TYPES:
        if layer.weight_shape[1] % one.block == 0:
            out.setdefault(one.bits, one)
    return dict(sorted(out.items()))


def padded(nbytes: int) -> int:
    """Bytes of a tensor's data in a file."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class GGUF(Target):
    """A GGUF file for llama.cpp and what is built on it: a type for each tensor.

    The score of a choice is that of its nearest grid, its cost the type's own bytes [our construction]. Q4_0, Q5_0 and
    Q8_0 are our grids of 32 weights, symmetric, and Q4_1 and Q5_1 those with zero points. K-quants, whose scales are
    quantized again, are chosen by the grid of their inner blocks and made by llama-quantize from what the export wrote.
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
            out.append(f"Rows that no block of 32 weights fills have no type; leave float: {', '.join(odd)}.")
        if without:
            out.append(
                f"K-quants need rows of whole blocks of 256 weights: {len(without)} layers ({without[0]}, …) have the "
                "types of 32 alone."
            )
        return tuple(out)
