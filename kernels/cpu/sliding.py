"""Depthwise convolution with windows of 3 x 3, one pixel apart: they slide along rows, weights in registers.

A pixel of the input is read once for the three windows of a row that it lies in, and rows of the result are
made two at a time, which share two of their input rows: four loads for eighteen multiply-adds.
"""

from __future__ import annotations

from ..jit import kernel
from .vectors import (
    all_lanes,
    first_lanes,
    keep_in_line,
    lanes_of,
    load,
    multiply_add,
    prefetch,
    store,
)

# Rows of the result that are made together.
ROWS = 2


@kernel
def _add_column(top, middle, bottom, weights, total):
    """Add three pixels, one below the other, times a column of the weights."""
    keep_in_line()
    total = multiply_add(top, weights[0], total)
    return multiply_add(bottom, weights[2], multiply_add(middle, weights[1], total))


@kernel
def _slide(x, weight, taps, bias, y, source, in_row, target, out_row, step, columns, c, mask):
    """Two rows of the result, for one vector of channels."""
    keep_in_line()
    before, width, outputs = columns
    zero = load(bias, c, mask)
    left = load(weight, taps[0] + c, mask), load(weight, taps[3] + c, mask), load(weight, taps[6] + c, mask)
    inner = load(weight, taps[1] + c, mask), load(weight, taps[4] + c, mask), load(weight, taps[7] + c, mask)
    right = load(weight, taps[2] + c, mask), load(weight, taps[5] + c, mask), load(weight, taps[8] + c, mask)
    # Of each row the sums of the windows that a column of pixels is the right, inner and left one of.
    a0, a1, a2 = zero, zero, zero
    b0, b1, b2 = zero, zero, zero
    at, to = source + c, target + c - 2 * step
    for column in range(outputs + 2):
        if column >= before and column < before + width:
            p0, p1 = load(x, at, mask), load(x, at + in_row, mask)
            p2, p3 = load(x, at + 2 * in_row, mask), load(x, at + 3 * in_row, mask)
            # Processors foresee steps along a row, but not the rows below.
            prefetch(x, at + 4 * in_row)
            prefetch(x, at + 5 * in_row)
            a0, b0 = _add_column(p0, p1, p2, right, a0), _add_column(p1, p2, p3, right, b0)
            a1, b1 = _add_column(p0, p1, p2, inner, a1), _add_column(p1, p2, p3, inner, b1)
            a2, b2 = _add_column(p0, p1, p2, left, a2), _add_column(p1, p2, p3, left, b2)
        if column >= 2:
            store(a0, y, to, mask)
            store(b0, y, to + out_row, mask)
        a0, a1, a2 = a1, a2, zero
        b0, b1, b2 = b1, b2, zero
        at += step
        to += step


@kernel
def slide_band(x, weight, taps, bias, y, source, in_row, target, out_row, rows, channels, columns):
    """`rows` rows of the result, two or more, whose windows' rows all lie in the image.

    Arrays are pointers, `taps` that to the offsets of the nine taps in `weight`. `source` and `target` are
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
        for c in range(0, whole, lanes):
            _slide(x, weight, taps, bias, y, s, in_row, t, out_row, channels, columns, c, everything)
        if whole < channels:
            _slide(x, weight, taps, bias, y, s, in_row, t, out_row, channels, columns, whole, some)
