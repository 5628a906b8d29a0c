"""Dense streams of 1- to 8-bit values in int32 words, in the bit order of compressed-tensors' pack-quantized.

Value k of a stream occupies bits k·b … k·b+b−1, counted from the least significant bit of word 0: 32 values take
exactly b words, and the last word is padded with zero bits. Eight values take exactly b bytes (four take three bytes at
6 bits; 2, 4 or 8 take one byte at 4, 2 or 1 bits). So such a group is handled as one integer with a byte for each
value, whose fields are widened from b to 8 bits, and back, in one to three steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..core import check_width
from ..errors import InvalidArgument

_BYTES = 1 << 18
"""Bytes of values handled at a time; they and one temporary fit into a core's cache."""

_CELLS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""{values of a group: the integer type that has a byte for each}"""


def _steps(num_bits: int) -> list[tuple[int, int, int]]:
    """(mask of lower fields, mask of upper fields, shift) from the widest cells to the narrowest."""
    steps = []
    for fields, cell in ((4, 64), (2, 32), (1, 16)):
        width = fields * num_bits
        low = sum(((1 << width) - 1) << at for at in range(0, 64, cell))
        steps.append((low, low << width, cell // 2 - width))
    return steps


def _group(num_bits: int) -> int:
    """The smallest number of values, 2, 4 or 8, that take whole bytes together; below 8 bits."""
    return 8 // math.gcd(8, num_bits)


def _spread(x: Tensor, num_bits: int) -> None:
    """Move the b-bit fields of each integer to its bytes, in place."""
    size = x.element_size()
    whole = (1 << 8 * size) - 1
    narrow = num_bits <= 4  # whole integers can be shifted: unwanted bits fall between the fields
    if narrow and 8 % num_bits:
        x &= (1 << size * num_bits) - 1  # clear bits of the next group
    for low, high, shift in _steps(num_bits)[-size.bit_length() + 1 :]:
        low, high = low & whole, high & whole
        if narrow:
            x |= x << shift
            x &= low | (high << shift)
        else:
            upper = x & high
            x &= low
            x |= upper.bitwise_left_shift_(shift)


def _gather(x: Tensor, num_bits: int) -> None:
    """The inverse of _spread."""
    for low, high, shift in reversed(_steps(num_bits)):
        upper = (x >> shift).bitwise_and_(high)
        x &= low
        x |= upper


def word_count(count: int, num_bits: int) -> int:
    """Number of int32 words of a stream of `count` values."""
    return -(-count * num_bits // 32)


def pack_bits(values: Tensor, num_bits: int, *, offset: int = 0) -> Tensor:
    """Pack integers along the last axis into int32 words.

    Value k of a stream occupies bits k·b … k·b+b−1, counted from the least significant bit of word 0, as in
    compressed-tensors' `pack-quantized`.

    Args:
        values: Integers, `[..., count]`.
        num_bits: Bit-width b, 1 to 8.
        offset: Added to each value; the resulting code must fit `num_bits` unsigned bits.

    Returns:
        int32 words, `[..., ceil(count·b/32)]`.

    Raises:
        InvalidArgument: The values are not integers or do not fit, or the bit-width is out of range.

    Example:
        >>> import torch
        >>> from hub_mpq.pack import pack_bits
        >>> words = pack_bits(torch.arange(-4, 4), 3, offset=4)
        >>> f"{words.item():#010x}"
        '0x00fac688'
    """
    bits = check_width(num_bits)
    if values.is_floating_point() or values.is_complex() or values.dim() == 0:
        raise InvalidArgument(f"expected integers [..., count], got {values.dtype} {tuple(values.shape)}")
    *lead, count = values.shape
    if values.numel() == 0:
        return torch.empty(*lead, word_count(count, bits), dtype=torch.int32, device=values.device)
    least, most = (int(v) + offset for v in torch.aminmax(values))
    if least < 0 or most >= 1 << bits:
        raise InvalidArgument(
            f"values {least - offset} to {most - offset} do not fit into {bits} bits with offset {offset}"
        )
    groups, words = -(-count // 8), word_count(count, bits)
    codes = torch.zeros(*lead, 8 * groups, dtype=torch.uint8, device=values.device)
    codes[..., :count] = values.to(torch.int16) + offset if offset else values
    if bits < 8:
        cells = codes.view(torch.int64)
        for part in torch.split(cells.reshape(-1), _BYTES // 8):
            _gather(part, bits)
        codes = cells.view(torch.uint8).reshape(*lead, groups, 8)[..., :bits].flatten(-2)
    out = torch.zeros(*lead, words, dtype=torch.int32, device=values.device)
    keep = min(4 * words, codes.shape[-1])  # only padding of the last group is cut off
    out.view(torch.uint8)[..., :keep] = codes[..., :keep]
    return out


def _cells(stream: Tensor, rows: int, groups: int, num_bits: int) -> Tensor:
    """Integers [rows, groups] whose lower bits hold the groups of values of each row of bytes."""
    size = _group(num_bits)
    step = size * num_bits // 8
    if step == 1:
        return stream.reshape(rows, -1)[:, :groups].to(_CELLS[size])
    cells = torch.empty(rows, groups, dtype=_CELLS[size], device=stream.device)
    wide = torch.nn.functional.pad(stream.reshape(-1), (0, 8))  # the last group may read past the end
    stride = stream.numel() // rows
    if stream.device.type == "cpu":  # NumPy reads whole integers at every b-th byte; torch has no unaligned strides
        source = np.ndarray((rows, groups), f"<i{size}", wide.numpy().data, 0, (stride, step))
        np.copyto(cells.numpy(), source)
    else:
        bytes_of = wide.as_strided((rows, groups, size), (stride, step, 1))
        cells.view(torch.uint8).view(rows, groups, size).copy_(bytes_of)
    return cells


def _unpack_traced(words: Tensor, num_bits: int, count: int) -> Tensor:
    """`unpack_bits` with plain operators, for torch.compile and torch.export."""
    at = torch.arange(count, device=words.device) * num_bits
    word, shift = at // 32, at % 32
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))  # a code may continue in the next word
    codes = (wide[..., word] >> shift) | (wide[..., word + 1] << (32 - shift))
    return (codes & ((1 << num_bits) - 1)).to(torch.uint8)


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Unpack int32 words; the inverse of `pack_bits` with offset 0.

    Args:
        words: int32, `[..., ceil(count·b/32)]`.
        num_bits: Bit-width b, 1 to 8.
        count: Number of values in each stream.

    Returns:
        Codes, uint8 `[..., count]`.

    Raises:
        InvalidArgument: The words have another dtype or number, or the bit-width is out of range.

    Example:
        >>> import torch
        >>> from hub_mpq.pack import pack_bits, unpack_bits
        >>> unpack_bits(pack_bits(torch.tensor([5, 0, 7]), 3), 3, count=3)
        tensor([5, 0, 7], dtype=torch.uint8)
    """
    bits = check_width(num_bits)
    *lead, have = words.shape
    if words.dtype != torch.int32 or have != word_count(count, bits):
        raise InvalidArgument(
            f"expected {word_count(count, bits)} int32 words for {count} values of {bits} bits, "
            f"got {have} of {words.dtype}"
        )
    if torch.compiler.is_compiling():
        return _unpack_traced(words, bits, count)
    stream = words.contiguous().view(torch.uint8)
    if words.numel() == 0:
        return torch.empty(*lead, count, dtype=torch.uint8, device=words.device)
    if bits == 8:
        return stream[..., :count].clone()
    size = _group(bits)
    rows, groups = words.numel() // have, -(-count // size)
    if groups * size * bits == 32 * have:  # no padding between the rows: one long row
        rows, groups = 1, rows * groups
    cells = _cells(stream, rows, groups, bits)
    for part in torch.split(cells.view(-1), _BYTES // size):
        _spread(part, bits)
    return cells.view(torch.uint8).view(*lead, -1)[..., :count]
