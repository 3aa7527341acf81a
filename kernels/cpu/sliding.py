"""Depthwise convolution with square windows, one pixel apart: they slide along rows.

A pixel of the input is read once for all the windows of a row that it lies in, and rows of the result are
made two at a time, which share most of their input rows: windows of 3 x 3, whose weights stay in registers,
take four loads for eighteen multiply-adds, those of 5 x 5 six for fifty, and one for each weight.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import kernel
from .loops import sum_loop
from .simd import TILE_ROWS
from .tile import Emitter
from .vectors import all_lanes, first_lanes, keep_in_line, lanes_of

# Rows of the result that are made together.
ROWS = 2
# Sides of windows that slide: as many sums as both rows have windows at a pixel must fit the registers.
SIDES = (3, 5) if TILE_ROWS == 8 else (3,)

_I64 = ir.IntType(64)


class _Window:
    """Writes the instructions of `ROWS` rows of windows, for one vector of channels."""

    def __init__(self, emit, side, mask, weights, offsets):
        self.emit, self.side, self.mask = emit, side, mask
        places = [emit.builder.load(emit.at(offsets, ir.Constant(_I64, k))) for k in range(side * side)]
        self._places = [emit.at(weights, place) for place in places]
        # More would not stay in the registers.
        self._held = [emit.load(place, mask) for place in self._places] if side == 3 else None

    def _weight(self, tap):
        return self._held[tap] if self._held else self.emit.load(self._places[tap], self.mask)

    def with_column(self, place, in_row, sums):
        """The sums of all windows that a column of pixels lies in; the first are those that it ends."""
        emit, side = self.emit, self.side
        rows = [emit.builder.mul(in_row, ir.Constant(_I64, i)) for i in range(side + 2 * ROWS - 1)]
        pixels = [emit.load(emit.at(place, row), self.mask) for row in rows[: side + ROWS - 1]]
        # Processors foresee steps along a row, but not the rows below.
        for row in rows[side + ROWS - 1 :]:
            emit.prefetch(emit.at(place, row), to_write=False)
        sums = list(sums)
        for column in range(side):
            for a in range(side):
                weight = self._weight(a * side + side - 1 - column)
                for r in range(ROWS):
                    k = r * side + column
                    sums[k] = emit.multiply_add(pixels[r + a], weight, sums[k])
        return sums


@intrinsic(prefer_literal=True)
def _slide(typing_context, side, x, weight, taps, bias, y, places, rows, columns, step, mask):
    """`ROWS` rows of the result, for one vector of channels.

    Arrays are pointers; `taps` the offsets of a window's taps in `weight`, and `places` the offsets of the
    first window's first pixel, in the padding or not, of its result, and of the vector in a pixel. `rows` are
    elements from one row of the input, and of the result, to the next; `columns` the pixels of padding before
    a row, its pixels, and those of the result, which are `step` elements apart. The literal is the side of a
    window.
    """
    if not isinstance(side, types.IntegerLiteral):
        return None
    many = side.literal_value

    def codegen(context, builder, signature, arguments):
        _, x, weight, taps, bias, y, places, rows, columns, step, mask = arguments
        emit = Emitter(context, builder, signature.args[1].dtype)
        in_row, out_row = (builder.extract_value(rows, i) for i in range(2))
        before, width, outputs = (builder.extract_value(columns, i) for i in range(3))
        source, target, vector = (builder.extract_value(places, i) for i in range(3))
        window = _Window(emit, many, mask, emit.at(weight, vector), taps)
        start, zero = emit.load(emit.at(bias, vector), mask), ir.Constant(_I64, 0)
        last = ir.Constant(_I64, many - 1)
        end = builder.add(outputs, last)

        def inside(column):
            least = builder.select(builder.icmp_signed("<", column, end), column, end)
            return builder.select(builder.icmp_signed(">", least, zero), least, zero)

        def slide(column, values, meets):
            place, result, *sums = values
            if meets:
                sums = window.with_column(place, in_row, sums)
            with builder.if_then(builder.icmp_signed(">=", column, last)):
                for r in range(ROWS):
                    distance = builder.mul(out_row, ir.Constant(_I64, r))
                    emit.store(sums[r * many], emit.at(result, distance), mask)
            rest = [sums[r * many + 1 : (r + 1) * many] for r in range(ROWS)]
            new = [value for row in rest for value in (*row, start)]
            return [emit.at(place, step), emit.at(result, step), *new]

        first, beyond = inside(before), inside(builder.add(before, width))
        result = emit.at(y, target, vector, builder.mul(step, ir.Constant(_I64, 1 - many)))
        values = [emit.at(x, source, vector), result, *[start] * (ROWS * many)]
        bounds = ((zero, first, False), (first, beyond, True), (beyond, end, False))
        for begin, stop, meets in bounds:
            values = sum_loop(
                emit, begin, stop, values, lambda c, v, meets=meets: slide(c, v, meets), unrolls=False
            )
        return context.get_dummy_value()

    return types.void(side, x, weight, taps, bias, y, places, rows, columns, step, mask), codegen


@kernel
def _slide_any(side, x, weight, taps, bias, y, places, rows, columns, step, mask):
    keep_in_line()
    if side == 3:
        _slide(3, x, weight, taps, bias, y, places, rows, columns, step, mask)
    else:
        _slide(5, x, weight, taps, bias, y, places, rows, columns, step, mask)


@kernel
def slide_band(side, x, weight, taps, bias, y, source, in_row, target, out_row, rows, channels, columns):
    """`rows` rows of the result, two or more, whose windows of `side` rows all lie in the image.

    Arrays are pointers, `taps` that to the offsets of a window's taps in `weight`. `source` and `target` are
    the offsets of the first window's first pixel, in the padding or not, and of its result; `columns` are the
    pixels of padding before a row, its pixels, and those of the result.
    """
    lanes, everything = lanes_of(x), all_lanes(x)
    whole = channels // lanes * lanes
    some = first_lanes(x, channels - whole)
    for row in range(0, rows, ROWS):
        # The last two begin earlier than they would, if a row is missing.
        first = min(row, rows - ROWS)
        s, t = source + first * in_row, target + first * out_row
        steps = in_row, out_row
        for c in range(0, whole, lanes):
            _slide_any(side, x, weight, taps, bias, y, (s, t, c), steps, columns, channels, everything)
        if whole < channels:
            _slide_any(side, x, weight, taps, bias, y, (s, t, whole), steps, columns, channels, some)
