"""Direct convolution backward to the weights, on the register tile.

The gradient is a product of a matrix of taps by pixels with one of pixels by filters (see `tile`). Its rows
are cut into units, whose sums stay in the second-level cache while all images pass by, and the images into
pieces, whose sums are added up in the end. Both are cut by the sizes alone, so that the number of threads
changes no bit of the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import geometry, simd
from .direct import (
    MULTIPLY_ADDS_PER_BYTE,
    Layer,
    column_of_pixels,
    fill_window,
    set_rectangle,
    share,
)
from .epilogue import NO_EPILOGUE, Epilogue, unpool_panel, window_taps
from .geometry import Gradient
from .tile import add_ranges, add_rows
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

# Units times pieces of the batch are between these two, whatever the number of threads.
_FEWEST_ITEMS = 4
_MOST_ITEMS = 16
# A piece's sums are written and read again: that is little beside summing so many pixels.
_PIXELS_A_PIECE = 2048
# Sums of a unit, which should stay in the second-level cache beside its inputs.
_UNIT_BYTES = 768 * 1024
# Slices of a group have a multiple of so many channels: they are copied from pixel to pixel.
_SLICE = 8
# Gradients are copied to where they lie next to each other if they meet so many taps.
_MOST_READ_IN_PLACE = 96


class Cut(NamedTuple):
    """A layer's rows of the gradient in units of the same size: a slice of one group, or whole groups."""

    units: int
    slices: int  # of each group
    groups: int  # in a unit
    channels: int  # of each of these
    pieces: int  # of the batch
    high: int = 0  # taps of a tile
    tiles: int = 0  # of a panel
    turns: int = 0  # see `_turns`


@kernel
def _fill_slice(x, n, of, c0, h0, rows, window):
    """`fill_window`, of the channels from `c0` on that are in the window."""
    b = of.blocks
    row = b.window_w * b.channels
    left = min(max(-b.origin_w, 0), b.window_w)
    first = max(b.origin_w, 0)
    copied = max(min(b.image_w - first, b.window_w - left), 0)
    begin, end = left * b.channels, (left + copied) * b.channels
    for r in range(rows):
        h = h0 + r
        if h < 0 or h >= b.image_h:
            clear(window, r * row, row)
            continue
        source = ((n * b.image_h + h) * b.image_w + first) * of.channels + c0
        clear(window, r * row, begin)
        for w in range(copied):
            copy(x, source + w * of.channels, window, r * row + begin + w * b.channels, b.channels)
        clear(window, r * row + end, row - end)


@kernel
def _read_inputs(x, n, first, of, c0, window):
    """Where a unit's inputs of the block from grid row `first` on lie: in the image, or in `window`."""
    b = of.blocks
    h0 = b.origin_h + first * b.step
    if b.in_place:
        return x, ((n * b.image_h + h0) * b.image_w + b.origin_w) * of.channels + c0
    rows = b.window_h - max(first + b.rows - b.height, 0) * b.step
    if b.channels == of.channels:
        fill_window(x, n, b, h0, rows, rows, window)
    else:
        _fill_slice(x, n, of, c0, h0, rows, window)
    return window, 0


@kernel
def _read_gradients(dout, argmax, n, first, rows, column, many, of, e, pool, spare, width, bias, s0):
    """Where a panel of a block's gradients lies, and its row length: in dout, or in `spare`."""
    b = of.blocks
    filters = dout.shape[1]
    flat = dout.reshape(dout.size)
    if e.pool_h > 0:
        p0 = (n * e.out_h + first // e.pool_h) * e.out_w * filters + column
        unpool_panel(flat, argmax, p0, rows // e.pool_h, e, pool, spare, width, bias, s0, many)
        return spare, 0, width
    count = rows * b.width
    begin = (n * b.height + first) * b.width * filters + column
    # Whole vectors would read past the end of dout.
    fits = begin + (count - 1) * filters + width <= dout.size
    if fits and (filters == width or of.taps.size <= _MOST_READ_IN_PLACE):
        return flat, begin, filters
    for k in range(count):
        copy(flat, begin + k * filters, spare, k * width, many)
    return spare, 0, width


@kernel
def _pixel_ranges(of, first, rows, ranges):
    """The pixels of the block from grid row `first` on that meet each tile's taps; nothing if all do."""
    if of.tiles.size == 0:
        return ranges[:0]
    tiles = of.tiles
    for t in range(tiles.shape[0]):
        top, bottom = max(tiles[t, 0] - first, 0), min(tiles[t, 1] - first, rows)
        set_rectangle(ranges, t, top, bottom, tiles[t, 2], tiles[t, 3], of.blocks.width)
    return ranges


@kernel
def _add_block(x, dout, argmax, n, first, unit, of, cut, columns, partial, bias, memory, e, pool):
    """Add the products of image n's block from grid row `first` on to all of a unit's panels."""
    window, all_ranges, spare = memory
    panels, depth, width = partial.shape
    sums, gradients = partial.reshape(partial.size), dout.reshape(dout.size)
    taps, col, b = of.taps, of.pixels, of.blocks
    rows = min(b.rows, b.height - first)
    pixels = rows * b.width
    a, a0 = _read_inputs(x, n, first, of, unit * cut.groups * cut.channels, window)
    ranges = _pixel_ranges(of, first, rows, all_ranges)
    high, tiles, turns = cut.high, cut.tiles, cut.turns
    fresh = min(rows * b.step * b.image_w * of.channels, x.size)
    next_x = (n * b.image_h + b.origin_h + first * b.step + b.window_h) * b.image_w * of.channels
    # What is pooled has fewer rows and columns.
    height, line, pooled = (e.out_h, e.out_w, e.pool_h) if e.pool_h > 0 else (b.height, b.width, 1)
    size = rows // pooled * line * dout.shape[1]
    next_dout = (n * height + (first + rows) // pooled) * line * dout.shape[1]
    for p in range(panels):
        group = p // (panels // cut.groups)
        column = (p - group * (panels // cut.groups)) * width
        many = min(columns - column, width)
        column += (unit // cut.slices * cut.groups + group) * columns
        source, b0, ldb = _read_gradients(
            dout, argmax, n, first, rows, column, many, of, e, pool, spare, width, bias, p * width
        )
        at, c0 = a0 + group * cut.channels, p * depth * width
        begin, t1 = p * tiles, p * tiles
        while t1 < begin + tiles:
            t0, t1 = t1, begin + tiles
            if t0 < turns:
                t1 = min(t1, turns)
                ahead = share(x, next_x, fresh, t0, t1, turns)
            else:
                ahead = share(gradients, next_dout, size, t0 - turns, t1 - turns, panels * tiles - turns)
            some = (t0 - begin) * high, (t1 - begin) * high, high
            add_ranges(
                a,
                at,
                taps,
                col,
                some,
                pixels,
                ranges[4 * (t0 - begin) :],
                source,
                b0,
                ldb,
                sums,
                c0,
                of.places,
                many,
                ahead,
            )


@parallel
def _add_products(
    part, parts, x, images, dout, of, cut, columns, partial, windows, ranges, spares, e, pool, argmax, biases
):
    keep_out_of_line()
    b = of.blocks
    memory = windows[part], ranges[part], spares[part]
    lo, hi = span(part, parts, cut.pieces * cut.units)
    for item in range(lo, hi):
        piece = item // cut.units
        unit = item - piece * cut.units
        sums, bias = partial[piece, unit], biases[piece, unit]
        clear(sums.reshape(sums.size), 0, sums.size)
        clear(bias, 0, bias.size)
        task0, task1 = span(piece, cut.pieces, images * b.blocks)
        for task in range(task0, task1):
            n = task // b.blocks
            first = (task - n * b.blocks) * b.rows
            _add_block(x, dout, argmax, n, first, unit, of, cut, columns, sums, bias, memory, e, pool)


@kernel
def _add_biases(biases, cut, columns, dbias):
    """Add all pieces to dbias; the slices of a group have each summed up the same."""
    of_group = biases.shape[2] // cut.groups
    for f in range(dbias.size):
        group = f // columns
        unit = group // cut.groups
        k = (group - unit * cut.groups) * of_group + f - group * columns
        for piece in range(cut.pieces):
            dbias[f] += biases[piece, unit * cut.slices, k]


@parallel
def _reduce(part, parts, partial, biases, cut, columns, dweight, dbias):
    """Add all pieces to dweight (kH * kW * C / groups, F), and to dbias if it has elements."""
    keep_out_of_line()
    if part == 0:
        _add_biases(biases, cut, columns, dbias)
    width = partial.shape[4]
    panels = partial.shape[2] // cut.groups
    inner = cut.slices * cut.channels
    lo, hi = span(part, parts, len(dweight))
    for k in range(lo, hi):
        tap = k // inner
        s = (k - tap * inner) // cut.channels
        row = tap * cut.channels + k - tap * inner - s * cut.channels
        for u in range(s, cut.units, cut.slices):
            for p in range(cut.groups * panels):
                g = p // panels
                column = (p - g * panels) * width
                many = min(columns - column, width)
                target = dweight[k, (u // cut.slices * cut.groups + g) * columns + column :]
                total = partial[0, u, p, row]
                for piece in range(1, cut.pieces):
                    more = partial[piece, u, p, row]
                    for j in range(many):
                        total[j] += more[j]
                for j in range(many):
                    target[j] += total[j]


def _cut(layer: Layer, pixels: int, width: int, itemsize: int) -> Cut:
    """The units and pieces of a gradient that is summed over `pixels`, in panels of `width` columns."""
    inner = layer.channels // layer.groups
    columns = -(-(layer.filters // layer.groups) // width) * width
    group_bytes = layer.rows.kernel * layer.columns.kernel * inner * columns * itemsize
    slices, groups = 1, layer.groups
    if group_bytes * layer.groups > _UNIT_BYTES:
        groups = 1
        whole = [s for s in range(1, inner + 1) if inner % s == 0 and inner // s % _SLICE == 0]
        slices = next((s for s in whole if group_bytes // s <= _UNIT_BYTES), (whole or [1])[-1])
    units = layer.groups // groups * slices
    items = min(max(pixels // _PIXELS_A_PIECE * units, _FEWEST_ITEMS), _MOST_ITEMS)
    # A power of two: as many for each of the threads, and of the images for each piece.
    pieces = 1 << (-(-items // units) - 1).bit_length()
    return Cut(units, slices, groups, inner // slices, pieces)


def _turns(fresh: int, size: int, panels: int, tiles: int) -> int:
    """How many of the panels' tiles fetch the next block's inputs; the others fetch its gradients.

    Both get their share, and of tiles a panel's one, at least, is left for its gradients: a lone tile of few
    taps has time for nothing else.
    """
    turns = (panels * tiles * fresh + (fresh + size) // 2) // (fresh + size)
    if tiles > 1 and fresh > 0:
        return min(max(turns, 1), panels * (tiles - 1))
    return turns


@lru_cache(maxsize=512)
def _plan(
    layer: Layer, e: Epilogue, images: int, width: int, itemsize: int
) -> tuple[Gradient, Cut, np.ndarray]:
    """A gradient's tables and cut, and the offsets of what `e` pools."""
    rows, columns, multiple = layer.rows.forward(), layer.columns.forward(), 1
    if e.pool_h:
        rows = rows._replace(outputs=e.out_h * e.pool_h)
        columns = columns._replace(outputs=e.out_w * e.pool_w)
        multiple = e.pool_h
    cut = _cut(layer, images * rows.outputs * columns.outputs, width, itemsize)
    seen = cut.channels, cut.groups
    of = geometry.gradient(rows, columns, layer.image, layer.channels, *seen, layer.filters, width, multiple)
    b, high = of.blocks, add_rows(layer.rows.kernel * layer.columns.kernel * cut.channels)
    tiles, panels = of.taps.size // high, cut.groups * -(-layer.filters // layer.groups // width)
    # For each row of gradients.
    fresh = multiple * b.step * b.image_w * layer.channels if cut.units == 1 else 0
    line = e.out_w if e.pool_h else b.width
    cut = cut._replace(
        pieces=min(cut.pieces, images * b.blocks),
        high=high,
        tiles=tiles,
        turns=_turns(fresh, line * layer.filters, panels, tiles),
    )
    return of, cut, window_taps(e, width)


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
    if not e.pool_h:
        column = column_of_pixels(layer, x.shape[0])
        if column is not layer:
            layer, x = column, x.reshape(1, *column.image, column.channels)
    images, dtype = x.shape[0], dout.dtype
    width = simd.panel_width(dtype)
    of, cut, taps = _plan(layer, e, images, width, dtype.itemsize)
    columns = layer.filters // layer.groups
    panels = cut.groups * -(-columns // width)
    depth = layer.rows.kernel * layer.columns.kernel * cut.channels
    shape = cut.pieces, cut.units, panels
    partial = scratch("partial", (*shape, depth, width), dtype)
    biases = scratch("biases", (cut.pieces, cut.units, panels * width), dtype)
    work = images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE
    parts = part_count(cut.pieces * cut.units, work)
    b = of.blocks
    window = 1 if b.in_place else b.window_h * b.window_w * b.channels
    _add_products(
        parts,
        x.ravel(),
        images,
        dout.reshape(-1, layer.filters),
        of,
        cut,
        columns,
        partial,
        scratch("windows", (parts, window), dtype),
        scratch("ranges", (parts, of.tiles.size), np.intp),
        scratch("spares", (parts, b.rows * b.width * width), dtype),
        e,
        taps,
        argmax.reshape(-1),
        biases,
    )
    flat = dweight.reshape(-1, layer.filters)
    dbias = NOTHING[dtype] if dbias is None else dbias
    _reduce(part_count(len(flat), partial.nbytes), partial, biases, cut, columns, flat, dbias)
