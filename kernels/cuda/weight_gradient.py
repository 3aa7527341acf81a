"""Gradient of a convolution's weights: one matrix product that sums over the pixels of all images.

A row of the product is a tap (kh, kw) and a channel c, a column a filter, and the sum runs over pixels (n, i,
j) of dout. There are many pixels and few weights, so blocks take parts of the sum, which `splits.add_parts`
adds up.

A thread's rows are fixed; what it reads next moves from pixel to pixel. With the gradient behind a
max-pooling, dout is read from the pooled gradient where argmax says that a pixel was the largest of its
window: the image of zeros between them is never written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import cuda

from ..cpu.direct import Layer
from . import checks
from . import tile as tiles
from .arrays import DeviceArray
from .correlation import PLAIN, Pool
from .jit import FLOATS, Kernel, device_function, kernel
from .splits import add_parts, grid, nothing, scratch
from .taps import advanced, digits, following, narrow, quotient
from .tile import SCALAR_TILES, TILES, Tile
from .vectors import LANES, is_aligned, load4, load8, store4, store8


class Sizes(NamedTuple):
    """What a launch computes."""

    images: int
    height: int
    width: int
    channels: int
    out_h: int
    out_w: int
    filters: int
    depth: int  # channels of a group
    columns: int  # and filters
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    top: int
    left: int
    span: int  # pixels in one block of the grid's z axis
    accumulate: int
    pool_h: int
    pool_w: int


@device_function
def _fetch_one(x, pixel, row, g, channel):
    """Element of x that the tap and channel `row`, (kh, kw, c), see from pixel (n, i, j) of dout."""
    n, i, j = pixel
    kh, kw, c = row
    h = narrow(i * g.stride_h + kh * g.dilation_h - g.top)
    w = narrow(j * g.stride_w + kw * g.dilation_w - g.left)
    if kh < g.kernel_h and n < g.images and h >= 0 and h < g.height and w >= 0 and w < g.width:
        return x[((n * g.height + h) * g.width + w) * g.channels + channel + c]
    return x.dtype.type(0)


@device_function
def fetch_scalars(x, pixel, row, g, channel):
    """Four rows of the product's left factor, from `row` on."""
    second = following(row, g.kernel_w, g.depth)
    third = following(second, g.kernel_w, g.depth)
    fourth = following(third, g.kernel_w, g.depth)
    return (
        _fetch_one(x, pixel, row, g, channel),
        _fetch_one(x, pixel, second, g, channel),
        _fetch_one(x, pixel, third, g, channel),
        _fetch_one(x, pixel, fourth, g, channel),
    )


@device_function
def _fetch_vector(x, pixel, row, g, channel):
    """Eight rows, channels of one tap."""
    n, i, j = pixel
    kh, kw, c = row
    h = narrow(i * g.stride_h + kh * g.dilation_h - g.top)
    w = narrow(j * g.stride_w + kw * g.dilation_w - g.left)
    if kh < g.kernel_h and n < g.images and h >= 0 and h < g.height and w >= 0 and w < g.width:
        return load8(x, ((n * g.height + h) * g.width + w) * g.channels + channel + c)
    zero = x.dtype.type(0)
    return zero, zero, zero, zero, zero, zero, zero, zero


def _dense_reader(vector: bool) -> Callable:
    """A device function that reads four neighbours of dout, or `many` and zeros."""

    @device_function
    def read_vector(dout, argmax, at, offset, many):
        if many > 0:
            return load4(dout, at)
        zero = dout.dtype.type(0)
        return zero, zero, zero, zero

    @device_function
    def read_scalars(dout, argmax, at, offset, many):
        zero = dout.dtype.type(0)
        return (
            dout[at] if many > 0 else zero,
            dout[at + 1] if many > 1 else zero,
            dout[at + 2] if many > 2 else zero,
            dout[at + 3] if many > 3 else zero,
        )

    return read_vector if vector else read_scalars


def _chosen_reader(vector: bool) -> Callable:
    """The same, but zero where argmax is not `offset`."""
    read = _dense_reader(vector)

    @device_function
    def chosen(dout, argmax, at, offset, many):
        first, second, third, fourth = read(dout, argmax, at, offset, many)
        zero = dout.dtype.type(0)
        return (
            first if many > 0 and argmax[at] == offset else zero,
            second if many > 1 and argmax[at + 1] == offset else zero,
            third if many > 2 and argmax[at + 2] == offset else zero,
            fourth if many > 3 and argmax[at + 3] == offset else zero,
        )

    return chosen


def _gradient_reader(vector: bool, pooled: bool) -> Callable:
    """A device function that reads four filters, or eight if `vector`, of pixel (n, i, j) of dout.

    If `pooled`, dout is the gradient behind a max-pooling.
    """
    read = (_chosen_reader if pooled else _dense_reader)(vector)

    @device_function
    def dense(pixel, g):
        """The pixel's number, whether there is such a pixel, and nothing."""
        n, i, j = pixel
        return (n * g.out_h + i) * g.out_w + j, n < g.images, 0

    @device_function
    def behind(pixel, g):
        """The number of the pixel's window, whether there is one, and the pixel's offset in it."""
        n, i, j = pixel
        row, column = quotient(i, g.pool_h), quotient(j, g.pool_w)
        rows, columns = quotient(g.out_h, g.pool_h), quotient(g.out_w, g.pool_w)
        offset = (i - row * g.pool_h) * g.pool_w + j - column * g.pool_w
        return (n * rows + row) * columns + column, n < g.images and row < rows and column < columns, offset

    find = behind if pooled else dense

    @device_function
    def fetch_four(dout, argmax, pixel, g, column, many):
        number, is_there, offset = find(pixel, g)
        return read(dout, argmax, number * g.filters + column, offset, many if is_there else 0)

    @device_function
    def fetch_eight(dout, argmax, pixel, g, column, many):
        number, is_there, offset = find(pixel, g)
        many = many if is_there else 0
        at = number * g.filters + column
        return read(dout, argmax, at, offset, many) + read(dout, argmax, at + LANES, offset, many - LANES)

    return fetch_eight if vector else fetch_four


def _writer(vector: bool) -> Callable:
    """A device function that writes a block of four rows and columns of sums, or adds them to the result."""

    @device_function
    def finish(block, row, column, dweight, offset, group, g):
        rows = g.kernel_h * g.kernel_w * g.depth
        many = g.columns - column
        if many <= 0:
            return
        for r in range(LANES):
            if row + r < rows:
                at = offset + (row + r) * g.filters + group * g.columns + column
                for lane in range(LANES):
                    if vector or lane < many:
                        value = block[r * LANES + lane]
                        if g.accumulate:
                            value += dweight[at + lane]
                        dweight[at + lane] = value

    return finish


def _fetcher(vector: bool, pooled: bool) -> Callable:
    """A device function that reads this thread's rows and columns of a slice, for `tiles.sum_slices`."""
    fetch_rows = _fetch_vector if vector else fetch_scalars
    fetch_columns = _gradient_reader(vector, pooled)

    @device_function
    def fetch(operands, state):
        x, dout, argmax, row, channel, column, many, step, g = operands
        pixel_a, pixel_b = state
        of_x = fetch_rows(x, pixel_a, row, g, channel)
        of_dout = fetch_columns(dout, argmax, pixel_b, g, column, many)
        after = advanced(pixel_a, step, g.out_h, g.out_w), advanced(pixel_b, step, g.out_h, g.out_w)
        return of_x, of_dout, after

    return fetch


def _putter(tile: Tile, vector: bool) -> Callable:
    """A device function that puts them into the buffers."""
    put_values = store8 if vector else store4
    run, readers_b = tile.run, tile.columns // tile.run * tile.depth

    @device_function
    def put(a, at_a, b, at_b, of_x, of_dout):
        thread = cuda.threadIdx.x
        put_values(a, at_a + thread * run, of_x)
        if thread < readers_b:
            put_values(b, at_b + thread * run, of_dout)

    return put


def _weight_gradient(tile: Tile, vector: bool, pooled: bool, floats: tuple[str, ...]) -> Kernel:
    """The kernel for one tile.

    With `vector`, channels of a group are multiples of eight, filters of four, and arrays are aligned.
    """
    sum_slices = tiles.sum_slices(tile, _fetcher(vector, pooled), _putter(tile, vector))
    finish, place = tiles.in_blocks(tile, _writer(vector)), tiles.place(tile)
    rows_a, columns_b, depth_k, run = tile.rows, tile.columns, tile.depth, tile.run
    across_a, across_b = rows_a // run, columns_b // run
    size_sums = tile.thread_rows * tile.thread_columns

    @kernel(
        f"T[::1], T[::1], uint8[::1], T[::1], int64, UniTuple(int32, {len(Sizes._fields)})",
        name=f"{tile.name}{', vector' if vector else ''}{', pooled' if pooled else ''}",
        floats=floats,
        launch_bounds=(tile.threads, tile.blocks),
    )
    def weight_gradient(x, dout, argmax, dweight, part, sizes):
        sums = cuda.local.array(size_sums, x.dtype)
        g = Sizes(*sizes)
        thread, group = cuda.threadIdx.x, cuda.blockIdx.y
        column_tiles = (g.columns + columns_b - 1) // columns_b
        row_tile = quotient(cuda.blockIdx.x, column_tiles)
        first_row = row_tile * rows_a
        first_column = (cuda.blockIdx.x - row_tile * column_tiles) * columns_b

        # What this thread reads: neighbouring rows, and columns, of every depth_k-th pixel.
        row = digits(first_row + thread % across_a * run, g.kernel_w, g.depth)
        column = first_column + thread % across_b * run
        many = g.columns - column if thread < across_b * depth_k else 0
        start = cuda.blockIdx.z * g.span
        state = (
            digits(start + thread // across_a, g.out_h, g.out_w),
            digits(start + thread // across_b, g.out_h, g.out_w),
        )
        step = digits(depth_k, g.out_h, g.out_w)
        pixels = min(g.span, g.images * g.out_h * g.out_w - start)
        slices = (pixels + depth_k - 1) // depth_k

        operands = x, dout, argmax, row, group * g.depth, group * g.columns + column, many, step, g
        sum_slices(operands, state, slices, sums)
        down, across = place(thread)
        finish(sums, first_row + down, first_column + across, dweight, cuda.blockIdx.z * part, group, g)

    return weight_gradient


_FLOAT32 = FLOATS[:1]
# What doesn't load vectors is a first layer, of few rows, or small, or of float64.
_KERNELS = {
    (tile, vector, pooled): _weight_gradient(tile, vector, pooled, _FLOAT32 if vector else FLOATS)
    for pooled in (False, True)
    for vector in (True, False)
    for tile in (TILES[pooled:] if vector else SCALAR_TILES[-1:])
}


class _Plan(NamedTuple):
    """A launch, but for the arrays."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    sizes: Sizes


def sizes_of(layer: Layer, images: int, span: int, accumulate: bool, pool: Pool = PLAIN) -> Sizes:
    """What a launch computes, with `span` pixels in one block."""
    for height, width in (layer.image, layer.out_image):
        checks.countable("x", images * height * width)
    return Sizes(
        images,
        *layer.image,
        layer.channels,
        *layer.out_image,
        layer.filters,
        layer.channels // layer.groups,
        layer.filters // layer.groups,
        layer.rows.kernel,
        layer.columns.kernel,
        layer.rows.stride,
        layer.columns.stride,
        layer.rows.dilation,
        layer.columns.dilation,
        layer.rows.padding[0],
        layer.columns.padding[0],
        span,
        int(accumulate),
        pool.height,
        pool.width,
    )


@lru_cache(maxsize=1024)
def _plan(layer: Layer, images: int, dtype: np.dtype, aligned: bool, accumulate: bool, pool: Pool) -> _Plan:
    depth, columns = layer.channels // layer.groups, layer.filters // layer.groups
    terms = layer.rows.kernel * layer.columns.kernel * depth
    vector = aligned and dtype == np.float32 and depth % TILES[0].run == columns % LANES == 0
    pixels = images * layer.out_image[0] * layer.out_image[1]
    tiles_ = TILES[pool.pooled :] if vector else SCALAR_TILES[-1:]
    if terms <= tiles_[-1].rows:
        tiles_ = tiles_[-1:]
    chosen = grid(terms, columns, layer.groups, pixels, tiles_)
    sizes = sizes_of(layer, images, chosen.span, accumulate and chosen.parts == 1, pool)
    kernel_ = _KERNELS[chosen.tile, vector, pool.pooled > 0]
    blocks = chosen.tiles, checks.blocks("groups", layer.groups), chosen.parts
    return _Plan(kernel_, blocks, chosen.tile.threads, sizes)


def add_weight_gradient(
    layer: Layer,
    dout: DeviceArray,
    x: DeviceArray,
    dweight: DeviceArray,
    accumulate: bool,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `dweight` with the gradient of the weights, or add it.

    With `pool`, `dout` is the gradient behind a max-pooling, and `argmax` what that gave.
    """
    aligned = is_aligned(dout, x, dweight)
    plan = _plan(layer, x.shape[0], x.dtype, aligned, accumulate, pool)
    parts = plan.grid[2]
    target = dweight.ravel() if parts == 1 else scratch(parts, dweight)
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    plan.kernel[plan.grid, plan.threads](x.ravel(), dout.ravel(), where, target, dweight.size, plan.sizes)
    if parts > 1:
        add_parts(dweight, target, None, accumulate)
