"""Sums of products of codes by AND and popcount of their bit planes, compiled by Numba when they are first called.

EBS's binary decomposition, whose definition is `hub_mpq.quantizers.binary_decomposition`: the sum of
2^(i+j) · popcount(W_i AND X_j) over the planes of both operands, here packed in 64-bit words. The planes of the weight
have signs (two's complement), so that signed codes need no correction. Only ±1 is one plane u, w = 2u − 1, and the sum
of the activations' codes. The zero point of the activations is one number for each output. How the loops are blocked is
our construction.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

ROWS = 4
"""Pixels (rows of a product) that share a load of the weight."""
LANES = 8
"""Outputs in one vector, 64 bits each."""
BLOCK = 32
"""Pixels whose planes and sums stay in the cache while all outputs are made."""
SLACK = 4
"""Words that are copied at once; arrays of words that are copied from or to are so much longer."""
BYTE_STEPS = 31
"""Words whose counts, 8 at most, a byte can hold."""


def _popcount_of_words() -> bool:
    """Whether the CPU that Numba compiles for counts the bits of 64-bit lanes in one instruction."""
    from llvmlite import binding
    from numba.core import config

    if config.CPU_FEATURES is not None:  # by NUMBA_CPU_FEATURES
        return "+avx512vpopcntdq" in config.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get("avx512vpopcntdq"))


@lru_cache
def kernels() -> SimpleNamespace:
    """The compiled functions `pack` and `multiply`; they release the GIL."""
    import numba
    import numpy as np
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    n, f = types.intp, types.float32
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    words, octets = ir.VectorType(i64, LANES), ir.VectorType(i8, 64)
    by_words = _popcount_of_words()

    def pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, element: Any) -> Any:
        data = context.make_array(kind)(context, builder, array).data
        return builder.bitcast(builder.gep(data, [at]), element.as_pointer())

    def splat(builder: Any, scalar: Any, count: int) -> Any:
        kind = ir.VectorType(scalar.type, count)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(i32, 0))
        return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, count), [0] * count))

    def popcount(builder: Any, vector: Any) -> Any:
        name = "llvm.ctpop.v8i64" if vector.type == words else "llvm.ctpop.v64i8"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector.type, [vector.type]), name)
        return builder.call(function, [vector])

    @intrinsic  # type: ignore[untyped-decorator]
    def pack_word(typing: Any, codes: Any, at: Any, bit: Any) -> Any:
        """Bit `bit` of the 64 codes from `at` on, as one word."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = builder.load(pointer(context, builder, signature.args[0], args[0], args[1], octets), align=1)
            mask = splat(builder, builder.shl(ir.Constant(i8, 1), builder.trunc(args[2], i8)), 64)
            zero = ir.Constant(octets, None)
            return builder.bitcast(builder.icmp_unsigned("!=", builder.and_(vector, mask), zero), i64)

        return types.uint64(codes, types.intp, types.intp), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def add_counts(
        typing: Any, sums: Any, at: Any, stride: Any, weight: Any, w_at: Any, x: Any, x_at: Any, count: Any, factor: Any
    ) -> Any:
        """sums[at + row·stride …] += factor · popcounts of `count` words of ROWS rows AND of LANES outputs."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            size, factor_ = args[7], args[8]
            totals = [cgutils.alloca_once(builder, words) for _ in range(ROWS)]
            for total in totals:
                builder.store(ir.Constant(words, None), total)

            def product(k: Any, row: int) -> Any:
                place = builder.add(args[4], builder.mul(k, ir.Constant(i64, LANES)))
                vector = builder.load(pointer(context, builder, kinds[3], args[3], place, words), align=8)
                place = builder.add(builder.add(args[6], builder.mul(size, ir.Constant(i64, row))), k)
                scalar = builder.load(pointer(context, builder, kinds[5], args[5], place, i64))
                return builder.and_(vector, splat(builder, scalar, LANES))

            def add(place: Any, vector: Any) -> None:
                builder.store(builder.add(builder.load(place), vector), place)

            if by_words:
                with cgutils.for_range(builder, size) as loop:
                    for row in range(ROWS):
                        add(totals[row], popcount(builder, product(loop.index, row)))
            else:
                step = ir.Constant(i64, BYTE_STEPS)
                bytes_ = [cgutils.alloca_once(builder, octets) for _ in range(ROWS)]
                with cgutils.for_range_slice(builder, ir.Constant(i64, 0), size, step, inc=True) as (start, _):
                    for place in bytes_:
                        builder.store(ir.Constant(octets, None), place)
                    stop = builder.add(start, step)
                    stop = builder.select(builder.icmp_signed("<", stop, size), stop, size)
                    with cgutils.for_range_slice(builder, start, stop, ir.Constant(i64, 1), inc=True) as (k, _):
                        for row in range(ROWS):
                            add(bytes_[row], popcount(builder, builder.bitcast(product(k, row), octets)))
                    for row in range(ROWS):
                        add(totals[row], byte_sums(builder, builder.bitcast(builder.load(bytes_[row]), words)))
            times = splat(builder, builder.trunc(factor_, i32), LANES)
            for row in range(ROWS):
                place = builder.add(args[1], builder.mul(args[2], ir.Constant(i64, row)))
                goal = pointer(context, builder, kinds[0], args[0], place, narrow)
                counts = builder.mul(builder.trunc(builder.load(totals[row]), narrow), times)
                builder.store(builder.add(builder.load(goal, align=4), counts), goal, align=4)
            return context.get_dummy_value()

        return types.void(sums, n, n, weight, n, x, n, n, n), generate

    def byte_sums(builder: Any, vector: Any) -> Any:
        """The sum of the eight bytes of each word."""

        def constant(value: int) -> Any:
            return ir.Constant(words, [value] * LANES)

        def right(value: Any, bits: int) -> Any:
            return builder.lshr(value, constant(bits))

        even = constant(0x00FF00FF00FF00FF)
        pairs = builder.add(builder.and_(vector, even), builder.and_(right(vector, 8), even))
        pairs = builder.add(pairs, right(pairs, 32))
        return builder.and_(builder.add(pairs, right(pairs, 16)), constant(0xFFFF))

    narrow, floats = ir.VectorType(i32, LANES), ir.VectorType(ir.FloatType(), LANES)

    def clamp(builder: Any, vector: Any, low: Any, high: Any) -> Any:
        low, high = splat(builder, low, LANES), splat(builder, high, LANES)
        vector = builder.select(builder.fcmp_ordered("<", vector, low), low, vector)
        return builder.select(builder.fcmp_ordered(">", vector, high), high, vector)

    def scaled(context: Any, builder: Any, kinds: Any, args: Any) -> Any:
        """(sums + constant) · scale + bias of LANES outputs; `args` as the first six of the functions below."""

        def loaded(n: int, at: Any, element: Any) -> Any:
            return builder.load(pointer(context, builder, kinds[n], args[n], at, element), align=4)

        whole = builder.add(loaded(0, args[1], narrow), loaded(2, args[5], narrow))
        y = builder.fmul(builder.sitofp(whole, floats), loaded(3, args[5], floats))
        return builder.fadd(y, loaded(4, args[5], floats))

    n, f = types.intp, types.float32

    @intrinsic  # type: ignore[untyped-decorator]
    def to_float(
        typing: Any,
        sums: Any,
        at: Any,
        constant: Any,
        scale: Any,
        bias: Any,
        c: Any,
        low: Any,
        high: Any,
        out: Any,
        goal: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            y = clamp(builder, scaled(context, builder, signature.args, args), args[6], args[7])
            builder.store(y, pointer(context, builder, signature.args[8], args[8], args[9], floats), align=4)
            return context.get_dummy_value()

        return types.void(sums, n, constant, scale, bias, n, f, f, out, n), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def to_sum(
        typing: Any,
        sums: Any,
        at: Any,
        constant: Any,
        scale: Any,
        bias: Any,
        c: Any,
        low: Any,
        high: Any,
        summand: Any,
        out: Any,
        goal: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = signature.args
            other = builder.load(pointer(context, builder, kinds[8], args[8], args[10], floats), align=4)
            y = builder.fadd(scaled(context, builder, kinds, args), other)
            y = clamp(builder, y, args[6], args[7])
            builder.store(y, pointer(context, builder, kinds[9], args[9], args[10], floats), align=4)
            return context.get_dummy_value()

        return types.void(sums, n, constant, scale, bias, n, f, f, summand, out, n), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def to_codes(
        typing: Any,
        sums: Any,
        at: Any,
        constant: Any,
        scale: Any,
        bias: Any,
        c: Any,
        low: Any,
        high: Any,
        inverse: Any,
        zero: Any,
        top: Any,
        codes: Any,
        goal: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            inverse, zero, top = args[8:11]
            y = clamp(builder, scaled(context, builder, signature.args, args), args[6], args[7])
            y = builder.fmul(y, splat(builder, inverse, LANES))
            y = clamp(builder, y, builder.fneg(zero), builder.fsub(top, zero))
            magic = ir.Constant(floats, [1.5 * 2.0**23] * LANES)  # added and taken away, it rounds half to even
            y = builder.fsub(builder.fadd(y, magic), magic)
            whole = builder.fptosi(builder.fadd(y, splat(builder, zero, LANES)), narrow)
            octet = ir.VectorType(i8, LANES)
            goal = pointer(context, builder, signature.args[11], args[11], args[12], octet)
            builder.store(builder.trunc(whole, octet), goal, align=1)
            return context.get_dummy_value()

        return types.void(sums, n, constant, scale, bias, n, f, f, f, f, f, codes, n), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def copy_words(typing: Any, source: Any, at: Any, x: Any, goal: Any) -> Any:
        """SLACK words."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(i64, SLACK)
            vector = builder.load(pointer(context, builder, signature.args[0], args[0], args[1], kind), align=8)
            builder.store(vector, pointer(context, builder, signature.args[2], args[2], args[3], kind), align=8)
            return context.get_dummy_value()

        return types.void(source, n, x, n), generate

    @intrinsic  # type: ignore[untyped-decorator]
    def count_bits(typing: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ctpop(args[0])

        return types.uint64(types.uint64), generate

    jit = numba.njit(nogil=True, boundscheck=False, error_model="numpy")

    @jit  # type: ignore[untyped-decorator]
    def pack(codes: Any, planes: Any, start: int, stop: int) -> None:
        """Planes [bits, pixels, words] of codes uint8 [pixels · words · 64], pixels start … stop."""
        bits, _, count = planes.shape
        for p in range(start, stop):
            for q in range(count):
                for j in range(bits):
                    planes[j, p, q] = pack_word(codes, 64 * (p * count + q), j)

    @jit  # type: ignore[untyped-decorator]
    def gather(
        codes: Any, zero: int, planes: Any, sizes: Any, shape: Any, window: Any, first: int, rows: int, g: int, x: Any
    ) -> None:
        """Planes of all that some output pixels of group g read, into x."""
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

    @jit  # type: ignore[untyped-decorator]
    def begin(sums: Any, wide: int, x: Any, sizes: Any, rows: int, one_bit: bool) -> None:
        """Start sums at 0, or at minus the sum of the codes of each pixel."""
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

    @jit  # type: ignore[untyped-decorator]
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
        """Sums to float32 or to codes, the one that has a size, from `goal` on."""
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

    @jit  # type: ignore[untyped-decorator]
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
        """Output pixels start … stop, all outputs.

        Args:
            codes: Of the input, uint8 [pixels · groups · channels].
            zero: Its zero point.
            planes: Of the input, uint64 [bits, pixels, words]; no pixels where they are made as they are read.
            shape: (height, width, output height, output width).
            window: (kernel, stride, padding, dilation), each for both axes.
            channels: Of one group.
            weight: uint64 [groups, outputs / LANES, planes, words, LANES].
            factors: int64 [planes], of each plane of the weight.
            one_bit: Whether w = 2u − 1: the sum of the activations' codes is subtracted.
            constant: int32 [outputs], added to the sums.
            scale, bias: float32 [outputs].
            summand: float32 [pixels · outputs], or of no size.
            cut: (low, high) of the float32 result.
            grid: (1 / scale, zero point, top) of the codes of the output.
            out, out_codes: float32 and uint8 [pixels · outputs]; the one that has a size is written.
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
