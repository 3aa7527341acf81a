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
from .direct import Layer, share
from .square_tile import HAS_REGISTERS, add_square
from .tile import add_ranges, add_rows, padded_rows, tile_rows
from .vectors import lanes_of, pointer, prefetch
from .winograd_blocks import transform_input, windows
from .winograd_tiling import (
    Filters,
    Tiling,
    filters_of,
    in_turn,
    is_far,
    next_pixels,
    panel_filters,
    piece_tap,
    row_origin,
    steps_to,
    tiling,
    with_far,
)
from .winograd_transforms import add_filter_gradient, output_gradient_tile
from .workspace import clear, scratch

# Tiles of a round, at most: the sums go to the cache and back for each.
_ROUND = 256
# Tiles that a task transforms.
_TASK = 32
# What is transformed fits a thread's own cache if these are its bytes; so do the sums of so few products.
_ROUND_BYTES = 1 << 19
_MOST_APART = 1 << 10
# Pieces of the work that are summed apart, about, and tiles in one, at least.
_PIECES = 8
_FEWEST_TILES_APART = 128


class Cut(NamedTuple):
    """How the work is cut."""

    slabs: int  # vectors of channels of a piece of a group's filters
    tiles: int  # that a task transforms, at most
    pieces: int  # of the tiles, whose sums are apart; 0: all threads add to the same


@kernel
def _transform_gradient(dout, g, first, last, panel, zeros, w, w0):
    """A dY A^T of the tiles from `first` to `last` and a panel of filters."""
    keep_out_of_line()
    lanes = lanes_of(dout)
    line = g.out_width * g.y_pixel * g.dilation_h
    pixel = g.y_pixel * g.dilation_w
    filter0, many = panel_filters(g, panel, lanes)
    filter0 += panel // g.panels * g.filters
    pixels = pointer(dout)
    for tile in range(first, last):
        row = tile // g.tile_columns
        n, top, phase = row_origin(g, row)
        left = phase + (tile - row * g.tile_columns) * 4 * g.dilation_w
        d0 = ((n * g.out_height + top) * g.out_width + left) * g.y_pixel + filter0
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


@kernel
def _transform_slab(x, g, cut, group, slab, begin, end, zeros, offsets, columns, v):
    """B^T d B of the tiles from `begin` to `end` and a vector of channels of one piece of the filters."""
    lanes = lanes_of(x)
    piece = slab // cut.slabs
    # The last begins earlier where the channels don't fill it.
    c = group * g.channels + min((slab - piece * cut.slabs) * lanes, g.channels - lanes)
    transform_input(x, g, piece, begin, end, c, c + lanes, offsets, zeros, columns, v)


@kernel
def _add_products(v, w, g, element, panel, depth, tables, sums, ahead):
    """Multiply an element of `depth` tiles of a group with that of a panel of its filters.

    Meanwhile a cache fetches `ahead`.
    """
    lanes = lanes_of(v)
    channels, tiles, sum_rows = tables
    many = panel_filters(g, panel, lanes)[1]
    w0 = element * g.weight_step + panel * g.block * g.panel
    sums0 = element * g.product_step + panel * g.depth * g.panel
    if HAS_REGISTERS and many == lanes and g.channels % lanes == 0:
        for c in range(0, g.depth, lanes):
            place = sums0 + c * g.panel
            v0 = element * g.input_step + c * g.block
            add_square(v, v0, w, w0, sums, place, (lanes, g.panel, g.panel), depth, ahead)
            ahead = ahead[:0]
        return
    add_ranges(
        v,
        element * g.input_step,
        channels,
        tiles,
        (0, channels.size, tile_rows(channels.size)),
        depth,
        channels[:0],
        w,
        w0,
        g.panel,
        sums,
        sums0,
        sum_rows,
        many,
        ahead,
    )


@parallel
def _transform(part, parts, x, dout, g, cut, first, last, zeros, offsets, columns, v, w):
    """Images by slab of one vector of channels, gradients by panel of filters, tile after tile in each."""
    keep_out_of_line()
    lanes = lanes_of(x)
    slabs = g.cuts * cut.slabs
    slices = slabs + g.panels
    lo, hi = span(part, parts, (last - first + cut.tiles - 1) // cut.tiles * slices)
    for task in range(lo, hi):
        piece = task // slices
        slab = task - piece * slices
        begin = first + piece * cut.tiles
        end = min(begin + cut.tiles, last)
        if slab < slabs:
            target = v[(slab * g.block + begin - first) * lanes :]
            _transform_slab(x, g, cut, 0, slab, begin, end, zeros, offsets[part], columns[part], target)
        else:
            panel = slab - slabs
            place = (panel * g.block + begin - first) * g.panel
            _transform_gradient(dout, g, begin, end, panel, zeros, w, place)


@parallel
def _multiply(part, parts, x, dout, v, w, g, first, last, tables, sums):
    keep_out_of_line()
    pixels, gradients = next_pixels(x, dout, g, first, last)
    far = is_far(v)
    lo, hi = span(part, parts, g.area * g.panels)
    for task in range(lo, hi):
        element = task // g.panels
        panel = task - element * g.panels
        if first == 0:
            clear(sums, element * g.product_step + panel * g.depth * g.panel, g.depth * g.panel)
        # Images that are far away would be waited for by the first panel of each element.
        following = (element + 1) * g.input_step
        images = share(v, following, g.input_step, panel // 2, panel // 2 + 1, (g.panels + 1) // 2)
        ahead = with_far(images, far, pixels, gradients, task, g.area * g.panels)
        _add_products(v, w, g, element, panel, last - first, tables, sums, ahead)


@parallel
def _sum_apart(part, parts, x, dout, g, cut, zeros, offsets, columns, vs, ws, tables, sums):
    """The sums of every group and piece of the tiles, each by one thread in its own cache."""
    keep_out_of_line()
    lanes = lanes_of(x)
    v, w = vs[part], ws[part]
    lo, hi = span(part, parts, g.groups * cut.pieces)
    for task in range(lo, hi):
        group = task // cut.pieces
        piece = task - group * cut.pieces
        own = sums[piece, group]
        clear(own, 0, own.size)
        begin, end = span(piece, cut.pieces, g.tiles)
        for first in range(begin, end, g.block):
            last = min(first + g.block, end)
            for slab in range(g.cuts * cut.slabs):
                target = v[slab * g.block * lanes :]
                _transform_slab(
                    x, g, cut, group, slab, first, last, zeros, offsets[part], columns[part], target
                )
            for panel in range(g.panels):
                place = panel * g.block * g.panel
                _transform_gradient(dout, g, first, last, group * g.panels + panel, zeros, w, place)
            pixels, gradients = next_pixels(x, dout, g, first, last)
            for element in range(g.area):
                for panel in range(g.panels):
                    ahead = in_turn(pixels, gradients, element * g.panels + panel, g.area * g.panels)
                    _add_products(v, w, g, element, panel, last - first, tables, own, ahead)


@kernel
def _add_piece(taps, piece, height, width, g, dweight, target):
    """Add those taps of a piece that the filter has, a vector each, to the gradient."""
    lanes = lanes_of(taps)
    for t in range(g.taps * g.taps):
        tap = piece_tap(piece, t, height, width, g.cuts_w, g.taps)
        if tap >= 0:
            place = target + tap * g.channels * g.y_pixel
            values, places = taps[t * lanes : (t + 1) * lanes], dweight[place : place + lanes]
            for i in range(places.size):
                places[i] += values[i]


@kernel
def _add_up(sums, group, g, place):
    """Add the sums of all pieces, of a channel and a panel, to those of the first."""
    for piece in range(1, len(sums)):
        for element in range(g.area):
            begin = element * g.product_step + place
            end = begin + g.panel
            values, places = sums[piece, group, begin:end], sums[0, group, begin:end]
            for i in range(places.size):
                places[i] += values[i]


@parallel
def _finish(part, parts, g, height, width, sums, taps, dweight):
    """Add G^T M G to the gradient of filters of `height` x `width`, M being the sums."""
    keep_out_of_line()
    lanes = lanes_of(dweight)
    lo, hi = span(part, parts, g.groups * g.depth)
    for task in range(lo, hi):
        group = task // g.depth
        c = task - group * g.depth
        piece = c // g.channels
        for panel in range(g.panels):
            filter0, many = panel_filters(g, panel, lanes)
            shared = panel * g.panel - filter0
            place = (panel * g.depth + c) * g.panel
            _add_up(sums, group, g, place)
            for f in range(0, many, lanes):
                target = (c - piece * g.channels) * g.y_pixel + group * g.filters + filter0 + f
                whole = height == g.taps and width == g.taps
                if whole:
                    tap = g.channels * g.y_pixel
                    add_filter_gradient(
                        g.form, sums[0, group], place + f, g.product_step, dweight, target, tap, shared - f
                    )
                else:
                    clear(taps[part], 0, taps[part].size)
                    add_filter_gradient(
                        g.form, sums[0, group], place + f, g.product_step, taps[part], 0, lanes, shared - f
                    )
                    _add_piece(taps[part], piece, height, width, g, dweight, target)


def _block(g: Tiling) -> tuple[int, int]:
    """Tiles that are transformed together, and pieces that are summed apart."""
    if g.groups == 1 and g.depth * g.filters > _MOST_APART:
        return -(-g.tiles // -(-g.tiles // _ROUND)), 0
    pieces = max(1, min(-(-_PIECES // g.groups), g.tiles // _FEWEST_TILES_APART))
    most = max(_TASK, _ROUND_BYTES // (4 * g.area * (g.depth + g.filters)))
    tiles = -(-g.tiles // pieces)
    return -(-tiles // -(-tiles // most)), pieces


@lru_cache(maxsize=256)
def _cut(
    x_shape: tuple[int, ...], out_shape: tuple[int, ...], padding: tuple[int, int], of: Filters
) -> tuple[Tiling, Cut, tuple[np.ndarray, ...]]:
    """The sizes, and the engine's tables: channels, tiles, and channels in the sums."""
    g, _ = tiling(x_shape, out_shape, padding, of)
    lanes = simd.lanes(np.float32)
    slabs = -(-g.channels // lanes)
    block, pieces = _block(g)
    cut = Cut(slabs, min(_TASK, block), pieces)
    # One vector more in each step: at a power of two all elements would compete for the same cache lines.
    g = g._replace(
        block=block,
        input_tile=lanes,
        input_step=g.cuts * slabs * block * lanes + lanes,
        weight_step=g.panels * block * g.panel + lanes,
        product_step=g.panels * g.depth * g.panel + lanes,
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
    size = g.groups * g.area * g.product_step
    sums = scratch("sums", max(cut.pieces, 1) * size, x.dtype).reshape(-1, g.groups, size // g.groups)
    run = _run_apart if cut.pieces else _run_together
    run(g, cut, x.reshape(-1), dout.reshape(-1), tables, sums)
    parts = part_count(g.groups * g.depth, sums.nbytes)
    taps = scratch("squares", parts * g.taps**2 * simd.lanes(x.dtype), x.dtype).reshape(parts, -1)
    _finish(parts, g, *of.kernel, sums, taps, dweight.reshape(-1))


def _run_together(g, cut, x, dout, tables, sums):
    v = scratch("input", g.area * g.input_step, x.dtype)
    w = scratch("gradients", g.area * g.weight_step, x.dtype)
    zeros = np.zeros(simd.lanes(x.dtype), x.dtype)
    tasks = -(-g.block // cut.tiles) * (g.cuts * cut.slabs + g.panels)
    transforms = part_count(tasks, v.nbytes + w.nbytes)
    memory = windows(g, transforms)
    products = part_count(g.area * g.panels, g.block * g.area * g.depth * g.filters)
    for first in range(0, g.tiles, g.block):
        last = min(first + g.block, g.tiles)
        _transform(transforms, x, dout, g, cut, first, last, zeros, *memory, v, w)
        _multiply(products, x, dout, v, w, g, first, last, tables, sums.reshape(-1))


def _run_apart(g, cut, x, dout, tables, sums):
    parts = part_count(g.groups * cut.pieces, g.tiles * g.area * g.depth * g.y_pixel)
    vs = scratch("input", parts * g.area * g.input_step, x.dtype).reshape(parts, -1)
    ws = scratch("gradients", parts * g.area * g.weight_step, x.dtype).reshape(parts, -1)
    zeros = np.zeros(simd.lanes(x.dtype), x.dtype)
    _sum_apart(parts, x, dout, g, cut, zeros, *windows(g, parts), vs, ws, tables, sums)
