"""The gradient of the weights by Winograd's algorithm along rows, for images of few channels.

Where the forward pass multiplies transforms of windows and of filters, this multiplies those of windows and
of tiles of dout, and sums over all tiles and images:

    dweight = G^T [ sum over tiles of (B^T d) * (A dout) ]

(see `winograd_rows` and `winograd_points`). A thread transforms the rows of the image under a band of dout.
The sums of some taps then stay in registers while tiles of dout pass by, which are transformed as they are
read.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd, winograd_rows
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer, lone
from .epilogue import NO_EPILOGUE, Epilogue
from .row_tiles import POOLED, RELU, SIZE, STORED, TAPS, add_gradients
from .vectors import all_lanes, lanes_of, load, pointer, store
from .winograd_points import FILTER_GRADIENT, TILE, transform
from .winograd_rows import Grid, transform_band
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

# Sums are kept in so many pieces, whatever the number of threads.
_PIECES = 16
# Tiles of dout that are summed for one vector of filters before the next: they should stay in the first-level
# cache for all taps.
_CHUNK = 64
# So many tiles ahead dout is fetched: with a quarter of that memory is waited for.
_AHEAD = 64
# Behind pooling by 2 x 2, sums over the largest pixels alone take no longer with more channels.
_MOST_POOLED_CHANNELS = 4 if simd.FULL_WIDTH else 3


class _Cycles(NamedTuple):
    """Measured, a product of the direct way being 1."""

    transform: float  # of a vector of the image
    product: float
    tile: float  # of a tile of dout for each few taps
    copy: float  # of a tile of dout that is copied
    unpool: float  # of a pixel that has a gradient or none, for each of a window's rows: the direct way


_CYCLES = _Cycles(20.0, 1.1, 20.0, 60.0, 10.0) if simd.FULL_WIDTH else _Cycles(25.0, 1.0, 5.0, 30.0, 0.0)


class Tables(NamedTuple):
    """Offsets, in elements."""

    sources: np.ndarray  # of each whole tile of a band in its transformed rows
    targets: np.ndarray  # of its first pixel in dout
    ends: np.ndarray  # as `sources`, of the tiles that end with their rows
    spares: np.ndarray  # where those lie when copied
    taps: np.ndarray  # of a row of the kernel and a channel, from a tile's source; a multiple of `TAPS`
    finish: int  # how the forward pass ends; see `row_tiles`
    pool: int  # rows and columns of the grid behind a pixel of dout


@kernel
def _copy_ends(values, d0, rows, width, filters, missing, many, lanes, spare):
    """The last `missing` pixels of rows, of a vector of filters, as tiles of `many` that begin with zeros."""
    for r in range(rows):
        clear(spare, r * many * lanes, (many - missing) * lanes)
        for m in range(many - missing, many):
            pixel = (r + 1) * width - many + m
            copy(values, d0 + pixel * filters, spare, (r * many + m) * lanes, lanes)


@kernel
def _add_tiles(finish, t0, t1, tables, depth, image, gradients, d0, pixel, ahead, sums, s0):
    """The share of some tiles of dout in the sums of all taps, of one vector of filters."""
    keep_out_of_line()
    step = SIZE * lanes_of(sums)
    b0 = s0 + depth * step
    for k in range(0, depth, TAPS):
        # Once is enough.
        fetched = ahead if k == 0 else 0
        s = s0 + k * step
        if finish == STORED:
            add_gradients(STORED, t0, t1, tables, k, image, gradients, d0, pixel, fetched, sums, s, b0)
        elif finish == RELU:
            add_gradients(RELU, t0, t1, tables, k, image, gradients, d0, pixel, fetched, sums, s, b0)
        else:
            add_gradients(POOLED, t0, t1, tables, k, image, gradients, d0, pixel, fetched, sums, s, b0)


@kernel
def _add_band(dout, argmax, d0, rows, g, of, spectrum, sums, size, spare, codes):
    """The share of a band of `rows` rows of dout, from `d0` on, in the sums of all taps and filters."""
    lanes = lanes_of(dout)
    width, many = g.width // of.pool, TILE // of.pool
    tiles, missing = rows * (width // many), width % many
    ahead = _AHEAD * many * g.filters
    # Arrays are handed on as pointers: each would be seven numbers, at every call.
    taps, depth, totals = pointer(of.taps), of.taps.size, pointer(sums)
    image = pointer(spectrum), g.plane
    tables, gradients = (pointer(of.sources), pointer(of.targets), taps), (pointer(dout), pointer(argmax))
    for t in range(0, tiles, _CHUNK):
        end = min(t + _CHUNK, tiles)
        for v in range(sums.size // size):
            d = d0 + min(v * lanes, g.filters - lanes)
            s = v * size
            _add_tiles(of.finish, t, end, tables, depth, image, gradients, d, g.filters, ahead, totals, s)
    if missing == 0:
        return
    tables, gradients = (pointer(of.ends), pointer(of.spares), taps), (pointer(spare), pointer(codes))
    for v in range(sums.size // size):
        d = d0 + min(v * lanes, g.filters - lanes)
        _copy_ends(dout, d, rows, width, g.filters, missing, many, lanes, spare)
        if of.finish != STORED:
            _copy_ends(argmax, d, rows, width, g.filters, missing, many, lanes, codes)
        _add_tiles(of.finish, 0, rows, tables, depth, image, gradients, 0, lanes, 0, totals, v * size)


@parallel
def _weight(part, parts, x, images, dout, argmax, g, of, size, partial, windows, spectra, spares, codes):
    keep_out_of_line()
    window, spectrum = windows[part], spectra[part]
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
            d0 = n * (dout.size // images) + first // of.pool * g.out_row
            _add_band(
                dout, argmax, d0, rows // of.pool, g, of, spectrum, sums, size, spares[part], codes[part]
            )


@kernel
def _add_pieces(partial, s0, target, t0):
    """The sum of a vector over all pieces."""
    sums = pointer(partial)
    everything = all_lanes(sums)
    value = load(sums, s0, everything)
    for piece in range(1, len(partial)):
        value = value + load(sums, piece * partial.shape[1] + s0, everything)
    store(value, pointer(target), t0, everything)


@parallel
def _fold(part, parts, partial, memory, dweight, dbias):
    """Add the pieces, transform the sums back, and add them to the gradients."""
    keep_out_of_line()
    kernel_h, kernel_w, channels, filters = dweight.shape
    lanes = lanes_of(partial)
    vectors = (filters + lanes - 1) // lanes
    size = partial.shape[1] // vectors
    total, result = memory[part, : SIZE * lanes], memory[part, SIZE * lanes :]
    lo, hi = span(part, parts, vectors)
    for v in range(lo, hi):
        f = min(v * lanes, filters - lanes)
        # Filters of the last vector that belong to the one before it too are added there.
        own = v * lanes - f
        for k in range(kernel_h * channels):
            for i in range(0, SIZE * lanes, lanes):
                _add_pieces(partial, v * size + k * SIZE * lanes + i, total, i)
            transform(SIZE, FILTER_GRADIENT, total, 0, lanes, result, 0, lanes)
            for w in range(kernel_w):
                for j in range(own, lanes):
                    dweight[k // channels, w, k % channels, f + j] += result[w * lanes + j]
        if dbias.size > 0:
            _add_pieces(partial, (v + 1) * size - lanes, total, 0)
            for j in range(own, lanes):
                dbias[f + j] += total[j]


@lru_cache(maxsize=512)
def _plan(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> tuple[Grid, Tables]:
    lanes = simd.lanes(dtype)
    g, of = winograd_rows.plan(layer, images, dtype, e)
    pool = max(e.pool_h, 1)
    rows, columns = np.arange(0, g.rows, pool), np.arange(g.width // TILE) * TILE
    row = SIZE * g.plane
    return g, Tables(
        sources=np.add.outer(rows * row, columns * g.channels).ravel(),
        targets=np.add.outer(rows // pool * g.out_row, columns // pool * g.filters).ravel(),
        ends=rows * row + (g.width - TILE) * g.channels,
        spares=rows // pool * (TILE // pool * lanes),
        taps=np.concatenate([of.taps, np.repeat(of.taps[-1:], -of.taps.size % TAPS)]),
        finish=winograd_rows.FINISHES[e.pool_h, e.pool_w],
        pool=pool,
    )


def add_weight_gradient(
    layer: Layer,
    dout: np.ndarray,
    x: np.ndarray,
    dweight: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
    dbias: np.ndarray | None = None,
) -> None:
    """Add the weights' gradient to `dweight` and, of what `e` pooled, the bias's to `dbias`."""
    images, dtype = len(x), x.dtype
    lanes = simd.lanes(dtype)
    g, of = _plan(layer, min(images, _PIECES), dtype, e)
    vectors = -(-layer.filters // lanes)
    pieces = min(_PIECES, images * g.bands)
    # Behind the sums of a vector of filters is that of the bias.
    size = (of.taps.size * SIZE + 1) * lanes
    partial = scratch("partial", (pieces, vectors * size), dtype)
    parts = part_count(pieces, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    spare = (parts, g.rows * TILE * lanes)
    _weight(
        parts,
        x.reshape(-1),
        images,
        dout.reshape(-1),
        argmax.reshape(-1),
        g,
        of,
        size,
        partial,
        scratch("windows", (parts, winograd_rows.window_size(g, lanes)), dtype),
        scratch("spectra", (parts, g.window_h * SIZE * g.plane), dtype),
        scratch("spares", spare, dtype),
        scratch("codes", spare, np.uint8),
    )
    results = scratch("results", (part_count(vectors, partial.nbytes), 2 * SIZE * lanes), dtype)
    _fold(len(results), partial, results, dweight, NOTHING[dtype] if dbias is None else dbias)


@lru_cache(maxsize=512)
def _pays(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> bool:
    """Whether rows of tiles take less time than the direct way."""
    g, of = _plan(layer, images, dtype, e)
    lanes = simd.lanes(dtype)
    vectors = -(-layer.filters // lanes)
    transforms = g.window_h / g.rows * g.plane / lanes * _CYCLES.transform
    tile = of.taps.size // TAPS * (TAPS * SIZE * _CYCLES.product + _CYCLES.tile)
    ends = tile + _CYCLES.copy if g.width % TILE else 0
    pixel = layer.multiply_adds / math.prod(layer.out_image) / layer.filters * lone(layer.filters, dtype)
    pixel += _CYCLES.unpool * e.pool_h
    return transforms + vectors * (g.width // TILE * tile + ends) < vectors * g.width * pixel


def suits(layer: Layer, images: int, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> bool:
    """Whether the gradient may be computed here, and is sooner than the direct way."""
    return winograd_rows.fits(layer, dtype) and _pays(layer, min(images, _PIECES), dtype, e)


def suits_pooled(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> bool:
    """Whether that behind `e` may be computed here, and is sooner than from the largest pixels alone."""
    if (e.pool_h, e.pool_w) not in winograd_rows.FINISHES or e.out_w * e.pool_w < TILE:
        return False
    return (e.pool_h == 1 or layer.channels <= _MOST_POOLED_CHANNELS) and suits(layer, images, dtype, e)
