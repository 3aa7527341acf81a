"""How convolutions on the matrix unit are laid out: phases of the image, blocks of rows, and where taps see.

The pixels of a block of rows are split and laid out in one row, with zeros between the rows of the image and
between images, which both neighbours share as padding. A tap is then the same step for every pixel.

With a stride, taps see every other pixel: those of a phase. The phases lie one behind the other, each as if
it were an image; the gradient to the input is computed phase by phase, from the taps that meet it.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from ..jit import kernel
from . import matrix_unit
from .direct import Layer, Side, column_of_pixels
from .matrix_unit import BLOCK, ROW_WORDS, SIDE, TERMS

# Of a block's split pixels, which stay in the second-level cache with a panel of weights.
_BLOCK_BYTES = 640 << 10
# Rows so long that a block of one leaves that cache are done by the vectors.
_MOST_BYTES = 2 << 20


class Phase(NamedTuple):
    """Every so many pixels along an axis, and the taps that meet them."""

    first: int
    pixels: int
    before: int  # zeros before them
    taps: tuple[int, ...]
    places: tuple[int, ...]  # where each of the taps sees them, from an output's place on

    @property
    def reach(self) -> int:
        """The last place."""
        return max(self.places)


class Axis(NamedTuple):
    """A convolution along one axis, as its phases."""

    size: int  # of the input, whose pixels are `step` apart in each phase
    step: int
    phases: tuple[Phase, ...]
    outputs: int
    first: int  # where these are written, and how far apart
    apart: int

    @property
    def reach(self) -> int:
        """The last place that a tap sees."""
        return max(phase.reach for phase in self.phases)

    @property
    def pitch(self) -> int:
        """Pixels from one image, or row of it, to the next, which shares the zeros between them."""
        ends = [(of.pixels, of.before, self.outputs + of.reach - of.before - of.pixels) for of in self.phases]
        return max(self.outputs, *(pixels + max(before, after) for pixels, before, after in ends))


def forward_axis(side: Side) -> Axis:
    """A layer's forward pass along an axis."""
    phases = []
    for first, count, taps, shifts in _meetings(side):
        before = max(0, -min(shifts))
        phases.append(Phase(first, count, before, taps, tuple(before + shift for shift in shifts)))
    return Axis(side.size, side.stride, tuple(phases), side.outputs, 0, 1)


def backward_axes(side: Side) -> list[Axis]:
    """A layer's gradient to each phase of its input that some tap meets."""
    axes = []
    for first, count, taps, shifts in _meetings(side):
        before = max(0, *shifts)
        seen = Phase(0, side.outputs, before, taps, tuple(before - shift for shift in shifts))
        if count:
            axes.append(Axis(side.outputs, 1, (seen,), count, first, side.stride))
    return axes


def _meetings(side: Side) -> list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]:
    """Phases of the input that taps meet: first pixel, number, taps, and pixels from an output to a tap."""
    meet: dict[int, list[tuple[int, int]]] = {}
    for tap in range(side.kernel):
        shift, phase = divmod(tap * side.dilation - side.padding[0], side.stride)
        meet.setdefault(phase, []).append((tap, shift))
    of_phase = []
    for first, seen in sorted(meet.items()):
        taps, shifts = zip(*seen, strict=True)
        of_phase.append((first, max(-(-(side.size - first) // side.stride), 0), taps, shifts))
    return of_phase


class Grid(NamedTuple):
    """Sizes of a convolution whose pixels lie in rows of `width`, and images in `height` such rows."""

    images: int
    image_h: int
    image_w: int
    channels: int
    step_h: int  # from a pixel of a phase to the next in the image
    step_w: int
    out_h: int
    out_w: int
    filters: int
    reach: int  # rows of the input that an output sees beside its first
    width: int
    height: int
    block_images: int  # whole images of a block, or 0
    block_rows: int  # else rows of one image
    pixel: int  # words of a split pixel
    phase: int  # pixels from one phase to the next
    y_first: int  # elements to the first output, from one pixel of them to the next, row and image
    y_pixel: int
    y_line: int
    y_image: int


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


class Plan(NamedTuple):
    """What a convolution's kernels read beside its arrays."""

    grid: Grid
    phases: np.ndarray  # first row and column, rows and columns, zeros above and to the left
    taps: np.ndarray  # phase by phase
    places: np.ndarray  # pixels from an output's place to where each of the taps sees


def plan(
    layer: Layer,
    axes: tuple[Axis, Axis],
    sizes: tuple[int, int, int],
    out_image: tuple[int, int],
    pool_h: int,
) -> Plan:
    """One of a layer's passes; its sizes are the numbers of images, channels and filters.

    Blocks are whole images, as many as fit the cache, or else rows of one, whole windows of a pool.
    """
    (rows, columns), (images, channels, filters) = axes, sizes
    pixel = -(-channels // TERMS) * ROW_WORDS
    both = list(product(rows.phases, columns.phases))
    fitting = max(_BLOCK_BYTES // (4 * pixel * columns.pitch * len(both)), 1)
    block_images = min(max(fitting - rows.reach, 0) // rows.pitch, images)
    block_rows = rows.outputs
    if not block_images:
        cuts = -(-rows.outputs // max(fitting - rows.reach, 1))
        block_rows = -(-rows.outputs // (cuts * pool_h)) * pool_h
    tall = (max(block_images, 1) - 1) * rows.pitch + block_rows + rows.reach
    # Registers of rows reach beyond the last pixel.
    phase = max(of.before for of in columns.phases) + tall * columns.pitch + BLOCK + columns.reach
    line = out_image[1] * filters
    image = images, rows.size, columns.size, channels, rows.step, columns.step
    out = rows.outputs, columns.outputs, filters
    blocks = rows.reach, columns.pitch, rows.pitch, block_images, block_rows, pixel, phase
    written = rows.first * line + columns.first * filters, columns.apart * filters, rows.apart * line
    taps, places = [], []
    for number, (r, c) in enumerate(both):
        for kh, h in zip(r.taps, r.places, strict=True):
            for kw, w in zip(c.taps, c.places, strict=True):
                taps.append(kh * layer.columns.kernel + kw)
                places.append(number * phase + h * columns.pitch + w)
    return Plan(
        Grid(*image, *out, *blocks, *written, out_image[0] * line),
        np.array([(r.first, c.first, r.pixels, c.pixels, r.before, c.before) for r, c in both], np.intp),
        np.array(taps, np.intp),
        np.array(places, np.intp),
    )


def gain(layer: Layer, channels: int, filters: int, packed: float, written: float) -> float:
    """Useful multiply-adds of an output for each number of it that is packed or written, by these weights."""
    if not channels * filters:
        return 0
    used = channels / (-(-channels // TERMS) * TERMS) * filters / (-(-filters // SIDE) * SIDE)
    taps = layer.rows.kernel * layer.columns.kernel
    return taps * channels * filters * used / (packed * channels + written * filters)


def phases_of(layer: Layer) -> int:
    """Phases of the input that taps meet."""
    return len(_meetings(layer.rows)) * len(_meetings(layer.columns))


def fits(layer: Layer, dtype: np.dtype) -> bool:
    """Whether a layer's passes can be taken to the matrix unit."""
    sides = layer.rows, layer.columns
    if dtype != np.float32 or layer.groups != 1 or min(*sides[0].padding, *sides[1].padding) < 0:
        return False
    of = column_of_pixels(layer, 1)
    rows, columns = forward_axis(of.rows), forward_axis(of.columns)
    # Split pixels that one row of the results sees.
    pixels = phases_of(of) * columns.pitch * (rows.reach + 1)
    return 4 * pixels * -(-layer.channels // TERMS) * ROW_WORDS <= _MOST_BYTES and matrix_unit.is_there()
