"""Gradient of a convolution's weights on the matrix unit, where there is one.

As in `split_direct` the pixels of a block lie in one row, with zeros between, so that a tap is the same step
for each. Here they are the terms: the image is turned, channel by channel, and a tap is a register of terms
that begins some pixels further on. The gradients of pixels that are none are zero.

A task is some channels, some filters and some taps, whose sums it keeps while it goes through all images: no
sum depends on how tasks are cut. If there are few sums, the images are cut in pieces, too, by their sizes
alone, and what the pieces sum is added up afterwards.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import get_num_threads, parallel, part_count, span
from . import matrix_unit
from .direct import Layer
from .matrix_unit import ALL, BLOCK, CONFIGURATION, LEADING, OTHERS, SIDE, TERMS, multiply, write_sums
from .pieces import blocks, span_elements
from .split import SQUARES, pack_channels, pack_pixels, words_of_panel
from .split_grid import Grid, block_of, blocks_of, fits, forward_axis, gain, phases_of, plan
from .vectors import pointer
from .workspace import clear, scratch

# So many numbers of 16 bits in a line of a cache; rows an even number of lines apart would meet in few sets.
_LINE = 32
# Pieces of the images, of so few sums.
_PIECES = 8
_FEW_RESULTS = 20_000
# What is multiplied for each number that is packed, so that the unit repays it.
_LEAST_GAIN = 60
_LEAST_WORK = 1 << 22
_MULTIPLY_ADDS_PER_BYTE = 20


class Cut(NamedTuple):
    """How many channels, panels of filters and taps a task has; and how its pixels lie."""

    pieces: int  # of the images
    channels: int
    panels: int
    taps: int
    pitch: int  # numbers of 16 bits from one channel to the next, and from one part to the next
    part: int
    kernel_w: int
    dilation_h: int
    dilation_w: int
    top: int  # zeros above and to the left of an image
    left: int


class Task(NamedTuple):
    """A piece of the images; the first of some channels, filters and taps, and how many they are."""

    piece: int
    channel: int
    channels: int
    filter: int
    filters: int
    tap: int
    taps: int


@kernel
def _task(g, cut, taps, number):
    tap_cuts = (taps + cut.taps - 1) // cut.taps
    panels = (g.filters + BLOCK - 1) // BLOCK
    panel_cuts = (panels + cut.panels - 1) // cut.panels
    channel_cuts = (g.channels + cut.channels - 1) // cut.channels
    c = number // (panel_cuts * tap_cuts) % channel_cuts * cut.channels
    f = number // tap_cuts % panel_cuts * cut.panels * BLOCK
    tap = number % tap_cuts * cut.taps
    channels, filters = min(g.channels - c, cut.channels), min(g.filters - f, cut.panels * BLOCK)
    piece = number // (panel_cuts * tap_cuts * channel_cuts)
    return Task(piece, c, channels, f, filters, tap, min(taps - tap, cut.taps))


@kernel
def _pack_image(x, g, phases, cut, block, task, tame, squares, packed):
    """Turn a task's channels of a block of pixels, see `split_grid`; whether all are finite."""
    finite = True
    for p in range(len(phases)):
        finite &= _pack_phase(x, g, phases[p], p * g.phase, cut, block, task, tame, squares, packed)
    return finite


@kernel
def _pack_phase(x, g, phase, begin, cut, block, task, tame, squares, packed):
    h0, w0, tall, wide, top, left = phase
    n, many, first, rows = block
    pixel = g.step_w * g.channels
    finite = True
    for i in range((max(g.block_images, 1) - 1) * g.height + g.block_rows + g.reach):
        row = first - top + i
        image = n + row // g.height
        h = row - row // g.height * g.height
        there = h < tall and n <= image < n + many and i < (many - 1) * g.height + rows + g.reach
        source = ((image * g.image_h + h0 + h * g.step_h) * g.image_w + w0) * g.channels + task.channel
        # Zeros end a row, and may begin the next one, which is written later.
        for k in range(0, g.width, TERMS):
            pixels = min(max(wide - k, 0), TERMS) if there else 0
            at = source + k * pixel if pixels > 0 else 0
            for c in range(0, task.channels, SIDE):
                some = min(task.channels - c, SIDE)
                place = c * cut.pitch + begin + left + i * g.width + k
                finite &= pack_channels(
                    x, at + c, pixel, pixels, some, tame, squares, packed, place, cut.pitch, cut.part
                )
    return finite


@kernel
def _pack_gradients(dout, g, block, task, panel, places, outputs, tame, packed):
    """A panel of a task's gradients of a block, which are `outputs` from the first to the last."""
    n, _, first, _ = block
    many = min(task.filters - panel * BLOCK, BLOCK)
    source = (n * g.out_h + first) * g.out_w * g.filters + task.filter + panel * BLOCK
    return pack_pixels(
        pointer(dout), source, g.filters, pointer(places), outputs, many, tame, pointer(packed), 0
    )


@kernel
def _add_wild(x, dout, g, cut, block, task, sums, drowned):
    """Add to a task's sums the products of what is infinite or NaN in the images with the gradients there.

    The unit would multiply it with the zeros between rows too. Where a NaN has drowned all filters of a tap
    and a channel, `drowned` says so, and no more is added there.
    """
    n, many, first, rows = block
    groups = (task.channels + BLOCK - 1) // BLOCK
    for pixel in range(n * g.image_h * g.image_w, (n + many) * g.image_h * g.image_w):
        image, h, w = pixel // (g.image_h * g.image_w), pixel // g.image_w % g.image_h, pixel % g.image_w
        for c in range(task.channels):
            value = x[pixel * g.channels + task.channel + c]
            if value - value == 0:
                continue
            for t in range(task.taps):
                # The place in the image where the output begins that sees the pixel by this tap.
                row = h + cut.top - (task.tap + t) // cut.kernel_w * cut.dilation_h
                column = w + cut.left - (task.tap + t) % cut.kernel_w * cut.dilation_w
                if row % g.step_h != 0 or column % g.step_w != 0:
                    continue
                row, column = row // g.step_h, column // g.step_w
                mark = t * task.channels + c
                if drowned[mark] or not (first <= row < first + rows and 0 <= column < g.out_w):
                    continue
                drowned[mark] = value != value
                gradient = ((image * g.out_h + row) * g.out_w + column) * g.filters + task.filter
                for f in range(task.filters):
                    group = (f // BLOCK * groups + c // BLOCK) * task.taps + t
                    place = (group * BLOCK + c % BLOCK) * BLOCK + f % BLOCK
                    sums[place] += value * dout[gradient + f]


@kernel
def _multiply_panel(image, cut, steps, terms, gradients, task, panel, which, sums):
    """Add to the sums of a panel what a block contributes; `steps` are where the taps begin."""
    columns = min(task.filters - panel * BLOCK, BLOCK)
    place = panel * ((task.channels + BLOCK - 1) // BLOCK) * task.taps * BLOCK * BLOCK
    for c in range(0, task.channels, BLOCK):
        rows = min(task.channels - c, BLOCK)
        for tap in range(task.tap, task.tap + task.taps):
            a0 = c * cut.pitch + steps[tap]
            rows_of_a = image, a0, cut.pitch, cut.part, pointer(terms), terms.size
            multiply(*rows_of_a, gradients, 0, rows, columns, which, sums, place, True)
            place += BLOCK * BLOCK


@kernel
def _write_all(sums, g, cut, task, steps, bias, dweight):
    """Add a task's sums to the gradient; or write them to that of its piece, if there are several."""
    place, begin = 0, task.piece * steps.size * g.channels * g.filters
    for f in range(0, task.filters, BLOCK):
        columns = min(task.filters - f, BLOCK)
        for c in range(0, task.channels, BLOCK):
            rows = min(task.channels - c, BLOCK)
            for tap in range(task.tap, task.tap + task.taps):
                target = begin + (tap * g.channels + task.channel + c) * g.filters + task.filter + f
                adds = cut.pieces == 1
                write_sums(sums, place, bias, 0, 0, dweight, target, g.filters, rows, columns, adds)
                place += BLOCK * BLOCK


@parallel
def _add(
    part,
    parts,
    x,
    dout,
    dweight,
    g,
    phases,
    cut,
    tasks,
    steps,
    places,
    terms,
    configuration,
    images,
    panels,
    rooms,
    marks,
):
    keep_out_of_line()
    matrix_unit.start(pointer(configuration))
    image, gradients, drowned = images[part], panels[part], marks[part]
    squares, sums = rooms[part, :SQUARES], rooms[part, SQUARES:]
    lo, hi = span(part, parts, tasks)
    for number in range(lo, hi):
        task = _task(g, cut, steps.size, number)
        clear(sums, 0, sums.size)
        clear(image, 0, image.size)
        clear(drowned, 0, drowned.size)
        first, last = span(task.piece, cut.pieces, blocks_of(g))
        for i in range(first, last):
            block = block_of(g, i)
            _, many, _, rows = block
            outputs = ((many - 1) * g.height + rows - 1) * g.width + g.out_w
            if not _pack_image(x, g, phases, cut, block, task, False, squares, image):
                _add_wild(x, dout, g, cut, block, task, sums, drowned)
                _pack_image(x, g, phases, cut, block, task, True, squares, image)
            of_block = terms[: (outputs + TERMS - 1) // TERMS]
            for panel in range((task.filters + BLOCK - 1) // BLOCK):
                which = ALL
                while which >= 0:
                    # Gradients that are infinite or NaN meet their factors first, in the leading parts, and
                    # all other parts meet theirs then.
                    finite = _pack_gradients(
                        dout, g, block, task, panel, places, outputs, which == OTHERS, gradients
                    )
                    if which == ALL and not finite:
                        which = LEADING
                    _multiply_panel(
                        pointer(image),
                        cut,
                        steps,
                        of_block,
                        pointer(gradients),
                        task,
                        panel,
                        which,
                        pointer(sums),
                    )
                    which = OTHERS if which == LEADING else -1
        _write_all(pointer(sums), g, cut, task, steps, pointer(x), pointer(dweight))
    matrix_unit.end()


@parallel
def _add_pieces(part, parts, pieces, dweight):
    """Add the sums of each piece to the gradient."""
    keep_out_of_line()
    first, last = span_elements(part, parts, dweight.size)
    results = dweight[first:last]
    for piece in range(len(pieces)):
        values = pieces[piece, first:last]
        for i in range(results.size):
            results[i] += values[i]


class _Plan(NamedTuple):
    grid: Grid
    phases: np.ndarray
    cut: Cut
    tasks: int
    steps: np.ndarray  # where each tap begins
    places: np.ndarray  # of a block's outputs, among them; or -1
    terms: np.ndarray


@lru_cache(maxsize=512)
def _plan(layer: Layer, images: int, threads: int) -> _Plan:
    rows, columns = layer.rows, layer.columns
    axes = forward_axis(rows), forward_axis(columns)
    of = plan(layer, axes, (images, layer.channels, layer.filters), layer.out_image, 1)
    g, steps = of.grid, of.places[np.argsort(of.taps)]
    pieces = _PIECES if len(steps) * layer.channels * layer.filters <= _FEW_RESULTS else 1
    if g.block_images:
        g = g._replace(block_images=min(g.block_images, -(-images // pieces)))
    tall = max(g.block_images, 1)
    pieces = min(pieces, -(-images // tall) * (1 if g.block_images else -(-g.out_h // g.block_rows)))
    outputs = ((tall - 1) * g.height + g.block_rows - 1) * g.width + g.out_w
    place = np.arange(-(-outputs // TERMS) * TERMS)
    row, column = np.divmod(place, g.width)
    image, h = np.divmod(row, g.height)
    there = (column < g.out_w) & (h < g.block_rows) & (place < outputs)
    places = np.where(there, (image * g.out_h + h) * g.out_w + column, -1)
    part = -(-max(len(of.phases) * g.phase, len(place) + int(steps.max())) // _LINE) * _LINE
    pitch = 3 * part
    pitch += _LINE * (1 - pitch // _LINE % 2)
    # Channels are cut first: the others' gradients are packed again, which is less than to turn the image.
    groups, panels, taps = -(-layer.channels // BLOCK), -(-layer.filters // BLOCK), len(steps)
    shares = -(-threads // pieces)
    cuts = [min(groups, shares), 1, 1]
    for axis, most in ((1, panels), (2, taps)):
        cuts[axis] = min(most, -(-shares // (cuts[0] * cuts[1])))
    cut = Cut(
        pieces,
        -(-groups // cuts[0]) * BLOCK,
        -(-panels // cuts[1]),
        -(-taps // cuts[2]),
        pitch,
        part,
        columns.kernel,
        rows.dilation,
        columns.dilation,
        rows.padding[0],
        columns.padding[0],
    )
    tasks = pieces * -(-layer.channels // cut.channels) * -(-panels // cut.panels) * -(-taps // cut.taps)
    return _Plan(g, of.phases, cut, tasks, steps, places, np.arange(len(place) // TERMS) * TERMS)


@lru_cache(maxsize=1024)
def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's gradient of the weights is faster on the matrix unit."""
    phases = phases_of(layer)
    # Rows of several phases would be turned in registers that are less than half full.
    if phases > 1 and 2 * layer.out_image[1] < TERMS:
        return False
    repays = gain(layer, layer.channels, layer.filters, 2 * phases, 1) >= _LEAST_GAIN
    return repays and images * layer.multiply_adds >= _LEAST_WORK and fits(layer, dtype)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    of = _plan(layer, len(x), get_num_threads())
    g, cut, dtype = of.grid, of.cut, x.dtype
    work = len(x) * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE
    parts = min(part_count(of.tasks, work), of.tasks, get_num_threads())
    channels = -(-min(cut.channels, layer.channels) // BLOCK) * BLOCK
    images = scratch("turned pixels", (parts, channels * cut.pitch), np.int16)
    panels = scratch("split panel", (parts, words_of_panel(len(of.places))), np.int32)
    sums = channels * cut.panels * BLOCK * cut.taps
    rooms = scratch("sums", (parts, SQUARES + sums), dtype)
    marks = scratch("drowned", (parts, channels * cut.taps), np.bool_)
    flat = dweight.reshape(-1)
    apart = scratch("pieces", (cut.pieces, flat.size), dtype) if cut.pieces > 1 else flat.reshape(1, -1)
    _add(
        parts,
        x.reshape(-1),
        dout.reshape(-1),
        apart.reshape(-1),
        g,
        of.phases,
        cut,
        of.tasks,
        of.steps,
        of.places,
        of.terms,
        CONFIGURATION,
        images,
        panels,
        rooms,
        marks,
    )
    if cut.pieces > 1:
        _add_pieces(part_count(blocks(flat.size), apart.nbytes), apart, flat)
