"""Vectors of 64-bit words, which Numba does not offer, as LLVM instructions.

LLVM maps them to the registers of the CPU: one of 512 bits, two of 256 or four of 128.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

ROWS = 4
"""Pixels (rows of a product) that share one load of the weight."""
LANES = 8
"""Outputs in one vector, 64 bits each."""
SLACK = 4
"""Words copied at once; arrays that are copied from or to are longer by this number."""
BYTE_STEPS = 31
"""Number of words whose counts, at most 8 each, fit into a byte."""


def counts_words() -> bool:
    """Whether the CPU that Numba compiles for counts the bits of 64-bit lanes in one instruction."""
    from llvmlite import binding
    from numba.core import config

    chosen = vars(config).get("CPU_FEATURES")  # set by NUMBA_CPU_FEATURES
    if chosen is not None:
        return "+avx512vpopcntdq" in chosen
    return bool(binding.get_host_cpu_features().get("avx512vpopcntdq"))


def intrinsics() -> SimpleNamespace:
    """Functions for compiled code; positions are indices into flat arrays."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    n, f = types.intp, types.float32
    i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
    words, octets = ir.VectorType(i64, LANES), ir.VectorType(i8, 64)
    by_words = counts_words()

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

    @intrinsic
    def pack_word(typing: Any, codes: Any, at: Any, bit: Any) -> Any:
        """Pack bit `bit` of the 64 codes from `at` on into one word."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            vector = builder.load(pointer(context, builder, signature.args[0], args[0], args[1], octets), align=1)
            mask = splat(builder, builder.shl(ir.Constant(i8, 1), builder.trunc(args[2], i8)), 64)
            zero = ir.Constant(octets, None)
            return builder.bitcast(builder.icmp_unsigned("!=", builder.and_(vector, mask), zero), i64)

        return types.uint64(codes, types.intp, types.intp), generate

    @intrinsic
    def add_counts(
        typing: Any, sums: Any, at: Any, stride: Any, weight: Any, w_at: Any, x: Any, x_at: Any, count: Any, factor: Any
    ) -> Any:
        """sums[at + row·stride …] += factor · popcount(rows AND outputs), over `count` words of ROWS rows and LANES
        outputs."""

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
        """(sums + constant) · scale + bias of LANES outputs; `args` starts with the six that they share."""

        def loaded(n: int, at: Any, element: Any) -> Any:
            return builder.load(pointer(context, builder, kinds[n], args[n], at, element), align=4)

        whole = builder.add(loaded(0, args[1], narrow), loaded(2, args[5], narrow))
        y = builder.fmul(builder.sitofp(whole, floats), loaded(3, args[5], floats))
        return builder.fadd(y, loaded(4, args[5], floats))

    n, f = types.intp, types.float32

    @intrinsic
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

    @intrinsic
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

    @intrinsic
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
            magic = ir.Constant(floats, [1.5 * 2.0**23] * LANES)  # adding and subtracting it rounds half to even
            y = builder.fsub(builder.fadd(y, magic), magic)
            whole = builder.fptosi(builder.fadd(y, splat(builder, zero, LANES)), narrow)
            octet = ir.VectorType(i8, LANES)
            goal = pointer(context, builder, signature.args[11], args[11], args[12], octet)
            builder.store(builder.trunc(whole, octet), goal, align=1)
            return context.get_dummy_value()

        return types.void(sums, n, constant, scale, bias, n, f, f, f, f, f, codes, n), generate

    @intrinsic
    def copy_words(typing: Any, source: Any, at: Any, x: Any, goal: Any) -> Any:
        """Copy SLACK words."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(i64, SLACK)
            vector = builder.load(pointer(context, builder, signature.args[0], args[0], args[1], kind), align=8)
            builder.store(vector, pointer(context, builder, signature.args[2], args[2], args[3], kind), align=8)
            return context.get_dummy_value()

        return types.void(source, n, x, n), generate

    @intrinsic
    def count_bits(typing: Any, word: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.ctpop(args[0])

        return types.uint64(types.uint64), generate

    return SimpleNamespace(
        pack_word=pack_word,
        copy_words=copy_words,
        add_counts=add_counts,
        count_bits=count_bits,
        to_float=to_float,
        to_sum=to_sum,
        to_codes=to_codes,
    )
