"""What follows a convolution before its results reach memory: ReLU and max-pooling of a block of rows.

The block lies in scratch, a panel of filters at a time, still in the cache. Pooling comes first, for the
larger of two values is the larger after ReLU too, and ReLU then sees a quarter of the values.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from .simd import VECTOR_BITS
from .tile import Emitter

# In place of an offset in the window: ReLU let nothing pass, so that the window's gradient is zero.
DEAD = 255


class Epilogue(NamedTuple):
    """Max-pooling with windows that touch and don't overlap, of 1x1 or more, behind ReLU or not."""

    pool_h: int
    pool_w: int
    relu: int  # 0 or 1
    out_h: int  # pooled rows and columns
    out_w: int
    filters: int
    keeps: int  # 1: where each maximum was is written too


# The convolution's results are stored as they are.
NO_EPILOGUE = Epilogue(pool_h=0, pool_w=0, relu=0, out_h=0, out_w=0, filters=0, keeps=0)


@intrinsic
def _pool_vector(typing_context, relu, keeps, z, z0, taps, y, y0, argmax, columns):
    """Largest of the vectors z[z0 + taps], and which it was; the first `columns` lanes are written."""
    signature = types.void(relu, keeps, z, z0, taps, y, y0, argmax, columns)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, z.dtype)

        def array(position):
            return context.make_array(signature.args[position])(context, builder, arguments[position])

        relu, keeps, z0, y0, columns = (arguments[i] for i in (0, 1, 3, 6, 8))
        source = emit.at(array(2).data, z0)
        offsets = array(4).data
        area = builder.extract_value(array(4).shape, 0)
        integer = ir.IntType(8 * emit.bytes)
        indices = ir.VectorType(integer, emit.lanes)
        zero = ir.Constant(emit.vector, None)
        i64 = ir.IntType(64)

        first = emit.load(emit.at(source, builder.load(offsets)))
        entry = builder.block
        loop, end = (builder.append_basic_block(name) for name in ("pool.tap", "pool.end"))
        several = builder.icmp_signed(">", area, ir.Constant(i64, 1))
        builder.cbranch(several, loop, end)

        builder.position_at_end(loop)
        tap, best, where = builder.phi(i64), builder.phi(emit.vector), builder.phi(indices)
        value = emit.load(emit.at(source, builder.load(emit.at(offsets, tap))))
        # NaN wins, and the last of several.
        takes = builder.or_(
            builder.fcmp_ordered(">", value, best), builder.fcmp_unordered("uno", value, value)
        )
        tap_number = builder.trunc(tap, integer) if emit.bytes < 8 else tap
        new_best = builder.select(takes, value, best)
        new_where = builder.select(takes, emit.broadcast(tap_number, integer), where)
        following = builder.add(tap, ir.Constant(i64, 1))
        for phi, begin, new in (
            (tap, ir.Constant(i64, 1), following),
            (best, first, new_best),
            (where, ir.Constant(indices, None), new_where),
        ):
            phi.add_incoming(begin, entry)
            phi.add_incoming(new, loop)
        builder.cbranch(builder.icmp_signed("<", following, area), loop, end)

        builder.position_at_end(end)
        best, where = builder.phi(emit.vector), builder.phi(indices)
        for phi, begin, new in ((best, first, new_best), (where, ir.Constant(indices, None), new_where)):
            phi.add_incoming(begin, entry)
            phi.add_incoming(new, loop)
        rectifies = builder.icmp_signed("!=", relu, ir.Constant(relu.type, 0))
        rectifies = emit.broadcast(rectifies, ir.IntType(1))
        passes = builder.fcmp_ordered(">", best, zero)
        stays = builder.or_(passes, builder.fcmp_unordered("uno", best, best))
        dead = ir.Constant(indices, [DEAD] * emit.lanes)
        result = builder.select(builder.and_(rectifies, builder.not_(stays)), zero, best)
        where = builder.select(builder.and_(rectifies, builder.not_(passes)), dead, where)

        where = builder.trunc(where, ir.VectorType(ir.IntType(8), emit.lanes))
        keeps = builder.icmp_signed("!=", keeps, ir.Constant(keeps.type, 0))

        def write(mask):
            emit.store(result, emit.at(array(5).data, y0), mask)
            with builder.if_then(keeps):
                emit.store_bytes(where, emit.at(array(7).data, y0), mask)

        is_full = builder.icmp_signed(">=", columns, ir.Constant(columns.type, emit.lanes))
        with builder.if_else(is_full) as (full, part):
            with full:
                write(None)
            with part:
                write(emit.mask(columns, 0))
        return context.get_dummy_value()

    return signature, codegen


@kernel
def finish_panel(z, width, rows, e, taps, y, y0, argmax, columns):
    """Pool `rows` rows of windows of a block, and write them from y[y0] on.

    `z` holds the block's convolution, pixels of `width` filters each, rows of `e.out_w` windows; `taps` are
    the offsets in it of a window's pixels, from the first; `columns` of the filters are the result's.
    """
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * z.itemsize)
    line = e.out_w * e.pool_w * width
    for i in range(rows):
        for j in range(e.out_w):
            source = i * e.pool_h * line + j * e.pool_w * width
            target = y0 + (i * e.out_w + j) * e.filters
            for c in range(0, columns, lanes):
                _pool_vector(e.relu, e.keeps, z, source + c, taps, y, target + c, argmax, columns - c)


@intrinsic
def _unpool_vector(typing_context, dout, argmax, p0, taps, z, z0, sums, s0, columns):
    """Write to each z[z0 + taps[t]] the lanes of dout[p0:] from there, else zero; add them to sums."""
    signature = types.void(dout, argmax, p0, taps, z, z0, sums, s0, columns)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, z.dtype)

        def array(position):
            return context.make_array(signature.args[position])(context, builder, arguments[position])

        p0, z0, s0, columns = (arguments[i] for i in (2, 5, 7, 8))
        offsets, target = array(3).data, emit.at(array(4).data, z0)
        area = builder.extract_value(array(3).shape, 0)
        i64 = ir.IntType(64)
        integer = ir.IntType(8 * emit.bytes)
        indices = ir.VectorType(integer, emit.lanes)
        zero = ir.Constant(emit.vector, None)

        def read(mask):
            value = emit.load(emit.at(array(0).data, p0), mask)
            return value, emit.load_bytes(emit.at(array(1).data, p0), mask)

        is_full = builder.icmp_signed(">=", columns, ir.Constant(columns.type, emit.lanes))
        with builder.if_else(is_full) as (full, part):
            with full:
                whole, whole_block = read(None), builder.block
            with part:
                masked, masked_block = read(emit.mask(columns, 0)), builder.block
        value, code = builder.phi(emit.vector), builder.phi(whole[1].type)
        for phi, first, second in zip((value, code), whole, masked, strict=True):
            phi.add_incoming(first, whole_block)
            phi.add_incoming(second, masked_block)
        code = builder.zext(code, indices)

        entry = builder.block
        loop, end = (builder.append_basic_block(name) for name in ("unpool.tap", "unpool.end"))
        builder.branch(loop)
        builder.position_at_end(loop)
        tap, total = builder.phi(i64), builder.phi(emit.vector)
        number = builder.trunc(tap, integer) if emit.bytes < 8 else tap
        chosen = builder.icmp_unsigned("==", code, emit.broadcast(number, integer))
        gradient = builder.select(chosen, value, zero)
        emit.store(gradient, emit.at(target, builder.load(emit.at(offsets, tap))))
        following = builder.add(tap, ir.Constant(i64, 1))
        more = builder.fadd(total, gradient)
        for phi, begin, new in ((tap, ir.Constant(i64, 0), following), (total, zero, more)):
            phi.add_incoming(begin, entry)
            phi.add_incoming(new, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, area), loop, end)
        builder.position_at_end(end)
        place = emit.at(array(6).data, s0)
        emit.store(builder.fadd(emit.load(place), more), place)
        return context.get_dummy_value()

    return signature, codegen


@kernel
def unpool_panel(dout, argmax, p0, rows, e, taps, z, width, sums, s0, columns):
    """The adjoint of `finish_panel`: write the gradients of a block's pixels to `z`, zeros included.

    `dout` and `argmax` are read from p0 on; the gradients' sums over all pixels are added to `sums` from s0
    on, which like `z` is in whole vectors.
    """
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * z.itemsize)
    line = e.out_w * e.pool_w * width
    for i in range(rows):
        for j in range(e.out_w):
            target = i * e.pool_h * line + j * e.pool_w * width
            source = p0 + (i * e.out_w + j) * e.filters
            for c in range(0, columns, lanes):
                _unpool_vector(dout, argmax, source + c, taps, z, target + c, sums, s0 + c, columns - c)


def window_taps(e: Epilogue, width: int) -> np.ndarray:
    """Offsets of a window's pixels in a block whose pixels are `width` elements apart."""
    line = e.out_w * e.pool_w * width
    return np.add.outer(np.arange(e.pool_h) * line, np.arange(e.pool_w) * width).ravel().astype(np.intp)
