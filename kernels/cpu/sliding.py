"""Depthwise convolution with square windows, one pixel apart: they slide along rows.

A pixel of the input is read once for all the windows of a row that it lies in, and rows of the result are
made two at a time, which share most of their input rows. Windows of 3 x 3, whose weights stay in registers,
take four loads for eighteen multiply-adds; those of 5 x 5 and 7 x 7 six for fifty and eight for 98, and one
for each weight. Weights are packed, so that they lie at constant distances. Rows in the padding above and
below are read from a row of zeros.

The gradient of the weights slides likewise: the sums of up to three rows of taps stay in registers while the
image passes by, a pixel of which is read once for each, and one of dout once for all.
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


def _image_row(emit, x, zeros, row, height, in_row):
    """The pointer to a row of an image, or to the row of zeros where the image has none."""
    # As an unsigned number, a row above the image is beyond its end.
    is_inside = emit.builder.icmp_unsigned("<", row, height)
    return emit.builder.select(is_inside, emit.at(x, emit.builder.mul(row, in_row)), zeros)


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
            tops.append(_image_row(emit, x, zeros, row, height, in_row))
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


class _Taps:
    """Writes the instructions that sum rows of taps over a row of dout, for one vector of channels.

    Columns are counted as dout's are: the k-th meets the image's pixel k - before. Values of a loop are the
    gradients of the last columns, the nearest one first, and the sums.
    """

    def __init__(self, emit, side, zeros, columns, step, mask):
        self.emit, self.side = emit, side
        self._zeros, self._step, self._mask = zeros, step, mask
        self._before, width, self._outputs = columns
        builder, self._nothing = emit.builder, ir.Constant(emit.vector, None)
        last = ir.Constant(_I64, side - 1)

        def larger(a, b):
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        def smaller(a, b):
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        # Between these a pixel meets gradients through all taps.
        self._end = builder.add(self._before, width)
        self._inner = smaller(larger(self._before, last), self._end)
        self._outer = larger(smaller(self._outputs, self._end), self._inner)

    def _gradient(self, line, k):
        builder = self.emit.builder
        is_one = builder.icmp_unsigned("<", k, self._outputs)
        place = self.emit.at(line, builder.mul(k, self._step))
        return self.emit.load(builder.select(is_one, place, self._zeros), self._mask)

    def _met(self, k, pixel, tap):
        """The pixel of a column if a gradient meets it through a tap; else zero, for it may be NaN."""
        builder = self.emit.builder
        meets = builder.icmp_unsigned("<", builder.sub(k, ir.Constant(_I64, tap)), self._outputs)
        return builder.select(meets, pixel, self._nothing)

    def _with_column(self, tops, line, ahead, k, values, is_edge):
        emit, side = self.emit, self.side
        seen, sums = [self._gradient(line, k), *values[: side - 1]], values[side - 1 :]
        place = emit.builder.mul(emit.builder.sub(k, self._before), self._step)
        for row in ahead:
            emit.prefetch(emit.at(row, place), to_write=False)
        new: list = []
        for top in tops:
            pixel = emit.load(emit.at(top, place), self._mask)
            for tap in range(side):
                factor = self._met(k, pixel, tap) if is_edge else pixel
                new.append(emit.multiply_add(factor, seen[tap], sums[len(new)]))
        return [*seen[:-1], *new]

    def with_row(self, tops, line, ahead, sums):
        """The sums, with the products of a row of dout and the image's rows `tops`; `ahead` is fetched."""
        emit, before = self.emit, self._before
        none = [self._nothing] * (self.side - 1)

        def shift(k, values):
            return [self._gradient(line, k), *values[:-1]]

        values = [*sum_loop(emit, ir.Constant(_I64, 0), before, none, shift, unrolls=False), *sums]
        bounds = before, self._inner, self._outer, self._end
        for begin, stop, is_edge in zip(bounds, bounds[1:], (True, False, True), strict=False):

            def add(k, values, is_edge=is_edge):
                return self._with_column(tops, line, ahead, k, values, is_edge)

            values = sum_loop(emit, begin, stop, values, add, unrolls=False)
        return values[self.side - 1 :]


@intrinsic(prefer_literal=True)
def _add_taps(typing_context, side, tap_rows, x, zeros, dout, sums, rows, columns, steps, mask):
    """Add the products of some rows of dout with the image to the sums of some rows of taps.

    Arrays are pointers: to the vector in the first pixels of an image, of a row of zeros and of dout's first
    row, and in the first tap's sum. `rows` are the row of the image that the first tap sees, how many it has,
    the elements from one row of it, and of dout, to the next, and the rows of dout; `columns` the pixels of
    padding before a row, its pixels, and those of dout; `steps` the elements from one pixel, and from one
    tap's sum, to the next. The literals are the side of a window, and how many of its rows are summed.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (side, tap_rows)):
        return None
    many, taken = side.literal_value, tap_rows.literal_value

    def codegen(context, builder, signature, arguments):
        _, _, x, zeros, dout, sums, rows, columns, steps, mask = arguments
        emit = Emitter(context, builder, signature.args[2].dtype)
        first_row, height, in_row, out_row, count = (builder.extract_value(rows, i) for i in range(5))
        step, distance = (builder.extract_value(steps, i) for i in range(2))
        sides = tuple(builder.extract_value(columns, i) for i in range(3))
        taps = _Taps(emit, many, zeros, sides, step, mask)

        def add_row(i, sums):
            top = builder.add(first_row, i)
            seen = [builder.add(top, ir.Constant(_I64, a)) for a in range(taken)]
            tops = [_image_row(emit, x, zeros, row, height, in_row) for row in seen]
            line = emit.at(dout, builder.mul(i, out_row))
            # As many rows that follow arrive meanwhile: vector by vector of channels nobody foresees them.
            below = emit.at(x, builder.mul(builder.add(top, count), in_row))
            return taps.with_row(tops, line, [below, emit.at(line, builder.mul(count, out_row))], sums)

        places = [emit.at(sums, builder.mul(distance, ir.Constant(_I64, t))) for t in range(taken * many)]
        totals = [emit.load(place, mask) for place in places]
        totals = sum_loop(emit, ir.Constant(_I64, 0), count, totals, add_row, unrolls=False)
        for place, total in zip(places, totals, strict=True):
            emit.store(total, place, mask)
        return context.get_dummy_value()

    kinds = side, tap_rows, x, zeros, dout, sums, rows, columns, steps, mask
    return types.void(*kinds), codegen


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


@kernel
def add_strip(side, x, zeros, dout, sums, first, rows, height, steps, channels, columns):
    """Add the products of `rows` rows of dout, whose windows begin at row `first` of the image and on.

    Arrays are pointers: to the image of `height` rows, to a row of zeros, to dout's first row, and to the
    sums, (taps, channels). `steps` are the elements from one row of the image, and of dout, to the next,
    `columns` the pixels of padding before a row, its pixels, and those of dout.
    """
    keep_out_of_line()
    distances = channels, channels
    for c in range(0, channels, lanes_of(x)):
        some = first_lanes(x, channels - c)
        image, nothing, gradient = _at(x, c), _at(zeros, c), _at(dout, c)
        tap_row = 0
        while tap_row < side:
            of = first + tap_row, height, steps[0], steps[1], rows
            target = _at(sums, tap_row * side * channels + c)
            if side == 3:
                _add_taps(3, 3, image, nothing, gradient, target, of, columns, distances, some)
            elif side == 5 and tap_row == 0:
                _add_taps(5, 3, image, nothing, gradient, target, of, columns, distances, some)
            elif side == 5:
                _add_taps(5, 2, image, nothing, gradient, target, of, columns, distances, some)
            elif tap_row == 0:
                _add_taps(7, 3, image, nothing, gradient, target, of, columns, distances, some)
            else:
                _add_taps(7, 2, image, nothing, gradient, target, of, columns, distances, some)
            tap_row += 3 if tap_row == 0 else 2
