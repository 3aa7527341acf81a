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
    all_lanes,
    compress,
    compressed,
    count,
    first_lanes,
    lanes_in,
    lanes_of,
    like,
    load,
    pointer,
    steps,
    store,
)

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
# A byte is divided by another one so: multiplied with 2^16 divided by that, rounded up, and shifted.
_SHIFT = 16
# From more pixels of a window on, most lists of pixels get none of a vector's gradients.
_MANY_PIXELS = 16


class _Integers:
    """Vectors of int32, as many lanes as a vector of floats has."""

    def __init__(self, emit):
        self.emit, self.builder = emit, emit.builder
        self.kind = ir.VectorType(_I32, emit.lanes)

    def spread(self, number):
        """`number` in each lane."""
        undefined = ir.Constant(self.kind, ir.Undefined)
        first = self.builder.insert_element(undefined, number, _I32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self.kind, None))

    def load_bytes(self, place, mask):
        """Bytes as int32; those outside of `mask`, if there is one, are zero and not read."""
        many = self.emit.lanes
        kind = ir.VectorType(_I8, many)
        place = self.builder.bitcast(place, kind.as_pointer())
        if mask is None:
            values = self.builder.load(place)
            values.align = 1
        else:
            arguments = [place, _I32(1), mask, ir.Constant(kind, None)]
            values = self.emit.call(f"llvm.masked.load.v{many}i8.p0", kind, arguments)
        return self.builder.zext(values, self.kind)


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
        whole = _Integers(emit)
        area, *factors = (builder.trunc(number, _I32) for number in window)
        fraction, of_column, of_row = map(whole.spread, factors)
        gradients, codes, bases = emit.at(gradients, at), emit.at(codes, at), emit.at(bases, q)
        none, nothing, some = whole.spread(_I32(-1)), ir.Constant(emit.vector, None), emit.mask(columns, 0)
        mask = None if inside.literal_value else some
        sums = emit.at(sums, f)
        total, pixels, places = emit.load(sums, some), [], []
        for number in map(_I64, range(emit.lanes)):
            counts = builder.icmp_signed("<", number, rows)
            # Where there is no such pixel, the first is read instead.
            there = builder.mul(step, builder.select(counts, number, _I64(0)))
            code = whole.load_bytes(emit.at(codes, there), mask)
            row = builder.lshr(builder.mul(code, fraction), whole.spread(_I32(_SHIFT)))
            place = builder.add(builder.mul(code, of_column), builder.mul(row, of_row))
            place = builder.add(place, whole.spread(builder.load(emit.at(bases, number))))
            alive = builder.icmp_signed("<", code, whole.spread(builder.select(counts, area, _I32(0))))
            places.append(builder.select(alive, place, none))
            pixels.append(emit.load(emit.at(gradients, there), mask))
            total = builder.fadd(total, builder.select(alive, pixels[-1], nothing), flags=("nsz",))
        emit.store(total, sums, some)
        squares = zip(transposed(emit, places), transposed(emit, pixels), strict=True)
        for number, (place, gradient) in enumerate(squares):
            with builder.if_then(builder.icmp_signed("<", _I64(number), columns)):
                alive = builder.icmp_signed(">=", place, ir.Constant(whole.kind, None))
                filter_ = builder.add(f, _I64(number))
                length = emit.at(lengths, filter_)
                entries = builder.load(length)
                end = builder.add(builder.mul(capacity, filter_), entries)
                offset = builder.bitcast(emit.at(offsets, end), whole.kind.as_pointer())
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
