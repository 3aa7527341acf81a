"""Winograd's algorithm for few filters, or channels: the images of a batch lie in the lanes of vectors.

The output is cut into tiles of 4x4 pixels. For a tile, channel and filter, 3x3 taps take 6x6 products, 4x4
take 7x7 and 5x5 take 8x8; larger filters, of up to 8x8, are cut into four of 4x4, whose inputs are the tile's
own window and those of the tiles beside and below it, so that each window is transformed once (see
`winograd_points`). That is a quarter of the multiplications of 3x3 filters, a sixth of those of 5x5 and a
quarter of those of 7x7.

A thread transposes the rows under some rows of tiles to vectors of images, as `image_lanes` does, and then
transforms, multiplies and transforms back one tile at a time, in the first- and second-level caches. For
standard normal images and weights the largest error is below 2e-5 of the largest output. A NaN or an infinity
in an image makes NaN of all its outputs whose tile has it in a window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import direct, image_lanes, simd, winograd
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue
from .image_lanes import empty_row, fill_window, pitch, pool_outputs
from .vectors import keep_in_line, lanes_of, pointer
from .winograd_points import FILTERS, INPUT, ONE, OUTPUT, TILE, TOGETHER, matrices, tile_products, transform
from .workspace import NOTHING, NOWHERE, clear, scratch, set_start

# The sizes of transforms that are compiled, for filters whose sides are by 3 smaller; and with which of them
# filters are done that are cut in two along each axis.
SIZES = (6, 7, 8)
_CUT = 7
_FEWEST_TAPS, _MOST_TAPS = 3, 8
# A window of a band of tiles should leave half of the second-level cache.
_WINDOW_BYTES = 256 * 1024
# What is kept of transformed windows must lie in the second-level cache, or the gradient to the input takes
# twice as long as by `few_channels`, which streams: measured with 32 and 64 filters.
_SPECTRA_BYTES = 640 * 1024
# Tasks that a batch is cut into at least, if its images have enough rows of tiles.
_TASKS = 16
# Multiply-adds that take about as long as moving one byte: the unit of part_count.
_MULTIPLY_ADDS_PER_BYTE = 10


class _Cycles(NamedTuple):
    """Measured, of a product of vectors and of an element that is transformed: of vectors, and of weights."""

    product: float
    window: float
    result: float
    weight: float


# At full width those of `image_lanes`, in which these are given, are half as long.
_CYCLES = _Cycles(1.0, 16.0, 5.0, 40.0) if simd.FULL_WIDTH else _Cycles(1.5, 6.0, 6.0, 10.0)
# Operations of the transformation of a weight.
_TRANSFORM = 6


class Tiling(NamedTuple):
    """The integers that the compiled driver reads; what `image_lanes.Grid` has too means the same."""

    image_h: int
    image_w: int
    channels: int
    height: int
    width: int
    origin_h: int
    origin_w: int
    window_w: int
    pitch: int
    filters: int
    pool_h: int
    pool_w: int
    out_image: int
    out_first: int
    out_row: int
    out_column: int
    size: int  # of a tile's transform
    cuts: int  # filters that a filter is cut into along an axis
    together: int  # neighbouring tiles that are multiplied at a time
    tiles_h: int
    tiles_w: int
    rows: int  # rows of tiles of a band
    bands: int  # of an image


def transformer(which: int) -> Any:
    """The kernel that does the transform `which` of any of `SIZES`."""

    def transform_any(size, source, s0, source_step, target, t0, target_step):
        keep_in_line()
        if size == SIZES[0]:
            transform(SIZES[0], which, source, s0, source_step, target, t0, target_step)
        elif size == SIZES[1]:
            transform(SIZES[1], which, source, s0, source_step, target, t0, target_step)
        else:
            transform(SIZES[2], which, source, s0, source_step, target, t0, target_step)

    return kernel(transform_any)


_transform_inputs = transformer(INPUT)
_transform_outputs = transformer(OUTPUT)


@kernel
def transform_row(window, w0, g, columns, spectrum):
    """Transforms of the windows of a row of tiles, and of the cuts beside the last: by tile and column."""
    lanes = lanes_of(window)
    vectors = g.size * lanes
    step = g.channels * vectors
    for e in range(g.window_w * g.channels):
        _transform_inputs(g.size, window, w0 + e * lanes, g.pitch, columns, e * vectors, lanes)
    for tile in range(g.tiles_w + g.cuts - 1):
        source, target = tile * TILE * step, tile * g.size * step
        for e in range(0, step, lanes):
            _transform_inputs(g.size, columns, source + e, step, spectrum, target + e, step)


@kernel
def _multiply_column(size, tiles, v0, u0, s0, t0, operands):
    """The products of some tiles' columns with some filters; see `tile_products`."""
    keep_in_line()
    if size == SIZES[0]:
        if tiles == 1:
            tile_products(SIZES[0], 1, v0, u0, s0, t0, operands)
        else:
            tile_products(SIZES[0], TOGETHER[0], v0, u0, s0, t0, operands)
    elif size == SIZES[1]:
        if tiles == 1:
            tile_products(SIZES[1], 1, v0, u0, s0, t0, operands)
        else:
            tile_products(SIZES[1], TOGETHER[1], v0, u0, s0, t0, operands)
    else:
        tile_products(SIZES[2], TOGETHER[2], v0, u0, s0, t0, operands)


@kernel
def _multiply_tiles(spectrum, v0, tiles, taps, weights, start, g, sums):
    """Products of some neighbours, transformed along columns: sums[tile, filter, row of the tile, column]."""
    lanes = lanes_of(spectrum)
    padded = start.size // 2
    point = g.size * g.channels * lanes
    operands = (
        pointer(spectrum),
        g.size * point,
        pointer(taps),
        taps.size,
        pointer(weights),
        pointer(start),
        pointer(sums),
        padded * TILE * g.size * lanes,
    )
    u0 = 0
    for q in range(g.size):
        s0 = padded if q == ONE else 0
        for f in range(0, padded, FILTERS):
            t0 = (f * TILE * g.size + q) * lanes
            _multiply_column(g.size, tiles, v0 + q * point, u0, s0 + f, t0, operands)
            u0 += taps.size * g.size * FILTERS


@kernel
def _finish_tile(sums, t0, g, outputs, s0, line):
    """The outputs of the tile at sums[t0], by row, column and filter; rows are `line` elements apart."""
    lanes = lanes_of(sums)
    vectors = g.size * lanes
    step = g.filters * lanes
    for f in range(g.filters):
        for m in range(TILE):
            source, target = t0 + (f * TILE + m) * vectors, s0 + m * line + f * lanes
            _transform_outputs(g.size, sums, source, lanes, outputs, target, step)


@kernel
def _write_rows(y, n0, images, g, tile_row, result):
    """Write the rows of results that a row of tiles gives to `y`."""
    lanes = lanes_of(result)
    many = TILE // g.pool_h
    line = result.size // many
    for m in range(many):
        i = tile_row * many + m
        if i < g.height // g.pool_h:
            empty_row(y, n0, images, g, i, result[m * line :], lanes)


@parallel
def _convolve(part, parts, x, images, weights, taps, start, y, g, e, pool, argmax, memory):
    keep_out_of_line()
    windows, columns, spectra, products, outputs, results, places = memory
    window, column, spectrum, sums = windows[part], columns[part], spectra[part], products[part]
    output, result, place = outputs[part], results[part], places[part]
    lanes = lanes_of(x)
    many, tile_w = TILE // g.pool_h, TILE // g.pool_w * g.filters * lanes
    line = result.size // many
    slot = spectrum.size // g.cuts
    tile = g.size * g.size * g.channels * lanes
    product = sums.size // g.together
    lo, hi = span(part, parts, (images + lanes - 1) // lanes * g.bands)
    for task in range(lo, hi):
        n0 = task // g.bands * lanes
        first = task % g.bands * g.rows
        end = min(first + g.rows, g.tiles_h)
        rows = (end - first + g.cuts - 2) * TILE + g.size
        fill_window(x, n0, images, lanes, g, g.origin_h + first * TILE, rows, window)
        ready = first
        for t in range(first, end):
            while ready < t + g.cuts:
                w0 = (ready - first) * TILE * g.pitch
                transform_row(window, w0, g, column, spectrum[ready % g.cuts * slot :])
                ready += 1
            turned = taps[t % g.cuts]
            for j in range(g.tiles_w):
                t0 = j % g.together * product
                if t0 == 0:
                    tiles = min(g.together, g.tiles_w - j)
                    _multiply_tiles(spectrum, j * tile, tiles, turned, weights, start, g, sums)
                if e.pool_h:
                    _finish_tile(sums, t0, g, output, 0, TILE * g.filters * lanes)
                    for i in range(many):
                        for k in range(TILE // g.pool_w):
                            s = (i * g.pool_h * TILE + k * g.pool_w) * g.filters * lanes
                            r = i * line + j * tile_w + k * g.filters * lanes
                            pool_outputs(output[s:], pool, e, result, place, r, lanes)
                else:
                    _finish_tile(sums, t0, g, result, j * tile_w, line)
            _write_rows(y, n0, images, g, t, result)
            if e.keeps:
                _write_rows(argmax, n0, images, g, t, place)


@kernel
def _read_filters(weight, turned, c, h0, w0, high, wide, values):
    """All filters' taps from (h0, w0) on for channel `c`, and zeros behind the last filter."""
    kernel_h, kernel_w = weight.shape[:2]
    filters = weight.shape[2] if turned else weight.shape[3]
    for a in range(high):
        for b in range(wide):
            taps = values[a, b]
            clear(taps, 0, taps.size)
            for f in range(filters):
                if turned:
                    taps[f] = weight[kernel_h - 1 - h0 - a, kernel_w - 1 - w0 - b, f, c]
                else:
                    taps[f] = weight[h0 + a, w0 + b, c, f]


@kernel
def _add_weighted(factor, values, sums):
    for f in range(sums.size):
        sums[f] += factor * values[f]


@parallel
def _prepare(part, parts, weight, turned, bias, g, matrix, values, rows, transformed, start):
    """The transformed weights, and what sums start with; see `forward`.

    (kH, kW, C, F) becomes columns, groups of filters, cuts, channels and rows of the transform, and filters.
    """
    keep_out_of_line()
    (size, side), values, rows = matrix.shape, values[part], rows[part]
    padded = values.shape[2]
    if part == 0:
        clear(start, 0, padded)
        set_start(bias, start[padded:])
    group = g.cuts * g.cuts * g.channels * size * FILTERS
    lo, hi = span(part, parts, g.cuts * g.cuts * g.channels)
    for k in range(lo, hi):
        cut = k // g.channels
        h0, w0 = cut // g.cuts * side, cut % g.cuts * side
        high, wide = min(side, weight.shape[0] - h0), min(side, weight.shape[1] - w0)
        _read_filters(weight, turned, k - cut * g.channels, h0, w0, high, wide, values)
        for i in range(size):
            for b in range(wide):
                clear(rows[b], 0, padded)
                for a in range(high):
                    _add_weighted(matrix[i, a], values[a, b], rows[b])
            for q in range(size):
                sums = rows[side]
                clear(sums, 0, padded)
                for b in range(wide):
                    _add_weighted(matrix[q, b], rows[b], sums)
                for f in range(0, padded, FILTERS):
                    place = (q * padded // FILTERS + f // FILTERS) * group + (k * size + i) * FILTERS
                    for j in range(FILTERS):
                        transformed[place + j] = sums[f + j]


def _cut(taps: int) -> tuple[int, int]:
    """The size of transform of filters with so many rows and columns, and how many each is cut into."""
    whole = max(taps + TILE - 1, SIZES[0])
    return (whole, 1) if whole <= SIZES[-1] else (_CUT, 2)


@lru_cache(maxsize=512)
def tiling(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> tuple[Tiling, np.ndarray]:
    """A pass's sizes, and where a product's inputs lie, for each order of the rows of spectra in scratch."""
    lanes = simd.lanes(dtype)
    size, cuts = _cut(max(layer.rows.kernel, layer.columns.kernel))
    pool_h, pool_w = (e.pool_h, e.pool_w) if e.pool_h else (1, 1)
    height, width = (e.out_h * pool_h, e.out_w * pool_w) if e.pool_h else layer.out_image
    tiles_h, tiles_w = -(-height // TILE), -(-width // TILE)
    window_w = (tiles_w + cuts - 2) * TILE + size
    row = pitch(window_w * layer.channels * lanes, dtype)
    most = (_WINDOW_BYTES // (row * dtype.itemsize) - size) // TILE + 2 - cuts
    bands = max(-(-tiles_h // max(most, 1)), -(-_TASKS // -(-images // lanes)))
    rows = -(-tiles_h // min(bands, tiles_h))
    out_w = width // pool_w
    g = Tiling(
        image_h=layer.image[0],
        image_w=layer.image[1],
        channels=layer.channels,
        height=height,
        width=width,
        origin_h=-layer.rows.padding[0],
        origin_w=-layer.columns.padding[0],
        window_w=window_w,
        pitch=row,
        filters=layer.filters,
        pool_h=pool_h,
        pool_w=pool_w,
        out_image=height // pool_h * out_w * layer.filters,
        out_first=0,
        out_row=out_w * layer.filters,
        out_column=layer.filters,
        size=size,
        cuts=cuts,
        together=TOGETHER[SIZES.index(size)],
        tiles_h=tiles_h,
        tiles_w=tiles_w,
        rows=rows,
        bands=-(-tiles_h // rows),
    )
    channel = size * lanes
    tile = channel * size * layer.channels
    slots = np.arange(cuts) * ((tiles_w + cuts - 1) * tile)
    right = np.add.outer(np.arange(cuts) * tile, np.arange(layer.channels) * channel).ravel()
    return g, np.stack([np.add.outer(np.roll(slots, -turn), right).ravel() for turn in range(cuts)])


def _padded_filters(filters: int) -> int:
    return -(-filters // FILTERS) * FILTERS


@lru_cache(maxsize=512)
def _pooled_places(g: Tiling, lanes: int) -> np.ndarray:
    """Where the vectors of a pooling window lie, from its first, in the rows of a tile."""
    pixel = g.filters * lanes
    return np.add.outer(np.arange(g.pool_h) * (TILE * pixel), np.arange(g.pool_w) * pixel).ravel()


def _spectra(g: Tiling) -> int:
    """Vectors of the transformed windows that are kept at a time: those under a row of tiles."""
    return g.cuts * (g.tiles_w + g.cuts - 1) * g.size * g.size * g.channels


def _memory(parts: int, g: Tiling, e: Epilogue, dtype: np.dtype) -> tuple[np.ndarray, ...]:
    """Scratch for each part, in the order in which `_convolve` takes it."""
    lanes = simd.lanes(dtype)
    filters = _padded_filters(g.filters)
    # Vectors are moved by the whole, so that something lies beyond each end.
    line = (g.tiles_w * (TILE // g.pool_w) * g.filters + lanes) * lanes
    results = TILE // g.pool_h * line
    sizes = {
        "windows": ((g.rows + g.cuts - 2) * TILE + g.size) * g.pitch + lanes * lanes,
        "columns": g.window_w * g.channels * g.size * lanes,
        "spectra": _spectra(g) * lanes,
        "products": g.together * filters * TILE * g.size * lanes,
        "rows": TILE * TILE * g.filters * lanes if e.pool_h else 1,
        "results": results,
        "places": results if e.keeps else 1,
    }
    return tuple(scratch(use, parts * size, dtype).reshape(parts, size) for use, size in sizes.items())


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
    turned: bool = False,
) -> None:
    """Overwrite `y` with the convolution of `x`, through the epilogue `e`, and `argmax` if that keeps it.

    The weights may be those of the other direction, `turned` then, with channels and filters exchanged.
    """
    images, lanes = len(x), simd.lanes(x.dtype)
    g, taps = tiling(layer, images, x.dtype, e)
    padded = _padded_filters(g.filters)
    weights = scratch("weights", padded * taps.shape[1] * g.size * g.size, x.dtype)
    # What is added to the products at the point 1 of the rows: nothing, and the bias.
    start = scratch("start", 2 * padded, x.dtype)
    _transform_weights(weight, turned, bias, g, weights, start)
    parts = part_count(-(-images // lanes) * g.bands, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)
    memory = _memory(parts, g, e, x.dtype)
    flat = (y.reshape(-1), g, e, _pooled_places(g, lanes), argmax.reshape(-1), memory)
    _convolve(parts, x.reshape(-1), images, weights, taps, start, *flat)


def _transform_weights(
    weight: np.ndarray,
    turned: bool,
    bias: np.ndarray | None,
    g: Tiling,
    weights: np.ndarray,
    start: np.ndarray,
) -> None:
    matrix = matrices(g.size)[2]
    side, padded = matrix.shape[1], start.size // 2
    parts = part_count(g.cuts * g.cuts * g.channels, _TRANSFORM * weights.size)
    values = scratch("values", (parts, side, side, padded), np.float64)
    rows = scratch("rows", (parts, side + 1, padded), np.float64)
    biases = NOTHING[weights.dtype] if bias is None else bias
    _prepare(parts, weight, int(turned), biases, g, matrix, values, rows, weights, start)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    forward(_adjoint(layer), dout, weight, None, dx, turned=True)


def fits(layer: Layer) -> bool:
    """Whether the layer's passes can be done by tiles."""
    sides = layer.rows, layer.columns
    kernels = [side.kernel for side in sides]
    if layer.groups > 1 or any(side.stride > 1 or side.dilation > 1 for side in sides):
        return False
    return min(kernels) >= _FEWEST_TAPS and max(kernels) <= _MOST_TAPS and layer.multiply_adds > 0


def _cycles(layer: Layer, images: int, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> float:
    g, taps = tiling(layer, images, dtype, e)
    elements = g.size * g.size
    products = taps.shape[1] * _padded_filters(g.filters)
    windows = g.channels * (1 + (g.cuts - 1) / g.rows)
    tile = _CYCLES.product * products + _CYCLES.window * windows + _CYCLES.result * g.filters
    tiles = g.tiles_h * g.tiles_w * -(-images // simd.lanes(dtype))
    return elements * (tiles * tile + _CYCLES.weight * taps.shape[1] * g.filters)


@lru_cache(maxsize=512)
def _forward_pays(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> bool:
    if not fits(layer) or (e.pool_h and (TILE % e.pool_h or TILE % e.pool_w)):
        return False
    return _cycles(layer, images, dtype, e) < image_lanes.forward_cycles(layer, images, dtype)


@lru_cache(maxsize=512)
def _input_pays(layer: Layer, images: int, dtype: np.dtype) -> bool:
    sides = layer.rows, layer.columns
    if not fits(layer) or any(max(side.padding) >= side.kernel for side in sides):
        return False
    adjoint = _adjoint(layer)
    g, _ = tiling(adjoint, images, dtype, NO_EPILOGUE)
    if _spectra(g) * simd.lanes(dtype) * dtype.itemsize > _SPECTRA_BYTES:
        return False
    return _cycles(adjoint, images, dtype) < image_lanes.input_cycles(layer, images, dtype)


@lru_cache(maxsize=512)
def _adjoint(layer: Layer) -> Layer:
    """The layer whose forward pass, on dout and turned filters, is the gradient to the input of `layer`."""
    kernel = layer.rows.kernel, layer.columns.kernel
    padding = tuple(
        tuple(side.kernel - 1 - zeros for zeros in side.padding) for side in (layer.rows, layer.columns)
    )
    shape = (1, *layer.out_image, layer.filters)
    return direct.layer(shape, kernel, None, layer.channels, 1, padding, 1, 1)


def fills_vectors(images: int, dtype: np.dtype) -> bool:
    """Whether images fill a vector of what may be computed here."""
    return images >= simd.lanes(dtype) and dtype == np.float32 and winograd.get_winograd()


def _is_narrow(layer: Layer, depth: int, results: int, dtype: np.dtype) -> bool:
    """Whether a correlation from `depth` channels to `results` has no better way than by vectors of images.

    Either results don't fill a vector, or channels don't, without which `winograd` does nothing. Then
    `winograd_rows` is as fast where filters are 3x3 and channels no more than half of a vector.
    """
    lanes = simd.lanes(dtype)
    side = max(layer.rows.kernel, layer.columns.kernel)
    return results < lanes or (depth < lanes and (side > 3 or 2 * depth > lanes))


def suits_forward(layer: Layer, images: int, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> bool:
    """Whether the forward pass may be done here, and is faster than with all multiplications."""
    if not (fills_vectors(images, dtype) and _is_narrow(layer, layer.channels, layer.filters, dtype)):
        return False
    return _forward_pays(layer, images, dtype, e)


def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input may be computed here, and is sooner than elsewhere."""
    if not (fills_vectors(images, dtype) and _is_narrow(layer, layer.filters, layer.channels, dtype)):
        return False
    return _input_pays(layer, images, dtype)
