"""The gradient to an input of few channels, which do not fill vectors.

For each output pixel, one product gives its share in all inputs under its window: dout (F) times the weights
(F, kH * kW * C), whose columns are dense. The shares are added where windows overlap, in a block of input
rows that stays in the cache. That is Dumoulin & Visin's transposed convolution (2016, section 4) as a product
and col2im, in small pieces.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd
from .direct import Layer
from .image_tiles import gather_images
from .simd import TILE_ROWS, TILE_VECTORS
from .tile import Emitter, overwrite_panel, overwrite_ranges
from .vectors import lanes_of
from .workspace import clear, copy, scratch

# Bytes of a block of sums, which should stay in the second-level cache, and of a chunk of products, which
# should stay in the first-level cache.
_SUMS_BYTES = 128 * 1024
_PRODUCTS_BYTES = 24 * 1024
_MOST_PIXELS = 128
# Blocks that a batch is cut into at least, if they then have some rows that no other block needs too.
_BLOCKS = 16
_EXTENTS = 4
# Multiply-adds that take about as long as moving one byte: the unit of part_count.
_MULTIPLY_ADDS_PER_BYTE = 10


class Sizes(NamedTuple):
    """The integers that the compiled driver reads; lengths are in elements."""

    in_h: int  # input rows of an image
    in_row: int  # an input row
    out_h: int
    out_w: int
    pitch: int  # a row of sums, with the padding
    left: int  # before the first input in a row of sums
    line: int  # the products of a pixel
    step: int  # pixels that share no vector of sums are so many apart


class Shares(NamedTuple):
    """What the compiled driver reads; offsets are in elements."""

    blocks: np.ndarray  # (_, 6): first, last + 1 input row; the same of output rows; see _blocks
    pixels: np.ndarray  # offset in dout of each pixel of a chunk
    products: np.ndarray  # and of its products
    filters: np.ndarray  # 0, 1, 2...
    places: np.ndarray  # offset in the sums of each output pixel of a block
    pieces: np.ndarray  # (_, 3): of a pixel's products, to the sums, from the products, elements
    sizes: Sizes


@intrinsic
def _add_vector(typing_context, target, t0, source, s0, count):
    """target[t0 + i] += source[s0 + i] for i < count, at most one vector; as many of target are rewritten."""

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, target.dtype)
        to, values = (context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 2))
        place = emit.at(to.data, arguments[1])
        value = emit.load(emit.at(values.data, arguments[3]), emit.mask(arguments[4], 0))
        emit.store(builder.fadd(emit.load(place), value), place)
        return context.get_dummy_value()

    return types.void(target, t0, source, s0, count), codegen


@kernel
def _pack(weight, depth, width, memory):
    """The weights as panels of columns (kh, kw, c), a panel's width in each, of rows f."""
    lanes, columns = lanes_of(weight), weight.size // depth
    for first in range(0, columns, lanes):
        # Squares that reach beyond their panel are written before the next one is.
        target = first // width * width * depth + first % width
        for f in range(0, depth, lanes):
            gather_images(weight, f, depth, first, columns, depth - f, memory, target + f * width, width)


@kernel
def _multiply(dout, d0, of, count, weights, start, products):
    """The products of `count` pixels' gradients with all weights: a line for each pixel, behind a tile's.

    Meanwhile a cache fetches as many pixels' gradients that follow.
    """
    depth, line, width = of.filters.size, of.sizes.line, start.size
    # The last tile begins earlier than it would, in place of reading past the end.
    whole, rest = count // TILE_ROWS * TILE_ROWS, count - TILE_ROWS
    row, col, crow = of.pixels, of.filters, of.products
    panels = (line + width - 1) // width
    ahead = dout[d0 + count * depth : d0 + 2 * count * depth]
    for p in range(panels):
        c0, b0 = TILE_ROWS * line + p * width, p * depth * width
        many = min(line - p * width, width)
        lo, hi = span(p, panels, ahead.size)
        overwrite_ranges(
            dout,
            d0,
            row,
            col,
            0,
            whole,
            depth,
            col[:0],
            weights,
            b0,
            width,
            start,
            0,
            products,
            c0,
            crow,
            many,
            ahead[lo:hi],
        )
        if whole < count:
            d, c = d0 + rest * depth, c0 + rest * line
            overwrite_panel(
                dout, d, row, col, 0, 1, depth, weights, b0, width, start, 0, products, c, crow, many
            )


@kernel
def _add_windows(products, of, q, count, down, sums):
    """Add the lines of pixels q to q + count where their windows lie."""
    size = of.sizes
    # Neighbours' windows overlap: what was stored last is not read next.
    for first in range(size.step):
        for pixel in range(first, count, size.step):
            t0 = of.places[q + pixel] + down * size.pitch
            s0 = (TILE_ROWS + pixel) * size.line
            for k in range(len(of.pieces)):
                t, s, many = of.pieces[k, 0], of.pieces[k, 1], of.pieces[k, 2]
                _add_vector(sums, t0 + t, products, s0 + s, many)


@parallel
def _scatter(part, parts, dout, images, weight, dx, of, all_products, all_sums, memory):
    """dx, overwritten; each part packs the weights, which are few, for itself."""
    keep_out_of_line()
    products, sums = all_products[part], all_sums[part]
    size, depth = of.sizes, of.filters.size
    width = TILE_VECTORS * lanes_of(dout)
    start, weights = memory[part, :width], memory[part, width:]
    clear(start, 0, width)
    _pack(weight, depth, width, weights)
    lo, hi = span(part, parts, images * len(of.blocks))
    for task in range(lo, hi):
        n = task // len(of.blocks)
        block = of.blocks[task - n * len(of.blocks)]
        h0, h1, i0, i1, top, down = block[0], block[1], block[2], block[3], block[4], block[5]
        clear(sums, 0, sums.size)
        outputs = (i1 - i0) * size.out_w
        for q in range(0, outputs, of.pixels.size):
            count = min(of.pixels.size, outputs - q)
            d0 = ((n * size.out_h + i0) * size.out_w + q) * depth
            _multiply(dout, d0, of, count, weights, start, products)
            _add_windows(products, of, q, count, down, sums)
        for h in range(h0, h1):
            copy(sums, (h - top) * size.pitch + size.left, dx, (n * size.in_h + h) * size.in_row, size.in_row)


def _runs(layer: Layer) -> tuple[int, int]:
    """Runs of products that are neighbours in the sums too, for each row of the kernel; elements of one."""
    runs = 1 if layer.columns.dilation == 1 else layer.columns.kernel
    return runs, layer.columns.kernel // runs * layer.channels


def _pieces(layer: Layer, pitch: int, lanes: int) -> list[tuple[int, int, int]]:
    """A pixel's products, cut into vectors that are added at one place."""
    runs, run = _runs(layer)
    targets = [
        row * layer.rows.dilation * pitch + r * layer.columns.dilation * layer.channels
        for row in range(layer.rows.kernel)
        for r in range(runs)
    ]
    return [
        (target + v, i * run + v, min(lanes, run - v))
        for i, target in enumerate(targets)
        for v in range(0, run, lanes)
    ]


def _blocks(layer: Layer, images: int, row_bytes: int) -> list[tuple[int, int, int, int, int, int]]:
    """Input rows, the output rows that they have a share in, and where both begin in the sums, in rows."""
    side = layer.rows
    extent = side.dilation * (side.kernel - 1) + 1
    rows = min(_SUMS_BYTES // row_bytes, -(-side.size * images // _BLOCKS))
    rows = min(max(rows, _EXTENTS * extent), side.size)
    blocks = []
    for h0 in range(0, side.size, rows):
        h1 = min(h0 + rows, side.size)
        i0 = max(0, -(-(h0 + side.padding[0] - extent + 1) // side.stride))
        i1 = max(i0, min(side.outputs, -(-(h1 + side.padding[0]) // side.stride)))
        first = i0 * side.stride - side.padding[0]
        top = min(first, h0)
        blocks.append((h0, h1, i0, i1, top, first - top))
    return blocks


@lru_cache(maxsize=512)
def _shares(layer: Layer, images: int, dtype: np.dtype) -> tuple[Shares, int, int]:
    """The tables, and the elements that a block of sums and packed weights take."""
    rows, columns = layer.rows, layer.columns
    lanes = simd.lanes(dtype)
    extents = [side.dilation * (side.kernel - 1) + 1 for side in (rows, columns)]
    width = max((columns.outputs - 1) * columns.stride + extents[1], columns.padding[0] + columns.size)
    pitch = width * layer.channels
    blocks = np.array(_blocks(layer, images, pitch * dtype.itemsize))
    ends = np.maximum((blocks[:, 3] - 1) * rows.stride - rows.padding[0] + extents[0], blocks[:, 1])
    height = int((ends - blocks[:, 4]).max())
    most = int((blocks[:, 3] - blocks[:, 2]).max())
    line = -(-rows.kernel * columns.kernel * layer.channels // lanes) * lanes
    panel = simd.panel_width(dtype)
    packed = panel + (-(-line // panel) * layer.filters + lanes) * panel
    chunk = max(_PRODUCTS_BYTES // (line * dtype.itemsize), 1)
    chunk = min(-(-chunk // TILE_ROWS) * TILE_ROWS, _MOST_PIXELS)
    step = -(-_runs(layer)[1] // lanes) * lanes // (columns.stride * layer.channels) + 1
    pixels = np.arange(chunk)
    shares = Shares(
        blocks,
        pixels * layer.filters,
        pixels * line,
        np.arange(layer.filters),
        np.add.outer(
            np.arange(most) * rows.stride * pitch,
            np.arange(columns.outputs) * columns.stride * layer.channels,
        ).ravel(),
        np.array(_pieces(layer, pitch, lanes)),
        Sizes(
            rows.size,
            columns.size * layer.channels,
            rows.outputs,
            columns.outputs,
            pitch,
            columns.padding[0] * layer.channels,
            line,
            step,
        ),
    )
    return shares, height * pitch + lanes, packed


def suits(layer: Layer, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is best computed from shares."""
    lanes = simd.lanes(dtype)
    outputs = layer.out_image[0] * layer.out_image[1]
    if layer.groups > 1 or layer.channels > lanes or min(outputs, layer.out_image[1]) < TILE_ROWS:
        return False
    return cycles(layer, dtype) < layer.multiply_adds / layer.channels


def cycles(layer: Layer, dtype: np.dtype) -> float:
    """What an image costs, about."""
    lanes = simd.lanes(dtype)
    runs, run = _runs(layer)
    vectors = -(-layer.rows.kernel * layer.columns.kernel * layer.channels // lanes)
    # One for each multiply-add, two for a store, three for an addition in memory; half as much for misses.
    shares = vectors * (layer.filters + 2) + 3 * layer.rows.kernel * runs * -(-run // lanes)
    return 1.5 * layer.out_image[0] * layer.out_image[1] * shares


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input; see `suits`."""
    images = len(dout)
    dtype = dout.dtype
    of, sums, packed = _shares(layer, min(images, _BLOCKS), dtype)
    parts = part_count(images * len(of.blocks), images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)
    products = scratch("products", (parts, (of.pixels.size + TILE_ROWS) * of.sizes.line), dtype)
    windows = scratch("windows", (parts, sums), dtype)
    memory = scratch("weights", (parts, packed), dtype)
    _scatter(parts, dout.ravel(), images, weight.ravel(), dx.ravel(), of, products, windows, memory)
