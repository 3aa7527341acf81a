"""Convolutions of few pixels.

A layer deep in a network sees one small image with megabytes of weights: their way through the memory is all
that counts. Forward reads each of them once, where it lies and in the order in which it lies, a block of
channels of one tap after another. All pixels' sums stay in the nearest caches, a block is multiplied with the
pixels that its tap sees, none of them in the padding, and meanwhile the next block arrives. With few weights
it is all that is spared that counts: no window is copied and no weight packed.

Backward is, for many weights, a matrix product with the pixels' columns, which a direct convolution avoids:
they are small beside the weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from . import simd, winograd
from .columns import col2im, im2col
from .direct import MULTIPLY_ADDS_PER_BYTE, NOWHERE, Layer
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .linear import linear_backward_input, linear_backward_weight
from .simd import TILE_ROWS, VECTOR_BITS
from .tile import TALL_ROWS, add_rows, add_tiles, padded_rows
from .vectors import pointer, prefetch
from .winograd import panel_filters
from .workspace import copy, scratch, set_start

# With more pixels direct convolution takes less time; with few channels the sums of a block are short.
_MOST_PIXELS = 256
_FEW_CHANNELS, _MOST_PIXELS_OF_FEW_CHANNELS = 8, 64
# Where there is Winograd's algorithm, it does the more pixels of more channels times filters.
_MOST_PIXELS_BESIDE_WINOGRAD = 144
_MOST_WEIGHTS_BESIDE_WINOGRAD = 1 << 10
# With fewer weights direct convolution takes less time backward.
_FEWEST_WEIGHTS = 1 << 17
# Channels of a block: enough to repay reading and writing the sums, and few enough that the next block fits
# the second-level cache too.
_CHANNELS = 64


class Sizes(NamedTuple):
    """The integers that the compiled driver reads."""

    images: int
    pixels: int  # of all images that are summed: those that are pooled, or all
    filters: int
    panels: int  # of filters
    panel: int  # filters in one


def suits_forward(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer has few enough pixels, beside Winograd's algorithm too."""
    most = _MOST_PIXELS if layer.channels >= _FEW_CHANNELS else _MOST_PIXELS_OF_FEW_CHANNELS
    if layer.channels * layer.filters > _MOST_WEIGHTS_BESIDE_WINOGRAD and winograd.suits(
        layer, images, dtype
    ):
        most = _MOST_PIXELS_BESIDE_WINOGRAD
    return layer.groups == 1 and 0 < _pixels(layer, images) <= most


def suits_backward(layer: Layer, images: int) -> bool:
    """Whether a layer has few pixels and many weights."""
    weights = layer.rows.kernel * layer.columns.kernel * layer.channels * layer.filters
    return layer.groups == 1 and 0 < _pixels(layer, images) <= _MOST_PIXELS and weights >= _FEWEST_WEIGHTS


def _pixels(layer: Layer, images: int) -> int:
    return images * layer.out_image[0] * layer.out_image[1]


@kernel
def _write(z, g, panel, y, e, taps, argmax):
    """Write a panel's sums, or what `e` makes of them."""
    filter0, many = panel_filters(g, panel, VECTOR_BITS // (8 * y.itemsize))
    pixels = g.pixels // g.images
    for n in range(g.images):
        z0 = (panel * g.pixels + n * pixels) * g.panel
        if e.pool_h > 0:
            y0 = n * e.out_h * e.out_w * g.filters + filter0
            finish_panel(z[z0:], g.panel, e.out_h, e, taps, y, y0, argmax, many)
        else:
            for p in range(pixels):
                copy(z, z0 + p * g.panel, y, (n * pixels + p) * g.filters + filter0, many)


@parallel
def _correlate(part, parts, x, weight, copied, bias, y, g, tables, z, e, taps, argmax):
    """Sums of a share of the panels, to `z` (panels, pixels, width), and what becomes of them."""
    keep_out_of_line()
    blocks, row, crow, col = tables
    lanes = VECTOR_BITS // (8 * x.itemsize)
    if copied.size > 0:
        # Whole vectors would be read beyond the last weight; there is but one panel, and one part.
        copy(weight, 0, copied, 0, weight.size)
        weight = copied
    lo, hi = span(part, parts, g.panels)
    for panel in range(lo, hi):
        filter0, many = panel_filters(g, panel, lanes)
        for p in range(panel * g.pixels, (panel + 1) * g.pixels):
            copy(bias, filter0, z, p * g.panel, many)
    values = pointer(weight)
    for i in range(len(blocks)):
        w0, channel, depth, r0, r1 = blocks[i]
        following = blocks[min(i + 1, len(blocks) - 1), 0]
        for panel in range(lo, hi):
            filter0, many = panel_filters(g, panel, lanes)
            # Each tile fetches a vector of the next block's rows: a lone one leaves the others.
            for k in range(depth if r1 - r0 <= TALL_ROWS else 0):
                for f in range(lanes, many, lanes):
                    prefetch(values, following + filter0 + k * g.filters + f)
            add_tiles(
                x,
                channel,
                row,
                col,
                r0,
                r1,
                depth,
                col[:0],
                weight,
                w0 + filter0,
                g.filters,
                z,
                panel * g.pixels * g.panel,
                crow,
                many,
                weight[following + filter0 :],
                lanes // TILE_ROWS,
                g.filters,
            )
    for panel in range(lo, hi):
        _write(z, g, panel, y, e, taps, argmax)


@lru_cache(maxsize=256)
def _plan(layer: Layer, images: int, e: Epilogue, width: int) -> tuple[Sizes, tuple[np.ndarray, ...]]:
    """Sizes, and tables: the blocks of weights, and of each tap the pixels that see the image through it.

    A block is where it begins, its first channel, how many it has, and the rows of its tap's pixels in two
    tables: of where they are read in the images, and of where their sums lie in a panel.
    """
    out = (e.out_h * e.pool_h, e.out_w * e.pool_w) if e.pool_h else layer.out_image
    axes = layer.rows.forward(), layer.columns.forward()
    numbers = np.arange(images)[:, np.newaxis, np.newaxis]
    blocks: list[tuple[int, ...]] = []
    rows: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for tap in np.ndindex(layer.rows.kernel, layer.columns.kernel):
        seen = []
        for axis, many, size, k in zip(axes, out, layer.image, tap, strict=True):
            at = axis.origin + np.arange(many) * axis.step + axis.taps[k]
            inside = (at >= 0) & (at < size)
            seen.append((np.flatnonzero(inside), at[inside]))
        (i, h), (j, w) = seen
        if not len(i) or not len(j):
            continue
        pixels = (numbers * out[0] + i[:, np.newaxis]) * out[1] + j
        inputs = (numbers * layer.image[0] + h[:, np.newaxis]) * layer.image[1] + w
        tile_rows = add_rows(pixels.size)
        first = sum(len(row) for row in rows)
        rows.append(padded_rows(inputs.ravel() * layer.channels, tile_rows))
        places.append(padded_rows(pixels.ravel() * width, tile_rows))
        begin = (tap[0] * layer.columns.kernel + tap[1]) * layer.channels
        for channel in range(0, layer.channels, _CHANNELS):
            depth = min(layer.channels - channel, _CHANNELS)
            end = first + len(rows[-1])
            blocks.append(((begin + channel) * layer.filters, channel, depth, first, end))
    g = Sizes(images, images * out[0] * out[1], layer.filters, -(-layer.filters // width), width)
    table = np.array(blocks, np.intp).reshape(-1, 5)
    # One that is empty, for filters of which no tap sees a pixel.
    none = np.empty(0, np.intp)
    tables = table, np.concatenate([none, *rows]), np.concatenate([none, *places]), np.arange(_CHANNELS)
    return g, tables


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
    g, tables = _plan(layer, x.shape[0], e, simd.panel_width(x.dtype))
    start = scratch("start", g.panels * g.panel, x.dtype)
    between_jobs(set_start, start[np.newaxis], bias)
    parts = part_count(g.panels, x.shape[0] * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    z = scratch("products", g.panels * g.pixels * g.panel, x.dtype)
    lanes = simd.lanes(x.dtype)
    copied = scratch("weights", weight.size + lanes if layer.filters < lanes else 0, x.dtype)
    flat = x.reshape(-1), weight.reshape(-1), copied, start, y.reshape(-1)
    _correlate(parts, *flat, g, tables, z, e, window_taps(e, g.panel), argmax.reshape(-1))


def _windows(layer: Layer) -> tuple[tuple, ...]:
    rows, columns = layer.rows, layer.columns
    kernel, stride, padding, dilation = zip(rows[1:], columns[1:], strict=True)
    return kernel, stride, padding, dilation


def _columns(layer: Layer, images: int, dtype: np.dtype) -> np.ndarray:
    """Scratch for the columns of all pixels."""
    shape = (
        images * layer.out_image[0] * layer.out_image[1],
        layer.rows.kernel * layer.columns.kernel * layer.channels,
    )
    return scratch("columns", shape[0] * shape[1], dtype).reshape(shape)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    columns = _columns(layer, dx.shape[0], dx.dtype)
    linear_backward_input(dout.reshape(-1, layer.filters), weight.reshape(-1, layer.filters), out=columns)
    col2im(columns, dx.shape, *_windows(layer), out=dx)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    columns = im2col(x, *_windows(layer), out=_columns(layer, x.shape[0], x.dtype))
    gradient = dweight.reshape(-1, layer.filters)
    linear_backward_weight(dout.reshape(-1, layer.filters), columns, out=gradient, accumulate=True)
