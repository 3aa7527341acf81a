"""The gradient to 3x3 filters in a quarter of the multiplications: the adjoint of Winograd's F(4x4, 3x3).

Forward is linear in the filters, Y = A^T [(G g G^T) * (B^T d B)] A; hence

    dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G

The 36 sums over tiles are matrix products of transformed images with transformed gradients. The weights are
cut into squares of channels by filters whose sums, with a block of transformed tiles, stay near the
second-level cache. Where squares are few, the tiles are cut into pieces too, whose sums are added in order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd
from .direct import Layer
from .simd import VECTOR_BITS
from .tile import TILE_ROWS, add_panel
from .winograd import Tiling, tiling, transform_input, windows
from .winograd_transforms import WINDOW, add_filter_gradient, output_gradient_tile
from .workspace import clear, scratch

_AREA = WINDOW * WINDOW
# Channels and filters of a square of weights, at most.
_CHANNELS = 64
_FILTERS = 128
# Tiles that are transformed at a time.
_BLOCK = 32
# Squares and pieces are this many, or more.
_TASKS = 16


class Cut(NamedTuple):
    """How the sums are cut into tasks."""

    channels: int  # of a square, at most: rows of its transformed images and of its sums
    panels: int  # of filters in a square, at most
    rows: int  # squares along the channels
    columns: int  # and along the panels
    pieces: int  # of the tiles


@kernel
def _square(square, g, cut):
    """First and last + 1 of the channels and of the filters of a square."""
    row = square // cut.columns
    c0, c1 = span(row, cut.rows, g.channels)
    p0, p1 = span(square - row * cut.columns, cut.columns, (g.filters + g.panel - 1) // g.panel)
    return c0, c1, p0 * g.panel, min(p1 * g.panel, g.filters)


@kernel
def _transform_gradient(dout, g, first, last, f0, f1, zeros, w, pitch):
    """A dY A^T of the tiles from `first` to `last` and the filters from `f0` to `f1`, to rows of `pitch`."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * dout.itemsize)
    line = g.out_width * g.filters
    for tile in range(first, last):
        row = tile // g.tile_columns
        left = (tile - row * g.tile_columns) * 4
        n = row // g.tile_rows
        top = (row - n * g.tile_rows) * 4
        d0 = ((n * g.out_height + top) * g.out_width + left) * g.filters
        rows = g.out_height - top
        columns = g.out_width - left
        w0 = (tile - first) * pitch - f0
        for begin in range(f0, f1, lanes):
            # The last vector begins earlier where the filters don't fill it.
            f = min(begin, f1 - lanes)
            output_gradient_tile(
                dout, d0 + f, line, g.filters, rows, columns, zeros, w, w0 + f, g.weight_step
            )


@parallel
def _sum_products(part, parts, x, dout, g, cut, tables, zeros, offsets, columns, vs, ws, sums):
    keep_out_of_line()
    channels, tiles, sum_rows = tables
    v = vs[part]
    w = ws[part]
    squares = cut.rows * cut.columns
    pitch = cut.panels * g.panel
    lo, hi = span(part, parts, cut.pieces * squares)
    for task in range(lo, hi):
        piece = task // squares
        c0, c1, f0, f1 = _square(task - piece * squares, g, cut)
        rows = (c1 - c0 + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
        total = sums[task]
        clear(total, 0, total.size)
        block0, block1 = span(piece, cut.pieces, (g.tiles + g.block - 1) // g.block)
        for block in range(block0, block1):
            first = block * g.block
            last = min(first + g.block, g.tiles)
            transform_input(x, g, first, last, c0, c1, offsets[part], zeros, columns[part], v, cut.channels)
            _transform_gradient(dout, g, first, last, f0, f1, zeros, w, pitch)
            for e in range(36):
                for f in range(0, f1 - f0, g.panel):
                    add_panel(
                        v,
                        e * g.input_step,
                        channels,
                        tiles,
                        0,
                        rows,
                        last - first,
                        w,
                        e * g.weight_step + f,
                        pitch,
                        total,
                        e * g.product_step + f * cut.channels,
                        sum_rows,
                        min(f1 - f0 - f, g.panel),
                    )


@parallel
def _finish(part, parts, g, cut, sums, dweight):
    """Add G^T M G to the gradient, M being the sum of all pieces."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * dweight.itemsize)
    squares = cut.rows * cut.columns
    lo, hi = span(part, parts, squares * cut.channels)
    for task in range(lo, hi):
        square = task // cut.channels
        c = task - square * cut.channels
        c0, c1, f0, f1 = _square(square, g, cut)
        if c0 + c >= c1:
            continue
        for f in range(0, f1 - f0, g.panel):
            m0 = f * cut.channels + c * g.panel
            for e in range(36):
                place = e * g.product_step + m0
                total = sums[square, place : place + g.panel]
                for piece in range(1, cut.pieces):
                    more = sums[piece * squares + square, place : place + g.panel]
                    for j in range(total.size):
                        total[j] += more[j]
            many = min(f1 - f0 - f, g.panel)
            for k in range(0, many, lanes):
                target = (c0 + c) * g.filters + f0 + f + k
                tap = g.channels * g.filters
                add_filter_gradient(sums[square], m0 + k, g.product_step, dweight, target, tap, many - k)


@lru_cache(maxsize=256)
def _cut(
    x_shape: tuple[int, ...], out_shape: tuple[int, ...], padding: tuple[int, int]
) -> tuple[Tiling, Cut, tuple[np.ndarray, ...]]:
    """The sizes, and the engine's tables: channels, tiles, and channels in the sums."""
    g, _ = tiling(x_shape, out_shape, padding)
    lanes = simd.lanes(np.float32)
    panels = -(-g.filters // g.panel)
    rows = -(-g.channels // max(_CHANNELS, lanes))
    columns = -(-panels * g.panel // max(_FILTERS, g.panel))
    # The longest square along each axis, its channels in whole tiles of the engine.
    channels = -(-g.channels // rows)
    channels = -(-channels // TILE_ROWS) * TILE_ROWS
    width = -(-panels // columns)
    block = min(_BLOCK, g.tiles)
    pieces = min(-(-_TASKS // (rows * columns)), -(-g.tiles // block))
    cut = Cut(channels, width, rows, columns, pieces)
    g = g._replace(
        block=block,
        input_step=block * channels + lanes,
        weight_step=block * width * g.panel + lanes,
        product_step=channels * width * g.panel + lanes,
    )
    entries = np.arange(channels)
    return g, cut, (entries, np.arange(block) * channels, entries * g.panel)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient to the filters to `dweight`; see `winograd.suits`."""
    padding = (layer.rows.padding[0], layer.columns.padding[0])
    g, cut, tables = _cut(x.shape, dout.shape[1:], padding)
    lanes = simd.lanes(x.dtype)
    tasks = cut.pieces * cut.rows * cut.columns
    sums = scratch("sums", tasks * _AREA * g.product_step, x.dtype).reshape(tasks, -1)
    parts = part_count(tasks, g.tiles * _AREA * g.channels * g.filters)
    vs = scratch("input", parts * _AREA * g.input_step, x.dtype).reshape(parts, -1)
    ws = scratch("gradients", parts * _AREA * g.weight_step, x.dtype).reshape(parts, -1)
    zeros = np.zeros(lanes, x.dtype)
    arrays = (zeros, *windows(g, parts), vs, ws, sums)
    _sum_products(parts, x.reshape(-1), dout.reshape(-1), g, cut, tables, *arrays)
    parts = part_count(cut.rows * cut.columns * cut.channels, sums.nbytes)
    _finish(parts, g, cut, sums, dweight.reshape(-1))
