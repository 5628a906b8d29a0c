"""A packed weight: words, scales and the shape that they unpack to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import FLOAT_BITS, LayerBits, check_width, layer_kinds
from ..cost.size import channel_count, group_count, packed_shape
from ..errors import InvalidArgument
from .bits import pack_bits, unpack_bits, word_count


def _stream_shape(kind: str, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the values in the order they are packed: [rows, cols], or [count] for a flat stream."""
    row_axes = layer_kinds.get(kind).row_axes
    if row_axes is None:
        return (math.prod(weight_shape),)
    return channel_count(kind, weight_shape), weight_shape[row_axes[1]]


def _to_rows(weight: Tensor, kind: str) -> Tensor:
    """The values of a weight in the order they are packed."""
    axes = _swapped_axes(kind)
    rows = weight if axes is None else weight.transpose(*axes)
    return rows.reshape(_stream_shape(kind, weight.shape))


def _from_rows(rows: Tensor, kind: str, weight_shape: Sequence[int]) -> Tensor:
    """The inverse of `_to_rows`, contiguous."""
    axes = _swapped_axes(kind)
    if axes is None:
        return rows.reshape(weight_shape)
    shape = list(weight_shape)
    shape[axes[0]], shape[axes[1]] = shape[axes[1]], shape[axes[0]]
    return rows.reshape(shape).transpose(*axes).contiguous()


def _swapped_axes(kind: str) -> tuple[int, int] | None:
    """The axes of a weight that are swapped before packing; None: it is packed in memory order."""
    found = layer_kinds.get(kind)
    if found.row_axes is None:
        return (1, 0) if found.channel_axis == 1 else None
    return found.row_axes if found.transposed else None


GROUP_SCALES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """A bit-packed quantized weight, whose values are (integer - zero point) · scale.

    Args:
        weight_packed: int32 words, `[rows, ceil(columns·b/32)]` (linear, embedding, conv1d, experts …) or
            `[ceil(count·b/32)]` (convolutions), depending on the kind's `row_axes`. Codes are value + 2^(b-1); at 1 bit
            they are 0 for -1 and 1 for +1.
        weight_scale: float32, one per output channel or a single one; for groups float16 or bfloat16,
            `[rows, groups]`.
        weight_shape: Shape of the module's weight.
        num_bits: Bit-width b, 1 to 8.
        kind: Name of the `LayerKind`.
        weight_zero_point: Codes of `num_bits` bits, one per scale, packed as one stream of int32 words,
            `[ceil(count·b/32)]`. In files of version 1, int8 values of the scale's shape. None for zero.
        group_size: Weights of a row that share a scale (the last group may be shorter); None: the whole row.

    Raises:
        InvalidArgument: Shapes or dtypes of the parts do not fit together.

    Example:
        >>> import torch
        >>> from hub_mpq.pack import pack_weight
        >>> packed = pack_weight(torch.tensor([[-4, 3], [1, 0]]), torch.tensor([0.5, 2.0]), "linear", num_bits=3)
        >>> packed.weight_packed.shape, str(packed.bits)
        (torch.Size([2, 1]), 'W3A32')
        >>> packed.dequantize()
        tensor([[-2.0000,  1.5000],
                [ 2.0000,  0.0000]])
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: tuple[int, ...]
    num_bits: int
    kind: str
    weight_zero_point: Tensor | None = None
    group_size: int | None = None

    def __post_init__(self) -> None:
        bits = self.bits
        want = packed_shape(self.kind, self.weight_shape, self.num_bits)
        found = self.weight_packed.dtype, tuple(self.weight_packed.shape)
        if found != (torch.int32, want):
            raise InvalidArgument(f"weight_packed must be torch.int32 {want}, got {found[0]} {found[1]}")
        scale, zero = self.weight_scale, self.weight_zero_point
        shape = tuple(scale.shape)
        if bits.grouped:
            rows, groups = group_count(self.kind, self.weight_shape, self.group_size)
            dtypes = (torch.float32,) if self.group_size is None else GROUP_SCALES
            expected = (rows,) if self.group_size is None else (rows, groups)
            if scale.dtype not in dtypes or shape != expected:
                names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
                raise InvalidArgument(f"weight_scale must be {names} {expected}, got {scale.dtype} {shape}")
            words = (word_count(rows * groups, self.num_bits),)
            if not bits.symmetric and zero is not None and tuple(zero.shape) != words:
                raise InvalidArgument(f"weight_zero_point must be int32 {words}, got {tuple(zero.shape)}")
            return
        allowed = ((1,), (channel_count(self.kind, self.weight_shape),))
        if scale.dtype != torch.float32 or shape not in allowed:
            raise InvalidArgument(f"weight_scale must be float32 {allowed[1]} or (1,), got {scale.dtype} {shape}")
        if zero is not None and (zero.dtype != torch.int8 or zero.shape != scale.shape):
            raise InvalidArgument("weight_zero_point must be int8 and have the shape of weight_scale")

    @property
    def bits(self) -> LayerBits:
        """Bit-width, group size and zero points of the weight, with a float input."""
        coded = self.weight_zero_point is not None and self.weight_zero_point.dtype == torch.int32
        return LayerBits(self.num_bits, FLOAT_BITS, self.group_size, not coded)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that a file contains.

        Returns:
            `{last part of the name: tensor}`.
        """
        parts = {"weight_packed": self.weight_packed, "weight_scale": self.weight_scale}
        if self.weight_zero_point is not None:
            parts["weight_zero_point"] = self.weight_zero_point
        return parts | {"weight_shape": torch.tensor(self.weight_shape, dtype=torch.int64)}

    def zero_points(self) -> Tensor | None:
        """Unpack the zero points.

        Returns:
            int8 of the scale's shape, or None for zero.
        """
        zero = self.weight_zero_point
        if zero is None or self.bits.symmetric:
            return zero
        codes = unpack_bits(zero, self.num_bits, self.weight_scale.numel()).view(torch.int8)
        return _signed(codes, self.num_bits).view(self.weight_scale.shape)

    def _values(self, rows: Tensor | slice | None = None) -> Tensor:
        words = self.weight_packed if rows is None else self.weight_packed[rows]
        columns = _stream_shape(self.kind, self.weight_shape)[-1]
        return _signed(unpack_bits(words, self.num_bits, columns).view(torch.int8), self.num_bits)

    def unpack(self) -> Tensor:
        """Unpack the integers.

        Returns:
            int8 of `weight_shape`.
        """
        return _from_rows(self._values(), self.kind, self.weight_shape).contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: Tensor | slice | None = None) -> Tensor:
        """Compute (integer - zero point) · scale, multiplied in float32, or in float64 for that dtype.

        Args:
            dtype: The dtype of the result.
            rows: Indices `[n]`, or a slice, of the rows to unpack; None for all.

        Returns:
            The weight, of `weight_shape`, or `[n, columns]` for some rows.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values, scale, zero = self._values(rows), self.weight_scale, self.zero_points()
        if rows is not None and scale.numel() > 1:
            scale, zero = scale[rows], None if zero is None else zero[rows]
        if rows is None:
            count = channel_count(self.kind, self.weight_shape)
            values = values.reshape(count, values.numel() // max(count, 1))
        out = values.to(wide)
        for part, s, z in _groups(out, scale, zero, self.group_size):
            if z is not None:
                part.sub_(z.to(wide)[..., None])
            part.mul_(s.to(wide)[..., None])
        out = out.to(dtype)
        if rows is not None:
            return out
        return _from_rows(out, self.kind, self.weight_shape)

    def matrix(self, index: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize one matrix of a stack of experts.

        Args:
            index: Index of the matrix.
            dtype: The dtype of the result.

        Returns:
            The matrix, in the orientation of the module's weight.
        """
        each = len(self.weight_packed) // self.weight_shape[0]
        rows = self.dequantize(dtype, slice(index * each, (index + 1) * each))
        return rows.mT.contiguous() if layer_kinds.get(self.kind).transposed else rows


def _signed(codes: Tensor, num_bits: int) -> Tensor:
    """Convert codes to integers, both int8, in place."""
    if num_bits == 8:
        return codes ^ -128
    return codes.mul_(2).sub_(1) if num_bits == 1 else codes.sub_(1 << (num_bits - 1))


def _groups(
    out: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Yield (view of some groups [..., weights of a group], their scales, their zero points), covering `out`."""
    if group_size is None:
        yield out, scale, zero
        return
    cols = out.shape[1]
    full = cols // group_size
    if full:
        whole = out[:, : full * group_size].view(out.shape[0], full, group_size)
        yield whole, scale[:, :full], None if zero is None else zero[:, :full]
    if full * group_size < cols:
        yield out[:, None, full * group_size :], scale[:, full:], None if zero is None else zero[:, full:]


def pack_weight(
    int_weight: Tensor,
    scale: Tensor,
    kind: str,
    num_bits: int,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> PackedTensor:
    """Pack the integers of a weight with their scales.

    Args:
        int_weight: Integers in the shape of the module's weight, from -2^(b-1) to 2^(b-1)-1; at 1 bit -1 or +1.
        scale: `[channels]` or `[1]`, stored as float32; for groups `[rows, groups]`, float16 or bfloat16. Finite and
            positive.
        kind: Name of the `LayerKind`, such as `"linear"`.
        num_bits: Bit-width b, 1 to 8.
        zero_point: int8 of the scale's shape, stored as is; or another integer dtype, `[rows, groups]` or `[rows]`,
            from -2^(b-1) to 2^(b-1)-1, which is packed. None for zero.
        group_size: Weights of a row that share a scale; None: the whole row.

    Returns:
        The packed weight.

    Raises:
        InvalidArgument: A value is out of range, or shapes or dtypes do not fit together.

    Example:
        >>> import torch
        >>> from hub_mpq.pack import pack_weight
        >>> packed = pack_weight(torch.tensor([[-4, 3], [1, 0]]), torch.tensor([0.5, 2.0]), "linear", num_bits=3)
        >>> packed.unpack()
        tensor([[-4,  3],
                [ 1,  0]], dtype=torch.int8)
    """
    bits = check_width(num_bits)
    packed_shape(kind, int_weight.shape, bits)  # raises for an unknown kind or a wrong number of axes
    if int_weight.is_floating_point():
        raise InvalidArgument(f"int_weight must have an integer dtype, got {int_weight.dtype}")
    scale = scale.detach()
    if group_size is None or scale.dtype not in GROUP_SCALES:
        scale = scale.to(torch.float32)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise InvalidArgument("scales must be finite and positive")
    values = _to_rows(int_weight.detach(), kind)
    if bits == 1:
        if not bool((values.abs() == 1).all()):
            raise InvalidArgument("a 1-bit weight must contain only −1 and +1")
        values, offset = (values > 0).to(torch.uint8), 0
    else:
        offset = 1 << (bits - 1)
    words = pack_bits(values, bits, offset=offset)
    if zero_point is not None and not zero_point.is_floating_point() and zero_point.dtype != torch.int8:
        zero_point = pack_bits(zero_point.detach().reshape(-1), bits, offset=offset)
    return PackedTensor(words, scale, tuple(int_weight.shape), bits, kind, zero_point, group_size)


def empty_packed(
    kind: str, weight_shape: Sequence[int], bits: LayerBits | int, *, per_channel: bool = True
) -> PackedTensor:
    """Create a PackedTensor on the meta device, without values, to compute sizes or build empty models.

    Args:
        kind: Name of the `LayerKind`, such as `"linear"`.
        weight_shape: Shape of the module's weight.
        bits: Bit-width of the weight, with group size and zero points if any.
        per_channel: One scale per output channel, else a single one; groups always have one scale each.

    Returns:
        The packed weight.

    Raises:
        InvalidArgument: The kind is unknown, or does not fit the shape or the groups.

    Example:
        >>> from hub_mpq.pack import empty_packed
        >>> empty_packed("linear", (8, 100), 3).weight_packed.shape
        torch.Size([8, 10])
    """
    bits = LayerBits(bits, FLOAT_BITS) if isinstance(bits, int) else bits

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    zero = None
    if bits.grouped:
        rows, groups = group_count(kind, weight_shape, bits.group_size)
        flat = bits.group_size is None
        scale = empty((rows,) if flat else (rows, groups), torch.float32 if flat else torch.bfloat16)
        if not bits.symmetric:
            zero = empty((word_count(rows * groups, bits.weight),), torch.int32)
    else:
        scale = empty((channel_count(kind, weight_shape) if per_channel else 1,), torch.float32)
    words = empty(packed_shape(kind, weight_shape, bits.weight), torch.int32)
    return PackedTensor(words, scale, tuple(weight_shape), bits.weight, kind, zero, bits.group_size)
