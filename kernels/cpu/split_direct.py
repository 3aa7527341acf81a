"""Direct convolution on the matrix unit: forward, and backward to the input, where there is one.

The pixels of a block of rows are split and laid out in one row, with zeros between the rows of the image and
between images, which both neighbours share as padding. A tap is then the same step for every pixel, so that
the unit reads its rows of factors, one for each pixel, where they lie; results of pixels that are none, one
for each row of the image or a few, are dropped.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import get_num_threads, parallel, part_count, span
from . import matrix_unit
from .direct import Layer, column_of_pixels
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .matrix_unit import (
    ALL,
    BLOCK,
    CONFIGURATION,
    LEADING,
    OTHERS,
    PANEL_WORDS,
    ROW_WORDS,
    SIDE,
    TERMS,
    WORDS,
    multiply,
    write_sums,
)
from .split import SQUARES, pack_panel, pack_rows, pack_turned_panel, words_of_panel
from .vectors import pointer
from .workspace import NOTHING, NOWHERE, clear, scratch

# Of a block's split pixels, which stay in the second-level cache with a panel of weights.
_BLOCK_BYTES = 640 << 10
# Rows so long that a block of one leaves that cache are done by the vectors.
_MOST_BYTES = 2 << 20
# What is multiplied for each number that is packed or written, so that the unit repays it; and in all.
_LEAST_GAIN = 62
_LEAST_WORK = 1 << 21
_MULTIPLY_ADDS_PER_BYTE = 20


class Grid(NamedTuple):
    """Sizes of a convolution whose pixels lie in rows of `width`, and images in `height` such rows."""

    images: int
    image_h: int
    image_w: int
    channels: int
    out_h: int
    out_w: int
    filters: int
    top: int  # zeros above and to the left of an image
    left: int
    reach: int  # rows of the input that an output sees beside its first
    width: int
    height: int
    block_images: int  # whole images of a block, or 0
    block_rows: int  # else rows of one image
    pixel: int  # words of a split pixel


@kernel
def blocks_of(g):
    """Number of a grid's blocks."""
    if g.block_images > 0:
        return (g.images + g.block_images - 1) // g.block_images
    return g.images * ((g.out_h + g.block_rows - 1) // g.block_rows)


@kernel
def block_of(g, number):
    """The first image of a block and their number; of the results of each, the first row and their number."""
    if g.block_images > 0:
        n = number * g.block_images
        return n, min(g.images - n, g.block_images), 0, g.out_h
    cuts = (g.out_h + g.block_rows - 1) // g.block_rows
    first = number % cuts * g.block_rows
    return number // cuts, 1, first, min(g.out_h - first, g.block_rows)


@kernel
def _pack_block(x, g, block, tame, packed):
    """Split the pixels of a block, and those that they see; whether all are finite."""
    n, many, first, rows = block
    clear(packed, 0, g.left * g.pixel)
    finite = True
    words = pointer(packed)
    line = g.width * g.pixel
    filled = g.image_w * g.pixel
    for i in range((many - 1) * g.height + rows + g.reach):
        row = first - g.top + i
        image = n + row // g.height
        h = row - row // g.height * g.height
        place = g.left * g.pixel + i * line
        if h < g.image_h and n <= image < n + many:
            source = (image * g.image_h + h) * g.image_w * g.channels
            finite &= pack_rows(
                x, source, g.channels, g.image_w, g.channels, tame, words, place, g.pixel, ROW_WORDS
            )
            clear(packed, place + filled, line - filled)
        else:
            clear(packed, place, line)
    return finite


@kernel
def _sum_panel(packed, g, outputs, terms, weights, which, bias, target, columns, adds, sums):
    """The first `outputs` pixels of a block, those that are none too, by a panel of weights; see `_target`.

    `bias` has a pointer, the panel's first filter, and how many numbers are there.
    """
    biases, filter0, known = bias
    c, c0, step, line, image, rows, many = target
    for first in range(0, outputs, BLOCK):
        end = min(first + BLOCK, outputs)
        rows_of_a = packed, first * g.pixel, g.pixel, WORDS, pointer(terms), terms.size
        multiply(*rows_of_a, weights, 0, end - first, columns, which, sums, 0, False)
        at = first
        while at < end:
            row = at // g.width
            column = at - row * g.width
            n = row // g.height
            h = row - n * g.height
            count = min(g.width - column, end - at)
            if h < rows and column < many:
                s0, place = (at - first) * BLOCK, c0 + n * image + h * line + column * step
                valid = min(count, many - column)
                write_sums(sums, s0, biases, filter0, known, c, place, step, valid, columns, adds)
            at += count


@kernel
def _target(g, e, block, column, z, y):
    """Where a panel's results are written, from `column` on: to `z`, if they are to be pooled, or to `y`.

    That is a pointer, the place of the block's first pixel, the elements from a pixel, a row and an image to
    the next, and how many rows and columns are written of each image.
    """
    n, _, first, rows = block
    if e.pool_h > 0:
        wide = e.out_w * e.pool_w
        return (
            pointer(z),
            0,
            BLOCK,
            wide * BLOCK,
            g.block_rows * wide * BLOCK,
            rows // e.pool_h * e.pool_h,
            wide,
        )
    line = g.out_w * g.filters
    return pointer(y), (n * g.out_h + first) * line + column, g.filters, line, g.out_h * line, rows, g.out_w


@kernel
def _finish(z, g, e, pool, block, column, columns, y, argmax):
    """Pool what a panel of a block wrote to `z`."""
    n, many, first, rows = block
    image = g.block_rows * e.out_w * e.pool_w * BLOCK
    for i in range(many):
        place = ((n + i) * e.out_h + first // e.pool_h) * e.out_w * e.filters + column
        finish_panel(z[i * image :], BLOCK, rows // e.pool_h, e, pool, y, place, argmax, columns)


@kernel
def _pack_weights(weight, transposed, inner, outer, p, tame, squares, packed, place):
    """A panel of the filters, or if `transposed` of the channels, taps flipped; whether all are finite."""
    taps = weight.size // (inner * outer)
    size = (inner + TERMS - 1) // TERMS * PANEL_WORDS
    first = p * BLOCK
    many = min(outer - first, BLOCK)
    finite = True
    for t in range(taps):
        target = place + t * size
        if transposed:
            source = ((taps - 1 - t) * outer + first) * inner
            finite &= pack_turned_panel(weight, source, inner, inner, many, tame, squares, packed, target)
        else:
            source = t * inner * outer + first
            finite &= pack_panel(pointer(weight), source, outer, inner, many, tame, pointer(packed), target)
    return finite


@parallel
def _pack(part, parts, weight, transposed, inner, outer, rooms, packed, finite):
    keep_out_of_line()
    lo, hi = span(part, parts, len(packed))
    for p in range(lo, hi):
        finite[p] = _pack_weights(weight, transposed, inner, outer, p, False, rooms[part], packed[p], 0)


@parallel
def _correlate(
    part,
    parts,
    x,
    weight,
    transposed,
    packed,
    finite,
    bias,
    y,
    g,
    terms,
    configuration,
    images,
    panels_again,
    rooms,
    e,
    pool,
    argmax,
    zs,
):
    keep_out_of_line()
    matrix_unit.start(pointer(configuration))
    image, again, room, z = images[part], panels_again[part], rooms[part], zs[part]
    sums, pixels = pointer(room[SQUARES:]), pointer(x)
    panels = len(packed)
    item, last = span(part, parts, blocks_of(g) * panels)
    while item < last:
        number = item // panels
        panel0 = item - number * panels
        panel1 = min(panel0 + last - item, panels)
        item += panel1 - panel0
        block = block_of(g, number)
        _, many, _, rows = block
        outputs = ((many - 1) * g.height + rows - 1) * g.width + g.out_w
        block_finite = _pack_block(pixels, g, block, False, image)
        for panel in range(panel0, panel1):
            column = panel * BLOCK
            columns = min(g.filters - column, BLOCK)
            of_bias = pointer(bias), column, columns if bias.size > 0 else 0
            target = _target(g, e, block, column, z, y)
            both = block_finite and finite[panel]
            weights, which, adds = pointer(packed[panel]), ALL if both else LEADING, False
            while which >= 0:
                # What is infinite or NaN meets its factors first, in the leading parts, and all other parts
                # meet theirs then.
                if which == OTHERS:
                    _pack_block(pixels, g, block, True, image)
                    _pack_weights(weight, transposed, g.channels, g.filters, panel, True, room, again, 0)
                    weights, adds = pointer(again), True
                _sum_panel(
                    pointer(image), g, outputs, terms, weights, which, of_bias, target, columns, adds, sums
                )
                which = OTHERS if which == LEADING else -1
            if not both:
                _pack_block(pixels, g, block, False, image)
            if e.pool_h > 0:
                _finish(z, g, e, pool, block, column, columns, y, argmax)
    matrix_unit.end()


@lru_cache(maxsize=512)
def grid(layer: Layer, images: int, pool_h: int) -> Grid:
    """Blocks are whole images, as many as fit the cache, or else rows of one, whole windows of a pool."""
    (height, width), (out_h, out_w) = layer.image, layer.out_image
    (top, bottom), (left, right) = layer.rows.padding, layer.columns.padding
    reach = layer.rows.dilation * (layer.rows.kernel - 1)
    pitch = max(width + max(left, right), out_w)
    tall = max(height + max(top, bottom), out_h)
    pixel = -(-layer.channels // TERMS) * ROW_WORDS
    fitting = max(_BLOCK_BYTES // (4 * pixel * pitch), 1)
    block_images = min(max(fitting - reach, 0) // tall, images)
    block_rows = out_h
    if not block_images:
        cuts = -(-out_h // max(fitting - reach, 1))
        block_rows = -(-out_h // (cuts * pool_h)) * pool_h
    sizes = images, height, width, layer.channels, out_h, out_w, layer.filters, top, left, reach
    return Grid(*sizes, pitch, tall, block_images, block_rows, pixel)


class _Plan(NamedTuple):
    grid: Grid
    terms: np.ndarray
    tasks: int
    block_words: int
    panels: int
    panel_words: int


@lru_cache(maxsize=512)
def _plan(layer: Layer, images: int, pool_h: int) -> _Plan:
    g = grid(layer, images, max(pool_h, 1))
    rows, columns = layer.rows, layer.columns
    steps = np.add.outer(
        np.arange(rows.kernel) * rows.dilation * g.width, np.arange(columns.kernel) * columns.dilation
    )
    terms = np.add.outer(steps.ravel() * g.pixel, np.arange(g.pixel // ROW_WORDS) * ROW_WORDS).ravel()
    tall = max(g.block_images, 1)
    blocks = -(-images // tall) * (1 if g.block_images else -(-g.out_h // g.block_rows))
    deep = (tall - 1) * g.height + g.block_rows + g.reach
    # Registers of rows reach beyond the last pixel.
    block_words = (g.left + deep * g.width + BLOCK + columns.dilation * (columns.kernel - 1)) * g.pixel
    panels = -(-layer.filters // BLOCK)
    return _Plan(g, terms, blocks * panels, block_words, panels, words_of_panel(layer.channels) * steps.size)


def gain(layer: Layer, packed: float, written: float) -> float:
    """Useful multiply-adds of a pixel for each number of it that is packed or written, by these weights."""
    taps, channels, filters = layer.rows.kernel * layer.columns.kernel, layer.channels, layer.filters
    if not channels * filters:
        return 0
    used = channels / (-(-channels // TERMS) * TERMS) * filters / (-(-filters // SIDE) * SIDE)
    return taps * channels * filters * used / (packed * channels + written * filters)


def _least_block(layer: Layer) -> int:
    """Bytes of the split pixels that one row of the results sees."""
    of = column_of_pixels(layer, 1)
    g = grid(of, 1, 1)
    return 4 * g.pixel * g.width * (g.reach + 1)


def fits(layer: Layer, dtype: np.dtype) -> bool:
    """Whether a layer's passes can be taken to the matrix unit."""
    return (
        dtype == np.float32
        and layer.groups == layer.rows.stride == layer.columns.stride == 1
        and min(*layer.rows.padding, *layer.columns.padding) >= 0
        and _least_block(layer) <= _MOST_BYTES
        and matrix_unit.is_there()
    )


@lru_cache(maxsize=1024)
def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's forward pass is faster there."""
    repays = gain(layer, 1, 2) >= _LEAST_GAIN and images * layer.multiply_adds >= _LEAST_WORK
    return repays and fits(layer, dtype)


def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's gradient to its input is faster there."""
    return layer.exchanged is not None and suits(layer.exchanged, images, dtype)


def _run(layer, x, weight, transposed, bias, y, e, argmax):
    images, dtype = len(x), x.dtype
    g, terms, tasks, block_words, panels, panel_words = _plan(layer, images, e.pool_h)
    threads = get_num_threads()
    packed = scratch("split weights", (panels, panel_words), np.int32)
    finite = scratch("split weights are finite", panels, np.bool_)
    flat = weight.reshape(-1)
    parts = min(part_count(panels, 8 * packed.nbytes), threads)
    rooms = scratch("sums", (threads, SQUARES + BLOCK * BLOCK), dtype)
    _pack(parts, flat, int(transposed), g.channels, g.filters, rooms, packed, finite)
    parts = min(part_count(tasks, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE), threads)
    blocks = scratch("split pixels", (parts, block_words), np.int32)
    again = scratch("split weights again", (parts, panel_words), np.int32)
    size = max(g.block_images, 1) * g.block_rows * e.out_w * e.pool_w * BLOCK
    zs = scratch("rows", (parts, max(size, 1)), dtype)
    biases = NOTHING[dtype] if bias is None else bias
    _correlate(
        parts,
        x.reshape(-1),
        flat,
        int(transposed),
        packed,
        finite,
        biases,
        y.reshape(-1),
        g,
        terms,
        CONFIGURATION,
        blocks,
        again,
        rooms,
        e,
        window_taps(e, BLOCK),
        argmax.reshape(-1),
        zs,
    )


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`."""
    column = column_of_pixels(layer, len(x)) if not e.pool_h else layer
    if column is not layer:
        layer, x = column, x.reshape(1, *column.image, column.channels)
    _run(layer, x, weight, False, bias, y, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    column = column_of_pixels(layer, len(dout))
    if column is not layer:
        layer, dout = column, dout.reshape(1, *column.out_image, column.filters)
    _run(layer.exchanged, dout, weight, True, None, dx, NO_EPILOGUE, NOWHERE)
