"""Lists of the gradients behind max-pooling, for each filter or each pixel: a vector's are sorted at once.

An entry has a value, the gradient, and an offset. Lanes of a vector that belong to another list, or to none,
are squeezed out of it, and what is left is stored as a whole vector: behind a list's end anything may stand,
so that lists lie a vector further apart than they can be long.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import kernel
from .loops import transposed
from .tile import Emitter
from .vectors import (
    Vector,
    all_lanes,
    compress,
    compressed,
    count,
    first_lanes,
    lanes_in,
    lanes_of,
    like,
    load,
    load_vector,
    pointer,
    splat_vector,
    steps,
    store,
)

_I32, _I64 = ir.IntType(32), ir.IntType(64)
# A byte is divided by another one so: multiplied with 2^16 divided by that, rounded up, and shifted.
_SHIFT = 16
# From more pixels of a window on, most lists of pixels get none of a vector's gradients.
_MANY_PIXELS = 16


class Geometry(NamedTuple):
    """Windows of `area` pixels: where that of a code begins, counted from the window's first.

    The offset is code * of_column + code // the window's width * of_row.
    """

    area: int
    fraction: int  # stands for the width, see `_SHIFT`
    of_column: int
    of_row: int


def geometry(pool_h: int, pool_w: int, row: int, column: int) -> Geometry:
    """Of windows of `pool_h` x `pool_w` pixels, whose rows lie `row` and columns `column` elements apart."""
    return Geometry(pool_h * pool_w, -(-(1 << _SHIFT) // pool_w), column, row - pool_w * column)


@intrinsic(prefer_literal=True)
def _sort_square(typing_context, inside, sources, bounds, windows, lists):
    """Append what a square of pixels and filters, a vector's lanes of each, has to its filters' lists.

    `sources` are gradients and codes, where the first is and the step from pixel to pixel, and the pixels'
    bases and where the first of these is. Of `bounds`, rows and columns, only the first pixels and filters
    count; the literal `inside` says that the others can be read. `windows` is a `Geometry`. `lists` are
    values and offsets, how far lists are apart, their lengths, the sums of gradients, and the first filter.
    """
    if not isinstance(inside, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, arguments):
        (gradients, codes, at, step, bases, q), (rows, columns), window, lists_of = (
            cgutils.unpack_tuple(builder, packed) for packed in arguments[1:]
        )
        values, offsets, capacity, lengths, sums, f = lists_of
        emit = Emitter(context, builder, sources[0].dtype)
        integers, codes_of_a_vector = ir.VectorType(_I32, emit.lanes), Vector(types.uint8, emit.lanes)

        def spread(number):
            return splat_vector(builder, number, emit.lanes)

        area, *factors = (builder.trunc(number, _I32) for number in window)
        fraction, of_column, of_row = map(spread, factors)
        gradients, codes, bases = emit.at(gradients, at), emit.at(codes, at), emit.at(bases, q)
        none, nothing, some = spread(_I32(-1)), ir.Constant(emit.vector, None), emit.mask(columns, 0)
        mask = emit.everywhere(ir.IntType(1)(1)) if inside.literal_value else some
        sums = emit.at(sums, f)
        total, pixels, places = emit.load(sums, some), [], []
        for number in map(_I64, range(emit.lanes)):
            counts = builder.icmp_signed("<", number, rows)
            # Where there is no such pixel, the first is read instead.
            there = builder.mul(step, builder.select(counts, number, _I64(0)))
            code = load_vector(context, builder, codes_of_a_vector, codes, there, mask)
            code = builder.zext(code, integers)
            row = builder.lshr(builder.mul(code, fraction), spread(_I32(_SHIFT)))
            place = builder.add(builder.mul(code, of_column), builder.mul(row, of_row))
            place = builder.add(place, spread(builder.load(emit.at(bases, number))))
            alive = builder.icmp_signed("<", code, spread(builder.select(counts, area, _I32(0))))
            places.append(builder.select(alive, place, none))
            pixels.append(emit.load(emit.at(gradients, there), mask))
            total = builder.fadd(total, builder.select(alive, pixels[-1], nothing), flags=("nsz",))
        emit.store(total, sums, some)
        squares = zip(transposed(emit, places), transposed(emit, pixels), strict=True)
        for number, (place, gradient) in enumerate(squares):
            with builder.if_then(builder.icmp_signed("<", _I64(number), columns)):
                alive = builder.icmp_signed(">=", place, ir.Constant(integers, None))
                filter_ = builder.add(f, _I64(number))
                length = emit.at(lengths, filter_)
                entries = builder.load(length)
                end = builder.add(builder.mul(capacity, filter_), entries)
                offset = builder.bitcast(emit.at(offsets, end), integers.as_pointer())
                builder.store(compressed(builder, f"v{emit.lanes}i32", place, alive), offset).align = 4
                emit.store(compressed(builder, emit.suffix, gradient, alive), emit.at(values, end))
                builder.store(builder.add(entries, lanes_in(builder, alive)), length)
        return context.get_dummy_value()

    return types.void(inside, sources, bounds, windows, lists), codegen


@kernel
def sort_by_filter(
    dout, argmax, p0, pixels, filters, windows, bases, values, offsets, capacity, lengths, sums
):
    """Lists for each filter of the gradients of `pixels` windows, from p0 on, and where their runs begin.

    A list's offsets are those of the windows' first pixels, `bases`, and of the largest from there. `sums`, a
    number for each filter, gets the sums of the gradients added. `bases` has whole vectors.
    """
    gradients, codes, first_of_all = pointer(dout), pointer(argmax), pointer(bases)
    to_values, to_offsets, ends, totals = pointer(values), pointer(offsets), pointer(lengths), pointer(sums)
    lanes = lanes_of(gradients)
    for f in range(filters):
        lengths[f] = 0
    for q in range(0, pixels, lanes):
        for f in range(0, filters, lanes):
            at = p0 + q * filters + f
            sources = gradients, codes, at, filters, first_of_all, q
            bounds = pixels - q, filters - f
            lists = to_values, to_offsets, capacity, ends, totals, f
            if at + (lanes - 1) * filters + lanes <= dout.size:
                _sort_square(1, sources, bounds, windows, lists)
            else:
                _sort_square(0, sources, bounds, windows, lists)


@kernel
def sort_by_pixel(dout, argmax, p0, pixels, filters, area, run, values, offsets, capacity, lengths):
    """Lists for each pixel of `pixels` windows, from p0 on: the gradients of its filters, and their runs.

    A list's offsets are the filters' numbers * `run`.
    """
    for k in range(pixels * area):
        lengths[k] = 0
    for j in range(pixels):
        at, first = p0 + j * filters, j * area
        if area > _MANY_PIXELS:
            _append_each(dout, argmax, at, filters, area, run, values, offsets, first, capacity, lengths)
        else:
            _append_vectors(dout, argmax, at, filters, area, run, values, offsets, first, capacity, lengths)


@kernel
def _append_vectors(dout, argmax, at, filters, area, run, values, offsets, first, capacity, lengths):
    """Append the filters of a window to the lists of its pixels, a vector of filters at a time."""
    gradients, codes = pointer(dout), pointer(argmax)
    to_values, to_offsets = pointer(values), pointer(offsets)
    lanes, everything = lanes_of(gradients), all_lanes(gradients)
    numbers = steps(np.int32(run), everything)
    for f in range(0, filters, lanes):
        some = first_lanes(gradients, filters - f)
        gradient, code = load(gradients, at + f, some), load(codes, at + f, some)
        runs = numbers + like(numbers, f * run)
        for q in range(area):
            mine = (code == like(code, q)) & some
            end = (first + q) * capacity + lengths[first + q]
            store(compress(gradient, mine), to_values, end, everything)
            store(compress(runs, mine), to_offsets, end, everything)
            lengths[first + q] += count(mine)


@kernel
def _append_each(dout, argmax, at, filters, area, run, values, offsets, first, capacity, lengths):
    """`_append_vectors` filter by filter."""
    for f in range(filters):
        q = np.intp(argmax[at + f])
        if q < area:
            end = (first + q) * capacity + lengths[first + q]
            values[end] = dout[at + f]
            offsets[end] = f * run
            lengths[first + q] += 1
