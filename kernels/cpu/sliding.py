"""Depthwise convolution with square windows, one pixel apart: they slide along rows.

A pixel of the input is read once for all the windows of a row that it lies in, and rows of the result are
made two at a time, which share most of their input rows. Windows of 3 x 3, whose weights stay in registers,
take four loads for eighteen multiply-adds; those of 5 x 5 and 7 x 7 six for fifty and eight for 98, and one
for each weight. Weights are packed, so that they lie at constant distances. Rows in the padding above and
below are read from a row of zeros.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from .loops import sum_loop
from .simd import TILE_ROWS
from .tile import Emitter
from .vectors import all_lanes, first_lanes, keep_in_line, lanes_of, load, store

# Rows of the result that are made together.
ROWS = 2
# Sides of windows that slide: as many sums as both rows have windows at a pixel must fit the registers.
SIDES = (3, 5, 7) if TILE_ROWS == 8 else (3,)

_I64 = ir.IntType(64)


class _Window:
    """Writes the instructions of `ROWS` rows of windows, for one vector of channels."""

    def __init__(self, emit, side, weights):
        self.emit, self.side, self._weights = emit, side, weights
        # More would not stay in the registers.
        self._held = [self._load(weights, tap) for tap in range(side * side)] if side == 3 else None

    def _load(self, weights, tap):
        weight = self.emit.load(self.emit.at(weights, ir.Constant(_I64, tap * self.emit.lanes)))
        # No result is stored there: else all of them would be read, and spilled, before the first one is.
        weight.set_metadata("invariant.load", self.emit.builder.module.add_metadata([]))
        return weight

    def _read(self):
        """All weights; those that are not held are read where they are needed."""
        if self._held:
            return self._held
        weights = self._weights
        if self.side == 7:
            # Behind a pointer that could be another each time, or all would be read, and spilled, before the
            # loop. Of 5 x 5 half stay in registers so.
            kind = ir.FunctionType(weights.type, [weights.type])
            weights = self.emit.builder.asm(kind, "", "=r,0", [weights], True)
        return [self._load(weights, tap) for tap in range(self.side**2)]

    def with_column(self, pixels, sums):
        """The sums of all windows that a column of pixels lies in; the first are those that it ends."""
        side, sums, weights = self.side, list(sums), self._read()
        for column in range(side):
            for a in range(side):
                weight = weights[a * side + side - 1 - column]
                for r in range(ROWS):
                    k = r * side + column
                    sums[k] = self.emit.multiply_add(pixels[r + a], weight, sums[k])
        return sums


@intrinsic(prefer_literal=True)
def _slide(typing_context, side, x, zeros, weights, bias, y, rows, columns, step, mask):
    """`ROWS` rows of the result, for one vector of channels.

    Arrays are pointers: to the vector in the first pixels of an image, of a row of zeros and of the first row
    of the result, in the biases, and to its packed weights. `rows` are the windows' first row of the image,
    how many it has, and the elements from one row of it, and of the result, to the next; `columns` the pixels
    of padding before a row, its pixels, and those of the result, which are `step` elements apart. The literal
    is the side of a window.
    """
    if not isinstance(side, types.IntegerLiteral):
        return None
    many = side.literal_value

    def codegen(context, builder, signature, arguments):
        _, x, zeros, weights, bias, y, rows, columns, step, mask = arguments
        emit = Emitter(context, builder, signature.args[1].dtype)
        first_row, height, in_row, out_row = (builder.extract_value(rows, i) for i in range(4))
        before, width, outputs = (builder.extract_value(columns, i) for i in range(3))
        window = _Window(emit, many, weights)
        start, zero = emit.load(bias, mask), ir.Constant(_I64, 0)
        last = ir.Constant(_I64, many - 1)
        end = builder.add(outputs, last)
        tops = []
        for i in range(many + 2 * ROWS - 1):
            row = builder.add(first_row, ir.Constant(_I64, i))
            # As an unsigned number, a row above the image is beyond its end.
            is_inside = builder.icmp_unsigned("<", row, height)
            top = emit.at(x, builder.mul(row, in_row))
            tops.append(builder.select(is_inside, top, zeros))
        tops, below = tops[: many + ROWS - 1], tops[many + ROWS - 1 :]

        def inside(column):
            least = builder.select(builder.icmp_signed("<", column, end), column, end)
            return builder.select(builder.icmp_signed(">", least, zero), least, zero)

        def slide(column, values, meets):
            place, *sums = values
            if meets:
                # Processors foresee steps along a row, but not the rows below.
                for top in below:
                    emit.prefetch(emit.at(top, place), to_write=False)
                sums = window.with_column([emit.load(emit.at(top, place), mask) for top in tops], sums)
            # The first columns end no window: what they store is overwritten by the first that does.
            output = builder.sub(column, last)
            output = builder.select(builder.icmp_signed(">", output, zero), output, zero)
            result = emit.at(y, builder.mul(output, step))
            for r in range(ROWS):
                distance = builder.mul(out_row, ir.Constant(_I64, r))
                emit.store(sums[r * many], emit.at(result, distance), mask)
            rest = [sums[r * many + 1 : (r + 1) * many] for r in range(ROWS)]
            return [builder.add(place, step), *(value for row in rest for value in (*row, start))]

        first, beyond = inside(before), inside(builder.add(before, width))
        values = [builder.mul(builder.neg(before), step), *[start] * (ROWS * many)]
        bounds = ((zero, first, False), (first, beyond, True), (beyond, end, False))
        for begin, stop, meets in bounds:
            values = sum_loop(
                emit, begin, stop, values, lambda c, v, meets=meets: slide(c, v, meets), unrolls=False
            )
        return context.get_dummy_value()

    return types.void(side, x, zeros, weights, bias, y, rows, columns, step, mask), codegen


@intrinsic
def _at(typing_context, source, index):
    """The pointer to source[index]."""

    def codegen(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return source(source, types.intp), codegen


@kernel
def _slide_any(side, x, zeros, weights, bias, y, rows, columns, step, mask):
    keep_in_line()
    if side == 3:
        _slide(3, x, zeros, weights, bias, y, rows, columns, step, mask)
    elif side == 5:
        _slide(5, x, zeros, weights, bias, y, rows, columns, step, mask)
    else:
        _slide(7, x, zeros, weights, bias, y, rows, columns, step, mask)


@kernel
def pack(weight, taps, count, channels, packed):
    """The weights of `count` taps, at their offsets in `weight`, by vector of channels; all are pointers."""
    lanes, everything = lanes_of(weight), all_lanes(weight)
    target = 0
    for c in range(0, channels, lanes):
        some = first_lanes(weight, channels - c)
        for t in range(count):
            store(load(weight, taps[t] + c, some), packed, target, everything)
            target += lanes


@kernel
def slide_band(side, x, zeros, packed, bias, y, first, rows, height, steps, channels, columns):
    """`rows` rows of the result, two or more, the windows of the first beginning at row `first` of the image.

    Arrays are pointers: to the image of `height` rows, to a row of zeros, and to the first row of the result.
    `steps` are the elements from one row of the image, and of the result, to the next, `columns` the pixels
    of padding before a row, its pixels, and those of the result. `packed` holds the weights; see `pack`.
    """
    keep_out_of_line()
    lanes, everything = lanes_of(x), all_lanes(x)
    whole = channels // lanes * lanes
    some = first_lanes(x, channels - whole)
    taps = side * side
    for row in range(0, rows, ROWS):
        # The last two begin earlier than they would, if a row is missing.
        top = min(row, rows - ROWS)
        result = _at(y, top * steps[1])
        of = first + top, height, steps[0], steps[1]
        for c in range(0, channels, lanes):
            image, nothing, weights = _at(x, c), _at(zeros, c), _at(packed, c * taps)
            begin, target = _at(bias, c), _at(result, c)
            if c < whole:
                _slide_any(side, image, nothing, weights, begin, target, of, columns, channels, everything)
            else:
                _slide_any(side, image, nothing, weights, begin, target, of, columns, channels, some)
