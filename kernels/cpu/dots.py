"""Products of one row with many: as many sums at once as a vector has lanes, as LLVM instructions."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .image_tiles import exchanges
from .loops import sum_loop
from .simd import VECTOR_BITS
from .tile import Emitter
from .vectors import AS_WRITTEN, Vector

_I64 = ir.IntType(64)


def totals(emit, rows):
    """A vector of the sums of all lanes of as many vectors as it has lanes, always added in the same order.

    In each round the halves of two vectors' blocks are exchanged and added, so that there are half as many
    vectors of blocks twice as long.
    """
    builder, lanes, size = emit.builder, emit.lanes, 1
    while size < lanes:
        masks = exchanges(lanes, size)
        pairs = zip(rows[::2], rows[1::2], strict=True)
        halves = [[builder.shuffle_vector(*pair, mask) for mask in masks] for pair in pairs]
        rows = [builder.fadd(*half, flags=AS_WRITTEN) for half in halves]
        size *= 2
    return rows[0]


@intrinsic
def dots(typing_context, matrix, m0, step, many, row, r0, size):
    """Lane i: the sum over k of matrix[m0 + i * step + k] * row[r0 + k], for the first `many` lanes.

    Both are pointers; k counts to `size`. The other lanes repeat the last of these.
    """
    vector = Vector(matrix.dtype, VECTOR_BITS // matrix.dtype.bitwidth)

    def codegen(context, builder, signature, arguments):
        source, m0, step, many, factors, r0, size = arguments
        emit = Emitter(context, builder, matrix.dtype)
        last = builder.sub(many, ir.Constant(_I64, 1))
        lines = []
        for i in range(emit.lanes):
            number = ir.Constant(_I64, i)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            lines.append(emit.at(source, m0, builder.mul(number, step)))
        factors = emit.at(factors, r0)

        def add(k, sums, mask=None):
            factor = emit.load(emit.at(factors, k), mask)
            loaded = [emit.load(emit.at(line, k), mask) for line in lines]
            return [emit.multiply_add(value, factor, sum) for value, sum in zip(loaded, sums, strict=True)]

        lanes = ir.Constant(_I64, emit.lanes)
        vectors = builder.sdiv(size, lanes)
        zero = ir.Constant(emit.vector, None)
        sums = sum_loop(
            emit,
            ir.Constant(_I64, 0),
            vectors,
            [zero] * emit.lanes,
            lambda v, sums: add(builder.mul(v, lanes), sums),
            unrolls=False,
        )
        whole = builder.mul(vectors, lanes)
        return totals(emit, add(whole, sums, emit.mask(builder.sub(size, whole), 0)))

    arguments = (matrix, types.intp, types.intp, types.intp, row, types.intp, types.intp)
    return vector(*arguments), codegen
