"""Sums of products of codes by AND and popcount of their bit planes, compiled by Numba on the first call.

EBS's binary decomposition, defined in `hub_mpq.quantizers.binary_decomposition`: the sum of
2^(i+j) · popcount(W_i AND X_j) over the planes of both operands, here packed in 64-bit words. The planes of the weight
are signed (two's complement), so that signed codes need no correction. The only exception is a weight of ±1: one plane
u with w = 2u − 1, minus the sum of the activations' codes. The zero point of the activations adds one constant per
output. The blocking of the loops is our construction.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from .bit_serial_vectors import LANES, ROWS, SLACK, intrinsics

BLOCK = 32
"""Pixels whose planes and sums stay in the cache while all outputs are computed."""


@lru_cache
def kernels() -> SimpleNamespace:
    """The compiled functions `pack` and `multiply`; they release the GIL."""
    import numba
    import numpy as np

    vectors = intrinsics()
    pack_word, copy_words, add_counts = vectors.pack_word, vectors.copy_words, vectors.add_counts
    count_bits = vectors.count_bits
    to_float, to_sum, to_codes = vectors.to_float, vectors.to_sum, vectors.to_codes
    jit = numba.njit(nogil=True, boundscheck=False, error_model="numpy")

    @jit
    def pack(codes: Any, planes: Any, start: int, stop: int) -> None:
        """Pack codes uint8 [pixels · words · 64] into planes [bits, pixels, words], for pixels start … stop."""
        bits, _, count = planes.shape
        for p in range(start, stop):
            for q in range(count):
                for j in range(bits):
                    planes[j, p, q] = pack_word(codes, 64 * (p * count + q), j)

    @jit
    def gather(
        codes: Any, zero: int, planes: Any, sizes: Any, shape: Any, window: Any, first: int, rows: int, g: int, x: Any
    ) -> None:
        """Gather the planes of all inputs that some output pixels of group g read, into x."""
        pixels, groups, bits, count, channels, length, step = sizes
        height, width, out_height, out_width = shape
        kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w = window
        read = np.zeros(64 * length, np.uint8)
        image, left = first // (out_height * out_width), first % (out_height * out_width)
        line, column = left // out_width, left % out_width
        for r in range(rows):
            top, side = line * stride_h - pad_h, column * stride_w - pad_w
            corner = (image * height + top) * width + side
            inside = top >= 0 and top + (kernel_h - 1) * step_h < height and side >= 0
            if pixels and inside and side + kernel_w <= width:
                for j in range(bits):
                    for dy in range(kernel_h):
                        source = (j * pixels + corner + dy * step_h * width) * count
                        goal = j * step + r * length + dy * kernel_w * count
                        for q in range(0, kernel_w * count, SLACK):
                            copy_words(planes, source + q, x, goal + q)
            else:
                goal = 0
                for dy in range(kernel_h):
                    for dx in range(kernel_w):
                        y, z = dy * step_h, dx * step_w
                        if 0 <= top + y < height and 0 <= side + z < width:
                            source = ((corner + y * width + z) * groups + g) * channels
                            for c in range(channels):
                                read[np.uintp(goal + c)] = codes[np.uintp(source + c)]
                        else:
                            for c in range(channels):
                                read[np.uintp(goal + c)] = zero
                        goal += channels
                for k in range(length):
                    for j in range(bits):
                        x[np.uintp(j * step + r * length + k)] = pack_word(read, 64 * k, j)
            column += 1
            if column == out_width:
                line, column = line + 1, 0
            if line == out_height:
                image, line = image + 1, 0

    @jit
    def begin(sums: Any, wide: int, x: Any, sizes: Any, rows: int, one_bit: bool) -> None:
        """Initialize sums to 0, or to minus the sum of the codes of each pixel."""
        _, _, bits, _, _, length, step = sizes
        for r in range(rows):
            total = 0
            if one_bit:
                for j in range(bits):
                    ones = np.uint64(0)
                    for k in range(length):
                        ones += count_bits(x[np.uintp(j * step + r * length + k)])
                    total -= np.int64(ones) << j
            for o in range(r * wide, (r + 1) * wide):
                sums[np.uintp(o)] = total

    @jit
    def finish(
        sums: Any,
        wide: int,
        rows: int,
        goal: int,
        c: int,
        size: int,
        terms: Any,
        summand: Any,
        cut: Any,
        grid: Any,
        out: Any,
        codes: Any,
    ) -> None:
        """Convert sums to float32 or to codes (whichever array is not empty), from `goal` on."""
        constant, scale, bias = terms
        low, high = cut
        inverse, zero, top = grid
        whole = size // LANES * LANES
        for r in range(rows):
            at = r * wide
            if codes.size:
                for o in range(0, whole, LANES):
                    to_codes(sums, at + o, constant, scale, bias, c + o, low, high, inverse, zero, top, codes, goal + o)
            elif summand.size:
                for o in range(0, whole, LANES):
                    to_sum(sums, at + o, constant, scale, bias, c + o, low, high, summand, out, goal + o)
            else:
                for o in range(0, whole, LANES):
                    to_float(sums, at + o, constant, scale, bias, c + o, low, high, out, goal + o)
            for o in range(whole, size):
                y = np.float32(sums[at + o] + constant[c + o]) * scale[c + o] + bias[c + o]
                if summand.size:
                    y += summand[goal + o]
                y = min(max(y, low), high)
                if codes.size:
                    codes[goal + o] = np.uint8(min(max(np.rint(y * inverse), -zero), top - zero) + zero)
                else:
                    out[goal + o] = y
            goal += scale.size

    @jit
    def multiply(
        codes: Any,
        zero: int,
        planes: Any,
        shape: Any,
        window: Any,
        channels: int,
        weight: Any,
        factors: Any,
        one_bit: bool,
        constant: Any,
        scale: Any,
        bias: Any,
        summand: Any,
        cut: Any,
        grid: Any,
        out: Any,
        out_codes: Any,
        start: int,
        stop: int,
    ) -> None:
        """Compute all outputs of output pixels start … stop.

        Args:
            codes: Codes of the input, uint8 [pixels · groups · channels].
            zero: Zero point of the input.
            planes: Planes of the input, uint64 [bits, pixels, words]; no pixels if they are packed when read.
            shape: (height, width, output height, output width).
            window: (kernel, stride, padding, dilation), each for both axes.
            channels: Channels of one group.
            weight: uint64 [groups, outputs / LANES, planes, words, LANES].
            factors: Factor of each plane of the weight, int64 [planes].
            one_bit: Whether w = 2u − 1; then the sum of the activations' codes is subtracted.
            constant: int32 [outputs], added to the sums.
            scale: float32 [outputs].
            bias: float32 [outputs].
            summand: The residual, float32 [pixels · outputs], or empty.
            cut: (low, high) that the float32 result is clamped to.
            grid: (1 / scale, zero point, top) of the output's codes.
            out: float32 [pixels · outputs], or empty.
            out_codes: uint8 [pixels · outputs], or empty; the array that is not empty is written.
            start: First output pixel.
            stop: Output pixel after the last one.
        """
        groups, blocks, weight_planes, length, _ = weight.shape
        bits, pixels, count = planes.shape
        outputs, wide = scale.size // groups, blocks * LANES
        x = np.zeros(bits * (BLOCK * length + SLACK), np.uint64)
        sums = np.empty(BLOCK * wide, np.int32)
        flat_weight, flat_planes = weight.ravel(), planes.ravel()
        terms = (constant, scale, bias)
        step_x, step_w = BLOCK * length + SLACK, length * LANES
        sizes = (pixels, groups, bits, count, channels, length, step_x)
        for first in range(start, stop, BLOCK):
            rows = min(BLOCK, stop - first)
            for g in range(groups):
                gather(codes, zero, flat_planes, sizes, shape, window, first, rows, g, x)
                begin(sums, wide, x, sizes, rows, one_bit)
                for b in range(blocks):
                    for r in range(0, rows, ROWS):
                        at = r * wide + b * LANES
                        for i in range(weight_planes):
                            w_at = ((g * blocks + b) * weight_planes + i) * step_w
                            for j in range(bits):
                                x_at = j * step_x + r * length
                                add_counts(sums, at, wide, flat_weight, w_at, x, x_at, length, factors[i] << j)
                goal = first * scale.size + g * outputs
                finish(sums, wide, rows, goal, g * outputs, outputs, terms, summand, cut, grid, out, out_codes)

    return SimpleNamespace(pack=pack, multiply=multiply)
