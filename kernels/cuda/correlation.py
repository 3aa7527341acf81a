"""Convolution and its gradient to the input: a matrix product whose left factor is gathered from the images.

A row of the product is a pixel of the result, a column one of its channels, and the sum runs over taps and
channels of the images that are read (an im2col matrix that nobody writes down). Backward, the images are
dout's, the weights lie transposed, and pixels that lie `stride` apart form a phase, in which all have the
same taps: with stride 1 there is one. See Chetlur et al.: cuDNN: Efficient primitives for deep learning,
arXiv:1410.0759, section 3, and Dumoulin and Visin, arXiv:1603.07285, section 4.

Forward can end with ReLU and max-pooling: the pixels of a window are then neighbouring rows of one thread.
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
from .jit import FLOATS, Kernel, device_function, kernel
from .splits import add_parts, grid, nothing, scratch
from .taps import advanced, digits, following, forward_axis, input_axis, narrow, quotient
from .tile import SCALAR_TILES, TILES, Tile
from .vectors import ALIGNMENT, LANES, is_aligned, load4, load8, store4

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


@device_function
def _pixel(row, height, width, pool_h, pool_w):
    """Image, row and column of pixel `row`, where pixels are ordered by the windows of a pool."""
    area = pool_h * pool_w
    window = quotient(row, area)
    offset = row - window * area
    down = quotient(offset, pool_w)
    n, i, j = digits(window, quotient(height, pool_h), quotient(width, pool_w))
    return n, narrow(i * pool_h + down), narrow(j * pool_w + offset - down * pool_w)


@device_function
def _seen(term, window, steps, taps, g):
    """Row and column of the pixel that tap (kh, kw) sees from `window`, and whether the images have it."""
    h = narrow(window[0] + term[0] * steps[0])
    w = narrow(window[1] + term[1] * steps[1])
    return h, w, term[0] < taps[0] and h >= 0 and h < g.height and w >= 0 and w < g.width


def _image_reader(vector: bool) -> tuple[Callable, Callable]:
    """Device functions for where image n begins, and that read four terms of a pixel's sum from there on.

    The four, or eight if `vector`, begin at (kh, kw, c). They are zero outside the image and behind the last
    term.
    """

    @device_function
    def origin(n, channel, g):
        return n * (g.height * g.width) * g.channels + channel

    @device_function
    def one(x, start, term, window, steps, taps, g):
        h, w, inside = _seen(term, window, steps, taps, g)
        return x[start + narrow(h * g.width + w) * g.channels + term[2]] if inside else x.dtype.type(0)

    @device_function
    def read_scalars(x, argmax, start, term, window, steps, taps, depth, g):
        second = following(term, taps[1], depth)
        third = following(second, taps[1], depth)
        fourth = following(third, taps[1], depth)
        return (
            one(x, start, term, window, steps, taps, g),
            one(x, start, second, window, steps, taps, g),
            one(x, start, third, window, steps, taps, g),
            one(x, start, fourth, window, steps, taps, g),
        )

    @device_function
    def read_vector(x, argmax, start, term, window, steps, taps, depth, g):
        h, w, inside = _seen(term, window, steps, taps, g)
        if inside:
            return load8(x, start + narrow(h * g.width + w) * g.channels + term[2])
        zero = x.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    return origin, read_vector if vector else read_scalars


def _pooled_reader(vector: bool) -> tuple[Callable, Callable]:
    """The same of the images before a max-pooling's gradient: zero but for the largest pixel of a window."""

    @device_function
    def origin(n, channel, g):
        return n * (quotient(g.height, g.pool_h) * quotient(g.width, g.pool_w)) * g.channels + channel

    @device_function
    def place(start, term, window, steps, taps, g):
        """Where the gradient of a pixel's window lies (-1: nowhere), and the pixel's offset in the window."""
        h, w, inside = _seen(term, window, steps, taps, g)
        if not inside:
            return -1, 0
        row, column = quotient(h, g.pool_h), quotient(w, g.pool_w)
        columns = quotient(g.width, g.pool_w)
        if row >= quotient(g.height, g.pool_h) or column >= columns:
            return -1, 0
        offset = (h - row * g.pool_h) * g.pool_w + w - column * g.pool_w
        return start + (row * columns + column) * g.channels + term[2], offset

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
    def one(x, argmax, start, term, window, steps, taps, g):
        at, offset = place(start, term, window, steps, taps, g)
        return x[at] if at >= 0 and argmax[at] == offset else x.dtype.type(0)

    @device_function
    def read_scalars(x, argmax, start, term, window, steps, taps, depth, g):
        second = following(term, taps[1], depth)
        third = following(second, taps[1], depth)
        fourth = following(third, taps[1], depth)
        return (
            one(x, argmax, start, term, window, steps, taps, g),
            one(x, argmax, start, second, window, steps, taps, g),
            one(x, argmax, start, third, window, steps, taps, g),
            one(x, argmax, start, fourth, window, steps, taps, g),
        )

    @device_function
    def read_vector(x, argmax, start, term, window, steps, taps, depth, g):
        at, offset = place(start, term, window, steps, taps, g)
        if at >= 0:
            return chosen(x, argmax, at, offset) + chosen(x, argmax, at + LANES, offset)
        zero = x.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    return origin, read_vector if vector else read_scalars


def _weight_reader(tile: Tile, vector: bool) -> tuple[Callable, Callable]:
    """Device functions that read a thread's weights of a slice, and put them into the buffer.

    They are four neighbouring columns of one term, and of another where there are two for each thread.
    """
    pitch = tile.columns // LANES
    quads = tile.depth * pitch
    threads, is_twice = tile.threads, quads > tile.threads

    @device_function
    def four(weight, thread, slice_start, end, outer, group, first_column, columns):
        k = narrow(slice_start + thread // pitch)
        column = narrow(first_column + thread % pitch * LANES)
        at = k * outer + group * columns + column
        zero = weight.dtype.type(0)
        if thread >= quads or k >= end or column >= columns:
            return zero, zero, zero, zero
        if vector:
            return load4(weight, at)
        return (
            weight[at],
            weight[at + 1] if column + 1 < columns else zero,
            weight[at + 2] if column + 2 < columns else zero,
            weight[at + 3] if column + 3 < columns else zero,
        )

    @device_function
    def fetch(weight, thread, slice_start, end, term, tap, inner, outer, group, first_column, columns):
        return four(weight, thread, slice_start, end, outer, group, first_column, columns)

    @device_function
    def fetch_twice(weight, thread, slice_start, end, term, tap, inner, outer, group, first_column, columns):
        return four(weight, thread, slice_start, end, outer, group, first_column, columns) + four(
            weight, thread + threads, slice_start, end, outer, group, first_column, columns
        )

    @device_function
    def put(b, start, thread, values):
        if thread < quads:
            store4(b, start + thread * LANES, values)

    @device_function
    def put_twice(b, start, thread, values):
        store4(b, start + thread * LANES, values[:LANES])
        store4(b, start + (thread + threads) * LANES, values[LANES:])

    return (fetch_twice, put_twice) if is_twice else (fetch, put)


def _transposed_weight_reader(tile: Tile, vector: bool) -> tuple[Callable, Callable]:
    """The same for the gradient to the input: they are neighbouring terms of one column."""
    run, width = tile.run, tile.columns
    readers = tile.depth // run * width

    @device_function
    def place(term, tap, inner, outer, group, column, columns):
        kh = tap[0] + term[0] * tap[2]
        kw = tap[1] + term[1] * tap[3]
        return ((kh * tap[4] + kw) * columns + column) * outer + group * inner + term[2]

    @device_function
    def fetch_vector(weight, thread, slice_start, end, term, tap, inner, outer, group, first_column, columns):
        k = slice_start + thread // width * run
        column = first_column + thread % width
        if thread < readers and k < end and column < columns:
            return load8(weight, place(term, tap, inner, outer, group, column, columns))
        zero = weight.dtype.type(0)
        return zero, zero, zero, zero, zero, zero, zero, zero

    @device_function
    def fetch_scalars(
        weight, thread, slice_start, end, term, tap, inner, outer, group, first_column, columns
    ):
        k = slice_start + thread // width * run
        column = first_column + thread % width
        left = end - k if thread < readers and column < columns else 0
        zero = weight.dtype.type(0)
        second = following(term, tap[5], inner)
        third = following(second, tap[5], inner)
        fourth = following(third, tap[5], inner)
        return (
            weight[place(term, tap, inner, outer, group, column, columns)] if left > 0 else zero,
            weight[place(second, tap, inner, outer, group, column, columns)] if left > 1 else zero,
            weight[place(third, tap, inner, outer, group, column, columns)] if left > 2 else zero,
            weight[place(fourth, tap, inner, outer, group, column, columns)] if left > 3 else zero,
        )

    @device_function
    def put(b, start, thread, values):
        if thread < readers:
            place = start + thread // width * (run * width) + thread % width
            for lane in range(run):
                b[place + lane * width] = values[lane]

    return fetch_vector if vector else fetch_scalars, put


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


def _forward_writer(vector: bool) -> Callable:
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


def _input_writer(vector: bool) -> Callable:
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


def _correlation(tile: Tile, vector: bool, transposed: bool, pooled: bool, floats: tuple[str, ...]) -> Kernel:
    """The kernel for one tile: forward, or `transposed`, which is backward to the input, perhaps from a pool.

    With `vector`, channels of a group are multiples of eight, columns of four, and arrays are aligned.
    """
    reader = _transposed_weight_reader if transposed else _weight_reader
    fetch_weights, put_weights = reader(tile, vector)
    origin, fetch_pixels = (_pooled_reader if pooled else _image_reader)(vector)
    axis = input_axis if transposed else forward_axis
    finish = tiles.in_blocks(tile, (_input_writer if transposed else _forward_writer)(vector))
    place, multiply = tiles.place(tile), tiles.multiply(tile)
    rows_a, columns_b, depth_k, run = tile.rows, tile.columns, tile.depth, tile.run
    thread_rows, thread_columns = tile.thread_rows, tile.thread_columns
    # With two vectors of weights under way, 64 sums in a thread take more registers than two blocks leave it.
    blocks = 1 if tile is TILES[0] and not transposed else tile.blocks
    size_a, size_b, size_sums = 2 * rows_a * depth_k, 2 * columns_b * depth_k, thread_rows * thread_columns

    @kernel(
        f"T[::1], T[::1], T[::1], T[::1], uint8[::1], int64, UniTuple(int32, {len(Sizes._fields)})",
        name=", ".join(
            [("input" if transposed else "forward"), tile.name, *["vector"] * vector, *["pooled"] * pooled]
        ),
        floats=floats,
        launch_bounds=(tile.threads, blocks),
    )
    def correlation(x, weight, bias, y, argmax, part, sizes):
        a = cuda.shared.array(size_a, x.dtype, ALIGNMENT)
        b = cuda.shared.array(size_b, x.dtype, ALIGNMENT)
        left = cuda.local.array(thread_rows, x.dtype)
        right = cuda.local.array(thread_columns, x.dtype)
        sums = cuda.local.array(size_sums, x.dtype)
        g = Sizes(*sizes)
        thread = cuda.threadIdx.x

        # The part of the result that this block computes: a tile of a group's product, of one phase of the
        # pixels.
        column_tiles = quotient(g.columns + columns_b - 1, columns_b)
        row_tile = quotient(cuda.blockIdx.x, column_tiles)
        first_row = narrow(row_tile * rows_a)
        first_column = narrow((cuda.blockIdx.x - row_tile * column_tiles) * columns_b)
        phase_h, phase_w, group = digits(cuda.blockIdx.y, g.stride_w, quotient(g.filters, g.columns))
        count_h, step_h, origin_h, taps_h, tap_h, first_h, every_h = axis(
            phase_h, g.out_h, g.kernel_h, g.stride_h, g.dilation_h, g.top
        )
        count_w, step_w, origin_w, taps_w, tap_w, first_w, every_w = axis(
            phase_w, g.out_w, g.kernel_w, g.stride_w, g.dilation_w, g.left
        )
        pool_h, pool_w = (narrow(1), narrow(1)) if transposed else (g.pool_h, g.pool_w)
        windows = g.images * quotient(count_h, pool_h) * quotient(count_w, pool_w)
        rows = narrow(windows * (pool_h * pool_w))
        if first_row >= rows:
            return

        depth = max(g.depth, narrow(1))

        # Its terms, a slice at a time, and where this thread reads.
        start = narrow(cuda.blockIdx.z * g.span)
        end = narrow(min(start + g.span, taps_h * taps_w * g.depth))
        slices = narrow((end - start + depth_k - 1) // depth_k)
        middle = max(taps_w, 1)
        step = digits(depth_k, middle, depth)
        row = thread % rows_a
        term = digits(start + thread // rows_a * run, middle, depth)
        weight_term = digits(start + thread // columns_b * run, middle, depth)
        n, i, j = _pixel(first_row + row, count_h, count_w, pool_h, pool_w)
        window = narrow(i * step_h + origin_h), narrow(j * step_w + origin_w)
        base, steps = origin(n, group * g.depth, g), (tap_h, tap_w)
        taps = (taps_h if first_row + row < rows else narrow(0)), taps_w
        tap = first_h, first_w, every_h, every_w, g.kernel_w, taps_w
        outer = g.channels if transposed else g.filters
        put_at = thread // rows_a * (run * rows_a) + row

        for k in range(thread_rows * thread_columns):
            sums[k] = 0
        top, across = place(thread)
        for s in range(slices + 1):
            if s < slices:
                pixels = fetch_pixels(x, argmax, base, term, window, steps, taps, depth, g)
                weights = fetch_weights(
                    weight,
                    thread,
                    start,
                    end,
                    weight_term,
                    tap,
                    g.depth,
                    outer,
                    group,
                    first_column,
                    g.columns,
                )
                term = advanced(term, step, middle, depth)
                weight_term = advanced(weight_term, step, middle, depth)
                start = narrow(start + depth_k)
            if s > 0:
                old = narrow((s - 1) % 2)
                multiply(
                    a,
                    old * (rows_a * depth_k) + top,
                    b,
                    old * (columns_b * depth_k) + across,
                    left,
                    right,
                    sums,
                )
            if s < slices:
                buffer = narrow(s % 2)
                for lane in range(run):
                    a[buffer * (rows_a * depth_k) + put_at + lane * rows_a] = pixels[lane]
                put_weights(b, buffer * (columns_b * depth_k), thread, weights)
                cuda.syncthreads()
        finish(
            sums,
            first_row + top,
            first_column + across,
            bias,
            y,
            argmax,
            cuda.blockIdx.z * part,
            rows,
            group,
            (phase_h, phase_w),
            (count_h, count_w),
            g,
        )

    return correlation


_FLOAT32 = FLOATS[:1]
# Tiles by whether they load vectors. Without, they serve the first layer, of an image's few channels, and
# what is small or of float64.
_SCALAR = {False: SCALAR_TILES, True: SCALAR_TILES[-1:]}
_KERNELS = {
    (tile, vector, transposed, pooled): _correlation(
        tile, vector, transposed, pooled, FLOATS if tile is SCALAR_TILES[-1] else _FLOAT32
    )
    for transposed, pooled in ((False, False), (True, False), (True, True))
    for vector in (True, False)
    for tile in (TILES[pooled:] if vector else _SCALAR[transposed])
}


class Pool(NamedTuple):
    """What follows the convolution: max-pooling of windows that touch, with ReLU before it if `relu`."""

    height: int = 1
    width: int = 1
    pooled: int = 0
    relu: int = 0
    keeps: int = 0

    @property
    def is_fused(self) -> bool:
        """Whether the kernels can do it: a thread has four neighbouring rows."""
        return self.height * self.width in (1, 2, 4)


PLAIN = Pool()


class _Plan(NamedTuple):
    """A launch, but for the arrays."""

    kernel: Kernel
    grid: tuple[int, int, int]
    threads: int
    sizes: Sizes

    @property
    def parts(self) -> int:
        return self.grid[2]


def sizes_of(
    layer: Layer, images: int, transposed: bool, biased: bool, pool: Pool = PLAIN, span: int = 1
) -> Sizes:
    """What a launch computes, with `span` terms of the sum in one block."""
    for height, width in (layer.image, layer.out_image):
        checks.countable("dout" if transposed else "x", images * height * width)
    inner, outer = (*layer.image, layer.channels), (*layer.out_image, layer.filters)
    source, result = (outer, inner) if transposed else (inner, outer)
    rows, columns = layer.rows, layer.columns
    return Sizes(
        images,
        *source,
        *result,
        source[2] // layer.groups,
        result[2] // layer.groups,
        rows.kernel,
        columns.kernel,
        rows.stride,
        columns.stride,
        rows.dilation,
        columns.dilation,
        rows.padding[0],
        columns.padding[0],
        span,
        int(biased),
        *pool,
    )


@lru_cache(maxsize=1024)
def _plan(
    layer: Layer, images: int, dtype: np.dtype, transposed: bool, aligned: bool, biased: bool, pool: Pool
) -> _Plan:
    sizes = sizes_of(layer, images, transposed, biased, pool)
    single = dtype == np.float32
    vector = aligned and single and sizes.depth % TILES[0].run == sizes.columns % LANES == 0
    backward_pool = transposed and pool.pooled > 0
    tiles_ = TILES[backward_pool:] if vector else _SCALAR[transposed] if single else SCALAR_TILES[-1:]
    phases = sizes.stride_h * sizes.stride_w if transposed else 1
    if transposed:
        out_h, out_w = -(-sizes.out_h // sizes.stride_h), -(-sizes.out_w // sizes.stride_w)
    else:
        out_h, out_w = sizes.out_h // pool.height * pool.height, sizes.out_w // pool.width * pool.width
    taps = sizes.kernel_h * sizes.kernel_w
    products = checks.blocks("stride, groups", layer.groups * phases)
    terms = -(-taps // phases) * sizes.depth if transposed else taps * sizes.depth
    chosen = grid(
        images * out_h * out_w, sizes.columns, products, terms, tiles_, splits=transposed or not pool.pooled
    )
    if transposed and phases > 1:
        # Phases differ in their taps, of which the largest has more than the mean.
        chosen = chosen._replace(parts=1, span=taps * sizes.depth)
    biased = biased and chosen.parts == 1
    return _Plan(
        _KERNELS[chosen.tile, vector, transposed, backward_pool],
        (chosen.tiles, products, chosen.parts),
        chosen.tile.threads,
        sizes_of(layer, images, transposed, biased, pool, chosen.span),
    )


def _launch(
    plan: _Plan,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    y: DeviceArray,
    argmax: DeviceArray | None = None,
) -> None:
    target = y.ravel() if plan.parts == 1 else scratch(plan.parts, y)
    start = target if bias is None else bias
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    arrays = x.ravel(), weight.ravel(), start, target, where
    plan.kernel[plan.grid, plan.threads](*arrays, y.size, plan.sizes)
    if plan.parts > 1:
        add_parts(y, target, bias)


def forward(
    layer: Layer,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    y: DeviceArray,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `y` (and `argmax`) with the convolution of `x`, pooled as `pool` says."""
    aligned = is_aligned(x, weight, y)
    _launch(
        _plan(layer, x.shape[0], x.dtype, False, aligned, bias is not None, pool), x, weight, bias, y, argmax
    )


def backward_input(
    layer: Layer,
    dout: DeviceArray,
    weight: DeviceArray,
    dx: DeviceArray,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `dx` with the gradient to the input; with `pool`, `dout` is the gradient behind that."""
    aligned = is_aligned(dout, weight, dx)
    plan = _plan(layer, dout.shape[0], dout.dtype, True, aligned, False, pool)
    _launch(plan, dout, weight, None, dx, argmax)
