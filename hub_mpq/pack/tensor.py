"""One packed weight: words, scales and the shape they unpack to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import check_width, layer_kinds
from ..cost.size import channel_count, packed_shape
from ..errors import InvalidArgument
from .bits import pack_bits, unpack_bits


def _stream_shape(kind: str, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the values in the order they are packed: [rows, cols], or [count] for a flat stream."""
    row_axes = layer_kinds.get(kind).row_axes
    return (math.prod(weight_shape),) if row_axes is None else tuple(weight_shape[axis] for axis in row_axes)


def _transposed(kind: str) -> bool:
    """Whether the rows that are packed are the columns of the weight; the same transposition leads back."""
    return layer_kinds.get(kind).row_axes == (1, 0)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A quantized weight, bit-dense.

    `weight_packed`: int32 words, [rows, ceil(cols·b/32)] (linear, embedding, conv1d) or [ceil(count·b/32)] (conv2d),
    as the kind's `row_axes` say.
    `weight_scale`: float32, one per output channel or a single one. `weight_zero_point`: int8 of the scale's shape,
    None for zero. `weight_shape`: the module's own. Codes are value + 2^(b−1); at 1 bit they are 0 for −1 and 1
    for +1. Raises InvalidArgument when the parts do not belong together.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: tuple[int, ...]
    num_bits: int
    kind: str
    weight_zero_point: Tensor | None = None

    def __post_init__(self) -> None:
        want = packed_shape(self.kind, self.weight_shape, self.num_bits)
        found = self.weight_packed.dtype, tuple(self.weight_packed.shape)
        if found != (torch.int32, want):
            raise InvalidArgument(f"weight_packed must be torch.int32 {want}, not {found[0]} {found[1]}")
        allowed = ((1,), (channel_count(self.kind, self.weight_shape),))
        if self.weight_scale.dtype != torch.float32 or tuple(self.weight_scale.shape) not in allowed:
            shape = tuple(self.weight_scale.shape)
            raise InvalidArgument(f"weight_scale must be float32 {allowed[1]} or (1,), not {shape}")
        zero = self.weight_zero_point
        if zero is not None and (zero.dtype != torch.int8 or zero.shape != self.weight_scale.shape):
            raise InvalidArgument("weight_zero_point must be int8 of the shape of weight_scale")

    def parts(self) -> dict[str, Tensor]:
        """The tensors a file holds, by the last part of their name."""
        parts = {"weight_packed": self.weight_packed, "weight_scale": self.weight_scale}
        if self.weight_zero_point is not None:
            parts["weight_zero_point"] = self.weight_zero_point
        return parts | {"weight_shape": torch.tensor(self.weight_shape, dtype=torch.int64)}

    def _values(self) -> Tensor:
        shape = _stream_shape(self.kind, self.weight_shape)
        codes = unpack_bits(self.weight_packed, self.num_bits, shape[-1]).view(torch.int8)
        if self.num_bits == 8:
            return codes ^ -128
        return codes.mul_(2).sub_(1) if self.num_bits == 1 else codes.sub_(1 << (self.num_bits - 1))

    def unpack(self) -> Tensor:
        """The integers, int8 of `weight_shape`."""
        values = self._values()
        return (values.t() if _transposed(self.kind) else values).contiguous().view(self.weight_shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(integer − zero point)·scale, of `weight_shape`, multiplied in float32, or float64 if that is asked for."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = channel_count(self.kind, self.weight_shape)
        values = self._values()
        out = values.reshape(rows, values.numel() // max(rows, 1)).to(wide)
        if self.weight_zero_point is not None:
            out.sub_(self.weight_zero_point.to(wide)[:, None])
        out = out.mul_(self.weight_scale[:, None]).to(dtype)
        return out.t().contiguous() if _transposed(self.kind) else out.reshape(self.weight_shape)


def pack_weight(
    int_weight: Tensor, scale: Tensor, kind: str, num_bits: int, zero_point: Tensor | None = None
) -> PackedTensor:
    """Pack the integers of a weight (any integer dtype, the module's own shape) with their float32 scales.

    Integers lie in −2^(b−1) … 2^(b−1)−1; at 1 bit they are −1 or +1. `scale`: [channels] or [1], finite and above
    zero. InvalidArgument otherwise.
    """
    bits = check_width(num_bits)
    packed_shape(kind, int_weight.shape, bits)  # names an unknown kind or a wrong number of axes
    if int_weight.is_floating_point():
        raise InvalidArgument(f"pack_weight takes integers, not {int_weight.dtype}")
    scale = scale.detach().to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InvalidArgument("scales must be finite and above zero")
    values = int_weight.detach()
    values = (values.t() if _transposed(kind) else values).reshape(_stream_shape(kind, int_weight.shape))
    if bits == 1:
        if not bool((values.abs() == 1).all()):
            raise InvalidArgument("a 1-bit weight holds only −1 and +1")
        values, offset = (values > 0).to(torch.uint8), 0
    else:
        offset = 1 << (bits - 1)
    words = pack_bits(values, bits, offset=offset)
    return PackedTensor(words, scale, tuple(int_weight.shape), bits, kind, zero_point)


def empty_packed(kind: str, weight_shape: Sequence[int], num_bits: int, *, per_channel: bool = True) -> PackedTensor:
    """A PackedTensor on the meta device: no values, the right shapes, for sizes and for skeletons of models."""
    shape = packed_shape(kind, weight_shape, num_bits)
    scales = channel_count(kind, weight_shape) if per_channel else 1
    return PackedTensor(
        torch.empty(shape, dtype=torch.int32, device="meta"),
        torch.empty(scales, dtype=torch.float32, device="meta"),
        tuple(weight_shape),
        num_bits,
        kind,
    )
