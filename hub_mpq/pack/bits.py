"""Dense streams of 1- to 8-bit values in int32 words, the bit order of compressed-tensors' pack-quantized.

Value k of a stream lies in bits k·b … k·b+b−1, counted from the least significant bit of word 0: 32 values take
exactly b words, and the last word is filled with zero bits. Eight values take exactly b bytes, so that a group of
eight is one 64-bit integer whose fields are spread from b to 8 bits (and back) in three steps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core import check_width
from ..errors import InvalidArgument

_GROUPS = 1 << 15
"""Groups of eight values handled at a time: their 64-bit integers and one temporary stay in a core's cache."""


def _steps(num_bits: int) -> list[tuple[int, int, int]]:
    """(mask of lower fields, mask of upper fields, shift) from the widest cells to the narrowest."""
    steps = []
    for fields, cell in ((4, 64), (2, 32), (1, 16)):
        width = fields * num_bits
        low = sum(((1 << width) - 1) << at for at in range(0, 64, cell))
        steps.append((low, low << width, cell // 2 - width))
    return steps


def _spread(x: Tensor, num_bits: int) -> None:
    """Move eight b-bit fields of every int64 to its eight bytes, in place."""
    for low, high, shift in _steps(num_bits):
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
    """int32 words of a stream of `count` values."""
    return -(-count * num_bits // 32)


def pack_bits(values: Tensor, num_bits: int, *, offset: int = 0) -> Tensor:
    """Pack integers [..., count] along the last axis into int32 words [..., ceil(count·b/32)].

    The stored code is value + offset and must fit `num_bits` (1 to 8) unsigned bits; InvalidArgument otherwise.
    """
    bits = check_width(num_bits)
    if values.is_floating_point() or values.is_complex() or values.dim() == 0:
        raise InvalidArgument(f"pack_bits takes integers [..., count], not {values.dtype} {tuple(values.shape)}")
    *lead, count = values.shape
    if values.numel() == 0:
        return torch.empty(*lead, word_count(count, bits), dtype=torch.int32, device=values.device)
    least, most = (int(v) + offset for v in torch.aminmax(values))
    if least < 0 or most >= 1 << bits:
        raise InvalidArgument(f"values {least - offset} to {most - offset} do not fit {bits} bits (offset {offset})")
    groups, words = -(-count // 8), word_count(count, bits)
    codes = torch.zeros(*lead, 8 * groups, dtype=torch.uint8, device=values.device)
    codes[..., :count] = values.to(torch.int16) + offset if offset else values
    if bits < 8:
        cells = codes.view(torch.int64)
        for part in torch.split(cells.reshape(-1), _GROUPS):
            _gather(part, bits)
        codes = cells.view(torch.uint8).reshape(*lead, groups, 8)[..., :bits].flatten(-2)
    out = torch.zeros(*lead, words, dtype=torch.int32, device=values.device)
    keep = min(4 * words, codes.shape[-1])  # what is cut off are bits of the filling of the last group
    out.view(torch.uint8)[..., :keep] = codes[..., :keep]
    return out


def _cells(stream: Tensor, rows: int, groups: int, num_bits: int) -> Tensor:
    """int64 [rows, groups] whose lower 8·b bits are the groups of eight values of each row of bytes."""
    cells = torch.empty(rows, groups, dtype=torch.int64, device=stream.device)
    wide = torch.nn.functional.pad(stream.reshape(-1), (0, 8))  # the last group may read past the end
    stride = stream.numel() // rows
    if stream.device.type == "cpu":  # NumPy reads 8 bytes at every b-th one; torch has no unaligned strides
        source = np.ndarray((rows, groups), "<i8", wide.numpy().data, 0, (stride, num_bits))
        np.copyto(cells.numpy(), source)
    else:
        cells.view(torch.uint8).view(rows, groups, 8).copy_(wide.as_strided((rows, groups, 8), (stride, num_bits, 1)))
    return cells


def _unpack_traced(words: Tensor, num_bits: int, count: int) -> Tensor:
    """`unpack_bits` in plain operators, for torch.compile and torch.export."""
    at = torch.arange(count, device=words.device) * num_bits
    word, shift = at // 32, at % 32
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))  # a code may end in the next word
    codes = (wide[..., word] >> shift) | (wide[..., word + 1] << (32 - shift))
    return (codes & ((1 << num_bits) - 1)).to(torch.uint8)


def unpack_bits(words: Tensor, num_bits: int, count: int) -> Tensor:
    """Codes, uint8 [..., count], of int32 words [..., ceil(count·b/32)]: the inverse of pack_bits at offset 0."""
    bits = check_width(num_bits)
    *lead, have = words.shape
    if words.dtype != torch.int32 or have != word_count(count, bits):
        raise InvalidArgument(
            f"{count} values of {bits} bits take {word_count(count, bits)} int32 words, not {have} of {words.dtype}"
        )
    if torch.compiler.is_compiling():
        return _unpack_traced(words, bits, count)
    stream = words.contiguous().view(torch.uint8)
    if words.numel() == 0:
        return torch.empty(*lead, count, dtype=torch.uint8, device=words.device)
    if bits == 8:
        return stream[..., :count].clone()
    rows, groups = words.numel() // have, -(-count // 8)
    if groups * bits == 4 * have:  # no padding between the rows: one long row
        rows, groups = 1, rows * groups
    cells = _cells(stream, rows, groups, bits)
    for part in torch.split(cells.view(-1), _GROUPS):
        _spread(part, bits)
    return cells.view(torch.uint8).view(*lead, -1)[..., :count]
