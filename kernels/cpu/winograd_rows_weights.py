"""The gradient of the weights by Winograd's algorithm along rows, for images of few channels.

Where the forward pass multiplies transforms of windows and of filters, this multiplies those of windows and
of tiles of dout, and sums over all tiles and images:

    dweight = G^T [ sum over tiles of (B^T d) * (A dout) ]

(see `winograd_rows` and `winograd_points`). A thread transforms the rows of the image under a band of dout.
The sums of some taps then stay in registers while tiles of dout pass by, which are transformed as they are
read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd, winograd_rows
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer
from .epilogue import NO_EPILOGUE
from .row_tiles import SIZE, TAPS, add_gradients
from .simd import VECTOR_BITS
from .vectors import all_lanes, load, pointer, store
from .winograd_points import FILTER_GRADIENT, TILE, transform
from .winograd_rows import Grid, transform_band
from .workspace import clear, copy, scratch

# Sums are kept in so many pieces, whatever the number of threads.
_PIECES = 16
# Tiles of dout that are summed for one vector of filters before the next: they should stay in the first-level
# cache for all taps.
_CHUNK = 64
# So many tiles ahead dout is fetched: with a quarter of that memory is waited for.
_AHEAD = 64
# Measured cycles: of a vector of the image that is transformed, of a tile of dout for each few taps, and of a
# tile of dout that is copied.
_TRANSFORM_CYCLES = 25.0
_TILE_CYCLES = 5.0
_COPY_CYCLES = 30.0


class Tables(NamedTuple):
    """Offsets, in elements."""

    sources: np.ndarray  # of each whole tile of a band in its transformed rows
    targets: np.ndarray  # of its first pixel
    ends: np.ndarray  # as `sources`, of the tiles that end with their rows
    spares: np.ndarray  # where those lie when copied
    taps: np.ndarray  # of a row of the kernel and a channel, from a tile's source; a multiple of `TAPS`


@kernel
def _copy_ends(dout, d0, rows, g, missing, spare):
    """The last `missing` pixels of rows of dout, of a vector of filters, as tiles that begin with zeros."""
    lanes = VECTOR_BITS // (8 * dout.itemsize)
    for r in range(rows):
        clear(spare, r * TILE * lanes, (TILE - missing) * lanes)
        for m in range(TILE - missing, TILE):
            pixel = (r + 1) * g.width - TILE + m
            copy(dout, d0 + pixel * g.filters, spare, (r * TILE + m) * lanes, lanes)


@kernel
def _add_tiles(sources, targets, t0, t1, taps, spectrum, plane, dout, d0, pixel, ahead, sums, s0):
    """The share of some tiles of dout in the sums of all taps, of one vector of filters."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * sums.itemsize)
    tiles = pointer(sources), pointer(targets), pointer(taps)
    values, gradients, totals = pointer(spectrum), pointer(dout), pointer(sums)
    for k in range(0, taps.size, TAPS):
        # Once is enough.
        fetched = ahead if k == 0 else 0
        s = s0 + k * SIZE * lanes
        add_gradients(t0, t1, tiles, k, values, plane, gradients, d0, pixel, fetched, totals, s)


@parallel
def _weight(part, parts, x, images, dout, g, of, partial, windows, spectra, spares):
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * x.itemsize)
    window, spectrum, spare = windows[part], spectra[part], spares[part]
    tiles_w, missing = g.width // TILE, g.width % TILE
    size = of.taps.size * SIZE * lanes
    clear(window, 0, window.size)
    lo, hi = span(part, parts, len(partial))
    for piece in range(lo, hi):
        sums = partial[piece]
        clear(sums, 0, sums.size)
        task0, task1 = span(piece, len(partial), images * g.bands)
        for task in range(task0, task1):
            n = task // g.bands
            first = (task - n * g.bands) * g.rows
            rows = min(g.rows, g.height - first)
            transform_band(x, n, first, g, window, spectrum)
            image0 = (n * g.height + first) * g.width * g.filters
            for t in range(0, rows * tiles_w, _CHUNK):
                for v in range(sums.size // size):
                    d0 = image0 + min(v * lanes, g.filters - lanes)
                    _add_tiles(
                        of.sources,
                        of.targets,
                        t,
                        min(t + _CHUNK, rows * tiles_w),
                        of.taps,
                        spectrum,
                        g.plane,
                        dout,
                        d0,
                        g.filters,
                        _AHEAD * TILE * g.filters,
                        sums,
                        v * size,
                    )
            if missing == 0:
                continue
            for v in range(sums.size // size):
                _copy_ends(dout, image0 + min(v * lanes, g.filters - lanes), rows, g, missing, spare)
                s0 = v * size
                _add_tiles(
                    of.ends, of.spares, 0, rows, of.taps, spectrum, g.plane, spare, 0, lanes, 0, sums, s0
                )


@parallel
def _fold(part, parts, partial, memory, dweight):
    """Add the pieces, transform the sums back, and add them to the gradient."""
    keep_out_of_line()
    kernel_h, kernel_w, channels, filters = dweight.shape
    lanes = VECTOR_BITS // (8 * partial.itemsize)
    vectors = (filters + lanes - 1) // lanes
    size = partial.shape[1] // vectors
    total, result = memory[part, : SIZE * lanes], memory[part, SIZE * lanes :]
    everything = all_lanes(pointer(total))
    lo, hi = span(part, parts, vectors)
    for v in range(lo, hi):
        f = min(v * lanes, filters - lanes)
        for k in range(kernel_h * channels):
            for i in range(0, SIZE * lanes, lanes):
                place = v * size + k * SIZE * lanes + i
                value = load(pointer(partial), place, everything)
                for piece in range(1, len(partial)):
                    value = value + load(pointer(partial), piece * partial.shape[1] + place, everything)
                store(value, pointer(total), i, everything)
            transform(SIZE, FILTER_GRADIENT, total, 0, lanes, result, 0, lanes)
            for w in range(kernel_w):
                # Filters of the last vector that belong to the one before it too are added there.
                for j in range(v * lanes - f, lanes):
                    dweight[k // channels, w, k % channels, f + j] += result[w * lanes + j]


@lru_cache(maxsize=512)
def _plan(layer: Layer, images: int, dtype: np.dtype) -> tuple[Grid, Tables]:
    lanes = simd.lanes(dtype)
    g, of = winograd_rows.plan(layer, images, dtype, NO_EPILOGUE)
    row = SIZE * g.plane
    rows, columns = np.arange(g.rows), np.arange(g.width // TILE) * TILE
    return g, Tables(
        sources=np.add.outer(rows * row, columns * g.channels).ravel(),
        targets=np.add.outer(rows * g.width, columns).ravel() * g.filters,
        ends=rows * row + (g.width - TILE) * g.channels,
        spares=rows * (TILE * lanes),
        taps=np.concatenate([of.taps, np.repeat(of.taps[-1:], -of.taps.size % TAPS)]),
    )


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    images, dtype = len(x), x.dtype
    lanes = simd.lanes(dtype)
    g, of = _plan(layer, min(images, _PIECES), dtype)
    vectors = -(-layer.filters // lanes)
    pieces = min(_PIECES, images * g.bands)
    partial = scratch("partial", (pieces, vectors * of.taps.size * SIZE * lanes), dtype)
    parts = part_count(pieces, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    _weight(
        parts,
        x.reshape(-1),
        images,
        dout.reshape(-1),
        g,
        of,
        partial,
        scratch("windows", (parts, winograd_rows.window_size(g, lanes)), dtype),
        scratch("spectra", (parts, g.window_h * SIZE * g.plane), dtype),
        scratch("spares", (parts, g.rows * TILE * lanes), dtype),
    )
    parts = part_count(vectors, partial.nbytes)
    _fold(parts, partial, scratch("results", (parts, 2 * SIZE * lanes), dtype), dweight)


@lru_cache(maxsize=512)
def _pays(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether rows of tiles take less time than the direct way."""
    g, of = _plan(layer, images, dtype)
    lanes = simd.lanes(dtype)
    vectors = -(-layer.filters // lanes)
    transforms = g.window_h / g.rows * g.plane / lanes * _TRANSFORM_CYCLES
    tile = of.taps.size // TAPS * (TAPS * SIZE + _TILE_CYCLES)
    ends = tile + _COPY_CYCLES if g.width % TILE else 0
    direct = vectors * layer.multiply_adds / (g.height * layer.filters)
    return transforms + vectors * (g.width // TILE * tile + ends) < direct


def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient may be computed here, and is sooner than the direct way."""
    return winograd_rows.fits(layer, dtype) and _pays(layer, min(images, _PIECES), dtype)
