"""Sums over each channel of channels-last arrays, mean and variance among them: one pass, in float64.

Distances are taken from a sample, the first value that a sum sees: the sample is less than sqrt(n) standard
deviations from the mean of n values, so that at most n of the 2**53 that float64 tells apart are lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from .elementwise import flat, name_after, passes_caches
from .pieces import add_up, fill, piece_bounds, piece_count, repeat
from .simd import lanes
from .vectors import (
    LONG,
    all_lanes,
    all_long_lanes,
    fence,
    first_lanes,
    first_long_lanes,
    keep_in_line,
    lanes_of,
    load,
    multiply_add,
    pointer,
    pointers,
    prefetch,
    prefetch_vector,
    store,
    wide,
)
from .workspace import scratch

# Elements that are summed column by column should stay in the first-level cache.
_BLOCK = 4096
_FLOAT64 = np.dtype(np.float64)
# And so many elements ahead they are fetched from memory.
AHEAD = 8192
# A row of several pixels is no longer than this.
_LONGEST = 1024
# Channels from which on some lanes of a row's last vector may stay empty.
_MANY = 64


@lru_cache(maxsize=512)
def column_width(channels: int, dtype: np.dtype) -> int:
    """Elements of a row that holds each channel equally often, in whole vectors if channels are few."""
    return channels if channels >= _MANY else math.lcm(channels, lanes(dtype))


@kernel
def _add_column(x, start, rows, width, slab, k, mask):
    """Add `rows` rows of a column of vectors to its sums of distances and of their squares."""
    keep_in_line()
    total, squares, shift = load(slab, k, mask), load(slab, width + k, mask), load(slab, 2 * width + k, mask)
    for row in range(rows):
        place = start + row * width + k
        # Line after line, in whatever order they are read.
        prefetch(x, start + AHEAD + k * rows + row * lanes_of(x))
        distance = wide(load(x, place, mask)) - shift
        total = total + distance
        squares = multiply_add(distance, distance, squares)
    store(total, slab, k, mask)
    store(squares, slab, width + k, mask)


@kernel
def _add_rows(x, start, rows, width, size, slab):
    """Add the first `size` elements of each of `rows` rows to the sums of their columns."""
    keep_in_line()
    lanes = lanes_of(x)
    values, sums = pointer(x), pointer(slab)
    everything = all_lanes(values)
    whole = size // lanes * lanes
    for k in range(0, whole, lanes):
        _add_column(values, start, rows, width, sums, k, everything)
    if whole < size:
        _add_column(values, start, rows, width, sums, whole, first_lanes(values, size - whole))


@parallel
def moments(part, parts, x, slabs, centred):
    """For each piece and column: the sum, the sum of squared distances from the mean, and the count.

    Unless `centred`, the squares are worthless, and sums of float64 as exact as can be.
    """
    keep_out_of_line()
    pieces, _, width = slabs.shape
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        slab = slabs[piece].reshape(3 * width)
        total, squares, shift = slab[:width], slab[width : 2 * width], slab[2 * width :]
        first, last = piece_bounds(piece, pieces, x.size, width)
        rows = (last - first) // width
        ragged = last - first - rows * width
        fill(slab, 0)
        sample = x[first : min(first + width, last)]
        for k in range(sample.size):
            shift[k] = sample[k] if centred and np.isfinite(sample[k]) else 0
        step = max(1, _BLOCK // width)
        for row in range(0, rows, step):
            _add_rows(x, first + row * width, min(step, rows - row), width, width, slab)
        _add_rows(x, first + rows * width, 1, width, ragged, slab)
        for k in range(width):
            many = rows + (k < ragged)
            square = squares[k] - total[k] * total[k] / max(many, 1)
            squares[k] = 0.0 if square < 0 else square
            total[k] += many * shift[k]
            shift[k] = many


@kernel
def merge(slabs, total, squares, count):
    """Each channel's sum, sum of squared distances from its mean, and count, from `batch_moments`.

    Two sets of values are merged by equations 2.1 of Chan, Golub and LeVeque: Updating formulae and a
    pairwise algorithm for computing sample variances, 1979.
    """
    channels = total.size
    pieces, _, width = slabs.shape
    fill(total, 0)
    fill(squares, 0)
    fill(count, 0)
    for piece in range(pieces):
        for start in range(0, width, channels):
            end = start + channels
            sums, spread = slabs[piece, 0, start:end], slabs[piece, 1, start:end]
            counts = slabs[piece, 2, start:end]
            for c in range(channels):
                distance = sums[c] / max(counts[c], 1.0) - total[c] / max(count[c], 1.0)
                weight = counts[c] * count[c] / max(counts[c] + count[c], 1.0)
                squares[c] += spread[c] + distance * distance * weight
                total[c] += sums[c]
                count[c] += counts[c]


def batch_moments(x: np.ndarray, centred: int = 1) -> np.ndarray:
    """What `merge` takes, (pieces, 3, width), of an array that is not empty; see `moments`."""
    pieces = piece_count(x.size)
    slabs = scratch("moments", (pieces, 3, column_width(x.shape[-1], x.dtype)), _FLOAT64)
    moments(part_count(pieces, x.size), x.ravel(), slabs, centred)
    return slabs


def batch_sums(x: np.ndarray, out: np.ndarray, accumulate: bool) -> None:
    """Overwrite `out` with each channel's sum, or add to it; `x` is not empty."""
    add_up(1, batch_moments(x, centred=0)[:, 0], out, int(accumulate))


class ColumnSums:
    """A kernel that sums over the rows of arrays whose columns are channels, as often as they fill vectors.

    `function(arrays, start, rows, width, table, sums, k, mask, around)` adds `rows` rows of a column of
    vectors, from the elements `start + k` of the `arrays` on, to the sums of columns `k` and on. All but
    numbers and `mask` are pointers; `table` holds a value for each column. What it writes to the last array
    goes around the caches if `around` is true.
    """

    def __init__(self, function: Callable):
        column = kernel(function)

        def body(part, parts, inputs, row, tables, slabs, around):
            keep_out_of_line()
            table = tables[part]
            repeat(row, table)
            arrays, values, size, width = pointers(inputs), pointer(table), inputs[0].size, table.size
            everything, count = all_long_lanes(values), LONG * lanes_of(values)
            whole, step = width // count * count, max(1, _BLOCK // width)
            pieces = slabs.shape[0]
            lo, hi = span(part, parts, pieces)
            for piece in range(lo, hi):
                slab = slabs[piece]
                fill(slab, 0)
                sums = pointer(slab)
                first, last = piece_bounds(piece, pieces, size, width)
                rows = (last - first) // width
                for row in range(0, rows, step):
                    start, many = first + row * width, min(step, rows - row)
                    for k in range(0, whole, count):
                        column(arrays, start, many, width, values, sums, k, everything, around)
                    if whole < width:
                        some = first_long_lanes(values, width - whole)
                        column(arrays, start, many, width, values, sums, whole, some, 0)
                start = first + rows * width
                for k in range(0, last - start, count):
                    some = first_long_lanes(values, last - start - k)
                    column(arrays, start, 1, width, values, sums, k, some, 0)

            fence()

        name_after(function, body, "body")
        self._run = parallel(body)
        self.body = self._run.body
        self.__doc__ = function.__doc__

    def __call__(self, values: np.ndarray, sums: int, *inputs: np.ndarray) -> np.ndarray:
        """Slabs of so many `sums` side by side, in float64, which `fold` adds up by channels."""
        size, dtype = inputs[0].size, inputs[0].dtype
        pieces, width, is_whole = column_sizes(size, values.size, dtype)
        parts = part_count(pieces, size)
        tables = scratch("columns", (parts, width), dtype)
        slabs = scratch("column sums", (pieces, sums * width), _FLOAT64)
        around = is_whole and passes_caches(inputs[-1], len(inputs))
        self._run(parts, tuple(map(flat, inputs)), values, tables, slabs, int(around))
        return slabs


@lru_cache(maxsize=512)
def column_sizes(size: int, channels: int, dtype: np.dtype) -> tuple[int, int, bool]:
    """Pieces in which to sum so many elements, columns of their rows, and whether these are whole vectors.

    Rows hold each channel equally often, in whole vectors if that isn't too long.
    """
    width = channels = max(channels, 1)
    for many in (LONG * lanes(dtype), lanes(dtype)):
        if math.lcm(channels, many) <= _LONGEST:
            width = math.lcm(channels, many)
            break
    return piece_count(size), width, width % lanes(dtype) == 0


@ColumnSums
def products(arrays, start, rows, width, table, sums, k, mask, around):
    """Of the gradient, and of its products with x - center."""
    keep_in_line()
    dout, x = arrays
    center = load(table, k, mask)
    total, product = load(sums, k, mask), load(sums, width + k, mask)
    for row in range(rows):
        at, ahead = start + row * width + k, start + AHEAD + k * rows + row * LONG * lanes_of(x)
        prefetch_vector(dout, ahead, mask)
        prefetch_vector(x, ahead, mask)
        gradient = wide(load(dout, at, mask))
        total = total + gradient
        product = multiply_add(gradient, wide(load(x, at, mask) - center), product)
    store(total, sums, k, mask)
    store(product, sums, width + k, mask)


def gradient_sums(dout: np.ndarray, x: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Slabs of each channel's sums of dout, and beside them of dout * (x - center)."""
    return products(center, 2, dout, x)
