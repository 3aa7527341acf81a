"""Direct convolution on the matrix unit: forward, and backward to the input, where there is one.

The pixels lie as `split_grid` says: the unit reads its rows of factors, one for each pixel, where they are,
and results of pixels that are none, one for each row of the image or a few, are dropped.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
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
    TERMS,
    WORDS,
    multiply,
    write_sums,
)
from .pieces import clear_all
from .split import SQUARES, pack_panel, pack_rows, pack_turned_panel, words_of_panel
from .split_grid import (
    Plan,
    backward_axes,
    block_of,
    blocks_of,
    fits,
    forward_axis,
    gain,
    phases_of,
    plan,
)
from .vectors import pointer
from .workspace import NOTHING, NOWHERE, clear, scratch

# What is multiplied for each number that is packed or written, so that the unit repays it; and in all.
_LEAST_GAIN = 62
_LEAST_WORK = 1 << 21
_MULTIPLY_ADDS_PER_BYTE = 20


@kernel
def _pack_block(x, g, phases, block, tame, packed):
    """Split the pixels of a block, and those that they see; whether all are finite. See `Plan`."""
    n, many, first, rows = block
    finite = True
    words = pointer(packed)
    line, pitch = g.width * g.pixel, g.step_w * g.channels
    for p in range(len(phases)):
        h0, w0, tall, wide, top, left = phases[p]
        place = (p * g.phase + left) * g.pixel
        clear(packed, p * g.phase * g.pixel, left * g.pixel)
        filled = wide * g.pixel
        for i in range((many - 1) * g.height + rows + g.reach):
            row = first - top + i
            image = n + row // g.height
            h = row - row // g.height * g.height
            if h < tall and n <= image < n + many:
                source = ((image * g.image_h + h0 + h * g.step_h) * g.image_w + w0) * g.channels
                finite &= pack_rows(
                    x, source, pitch, wide, g.channels, tame, words, place, g.pixel, ROW_WORDS
                )
                clear(packed, place + filled, line - filled)
            else:
                clear(packed, place, line)
            place += line
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
    place = g.y_first + n * g.y_image + first * g.y_line + column
    return pointer(y), place, g.y_pixel, g.y_line, g.y_image, rows, g.out_w


@kernel
def _finish(z, g, e, pool, block, column, columns, y, argmax):
    """Pool what a panel of a block wrote to `z`."""
    n, many, first, rows = block
    image = g.block_rows * e.out_w * e.pool_w * BLOCK
    for i in range(many):
        place = ((n + i) * e.out_h + first // e.pool_h) * e.out_w * e.filters + column
        finish_panel(z[i * image :], BLOCK, rows // e.pool_h, e, pool, y, place, argmax, columns)


@kernel
def _pack_weights(weight, transposed, inner, outer, taps, p, tame, squares, packed, place):
    """Some taps of a panel of the filters, or if `transposed` of the channels; whether all are finite."""
    size = (inner + TERMS - 1) // TERMS * PANEL_WORDS
    first = p * BLOCK
    many = min(outer - first, BLOCK)
    finite = True
    for k in range(taps.size):
        target = place + k * size
        if transposed:
            source = (taps[k] * outer + first) * inner
            finite &= pack_turned_panel(weight, source, inner, inner, many, tame, squares, packed, target)
        else:
            source = taps[k] * inner * outer + first
            finite &= pack_panel(pointer(weight), source, outer, inner, many, tame, pointer(packed), target)
    return finite


@parallel
def _pack(part, parts, weight, transposed, inner, outer, taps, rooms, packed, finite):
    keep_out_of_line()
    lo, hi = span(part, parts, len(packed))
    for p in range(lo, hi):
        room = rooms[part]
        finite[p] = _pack_weights(weight, transposed, inner, outer, taps, p, False, room, packed[p], 0)


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
    phases,
    taps,
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
        block_finite = _pack_block(pixels, g, phases, block, False, image)
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
                    _pack_block(pixels, g, phases, block, True, image)
                    _pack_weights(
                        weight, transposed, g.channels, g.filters, taps, panel, True, room, again, 0
                    )
                    weights, adds = pointer(again), True
                _sum_panel(
                    pointer(image), g, outputs, terms, weights, which, of_bias, target, columns, adds, sums
                )
                which = OTHERS if which == LEADING else -1
            if not both:
                _pack_block(pixels, g, phases, block, False, image)
            if e.pool_h > 0:
                _finish(z, g, e, pool, block, column, columns, y, argmax)
    matrix_unit.end()


class _Job(NamedTuple):
    plan: Plan
    terms: np.ndarray
    tasks: int
    panels: int
    panel_words: int


def _job(of: Plan) -> _Job:
    g = of.grid
    terms = np.add.outer(of.places * g.pixel, np.arange(g.pixel // ROW_WORDS) * ROW_WORDS).ravel()
    cuts = 1 if g.block_images else -(-g.out_h // g.block_rows)
    blocks = -(-g.images // max(g.block_images, 1)) * cuts
    panels = -(-g.filters // BLOCK)
    return _Job(of, terms, blocks * panels, panels, words_of_panel(g.channels) * of.taps.size)


@lru_cache(maxsize=512)
def _forward_job(layer: Layer, images: int, pool_h: int) -> _Job:
    axes = forward_axis(layer.rows), forward_axis(layer.columns)
    sizes = images, layer.channels, layer.filters
    return _job(plan(layer, axes, sizes, layer.out_image, max(pool_h, 1)))


@lru_cache(maxsize=512)
def _backward_jobs(layer: Layer, images: int) -> list[_Job]:
    sizes = images, layer.filters, layer.channels
    every = product(backward_axes(layer.rows), backward_axes(layer.columns))
    return [_job(plan(layer, axes, sizes, layer.image, 1)) for axes in every]


@lru_cache(maxsize=1024)
def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's forward pass is faster there."""
    repays = gain(layer, layer.channels, layer.filters, phases_of(layer), 2) >= _LEAST_GAIN
    return repays and images * layer.multiply_adds >= _LEAST_WORK and fits(layer, dtype)


@lru_cache(maxsize=1024)
def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's gradient to its input is faster there."""
    met = phases_of(layer)
    # What no tap meets is cleared.
    written = 2 * met + (layer.rows.stride * layer.columns.stride - met) / 2
    repays = gain(layer, layer.filters, layer.channels, met, written) >= _LEAST_GAIN
    return repays and images * layer.multiply_adds >= _LEAST_WORK and fits(layer, dtype)


def _run(job, x, weight, transposed, bias, y, e, argmax):
    (g, phases, taps, _), terms, tasks, panels, panel_words = job
    dtype, threads = x.dtype, get_num_threads()
    packed = scratch("split weights", (panels, panel_words), np.int32)
    finite = scratch("split weights are finite", panels, np.bool_)
    flat = weight.reshape(-1)
    parts = min(part_count(panels, 8 * packed.nbytes), threads)
    rooms = scratch("sums", (threads, SQUARES + BLOCK * BLOCK), dtype)
    _pack(parts, flat, int(transposed), g.channels, g.filters, taps, rooms, packed, finite)
    work = g.images * g.out_h * g.out_w * g.channels * g.filters * taps.size / _MULTIPLY_ADDS_PER_BYTE
    parts = min(part_count(tasks, work), threads)
    blocks = scratch("split pixels", (parts, len(phases) * g.phase * g.pixel), np.int32)
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
        phases,
        taps,
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
    _run(_forward_job(layer, len(x), e.pool_h), x, weight, False, bias, y, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    column = column_of_pixels(layer, len(dout))
    if column is not layer:
        layer, dout = column, dout.reshape(1, *column.out_image, column.filters)
    jobs = _backward_jobs(layer, len(dout))
    if len(jobs) < min(layer.rows.stride, layer.image[0]) * min(layer.columns.stride, layer.image[1]):
        # What no tap meets.
        clear_all(dx)
    for job in jobs:
        _run(job, dout, weight, True, None, dx, NO_EPILOGUE, NOWHERE)
