"""The gradient to the filters in a quarter of the multiplications: the adjoint of Winograd's F(4x4, 3x3).

Forward is linear in the filters, Y = A^T [(G g G^T) * (B^T d B)] A; hence

    dg = G^T [ sum over tiles of (B^T d B) * (A dY A^T) ] G

The sums over tiles are matrix products of transformed images with transformed gradients. As many tiles
as the caches hold are transformed together; then each element is multiplied, a panel of filters at
a time, and added to the sums of the tiles before.
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
from .tile import add_panel, add_rows, padded_rows
from .vectors import pointer, prefetch
from .winograd import (
    Filters,
    Tiling,
    filters_of,
    panel_filters,
    piece_tap,
    row_origin,
    steps_to,
    tiling,
    transform_input,
    windows,
)
from .winograd_transforms import add_filter_gradient, output_gradient_tile
from .workspace import clear, scratch

# Tiles of a round, at most: the sums go to the cache and back for each.
_ROUND = 256
# Tiles that a task transforms.
_TASK = 32


class Cut(NamedTuple):
    """How the work is cut."""

    slabs: int  # vectors of channels
    panels: int  # of filters
    tiles: int  # that a task transforms, at most


@kernel
def _transform_gradient(dout, g, first, last, panel, zeros, w, w0):
    """A dY A^T of the tiles from `first` to `last` and a panel of filters."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * dout.itemsize)
    line = g.out_width * g.filters * g.dilation_h
    pixel = g.filters * g.dilation_w
    filter0, many = panel_filters(g, panel, lanes)
    pixels = pointer(dout)
    for tile in range(first, last):
        row = tile // g.tile_columns
        n, top, phase = row_origin(g, row)
        left = phase + (tile - row * g.tile_columns) * 4 * g.dilation_w
        d0 = ((n * g.out_height + top) * g.out_width + left) * g.filters + filter0
        rows = steps_to(g.out_height - top, g.dilation_h)
        columns = steps_to(g.out_width - left, g.dilation_w)
        # The next tile's pixels arrive meanwhile.
        for i in range(4):
            for j in range(4, 8):
                for f in range(0, many, lanes):
                    prefetch(pixels, d0 + i * line + j * pixel + f)
        for f in range(0, many, lanes):
            output_gradient_tile(
                g.form, dout, d0 + f, line, pixel, rows, columns, zeros, w, w0 + f, g.weight_step
            )
        w0 += g.panel


@parallel
def _transform(part, parts, x, dout, g, cut, first, last, zeros, offsets, columns, v, w):
    """Images by slab of one vector of channels, gradients by panel of filters, tile after tile in each."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * x.itemsize)
    slices = cut.slabs + cut.panels
    lo, hi = span(part, parts, (last - first + cut.tiles - 1) // cut.tiles * slices)
    for task in range(lo, hi):
        piece = task // slices
        slab = task - piece * slices
        begin = first + piece * cut.tiles
        end = min(begin + cut.tiles, last)
        if slab < cut.slabs:
            slabs = cut.slabs // g.cuts
            piece_of_filter = slab // slabs
            # The last begins earlier where the channels don't fill it.
            c = min((slab - piece_of_filter * slabs) * lanes, g.channels - lanes)
            target = v[(slab * g.block + begin - first) * lanes :]
            transform_input(
                x,
                g,
                piece_of_filter,
                begin,
                end,
                c,
                c + lanes,
                offsets[part],
                zeros,
                columns[part],
                target,
                lanes,
            )
        else:
            panel = slab - cut.slabs
            place = (panel * g.block + begin - first) * g.panel
            _transform_gradient(dout, g, begin, end, panel, zeros, w, place)


@parallel
def _add_products(part, parts, v, w, g, cut, is_first, depth, tables, sums):
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * v.itemsize)
    channels, tiles, sum_rows = tables
    lo, hi = span(part, parts, g.area * cut.panels)
    for task in range(lo, hi):
        element = task // cut.panels
        panel = task - element * cut.panels
        s0 = element * g.product_step + panel * g.depth * g.panel
        if is_first:
            clear(sums, s0, g.depth * g.panel)
        add_panel(
            v,
            element * g.input_step,
            channels,
            tiles,
            0,
            channels.size,
            depth,
            w,
            element * g.weight_step + panel * g.block * g.panel,
            g.panel,
            sums,
            s0,
            sum_rows,
            panel_filters(g, panel, lanes)[1],
        )


@kernel
def _add_piece(taps, piece, height, width, g, dweight, target):
    """Add those taps of a piece that the filter has, a vector each, to the gradient."""
    lanes = VECTOR_BITS // (8 * taps.itemsize)
    for t in range(g.taps * g.taps):
        tap = piece_tap(piece, t, height, width, g.cuts_w, g.taps)
        if tap >= 0:
            place = target + tap * g.channels * g.filters
            values, places = taps[t * lanes : (t + 1) * lanes], dweight[place : place + lanes]
            for i in range(places.size):
                places[i] += values[i]


@parallel
def _finish(part, parts, g, height, width, cut, sums, taps, dweight):
    """Add G^T M G to the gradient of filters of `height` x `width`, M being the sums."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * dweight.itemsize)
    lo, hi = span(part, parts, g.depth)
    for c in range(lo, hi):
        piece = c // g.channels
        for panel in range(cut.panels):
            filter0, many = panel_filters(g, panel, lanes)
            shared = panel * g.panel - filter0
            for f in range(0, many, lanes):
                source = (panel * g.depth + c) * g.panel + f
                target = (c - piece * g.channels) * g.filters + filter0 + f
                if height == g.taps and width == g.taps:
                    tap = g.channels * g.filters
                    add_filter_gradient(
                        g.form, sums, source, g.product_step, dweight, target, tap, shared - f
                    )
                else:
                    clear(taps[part], 0, taps[part].size)
                    add_filter_gradient(
                        g.form, sums, source, g.product_step, taps[part], 0, lanes, shared - f
                    )
                    _add_piece(taps[part], piece, height, width, g, dweight, target)


@lru_cache(maxsize=256)
def _cut(
    x_shape: tuple[int, ...], out_shape: tuple[int, ...], padding: tuple[int, int], of: Filters
) -> tuple[Tiling, Cut, tuple[np.ndarray, ...]]:
    """The sizes, and the engine's tables: channels, tiles, and channels in the sums."""
    g, _ = tiling(x_shape, out_shape, padding, of)
    lanes = simd.lanes(np.float32)
    slabs, panels = -(-g.channels // lanes), -(-g.filters // g.panel)
    rounds = -(-g.tiles // _ROUND)
    block = -(-g.tiles // rounds)
    cut = Cut(g.cuts * slabs, panels, min(_TASK, block))
    # One vector more in each step: at a power of two all elements would compete for the same cache lines.
    g = g._replace(
        block=block,
        input_step=cut.slabs * block * lanes + lanes,
        weight_step=panels * block * g.panel + lanes,
        product_step=panels * g.depth * g.panel + lanes,
    )
    channel = np.arange(g.channels)
    slab = channel // lanes
    places = slab * block * lanes + channel - np.minimum(slab * lanes, g.channels - lanes)
    places = np.add.outer(np.arange(g.cuts) * slabs * block * lanes, places).ravel()
    rows = add_rows(g.depth)
    sums = padded_rows(np.arange(g.depth) * g.panel, rows)
    return g, cut, (padded_rows(places, rows), np.arange(block) * lanes, sums)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient to the filters to `dweight`; see `winograd.suits`."""
    padding = (layer.rows.padding[0], layer.columns.padding[0])
    of = filters_of(layer)
    g, cut, tables = _cut(x.shape, dout.shape[1:], padding, of)
    v = scratch("input", g.area * g.input_step, x.dtype)
    w = scratch("gradients", g.area * g.weight_step, x.dtype)
    sums = scratch("sums", g.area * g.product_step, x.dtype)
    x, dout = x.reshape(-1), dout.reshape(-1)
    lanes = simd.lanes(x.dtype)
    zeros = np.zeros(lanes, x.dtype)
    tasks = -(-g.block // cut.tiles) * (cut.slabs + cut.panels)
    transforms = part_count(tasks, v.nbytes + w.nbytes)
    memory = windows(g, transforms)
    products = part_count(g.area * cut.panels, g.block * g.area * g.depth * g.filters)
    for first in range(0, g.tiles, g.block):
        last = min(first + g.block, g.tiles)
        _transform(transforms, x, dout, g, cut, first, last, zeros, *memory, v, w)
        _add_products(products, v, w, g, cut, int(first == 0), last - first, tables, sums)
    parts = part_count(g.depth, sums.nbytes)
    taps = scratch("squares", parts * g.taps**2 * lanes, x.dtype).reshape(parts, -1)
    _finish(parts, g, *of.kernel, cut, sums, taps, dweight.reshape(-1))
