"""Bytes of packed weights and of what else a layer stores: exact, as `hub_mpq.pack` writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..core import FLOAT_BITS, LayerBits, LayerGraph, LayerSpec, Limit, Reduction, check_width, layer_kinds, parse_bytes
from ..errors import InvalidArgument


def packed_shape(kind: str, weight_shape: Sequence[int], num_bits: int) -> tuple[int, ...]:
    """Shape of `<layer>.weight_packed` in int32 words.

    It is [rows, ceil(cols·b/32)], or [ceil(count·b/32)] for a kind that is packed as one stream. `weight_shape` is the
    shape of the module's weight. Raises InvalidArgument for an unknown kind, bit-width or number of axes.
    """
    bits = check_width(num_bits)
    row_axes = layer_kinds.get(kind).row_axes
    if row_axes is None:
        if len(weight_shape) <= layer_kinds.get(kind).channel_axis:
            many = "two axes" if layer_kinds.get(kind).channel_axis else "one axis"
            raise InvalidArgument(f"a {kind} weight must have at least {many}, got shape {tuple(weight_shape)}")
        return (-(-math.prod(weight_shape) * bits // 32),)
    if len(weight_shape) != (axes := 3 if row_axes[0] < 0 else 2):
        many = "two" if axes == 2 else "three"
        raise InvalidArgument(f"a {kind} weight must have {many} axes, got shape {tuple(weight_shape)}")
    return (channel_count(kind, weight_shape), -(-weight_shape[row_axes[1]] * bits // 32))


def row_shape(kind: str, weight_shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a weight that is packed row by row; for a stack of matrices, the rows of all of them.

    Raises InvalidArgument for a kind whose weight is packed as one stream.
    """
    row_axes = layer_kinds.get(kind).row_axes
    if row_axes is None:
        raise InvalidArgument(f"a {kind} weight cannot have groups or zero points")
    return channel_count(kind, weight_shape), weight_shape[row_axes[1]]


def group_count(kind: str, weight_shape: Sequence[int], group_size: int | None) -> tuple[int, int]:
    """(rows, groups per row) of a weight that is packed row by row; the last group of a row may be shorter.

    Raises InvalidArgument for a kind whose weight is packed as one stream.
    """
    rows, columns = row_shape(kind, weight_shape)
    return rows, 1 if group_size is None else -(-columns // group_size)


def grid_nbytes(kind: str, weight_shape: Sequence[int], bits: LayerBits, *, per_channel: bool = True) -> int:
    """Bytes of one weight's scales and zero points.

    Scales are float32, one per output channel or one in total; for groups they are float16 or bfloat16. Zero points
    have the weight's bit-width and are packed into 32-bit words.
    """
    if not bits.grouped:
        return 4 * (channel_count(kind, weight_shape) if per_channel else 1)
    rows, groups = group_count(kind, weight_shape, bits.group_size)
    zeros = 0 if bits.symmetric else 4 * -(-rows * groups * bits.weight // 32)
    return rows * groups * (4 if bits.group_size is None else 2) + zeros


def packed_nbytes(kind: str, weight_shape: Sequence[int], num_bits: int) -> int:
    """Bytes of one packed weight at `num_bits` (1 to 8)."""
    return 4 * math.prod(packed_shape(kind, weight_shape, num_bits))


def channel_count(kind: str, weight_shape: Sequence[int]) -> int:
    """The number of a weight's per-channel scales: its output channels, the rows of an embedding, or those of all
    matrices of a stack."""
    axis = layer_kinds.get(kind).channel_axis
    return weight_shape[axis] * (math.prod(weight_shape[:-2]) if axis < 0 else 1)


def layer_nbytes(layer: LayerSpec, bits: LayerBits, *, per_channel: bool = True, input_zero_point: bool = False) -> int:
    """Bytes that one layer takes in the payload of a packed file, without the header.

    They hold the packed weight, its scales and zero points (`grid_nbytes`), the int64 weight shape and, if the
    activation is quantized, its float32 scale and, with `input_zero_point`, its int32 zero point. A float weight takes
    4 bytes per value. A layer that shares another layer's weight stores the activation's part only.
    """
    total = 0
    if layer.weight_owner is None:
        if bits.weight == FLOAT_BITS:
            total += 4 * layer.weight_count
        else:
            total += packed_nbytes(layer.kind, layer.weight_shape, bits.weight)
            total += grid_nbytes(layer.kind, layer.weight_shape, bits, per_channel=per_channel)
            total += 8 * len(layer.weight_shape)
    if bits.activation != FLOAT_BITS:
        total += 4 + 4 * input_zero_point
    return total


class Size(Limit):
    """Bytes of the packed file, including its header."""

    name, unit, label = "size", "B", "packed file"
    help = 'Maximum bytes of the packed file ("5.7MB", "4MiB"), or a level ("W4").'
    whole_numbers = True
    level_parts = ("weight",)

    def amount(self, value: str | float) -> float:
        return parse_bytes(value, self.name)

    def of_layer(self, layer: LayerSpec, bits: LayerBits) -> int:
        return layer_nbytes(layer, bits)

    def beside(self, graph: LayerGraph, base_bytes: int) -> float:
        return base_bytes

    def reduction(self, graph: LayerGraph) -> Reduction:
        counts = {x.name: 0 if x.weight_owner else x.weight_count for x in graph.searched}
        scales = sum(layer_nbytes(x, LayerBits(8, 8)) - counts[x.name] for x in graph.searched)
        return Reduction({n: count / 8 for n, count in counts.items()}, activation=False, constant=scales)
