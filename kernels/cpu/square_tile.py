"""The engine's tile where few channels meet few filters: their weights stay in registers.

`tile` keeps results in registers and reads an element of A, and of B, for each product of vectors with one
vector of columns: more reads than products, of which a processor does as many in a cycle. With a vector of
filters, and as many channels as it has lanes, all weights fit the registers of AVX-512. Then a product reads
an element of A, and nothing else.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import simd
from .loops import sum_loop
from .tile import Emitter

# Rows whose sums are in work together: a sum waits four cycles for each of its products.
ROWS = 8

# As many registers as the weights and the sums need.
HAS_REGISTERS = simd.VECTOR_BITS == 512

_I64 = ir.IntType(64)


def _operands(context, builder, kinds, values):
    """Pointers to where A, B and C begin, which come as an array and a place each."""
    return [
        builder.gep(context.make_array(kinds[k])(context, builder, values[k]).data, [values[k + 1]])
        for k in range(0, 6, 2)
    ]


def _share(context, builder, kind, array, steps):
    """What is to be fetched, and how many elements of it in each of `steps`."""
    fetched = context.make_array(kind)(context, builder, array)
    size = cgutils.unpack_tuple(builder, fetched.shape)[0]
    one = _I64(1)
    return fetched.data, builder.sdiv(size, builder.select(builder.icmp_signed(">", steps, one), steps, one))


@intrinsic
def multiply_square(typing_context, a, a0, b, b0, c, c0, pitches, rows, adds, ahead):
    """C[c0 + i * pc + n] = sum over k of A[a0 + i * pa + k] * B[b0 + k * pb + n], or that is added to C.

    `pitches` are pa, pb and pc. There are as many k, and n, as a vector has lanes, and `rows` rows i, filled
    up to a multiple of `ROWS`; `adds` says whether to add. Meanwhile a cache fetches `ahead`.
    """

    def codegen(context, builder, signature, values):
        emit = Emitter(context, builder, a.dtype)
        a_row, b_row, c_row = _operands(context, builder, signature.args, values)
        a_pitch, b_pitch, c_pitch = cgutils.unpack_tuple(builder, values[6])
        rows, zero = values[7], _I64(0)
        adds = emit.everywhere(builder.icmp_signed("!=", values[8], zero))
        fetch, share = _share(context, builder, ahead, values[9], rows)
        weights = [emit.load(emit.at(b_row, builder.mul(b_pitch, _I64(k)))) for k in range(emit.lanes)]
        with cgutils.for_range_slice(builder, zero, rows, _I64(ROWS)) as (row, _):
            numbers = [builder.add(row, _I64(i)) for i in range(ROWS)]
            elements = [emit.at(a_row, builder.mul(number, a_pitch)) for number in numbers]
            places = [emit.at(c_row, builder.mul(number, c_pitch)) for number in numbers]
            sums = [emit.load(place, adds) for place in places]
            for k, weight in enumerate(weights):
                if k < ROWS:
                    emit.prefetch(emit.at(fetch, builder.mul(numbers[k], share)), to_write=False)
                for i in range(ROWS):
                    element = emit.broadcast(builder.load(emit.at(elements[i], _I64(k))))
                    sums[i] = emit.multiply_add(element, weight, sums[i])
            for value, place in zip(sums, places, strict=True):
                emit.store(value, place)
        return context.get_dummy_value()

    return types.void(a, a0, b, b0, c, c0, pitches, rows, adds, ahead), codegen


@intrinsic
def add_square(typing_context, a, a0, b, b0, c, c0, pitches, depth, ahead):
    """C[c0 + i * pc + n] += sum over k of A[a0 + k * pa + i] * B[b0 + k * pb + n].

    `pitches` are pa, pb and pc. There are as many rows i, and n, as a vector has lanes, and `depth` k.
    Meanwhile a cache fetches `ahead`.
    """

    def codegen(context, builder, signature, values):
        emit = Emitter(context, builder, a.dtype)
        a_row, b_row, c_row = _operands(context, builder, signature.args, values)
        a_pitch, b_pitch, c_pitch = cgutils.unpack_tuple(builder, values[6])
        fetch, share = _share(context, builder, ahead, values[8], values[7])

        def add_term(k, values):
            a_row, b_row, fetch, *sums = values
            vector = emit.load(b_row)
            emit.prefetch(fetch, to_write=False)
            elements = [emit.broadcast(builder.load(emit.at(a_row, _I64(i)))) for i in range(emit.lanes)]
            sums = [emit.multiply_add(element, vector, c) for element, c in zip(elements, sums, strict=True)]
            return [emit.at(a_row, a_pitch), emit.at(b_row, b_pitch), emit.at(fetch, share), *sums]

        start = [a_row, b_row, fetch, *[ir.Constant(emit.vector, None)] * emit.lanes]
        sums = sum_loop(emit, _I64(0), values[7], start, add_term, unrolls=False)[3:]
        for i, value in enumerate(sums):
            place = emit.at(c_row, builder.mul(c_pitch, _I64(i)))
            emit.store(builder.fadd(value, emit.load(place), flags=("nsz",)), place)
        return context.get_dummy_value()

    return types.void(a, a0, b, b0, c, c0, pitches, depth, ahead), codegen
