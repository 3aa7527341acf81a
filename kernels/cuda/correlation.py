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
from .correlation_memory import (
    PixelsAt,
    Sizes,
    forward_writer,
    image_reader,
    input_writer,
    pixel,
    pooled_reader,
    transposed_weight_reader,
    weight_reader,
)
from .jit import FLOATS, Kernel, device_function, kernel
from .splits import add_parts, grid, nothing, scratch
from .taps import Axis, advanced, digits, forward_axis, input_axis, narrow, quotient
from .tile import SCALAR_TILES, TILES, Tile
from .vectors import LANES, is_aligned


class _Portion(NamedTuple):
    """What a block computes: a tile of one group's product, for one phase of the result's pixels."""

    row: int
    column: int
    rows: int  # of the whole product
    group: int
    phase: tuple[int, int]
    down: Axis
    across: Axis


def _portion(tile: Tile, transposed: bool) -> Callable:
    """A device function for the `_Portion` of this block."""
    axis = input_axis if transposed else forward_axis
    rows_a, columns_b = tile.rows, tile.columns

    @device_function
    def portion(g):
        column_tiles = quotient(g.columns + columns_b - 1, columns_b)
        row_tile = quotient(cuda.blockIdx.x, column_tiles)
        column_tile = cuda.blockIdx.x - row_tile * column_tiles
        phase_h, phase_w, group = digits(cuda.blockIdx.y, g.stride_w, quotient(g.filters, g.columns))
        down = axis(phase_h, g.out_h, g.kernel_h, g.stride_h, g.dilation_h, g.top)
        across = axis(phase_w, g.out_w, g.kernel_w, g.stride_w, g.dilation_w, g.left)
        rows = g.images * down.outputs * across.outputs
        if not transposed:
            # Pixels that no window has are left out.
            rows = g.images * (g.windows_h * g.windows_w) * (g.pool_h * g.pool_w)
        first_row, first_column = narrow(row_tile * rows_a), narrow(column_tile * columns_b)
        return _Portion(first_row, first_column, narrow(rows), group, (phase_h, phase_w), down, across)

    return portion


def _pixels_at(tile: Tile, transposed: bool, origin: Callable) -> Callable:
    """A device function for where this thread reads the images for its block's portion."""
    rows_a = tile.rows

    @device_function
    def pixels_at(mine, g):
        row = mine.row + cuda.threadIdx.x % rows_a
        down, across = mine.down, mine.across
        pool_h, pool_w = (narrow(1), narrow(1)) if transposed else (g.pool_h, g.pool_w)
        n, i, j = pixel(row, down.outputs, across.outputs, pool_h, pool_w)
        return PixelsAt(
            origin(n, mine.group * g.depth, g),
            (narrow(i * down.step + down.origin), narrow(j * across.step + across.origin)),
            (down.tap_step, across.tap_step),
            (down.taps if row < mine.rows else narrow(0), across.taps),
        )

    return pixels_at


def _fetcher(tile: Tile, fetch_pixels: Callable, fetch_weights: Callable) -> Callable:
    """A device function that reads this thread's pixels and weights of a slice, for `tiles.sum_slices`."""
    depth_k = tile.depth

    @device_function
    def fetch(operands, state):
        x, weight, argmax, pixels_at, weights_at, step, middle, depth, g = operands
        term, weight_term, k = state
        pixels = fetch_pixels(x, argmax, term, pixels_at, depth, g)
        weights = fetch_weights(weight, k, weight_term, weights_at, g)
        term, weight_term = advanced(term, step, middle, depth), advanced(weight_term, step, middle, depth)
        return pixels, weights, (term, weight_term, narrow(k + depth_k))

    return fetch


def _putter(tile: Tile, put_weights: Callable) -> Callable:
    """A device function that puts them into the buffers."""
    rows_a, run = tile.rows, tile.run

    @device_function
    def put(a, at_a, b, at_b, pixels, weights):
        thread = cuda.threadIdx.x
        first = narrow(at_a + thread // rows_a * (run * rows_a) + thread % rows_a)
        for lane in range(run):
            a[first + lane * rows_a] = pixels[lane]
        put_weights(b, at_b, weights)

    return put


def _correlation(tile: Tile, vector: bool, transposed: bool, pooled: bool, floats: tuple[str, ...]) -> Kernel:
    """The kernel for one tile: forward, or `transposed`, which is backward to the input, perhaps from a pool.

    With `vector`, channels of a group are multiples of eight, columns of four, and arrays are aligned.
    """
    reader = transposed_weight_reader if transposed else weight_reader
    begin_weights, fetch_weights, put_weights = reader(tile, vector)
    origin, fetch_pixels = (pooled_reader if pooled else image_reader)(vector)
    portion, pixels_at = _portion(tile, transposed), _pixels_at(tile, transposed, origin)
    fetch, put = _fetcher(tile, fetch_pixels, fetch_weights), _putter(tile, put_weights)
    sum_slices, place = tiles.sum_slices(tile, fetch, put), tiles.place(tile)
    finish = tiles.in_blocks(tile, (input_writer if transposed else forward_writer)(vector))
    rows_a, depth_k, run = tile.rows, tile.depth, tile.run
    # With two vectors of weights under way, 64 sums in a thread take more registers than two blocks leave it.
    blocks = 1 if tile is TILES[0] and not transposed else tile.blocks
    size_sums = tile.thread_rows * tile.thread_columns
    pass_name = "input" if transposed else "forward"

    @kernel(
        f"T[::1], T[::1], T[::1], T[::1], uint8[::1], int64, UniTuple(int32, {len(Sizes._fields)})",
        name=", ".join([pass_name, tile.name, *["vector"] * vector, *["pooled"] * pooled]),
        floats=floats,
        launch_bounds=(tile.threads, blocks),
    )
    def correlation(x, weight, bias, y, argmax, part, sizes):
        sums = cuda.local.array(size_sums, x.dtype)
        g = Sizes(*sizes)
        mine = portion(g)
        if mine.row >= mine.rows:
            return
        # Its terms, a slice at a time.
        start = narrow(cuda.blockIdx.z * g.span)
        end = narrow(min(start + g.span, mine.down.taps * mine.across.taps * g.depth))
        slices = narrow((end - start + depth_k - 1) // depth_k)
        middle, depth = max(mine.across.taps, 1), max(g.depth, narrow(1))
        step = digits(depth_k, middle, depth)
        # And where this thread begins.
        thread = cuda.threadIdx.x
        tap = mine.down.first_tap, mine.across.first_tap, mine.down.every, mine.across.every, mine.across.taps
        k, weights_at = begin_weights(start, end, mine.group, mine.column, tap, g)
        operands = x, weight, argmax, pixels_at(mine, g), weights_at, step, middle, depth, g
        term = digits(start + thread // rows_a * run, middle, depth)
        sum_slices(operands, (term, digits(k, middle, depth), k), slices, sums)
        top, across = place(thread)
        row, column, offset = mine.row + top, mine.column + across, cuda.blockIdx.z * part
        counts = mine.down.outputs, mine.across.outputs
        finish(sums, row, column, bias, y, argmax, offset, mine.rows, mine.group, mine.phase, counts, g)

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
        layer.out_image[0] // pool.height,
        layer.out_image[1] // pool.width,
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
