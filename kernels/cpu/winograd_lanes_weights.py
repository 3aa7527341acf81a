"""The gradient of the weights of few filters by Winograd's algorithm, images in the lanes.

Where the forward pass multiplies transforms of windows and filters, this multiplies those of windows and of
tiles of dout, and sums over all tiles and images:

    dweight = G^T [ sum over tiles of (B^T d B) * (A dout A^T) ] G

(see `winograd_lanes` and `winograd_points`). A thread takes a band of rows of tiles of a vector of images;
products at one point are then a small matrix product over the band's tiles, whose sums fill the registers.
Lanes are added at the end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import image_lanes, simd, winograd_lanes
from .direct import Layer
from .epilogue import NO_EPILOGUE
from .image_lanes import fill_window
from .image_tiles import TAP_FILTERS, gather_images, taps_tile
from .vectors import all_lanes, lanes_of, load, pointer, total, zeros
from .winograd_lanes import Tiling, transform_row, transformer
from .winograd_points import GRADIENT, TILE, matrices
from .workspace import clear, scratch

# Filters of a tile of products, and its taps: those of the fewest tiles are taken.
_FILTERS = TAP_FILTERS[-1]
_TAPS = (3, 4)
# Sums are kept in so many pieces, whatever the number of threads.
_PIECES = 8
# What a band's transforms, of windows and of some filters' gradients, may take of the second-level cache.
_BAND_BYTES = 512 * 1024
_MULTIPLY_ADDS_PER_BYTE = 10
# Measured cycles of a product of vectors, and of an element of a transform.
_PRODUCT_CYCLES = 1.5
_TRANSFORM_CYCLES = 9.0
# And of adding a sum in registers to the one in memory.
_SUM_CYCLES = 5.0
# How much longer it all takes beside `image_lanes` where vectors are multiplied at full width.
_FULL_WIDTH_CYCLES = 1.53
# Rows and columns of filters that are not cut.
_MOST_WHOLE_TAPS = 5


class Sums(NamedTuple):
    """Sizes of the tiles of products; sums lie by group of filters, point, tile, tap and filter."""

    taps: int  # of a tile
    tiles: int  # of taps
    groups: int  # of filters


@kernel
def _read_gradients(dout, n0, images, g, first, rows, gradients):
    """Rows of tiles of dout from tile row `first` on, zero where the image ends."""
    lanes = lanes_of(dout)
    line, size = g.tiles_w * TILE * g.filters * lanes, g.width * g.filters
    for m in range(rows * TILE):
        i = first * TILE + m
        if i >= g.height:
            clear(gradients, m * line, line)
            continue
        source = i * g.out_row
        for k in range(0, size, lanes):
            gather_images(
                dout,
                source + k,
                g.out_image,
                n0,
                images,
                size - k,
                gradients,
                m * line + k * lanes,
                lanes,
            )
        clear(gradients, m * line + size * lanes, line - size * lanes)


_transform_gradient = transformer(GRADIENT)


@kernel
def _transform_gradients(gradients, g, rows, first, columns, spectrum):
    """Transforms of the band's tiles of dout of the filters from `first` on: by point, tile and filter."""
    lanes = lanes_of(gradients)
    vectors = g.size * lanes
    pixel = g.filters * lanes
    line = g.tiles_w * TILE * pixel
    point = rows * g.tiles_w * _FILTERS * lanes
    for tile in range(rows * g.tiles_w):
        corner = tile // g.tiles_w * TILE * line + tile % g.tiles_w * TILE * pixel
        for f in range(min(_FILTERS, g.filters - first)):
            source, target = corner + (first + f) * lanes, (tile * _FILTERS + f) * lanes
            for m in range(TILE):
                s, t = source + m * pixel, m * vectors
                _transform_gradient(g.size, gradients, s, line, columns, t, lanes)
            for i in range(g.size):
                s, t = i * lanes, target + i * point
                _transform_gradient(g.size, columns, s, vectors, spectrum, t, g.size * point)


@kernel
def _add_products(spectra, corners, taps, gradients, g, of, sums, s):
    """Add the band's products to the sums of a group of filters."""
    lanes = lanes_of(spectra)
    step = _FILTERS * lanes
    for q in range(g.size):
        for i in range(g.size):
            v = (q * g.channels * g.size + i) * lanes
            d = (q * g.size + i) * corners.size * step
            for k in range(0, of.tiles * of.taps, of.taps):
                if of.taps == _TAPS[0]:
                    taps_tile(_TAPS[0], _FILTERS, spectra, v, corners, taps, k, gradients, d, step, sums, s)
                else:
                    taps_tile(_TAPS[1], _FILTERS, spectra, v, corners, taps, k, gradients, d, step, sums, s)
                s += of.taps * step


@parallel
def _weight(part, parts, x, images, dout, g, of, corners, taps, sums, memory):
    keep_out_of_line()
    windows, columns, spectra, rows_of_dout, of_tiles = memory
    window, column, spectrum = windows[part], columns[part], spectra[part]
    gradients, spectrum_of_dout = rows_of_dout[part], of_tiles[part]
    lanes = lanes_of(x)
    slot = (g.tiles_w + g.cuts - 1) * g.size * g.size * g.channels * lanes
    lo, hi = span(part, parts, len(sums))
    for piece in range(lo, hi):
        added = sums[piece]
        clear(added, 0, added.size)
        task0, task1 = span(piece, len(sums), (images + lanes - 1) // lanes * g.bands)
        for task in range(task0, task1):
            n0 = task // g.bands * lanes
            first = task % g.bands * g.rows
            rows = min(g.rows, g.tiles_h - first)
            count = rows + g.cuts - 1
            h0 = g.origin_h + first * TILE
            fill_window(x, n0, images, lanes, g, h0, (count - 1) * TILE + g.size, window)
            for r in range(count):
                transform_row(window, r * TILE * g.pitch, g, column, spectrum[r * slot :])
            _read_gradients(dout, n0, images, g, first, rows, gradients)
            for group in range(of.groups):
                _transform_gradients(gradients, g, rows, group * _FILTERS, column, spectrum_of_dout)
                s = group * (added.size // of.groups)
                _add_products(spectrum, corners[: rows * g.tiles_w], taps, spectrum_of_dout, g, of, added, s)


@parallel
def _fold(part, parts, sums, g, of, matrix, memory, dweight):
    """Add pieces and lanes, and transform the sums back, for each channel of each cut and each filter."""
    keep_out_of_line()
    kernel_h, kernel_w, channels, filters = dweight.shape
    points, rows = memory[part, 0], memory[part, 1]
    values = pointer(sums)
    lanes = lanes_of(sums)
    side = matrix.shape[1]
    tile = of.taps * _FILTERS * lanes
    lo, hi = span(part, parts, g.cuts * g.cuts * channels * filters)
    for item in range(lo, hi):
        k, f = item // filters, item % filters
        place = f // _FILTERS * (sums.shape[1] // of.groups) + k // of.taps * tile
        place += (k % of.taps * _FILTERS + f % _FILTERS) * lanes
        for point in range(g.size * g.size):
            images = zeros(values)
            for piece in range(len(sums)):
                s = piece * sums.shape[1] + place + point * of.tiles * tile
                images = images + load(values, s, all_lanes(values))
            points[point] = total(images)
        cut, c = k // channels, k % channels
        h0, w0 = cut // g.cuts * side, cut % g.cuts * side
        for q in range(g.size):
            for a in range(side):
                added = 0.0
                for i in range(g.size):
                    added += matrix[i, a] * points[q * g.size + i]
                rows[q * side + a] = added
        for a in range(min(side, kernel_h - h0)):
            for b in range(min(side, kernel_w - w0)):
                added = 0.0
                for q in range(g.size):
                    added += matrix[q, b] * rows[q * side + a]
                dweight[h0 + a, w0 + b, c, f] += added


@lru_cache(maxsize=512)
def _tables(layer: Layer, images: int, dtype: np.dtype) -> tuple[Tiling, Sums, np.ndarray, np.ndarray]:
    """Sizes, and offsets in the spectra: of a band's tiles' windows, and from there of a product's taps."""
    lanes = simd.lanes(dtype)
    g, taps = winograd_lanes.tiling(layer, images, dtype, NO_EPILOGUE)
    elements = g.size * g.size * lanes
    slot = (g.tiles_w + g.cuts - 1) * elements * g.channels
    row_bytes = (slot + g.tiles_w * elements * _FILTERS) * dtype.itemsize
    rows = min(max(1, (_BAND_BYTES - (g.cuts - 1) * slot * dtype.itemsize) // row_bytes), g.tiles_h)
    bands = -(-g.tiles_h // rows)
    rows = -(-g.tiles_h // bands)
    corners = np.add.outer(np.arange(rows) * slot, np.arange(g.tiles_w) * (elements * g.channels)).ravel()
    depth = taps.shape[1]
    size = min(_TAPS, key=lambda many: (-(-depth // many) * many, -many))
    of = Sums(taps=size, tiles=-(-depth // size), groups=-(-g.filters // _FILTERS))
    return g._replace(rows=rows, bands=bands), of, corners, taps[0]


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    images, lanes = len(x), simd.lanes(x.dtype)
    g, of, corners, taps = _tables(layer, images, x.dtype)
    pieces = min(_PIECES, -(-images // lanes) * g.bands)
    group = g.size * g.size * of.tiles * of.taps * _FILTERS * lanes
    sums = scratch("partial", pieces * of.groups * group, x.dtype).reshape(pieces, -1)
    parts = part_count(pieces, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)
    elements = g.size * g.size * lanes
    row = g.tiles_w * TILE * g.filters * lanes
    sizes = {
        "windows": ((g.rows + g.cuts - 2) * TILE + g.size) * g.pitch + lanes * lanes,
        "columns": max(g.window_w * g.channels, TILE) * g.size * lanes,
        "spectra": (g.rows + g.cuts - 1) * (g.tiles_w + g.cuts - 1) * elements * g.channels,
        "rows": g.rows * TILE * row + lanes * lanes,
        "products": corners.size * elements * _FILTERS,
    }
    memory = tuple(scratch(use, parts * size, x.dtype).reshape(parts, size) for use, size in sizes.items())
    _weight(parts, x.reshape(-1), images, dout.reshape(-1), g, of, corners, taps, sums, memory)
    parts = part_count(g.filters, sums.nbytes)
    points = scratch("results", parts * 2 * g.size * g.size, x.dtype).reshape(parts, 2, -1)
    _fold(parts, sums, g, of, matrices(g.size)[2], points, dweight)


def _cycles(layer: Layer, images: int, dtype: np.dtype) -> float:
    g, of, _, _ = _tables(layer, images, dtype)
    elements = g.size * g.size
    product = _PRODUCT_CYCLES + _SUM_CYCLES / (g.rows * g.tiles_w)
    products = product * elements * of.tiles * of.taps * of.groups * _FILTERS
    windows = g.channels * (1 + (g.cuts - 1) / g.rows)
    tile = products + _TRANSFORM_CYCLES * elements * (windows + g.filters)
    return g.tiles_h * g.tiles_w * tile * -(-images // simd.lanes(dtype))


@lru_cache(maxsize=512)
def _pays(layer: Layer, images: int, dtype: np.dtype) -> bool:
    if not winograd_lanes.fits(layer):
        return False
    cycles, few = _cycles(layer, images, dtype), layer.filters < simd.lanes(dtype)
    if few and simd.FULL_WIDTH:
        cycles *= _FULL_WIDTH_CYCLES
    return cycles < image_lanes.weight_cycles(layer, images, dtype)


def _is_narrow(layer: Layer, dtype: np.dtype) -> bool:
    """Whether filters don't fill a vector; or channels don't, and filters little more than one.

    The latter only if these are larger than 3x3 and not cut: else there are faster ways.
    """
    lanes = simd.lanes(dtype)
    if layer.filters < lanes:
        return True
    side = max(layer.rows.kernel, layer.columns.kernel)
    return layer.channels < lanes and 4 * layer.filters <= 5 * lanes and 3 < side <= _MOST_WHOLE_TAPS


def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient may be computed here, and is sooner than with all multiplications."""
    if not (winograd_lanes.fills_vectors(images, dtype) and _is_narrow(layer, dtype)):
        return False
    return _pays(layer, images, dtype)
