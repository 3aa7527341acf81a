"""What the tiles of a convolution read and write: device functions for whoever puts a kernel together.

A thread reads four neighbouring terms of the sum for each slice, eight where these are whole vectors, of one
pixel of the result, and as many weights; see `correlation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import cuda

from .jit import device_function
from .taps import digits, following, narrow, quotient
from .tile import Tile
from .vectors import LANES, load4, load8, store4

# In place of an offset in a window: ReLU let nothing pass.
DEAD = 255


class Sizes(NamedTuple):
    """What a launch computes; forward, the images are x's and the result y's, backward dout's and dx's."""

    images: int
    height: int
    width: int
    channels: int
    out_h: int
    out_w: int
    filters: int
    depth: int  # channels of one group of the images
    columns: int  # and of the result
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    span: int  # terms of the sum in one block of the grid's z axis
    biased: int
    pool_h: int  # the windows that pixels of the result, or backward of the images, belong to
    pool_w: int
    pooled: int  # 1: end with max-pooling, and with ReLU if `relu`
    relu: int
    keeps: int  # 1: write argmax
    windows_h: int  # how many of the pool's windows there are
    windows_w: int


class PixelsAt(NamedTuple):
    """Where a thread reads the images: (kh, kw, c) of the sum is at window + (kh, kw) * steps."""

    start: int  # of the image, and of its group's channels
    window: tuple[int, int]
    steps: tuple[int, int]
    taps: tuple[int, int]


class WeightsAt(NamedTuple):
    """And where it reads the weights."""

    end: int  # of the terms that it reads
    source: int  # what all its places have in common
    many: int  # columns from its first on
    tap: tuple[int, ...]  # first and step of both axes' taps, and the taps of the second


@device_function
def pixel(row, height, width, pool_h, pool_w):
    """Image, row and column of pixel `row`, where pixels are ordered by the windows of a pool."""
    area = pool_h * pool_w
    window = quotient(row, area)
    offset = row - window * area
    down = quotient(offset, pool_w)
    n, i, j = digits(window, quotient(height, pool_h), quotient(width, pool_w))
    return n, narrow(i * pool_h + down), narrow(j * pool_w + offset - down * pool_w)


@device_function
def _seen(term, at, g):
    """Row and column of the pixel that tap (kh, kw) sees, and whether the images have it."""
    h = narrow(at.window[0] + term[0] * at.steps[0])
    w = narrow(at.window[1] + term[1] * at.steps[1])
    return h, w, term[0] < at.taps[0] and h >= 0 and h < g.height and w >= 0 and w < g.width


def image_reader(vector: bool) -> tuple[Callable, Callable]:
    """Device functions for where image n begins, and that read four terms of a pixel's sum from there on.

    The four, or eight if `vector`, begin at (kh, kw, c). They are zero outside the image and behind the last
    term.
    """

    @device_function
    def origin(n, channel, g):
        return n * (g.height * g.width) * g.channels + channel

    @device_function
    def one(x, term, at, g):
        h, w, inside = _seen(term, at, g)
        return x[at.start + narrow(h * g.width + w) * g.channels + term[2]] if inside else x.dtype.type(0)

    @device_function
    def read_scalars(x, argmax, term, at, depth, g):
        second = following(term, at.taps[1], depth)
        third = following(second, at.taps[1], depth)
        fourth = following(third, at.taps[1], depth)
        return (
            one(x, term, at, g),
            one(x, second, at, g),
            one(x, third, at, g),
            one(x, fourth, at, g),
        )

    @device_function
    def read_vector(x, argmax, term, at, depth, g):
        h, w, inside = _seen(term, at, g)
        if inside:
            return load8(x, at.start + narrow(h * g.width + w) * g.channels + term[2])
        zero = x.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    return origin, read_vector if vector else read_scalars


def pooled_reader(vector: bool) -> tuple[Callable, Callable]:
    """The same of the images before a max-pooling's gradient: zero but for the largest pixel of a window."""

    @device_function
    def origin(n, channel, g):
        return n * (g.windows_h * g.windows_w) * g.channels + channel

    @device_function
    def place(term, at, g):
        """Where the gradient of a pixel's window lies, and the pixel's offset in it, -1 if there is none."""
        h, w, inside = _seen(term, at, g)
        if not inside:
            return 0, narrow(-1)
        row, column = quotient(h, g.pool_h), quotient(w, g.pool_w)
        if row >= g.windows_h or column >= g.windows_w:
            return 0, narrow(-1)
        offset = narrow((h - row * g.pool_h) * g.pool_w + w - column * g.pool_w)
        return at.start + narrow(row * g.windows_w + column) * g.channels + term[2], offset

    @device_function
    def chosen(x, argmax, at, offset):
        first, second, third, fourth = load4(x, at)
        zero = x.dtype.type(0)
        return (
            first if argmax[at] == offset else zero,
            second if argmax[at + 1] == offset else zero,
            third if argmax[at + 2] == offset else zero,
            fourth if argmax[at + 3] == offset else zero,
        )

    @device_function
    def one(x, argmax, term, at, g):
        source, offset = place(term, at, g)
        return x[source] if offset >= 0 and argmax[source] == offset else x.dtype.type(0)

    @device_function
    def read_scalars(x, argmax, term, at, depth, g):
        second = following(term, at.taps[1], depth)
        third = following(second, at.taps[1], depth)
        fourth = following(third, at.taps[1], depth)
        return (
            one(x, argmax, term, at, g),
            one(x, argmax, second, at, g),
            one(x, argmax, third, at, g),
            one(x, argmax, fourth, at, g),
        )

    @device_function
    def read_vector(x, argmax, term, at, depth, g):
        source, offset = place(term, at, g)
        if offset >= 0:
            return chosen(x, argmax, source, offset) + chosen(x, argmax, source + LANES, offset)
        zero = x.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    return origin, read_vector if vector else read_scalars


def weight_reader(tile: Tile, vector: bool) -> tuple[Callable, Callable, Callable]:
    """Device functions for where a thread reads the weights, that read those of a slice, and buffer them.

    They are four neighbouring columns of one term, and of another where there are two for each thread.
    """
    pitch = tile.columns // LANES
    quads = tile.depth * pitch
    threads, is_twice = tile.threads, quads > tile.threads
    down = threads // pitch

    @device_function
    def begin(start, end, group, first_column, tap, g):
        """The first term that this thread reads, and `WeightsAt`."""
        thread = cuda.threadIdx.x
        column = narrow(first_column + thread % pitch * LANES)
        many = narrow(g.columns - column if thread < quads else 0)
        at = WeightsAt(end if many > 0 else narrow(0), group * g.columns + column, many, tap)
        return narrow(start + thread // pitch), at

    @device_function
    def four(weight, k, at, g):
        zero = weight.dtype.type(0)
        if k >= at.end:
            return zero, zero, zero, zero
        source = k * g.filters + at.source
        if vector:
            return load4(weight, source)
        return (
            weight[source],
            weight[source + 1] if at.many > 1 else zero,
            weight[source + 2] if at.many > 2 else zero,
            weight[source + 3] if at.many > 3 else zero,
        )

    @device_function
    def fetch(weight, k, term, at, g):
        return four(weight, k, at, g)

    @device_function
    def fetch_twice(weight, k, term, at, g):
        return four(weight, k, at, g) + four(weight, k + down, at, g)

    @device_function
    def put(b, start, values):
        thread = cuda.threadIdx.x
        if thread < quads:
            store4(b, start + thread * LANES, values)

    @device_function
    def put_twice(b, start, values):
        thread = cuda.threadIdx.x
        store4(b, start + thread * LANES, values[:LANES])
        store4(b, start + (thread + threads) * LANES, values[LANES:])

    return (begin, fetch_twice, put_twice) if is_twice else (begin, fetch, put)


def transposed_weight_reader(tile: Tile, vector: bool) -> tuple[Callable, Callable, Callable]:
    """The same for the gradient to the input: they are neighbouring terms of one column."""
    run, width = tile.run, tile.columns
    readers = tile.depth // run * width

    @device_function
    def begin(start, end, group, first_column, tap, g):
        thread = cuda.threadIdx.x
        column = first_column + thread % width
        many = narrow(g.columns - column if thread < readers else 0)
        source = column * g.channels + group * g.depth
        at = WeightsAt(end if many > 0 else narrow(0), source, many, tap)
        return narrow(start + thread // width * run), at

    @device_function
    def place(term, at, g):
        kh = at.tap[0] + term[0] * at.tap[2]
        kw = at.tap[1] + term[1] * at.tap[3]
        return (kh * g.kernel_w + kw) * g.columns * g.channels + at.source + term[2]

    @device_function
    def fetch_vector(weight, k, term, at, g):
        if k < at.end:
            return load8(weight, place(term, at, g))
        zero = weight.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    @device_function
    def fetch_scalars(weight, k, term, at, g):
        zero = weight.dtype.type(0)
        second = following(term, at.tap[4], g.depth)
        third = following(second, at.tap[4], g.depth)
        fourth = following(third, at.tap[4], g.depth)
        return (
            weight[place(term, at, g)] if k < at.end else zero,
            weight[place(second, at, g)] if k + 1 < at.end else zero,
            weight[place(third, at, g)] if k + 2 < at.end else zero,
            weight[place(fourth, at, g)] if k + 3 < at.end else zero,
        )

    @device_function
    def put(b, start, values):
        thread = cuda.threadIdx.x
        if thread < readers:
            first = narrow(start + thread // width * (run * width) + thread % width)
            for lane in range(run):
                b[first + lane * width] = values[lane]

    return begin, fetch_vector if vector else fetch_scalars, put


def _row_writer(vector: bool) -> Callable:
    """A device function that writes four neighbouring columns, as far as there are so many."""

    @device_function
    def write_vector(y, at, values, many):
        store4(y, at, values)

    @device_function
    def write_scalars(y, at, values, many):
        for lane in range(LANES):
            if lane < many:
                y[at + lane] = values[lane]

    return write_vector if vector else write_scalars


def forward_writer(vector: bool) -> Callable:
    """A device function that adds the bias to a block of four rows and columns of sums, and writes them."""
    write = _row_writer(vector)

    @device_function
    def pool(block, y, argmax, at, row, rows, many, g):
        """Four rows hold four, two windows or one. The first of several is the largest, and NaN beats all."""
        best = cuda.local.array(LANES, y.dtype)
        where = cuda.local.array(LANES, np.int32)
        area, zero = g.pool_h * g.pool_w, y.dtype.type(0)
        for r in range(LANES):
            # area is 1, 2 or 4.
            offset = r & (area - 1)
            for lane in range(LANES):
                value = block[r * LANES + lane]
                if offset == 0 or value > best[lane] or value != value:
                    best[lane] = value
                    where[lane] = offset
            if offset + 1 == area and row + r < rows:
                for lane in range(LANES):
                    if g.relu and not best[lane] > zero:
                        where[lane] = DEAD
                        if best[lane] <= zero:
                            best[lane] = zero
                place = at + quotient(row + r, area) * g.filters
                write(y, place, (best[0], best[1], best[2], best[3]), many)
                if g.keeps:
                    for lane in range(LANES):
                        if lane < many:
                            argmax[place + lane] = where[lane]

    @device_function
    def finish(block, row, column, bias, y, argmax, offset, rows, group, phase, counts, g):
        many = g.columns - column
        if many <= 0:
            return
        if g.biased:
            for lane in range(LANES):
                if lane < many:
                    start = bias[group * g.columns + column + lane]
                    for r in range(LANES):
                        block[r * LANES + lane] += start
        at = offset + group * g.columns + column
        if g.pooled:
            pool(block, y, argmax, at, row, rows, many, g)
            return
        for r in range(LANES):
            if row + r < rows:
                k = r * LANES
                values = block[k], block[k + 1], block[k + 2], block[k + 3]
                write(y, at + (row + r) * g.filters, values, many)

    return finish


def input_writer(vector: bool) -> Callable:
    """A device function that writes a block of four rows and columns of sums to the pixels of its phase."""
    write = _row_writer(vector)

    @device_function
    def finish(block, row, column, bias, y, argmax, offset, rows, group, phase, counts, g):
        many = g.columns - column
        if many <= 0:
            return
        pixel = digits(row, counts[0], counts[1])
        for r in range(LANES):
            if row + r < rows:
                n, i, j = pixel
                line = n * g.out_h + phase[0] + i * g.stride_h
                pixels = line * g.out_w + phase[1] + j * g.stride_w
                k = r * LANES
                values = block[k], block[k + 1], block[k + 2], block[k + 3]
                write(y, offset + pixels * g.filters + group * g.columns + column, values, many)
            pixel = following(pixel, counts[0], counts[1])

    return finish
