"""Convolutions with few filters or channels: the images of a batch lie in the lanes of vectors.

Where filters don't fill a vector, images do. A block of input rows of some images is transposed to scratch,
so that each of its elements is a vector of images; a tile then keeps the sums of several filters in registers
and multiplies vectors of images with single weights. For the gradient to the weights both factors are vectors
of images, and the lanes are added at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from . import few_channels, simd
from .direct import CYCLES, Layer, lone
from .epilogue import NO_EPILOGUE, Epilogue, pool_vector
from .geometry import Axis
from .image_tiles import (
    FILTERS,
    TAP_FILTERS,
    TAPS,
    VECTORS,
    filters_tile,
    gather_images,
    scatter_images,
    taps_tile,
)
from .pieces import clear_all
from .simd import TILE_ROWS
from .vectors import all_lanes, lanes_of, load, pointer, total, zeros
from .workspace import NOWHERE, clear, scratch

# A block's window should leave half of the second-level cache.
_WINDOW_BYTES = 256 * 1024
# Pixels over which a tile of the gradient to the weights sums, about.
_PIXELS = 48
_PIECES = 16
# Blocks that a batch is cut into at least, if they are then twice as high as the kernel.
_TASKS = 8
# By how much rows of a window that would lie in the same sets of the first-level cache are moved apart.
_SHIFT_BYTES = 512
# Measured cycles: of a multiply-add of vectors, here and in the gradient to the weights; and of transposing
# an element.
_TILE_CYCLES = 1.08
_WEIGHT_CYCLES = 1.2
_TRANSPOSE_CYCLES = 0.6
# Multiply-adds that take about as long as moving one byte: the unit of part_count.
_MULTIPLY_ADDS_PER_BYTE = 10


class Grid(NamedTuple):
    """The integers that the compiled drivers read; steps and offsets in the result are in elements."""

    image_h: int
    image_w: int
    channels: int
    height: int  # rows and columns of outputs
    width: int
    step: int  # input rows from one output row to the next
    origin_h: int  # input row of the first tap of output row 0; negative in the padding
    origin_w: int
    extent: int  # input rows under an output row
    window_w: int  # columns of a window
    pitch: int  # elements from row to row of a window
    rows: int  # output rows of a block
    blocks: int  # blocks of an image
    filters: int  # of the result
    pool_h: int  # rows and columns of outputs of which the result has one
    pool_w: int
    out_image: int  # elements of an image of the result
    out_first: int
    out_row: int
    out_column: int


class Tables(NamedTuple):
    """A correlation's sizes, and offsets in a window, in elements."""

    grid: Grid
    columns: np.ndarray  # of each output column's first tap
    taps: np.ndarray  # of each tap and channel from there


@kernel
def fill_window(x, n0, images, block, g, h0, rows, window):
    """The window of input rows from `h0` on as vectors of images, with zeros where the image ends."""
    lanes = lanes_of(x)
    row = g.pitch
    left = min(max(-g.origin_w, 0), g.window_w)
    first = max(g.origin_w, 0)
    inside = max(min(g.image_w - first, g.window_w - left), 0)
    image = g.image_h * g.image_w * g.channels
    begin, end = left * g.channels, (left + inside) * g.channels
    for r in range(rows):
        h = h0 + r
        if h < 0 or h >= g.image_h:
            clear(window, r * row, row)
            continue
        source = (h * g.image_w + first) * g.channels - begin
        clear(window, r * row, begin * block)
        for k in range(begin, end, lanes):
            w = r * row + k * block
            for i in range(0, block, lanes):
                gather_images(x, source + k, image, n0 + i, images, end - k, window, w + i, block)
        clear(window, r * row + end * block, row - end * block)


@kernel
def empty_row(y, n0, images, g, i, result, block):
    """Write a row of results, which are vectors of a block's images, to `y`."""
    lanes = lanes_of(result)
    line = g.width // g.pool_w * g.filters
    run = line if g.out_column == g.filters else g.filters
    for j in range(line // run):
        y0 = g.out_first + i * g.out_row + j * g.out_column
        for k in range(0, run, lanes):
            for v in range(0, block, lanes):
                r = (j * run + k) * block + v
                scatter_images(y, y0 + k, g.out_image, n0 + v, images, run - k, result, r, block)


@kernel
def _sum_taps(window, w, of, weights, start, filters, sums, s):
    """All filters' sums of one output pixel, whose first tap is at `w`."""
    depth = of.taps.size
    block = VECTORS * lanes_of(window)
    # A tile may have more filters than are left: the next pixel's overwrite them.
    for f in range(0, of.grid.filters, filters):
        r = s + f * block
        if filters == FILTERS[0]:
            filters_tile(FILTERS[0], window, w, of.taps, weights, f * depth, start, f, sums, r)
        elif filters == FILTERS[1]:
            filters_tile(FILTERS[1], window, w, of.taps, weights, f * depth, start, f, sums, r)
        elif filters == FILTERS[2]:
            filters_tile(FILTERS[2], window, w, of.taps, weights, f * depth, start, f, sums, r)
        else:
            filters_tile(FILTERS[-1], window, w, of.taps, weights, f * depth, start, f, sums, r)


@kernel
def pool_outputs(sums, taps, e, result, places, r, block):
    """One pixel of the result, and where it comes from, of the outputs at sums[taps]."""
    lanes = lanes_of(sums)
    kind = sums.dtype.type(0)
    offsets, outputs, values, where = pointer(taps), pointer(sums), pointer(result), pointer(places)
    everything = all_lanes(outputs)
    for k in range(0, e.filters * block, lanes):
        pool_vector(e.relu, e.keeps, kind, outputs, k, offsets, taps.size, values, where, r + k, everything)


@parallel
def _correlate(
    part, parts, x, images, weights, start, filters, y, of, e, pool, argmax, windows, results, spares, places
):
    keep_out_of_line()
    g = of.grid
    block = VECTORS * lanes_of(x)
    window, result, place = windows[part], results[part], places[part]
    # What is not pooled is the result already.
    sums = spares[part] if e.pool_h else result
    lo, hi = span(part, parts, (images + block - 1) // block * g.blocks)
    for task in range(lo, hi):
        n0 = task // g.blocks * block
        i0 = task % g.blocks * g.rows
        i1 = min(i0 + g.rows, g.height)
        fill_window(
            x, n0, images, block, g, g.origin_h + i0 * g.step, (i1 - i0 - 1) * g.step + g.extent, window
        )
        for i in range(i0, i1, g.pool_h):
            for j in range(0, g.width, g.pool_w):
                for tap in range(g.pool_h * g.pool_w):
                    a = tap // g.pool_w
                    w = (i - i0 + a) * g.step * g.pitch + of.columns[j + tap - a * g.pool_w]
                    s = pool[tap] if e.pool_h else j * g.filters * block
                    _sum_taps(window, w, of, weights, start, filters, sums, s)
                if e.pool_h:
                    pool_outputs(sums, pool, e, result, place, j // g.pool_w * g.filters * block, block)
            empty_row(y, n0, images, g, i // g.pool_h, result, block)
            if e.keeps:
                empty_row(argmax, n0, images, g, i // g.pool_h, place, block)


@kernel
def _add_pixels(window, w0, pixels, of, gradient, d0, filters, sums):
    """Add some pixels' share in the gradient of all weights."""
    lanes = lanes_of(window)
    step = of.grid.filters * lanes
    s = 0
    for f in range(0, of.grid.filters, filters):
        d = d0 + f * lanes
        for k in range(0, of.taps.size, TAPS):
            if filters == TAP_FILTERS[0]:
                taps_tile(TAPS, TAP_FILTERS[0], window, w0, pixels, of.taps, k, gradient, d, step, sums, s)
            elif filters == TAP_FILTERS[-1]:
                taps_tile(TAPS, TAP_FILTERS[-1], window, w0, pixels, of.taps, k, gradient, d, step, sums, s)
            else:
                taps_tile(TAPS, TAP_FILTERS[1], window, w0, pixels, of.taps, k, gradient, d, step, sums, s)
            s += TAPS * filters * lanes


@parallel
def _weight(part, parts, x, images, dout, filters, of, pixels, windows, gradients, sums):
    keep_out_of_line()
    g = of.grid
    lanes = lanes_of(x)
    window, gradient = windows[part], gradients[part]
    group = pixels.size // g.width
    line = g.width * g.filters
    lo, hi = span(part, parts, len(sums))
    for piece in range(lo, hi):
        added = sums[piece]
        clear(added, 0, added.size)
        task0, task1 = span(piece, len(sums), (images + lanes - 1) // lanes * g.blocks)
        for task in range(task0, task1):
            n0 = task // g.blocks * lanes
            first = task % g.blocks * g.rows
            end = min(first + g.rows, g.height)
            rows = (end - first - 1) * g.step + g.extent
            fill_window(x, n0, images, lanes, g, g.origin_h + first * g.step, rows, window)
            for i0 in range(first, end, group):
                count = min(group, end - i0) * g.width
                size, d0 = count * g.filters, i0 * line
                for k in range(0, size, lanes):
                    gather_images(dout, d0 + k, g.out_image, n0, images, size - k, gradient, k * lanes, lanes)
                w = (i0 - first) * g.step * g.pitch
                chunks = max(1, count // _PIXELS)
                for chunk in range(chunks):
                    q, end_q = span(chunk, chunks, count)
                    d = q * g.filters * lanes
                    _add_pixels(window, w, pixels[q:end_q], of, gradient, d, filters, added)


@parallel
def _fold(part, parts, sums, filters, dweight):
    keep_out_of_line()
    pieces, size = sums.shape
    depth, many = dweight.shape
    lanes = lanes_of(sums)
    values = pointer(sums)
    chunks = (depth + TAPS - 1) // TAPS
    lo, hi = span(part, parts, depth)
    for k in range(lo, hi):
        for f in range(many):
            tile = f // filters * chunks + k // TAPS
            first = ((tile * TAPS + k % TAPS) * filters + f % filters) * lanes
            images = zeros(values)
            for piece in range(pieces):
                images = images + load(values, piece * size + first, all_lanes(values))
            dweight[k, f] += total(images)


def pitch(row: int, dtype: np.dtype) -> int:
    """Elements from row to row, so that rows under one tap lie in different sets of the first-level cache."""
    page, shift = (size // dtype.itemsize for size in (4096, _SHIFT_BYTES))
    apart = row % page
    return row if shift <= apart <= page - shift else row + (shift - apart) % page


def _tables(
    rows: Axis,
    columns: Axis,
    image: tuple[int, int],
    channels: int,
    out_image: tuple[int, int],
    filters: int,
    images: int,
    block: int,
    dtype: np.dtype,
    pool: tuple[int, int] = (1, 1),
) -> Tables:
    """The tables of a correlation with `block` images at a time, of whose outputs windows are pooled."""
    row_pitch = pitch(columns.window * channels * block, dtype)
    many = _WINDOW_BYTES // (row_pitch * dtype.itemsize)
    many = min(max(1, (many - rows.extent) // rows.step + 1), rows.outputs)
    # A batch in one block of images is cut by rows, for the threads.
    tasks = max(1, _TASKS // -(-images // block))
    many = min(many, max(-(-rows.outputs // tasks), -(-2 * rows.extent // rows.step)))
    blocks = -(-rows.outputs // many)
    many = _padded(-(-rows.outputs // blocks), pool[0])
    taps = np.add.outer(np.array(rows.taps) * row_pitch, np.array(columns.taps) * channels * block)
    return Tables(
        Grid(
            image_h=image[0],
            image_w=image[1],
            channels=channels,
            height=rows.outputs,
            width=columns.outputs,
            step=rows.step,
            origin_h=rows.origin,
            origin_w=columns.origin,
            extent=rows.extent,
            window_w=columns.window,
            pitch=row_pitch,
            rows=many,
            blocks=-(-rows.outputs // many),
            filters=filters,
            pool_h=pool[0],
            pool_w=pool[1],
            out_image=out_image[0] * out_image[1] * filters,
            out_first=(rows.out_first * out_image[1] + columns.out_first) * filters,
            out_row=rows.out_step * out_image[1] * filters,
            out_column=columns.out_step * filters,
        ),
        np.arange(columns.outputs) * (columns.step * channels * block),
        np.add.outer(taps.ravel(), np.arange(channels) * block).ravel(),
    )


@lru_cache(maxsize=512)
def _forward_tables(
    layer: Layer, images: int, vectors: int, dtype: np.dtype, e: Epilogue = NO_EPILOGUE
) -> Tables:
    rows, columns = layer.rows.forward(), layer.columns.forward()
    if e.pool_h:
        rows = rows._replace(outputs=e.out_h * e.pool_h)
        columns = columns._replace(outputs=e.out_w * e.pool_w)
    return _tables(
        rows,
        columns,
        layer.image,
        layer.channels,
        (e.out_h, e.out_w) if e.pool_h else layer.out_image,
        layer.filters,
        images,
        vectors * simd.lanes(dtype),
        dtype,
        (e.pool_h, e.pool_w) if e.pool_h else (1, 1),
    )


@lru_cache(maxsize=512)
def _input_tables(layer: Layer, images: int, dtype: np.dtype) -> list[tuple[Tables, np.ndarray]]:
    """For each phase of the input: its tables over dout, and the kernel positions of its taps."""
    return [
        (
            _tables(
                rows,
                columns,
                layer.out_image,
                layer.filters,
                layer.image,
                layer.channels,
                images,
                VECTORS * simd.lanes(dtype),
                dtype,
            ),
            np.add.outer(np.array(kernel_rows) * layer.columns.kernel, kernel_columns).ravel(),
        )
        for rows, kernel_rows in layer.rows.phases()
        for columns, kernel_columns in layer.columns.phases()
    ]


def _windows(parts: int, g: Grid, dtype: np.dtype) -> np.ndarray:
    """A window for each part; vectors are written in whole tiles, so that some are beyond the end."""
    lanes = simd.lanes(dtype)
    size = ((g.rows - 1) * g.step + g.extent) * g.pitch + VECTORS * lanes * lanes
    return scratch("windows", parts * size, dtype).reshape(parts, size)


def _tile_size(filters: int, sizes: Sequence[int]) -> int:
    """The size of tile with which the fewest filters are computed, and then the fewest tiles."""
    return min(sizes, key=lambda size: (-(-filters // size) * size, -size))


def _run(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    positions: np.ndarray | None,
    bias: np.ndarray | None,
    y: np.ndarray,
    of: Tables,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Correlate with `weight`, from filters to channels by the taps at `positions` if they are given, through
    the epilogue `e`."""
    g = of.grid
    size = _tile_size(g.filters, FILTERS)
    tiles = -(-g.filters // size)
    weights = scratch("weights", tiles * of.taps.size * size, x.dtype).reshape(tiles, -1, size)
    start = scratch("start", tiles * size, x.dtype)
    between_jobs(_prepare, weight, positions, bias, weights, start)
    images = len(x)
    block = VECTORS * simd.lanes(x.dtype)
    parts = part_count(-(-images // block) * g.blocks, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)
    windows = _windows(parts, g, x.dtype)
    # Vectors are written in whole tiles, so that something is written beyond the end.
    beyond = size + simd.lanes(x.dtype)
    line = g.width // g.pool_w * g.filters + g.filters + beyond
    results = scratch("results", parts * line * block, x.dtype).reshape(parts, -1)
    spare = (g.pool_h * g.pool_w * g.filters + beyond) * block if e.pool_h else 1
    spares = scratch("rows", parts * spare, x.dtype).reshape(parts, spare)
    place = line * block if e.keeps else 1
    places = scratch("places", parts * place, x.dtype).reshape(parts, place)
    _correlate(
        parts,
        x.reshape(-1),
        images,
        weights.reshape(-1),
        start,
        size,
        y.reshape(-1),
        of,
        e,
        np.arange(g.pool_h * g.pool_w) * (g.filters * block),
        argmax.reshape(-1),
        windows,
        results,
        spares,
        places,
    )


def _prepare(
    weight: np.ndarray,
    positions: np.ndarray | None,
    bias: np.ndarray | None,
    weights: np.ndarray,
    start: np.ndarray,
) -> None:
    """The weights as panels of columns, and what sums start with; see `_run`."""
    if positions is None:
        flat = weight.reshape(-1, weight.shape[3])
    else:
        taps = weight.reshape(-1, *weight.shape[2:])[positions]
        flat = taps.transpose(0, 2, 1).reshape(-1, weight.shape[2])
    tiles, _, size = weights.shape
    weights[-1] = 0
    for t in range(tiles):
        columns = flat[:, t * size : (t + 1) * size]
        weights[t, :, : columns.shape[1]] = columns
    start.fill(0)
    if bias is not None:
        start[: bias.size] = bias


def _padded(count: int, size: int) -> int:
    return -(-count // size) * size


def _cycles(of: Tables, images: int, block: int, sums: float, dtype: np.dtype) -> float:
    """What an image costs of the `images`, `sums` being the multiply-adds of a whole vector of images."""
    g = of.grid
    lanes = simd.lanes(dtype)
    inputs = g.blocks * ((g.rows - 1) * g.step + g.extent) * min(g.window_w, g.image_w) * g.channels
    outputs = g.height * g.width * g.filters
    cycles = sums / lanes + _TRANSPOSE_CYCLES * (inputs + outputs)
    return cycles * _padded(images, block) / images


def _correlation_cycles(of: Tables, images: int, dtype: np.dtype) -> float:
    filters = _padded(of.grid.filters, _tile_size(of.grid.filters, FILTERS))
    sums = _TILE_CYCLES * of.grid.height * of.grid.width * of.taps.size * filters
    return _cycles(of, images, VECTORS * simd.lanes(dtype), sums, dtype)


def _is_narrow(layer: Layer, filters: int, images: int, dtype: np.dtype) -> bool:
    """What must hold for images to fill vectors better than filters, cheap to find out."""
    lanes = simd.lanes(dtype)
    return layer.groups == 1 and filters < lanes and images >= lanes


def forward_cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    """What the forward pass of all images costs, here or by `Layer.run`."""
    cycles = _correlation_cycles(_forward_tables(layer, images, VECTORS, dtype), images, dtype)
    return images * min(cycles, layer.forward_cycles(dtype) * lone(layer.filters, dtype))


@lru_cache(maxsize=512)
def suits_forward(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the forward pass is faster here than by `Layer.run`."""
    if not _is_narrow(layer, layer.filters, images, dtype):
        return False
    cycles = _correlation_cycles(_forward_tables(layer, images, VECTORS, dtype), images, dtype)
    return cycles < layer.forward_cycles(dtype)


def _other_input_cycles(layer: Layer, dtype: np.dtype, longer: float = 1.0) -> float:
    few = few_channels.cycles(layer, dtype) if few_channels.suits(layer, dtype) else np.inf
    return min(layer.input_cycles(dtype) * longer, few)


def _input_cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    return sum(_correlation_cycles(of, images, dtype) for of, _ in _input_tables(layer, images, dtype))


def input_cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    """What the gradient to the input of all images costs, here, by `Layer.run` or by `few_channels`."""
    others = _other_input_cycles(layer, dtype, lone(layer.channels, dtype))
    return images * min(_input_cycles(layer, images, dtype), others)


@lru_cache(maxsize=512)
def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is faster here than by `Layer.run` or by `few_channels`."""
    if not _is_narrow(layer, layer.channels, images, dtype):
        return False
    return _input_cycles(layer, images, dtype) < _other_input_cycles(layer, dtype)


def _weight_cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    of = _forward_tables(layer, images, 1, dtype)
    pixels, taps = of.grid.height * of.grid.width, of.taps.size
    filters = _padded(layer.filters, _tile_size(layer.filters, TAP_FILTERS))
    sums = _WEIGHT_CYCLES * pixels * _padded(taps, TAPS) * filters
    return _cycles(of, images, simd.lanes(dtype), sums, dtype)


def _direct_weight_cycles(layer: Layer, dtype: np.dtype) -> float:
    pixels = layer.out_image[0] * layer.out_image[1]
    taps = layer.multiply_adds // (pixels * layer.filters)
    return CYCLES * pixels * _padded(taps, TILE_ROWS) * -(-layer.filters // simd.lanes(dtype))


def weight_cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    """What the weights' gradient of all images costs, here, if filters are few, or by `direct_weights`."""
    cycles = _direct_weight_cycles(layer, dtype)
    if _is_narrow(layer, layer.filters, images, dtype):
        cycles = min(cycles, _weight_cycles(layer, images, dtype))
    return images * cycles


@lru_cache(maxsize=512)
def suits_weight(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the weights is faster here than by `direct_weights`."""
    if not _is_narrow(layer, layer.filters, images, dtype):
        return False
    return _weight_cycles(layer, images, dtype) < _direct_weight_cycles(layer, dtype)


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y` with the convolution of `x`, through the epilogue `e`, and `argmax` if that keeps it."""
    of = _forward_tables(layer, len(x), VECTORS, x.dtype, e)
    _run(layer, x, weight, None, bias, y, of, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    if layer.rows.skips or layer.columns.skips:
        clear_all(dx)
    for of, positions in _input_tables(layer, len(dout), dout.dtype):
        _run(layer, dout, weight, positions, None, dx, of)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    of = _forward_tables(layer, len(x), 1, x.dtype)
    g = of.grid
    images, lanes = len(x), simd.lanes(x.dtype)
    depth = of.taps.size
    filters = _tile_size(g.filters, TAP_FILTERS)
    tiles = -(-depth // TAPS) * -(-g.filters // filters)
    tasks = -(-images // lanes) * g.blocks
    pieces = min(_PIECES, tasks)
    sums = scratch("partial", pieces * tiles * TAPS * filters * lanes, x.dtype).reshape(pieces, -1)
    # Rows of pixels that are transposed at once, as many each time.
    group = -(-g.rows // -(-g.rows * g.width // _PIXELS))
    pixels = np.add.outer(np.arange(group) * (g.step * g.pitch), of.columns).ravel()
    parts = part_count(pieces, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)
    # Whole vectors are written and whole tiles read, beyond the end.
    gradients = scratch("results", parts * (pixels.size * g.filters + lanes + filters) * lanes, x.dtype)
    gradients = gradients.reshape(parts, -1)
    windows = _windows(parts, g, x.dtype)
    _weight(parts, x.reshape(-1), images, dout.reshape(-1), filters, of, pixels, windows, gradients, sums)
    flat = dweight.reshape(depth, -1)
    _fold(part_count(depth, sums.size), sums, filters, flat)
