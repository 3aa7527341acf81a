"""Convolutions of few pixels.

A layer deep in a network sees one small image with megabytes of weights: their way through the memory is all
that counts. Forward reads each of them once, where it lies and in the order in which it lies, a block of
channels of one tap after another. All pixels' sums stay in the nearest caches, a block is multiplied with the
pixels that its tap sees, none of them in the padding, and meanwhile the next block arrives. With few weights
it is all that is spared that counts: no window is copied and no weight packed.

Backward to the input is the same with the outputs for pixels, and each block of weights transposed on the
way. The gradient of the weights is added to them where they lie, tap by tap: each is a product of the
channels that it sees with the outputs that see it.

Many images of a few pixels are convolved so too, some of them after others: of 2x2 pixels a 3x3 filter sees
four in nine, where other ways multiply with the padding's zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd, winograd
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer
from .dots import dots
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .image_tiles import gather_images
from .simd import TILE_ROWS
from .tile import TALL_ROWS, add_ranges, add_rows, add_tiles, padded_rows, tile_rows
from .vectors import first_lanes, lanes_of, load, pointer, store
from .winograd_tiling import panel_filters
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

# With more pixels direct convolution takes less time; with few channels the sums of a block are short.
_MOST_PIXELS = 256
_FEW_CHANNELS, _MOST_PIXELS_OF_FEW_CHANNELS = 8, 64
# Where there is Winograd's algorithm, it does the more pixels of more channels times filters.
_MOST_PIXELS_BESIDE_WINOGRAD = 144
_MOST_WEIGHTS_BESIDE_WINOGRAD = 1 << 10
# And of more pixels those of small images whose padding is so much of what the filters see.
_MOST_SEEN = 0.6
# Of these, with fewer than twice so few channels, beside Winograd's algorithm, and beside vectors of images,
# with so many filters a lane that is filled.
_MOST_SEEN_BESIDE_OTHERS = 0.45
_MOST_FILTERS_OF_IMAGES = 0.7
# So few pixels of a tap are multiplied with weights as they lie: transposing these would take longer.
_MOST_DOTS = 4
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
    transposed: int  # 0, or of weights that are read from filters to channels: how many lie in a row


def suits_forward(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer has few enough pixels, beside Winograd's algorithm and vectors of images too."""
    by_winograd = winograd.suits(layer, images, dtype)
    if by_winograd and layer.channels * layer.filters > _MOST_WEIGHTS_BESIDE_WINOGRAD:
        return layer.groups == 1 and 0 < _pixels(layer, images) <= _MOST_PIXELS_BESIDE_WINOGRAD
    if not _suits(layer, images, layer.channels):
        return False
    lanes = simd.lanes(dtype)
    full = images / (-(-images // lanes) * lanes)
    if by_winograd or layer.filters < _MOST_FILTERS_OF_IMAGES * lanes * full:
        return _pixels(layer, images) <= _MOST_PIXELS or _seen(layer) <= _MOST_SEEN_BESIDE_OTHERS
    return True


def suits_input(layer: Layer, images: int) -> bool:
    """Whether a layer has few enough pixels on the way back to its input."""
    return _suits(layer, images, layer.filters)


def suits_input_first(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is sooner here than by vectors of images, too.

    These do each phase of a strided layer by itself, and multiply with all of the padding.
    """
    if images < simd.lanes(dtype) or not suits_input(layer, images):
        return False
    if _pixels(layer, images) <= _MOST_PIXELS:
        return layer.rows.stride * layer.columns.stride > 1
    return _seen(layer) <= _MOST_SEEN_BESIDE_OTHERS


def suits_weight(layer: Layer, images: int) -> bool:
    """Whether a layer has few enough pixels for the gradient of its weights."""
    return _suits(layer, images, layer.channels)


def _suits(layer: Layer, images: int, channels: int) -> bool:
    """Whether there are few enough pixels for images, or gradients, of so many channels."""
    most = _MOST_PIXELS if channels >= _FEW_CHANNELS else _MOST_PIXELS_OF_FEW_CHANNELS
    pixels = _pixels(layer, images)
    if layer.groups > 1 or not pixels:
        return False
    most_seen = _MOST_SEEN if channels >= 2 * _FEW_CHANNELS else _MOST_SEEN_BESIDE_OTHERS
    return pixels <= most or (_pixels(layer, 1) <= most == _MOST_PIXELS and _seen(layer) <= most_seen)


def _pixels(layer: Layer, images: int) -> int:
    return images * layer.out_image[0] * layer.out_image[1]


@lru_cache(maxsize=256)
def _seen(layer: Layer) -> float:
    """How much of what the filters see is the image."""
    seen = sum(i.size * j.size for _, ((i, _), (j, _)) in _axes(layer, layer.out_image))
    return seen / (layer.positions.size * _pixels(layer, 1))


def _some(layer: Layer, images: int) -> Iterator[slice]:
    """The images that are convolved together."""
    many = images if _pixels(layer, images) <= _MOST_PIXELS else _MOST_PIXELS // _pixels(layer, 1)
    for first in range(0, images, many):
        yield slice(first, min(first + many, images))


@kernel
def _write(z, g, panel, y, e, taps, argmax):
    """Write a panel's sums, or what `e` makes of them."""
    filter0, many = panel_filters(g, panel, lanes_of(y))
    pixels = g.pixels // g.images
    for n in range(g.images):
        z0 = (panel * g.pixels + n * pixels) * g.panel
        if e.pool_h > 0:
            y0 = n * e.out_h * e.out_w * g.filters + filter0
            finish_panel(z[z0:], g.panel, e.out_h, e, taps, y, y0, argmax, many)
        else:
            for p in range(pixels):
                copy(z, z0 + p * g.panel, y, (n * pixels + p) * g.filters + filter0, many)


@kernel
def _pack_transposed(weight, w0, g, filter0, many, depth, packed):
    """The weights of a block and a panel as rows of the panel's filters, which lie a row of weights apart."""
    lanes = lanes_of(weight)
    for f in range(0, many, lanes):
        for k in range(0, depth, lanes):
            source, target = w0 + filter0 * g.transposed + k, k * g.panel + f
            gather_images(weight, source, g.transposed, f, many, depth - k, packed, target, g.panel)


@kernel
def _add_dots(x, weight, w0, g, filter0, many, depth, channel, row, crow, r0, r1, z, z0):
    """As `add_tiles`, for few pixels: each weight is read where it lies."""
    lanes = lanes_of(x)
    inputs, weights, sums = pointer(x), pointer(weight), pointer(z)
    for f in range(0, many, lanes):
        count = min(many - f, lanes)
        some, first = first_lanes(sums, count), w0 + (filter0 + f) * g.transposed
        for r in range(r0, r1):
            at = z0 + crow[r] + f
            products = dots(weights, first, g.transposed, count, inputs, channel + row[r], depth)
            store(load(sums, at, some) + products, sums, at, some)


@parallel
def _correlate(part, parts, x, weight, packs, bias, y, g, tables, z, e, taps, argmax):
    """Sums of a share of the panels, to `z` (panels, pixels, width), and what becomes of them."""
    keep_out_of_line()
    blocks, row, crow, col = tables
    lanes, packed = lanes_of(x), packs[part]
    if g.transposed == 0 and g.filters < g.panel and g.filters != lanes:
        # Whole vectors would be read beyond the last weight; there is but one panel, and one part.
        copy(weight, 0, packed, 0, weight.size)
        weight = packed
    lo, hi = span(part, parts, g.panels)
    for panel in range(lo, hi):
        filter0, many = panel_filters(g, panel, lanes)
        for p in range(panel * g.pixels, (panel + 1) * g.pixels):
            if bias.size > 0:
                copy(bias, filter0, z, p * g.panel, many)
            else:
                clear(z, p * g.panel, many)
    for i in range(len(blocks)):
        w0, channel, depth, r0, r1, pixels, first = blocks[i]
        following = blocks[min(i + 1, len(blocks) - 1), 0]
        for panel in range(lo, hi):
            filter0, many = panel_filters(g, panel, lanes)
            z0 = panel * g.pixels * g.panel
            if g.transposed > 0 and pixels <= _MOST_DOTS:
                _add_dots(x, weight, w0, g, filter0, many, depth, channel, row, crow, r0, r0 + pixels, z, z0)
                continue
            source, b0, ldb, ahead = weight, w0 + filter0, g.filters, following + filter0
            if g.transposed > 0:
                _pack_transposed(weight, w0, g, filter0, many, depth, packed)
                source, b0, ldb, ahead = packed, 0, g.panel, weight.size
            # Tiles fetch the next block's rows: a lone one all of a row, else each a line of them.
            fetched = lanes // TILE_ROWS, g.filters, r1 - r0 <= TALL_ROWS
            add_tiles(
                x,
                channel,
                row,
                col[first:],
                (r0, r1, tile_rows(r1 - r0)),
                depth,
                col[:0],
                source,
                b0,
                ldb,
                z,
                z0,
                crow,
                many,
                weight[ahead:],
                fetched,
            )
    for panel in range(lo, hi):
        _write(z, g, panel, y, e, taps, argmax)


def _axes(layer: Layer, out: tuple[int, int]) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]]]]:
    """Every tap that sees the image: its number, and of rows and columns, which outputs and inputs meet."""
    axes = layer.rows.forward(), layer.columns.forward()
    for number, tap in enumerate(np.ndindex(layer.rows.kernel, layer.columns.kernel)):
        seen = []
        for axis, many, size, k in zip(axes, out, layer.image, tap, strict=True):
            at = axis.origin + np.arange(many) * axis.step + axis.taps[k]
            inside = (at >= 0) & (at < size)
            seen.append((np.flatnonzero(inside), at[inside]))
        if all(len(outputs) for outputs, _ in seen):
            yield number, seen


@lru_cache(maxsize=256)
def _plan(
    layer: Layer, images: int, e: Epilogue, width: int, transposed: bool = False
) -> tuple[Sizes, tuple[np.ndarray, ...], np.ndarray]:
    """Sizes, tables, and the offsets of what `e` pools.

    The tables are the blocks of weights, and of each tap the pixels that see the image through it. A block is
    where it begins, its first channel, how many it has, the rows of its tap's pixels in two tables (of where
    they are read in the images, and of where their sums lie in a panel), how many pixels these are, and where
    in the table of the channels' offsets it begins. `transposed` is from the outputs to the images.
    """
    out = (e.out_h * e.pool_h, e.out_w * e.pool_w) if e.pool_h else layer.out_image
    numbers = np.arange(images)[:, np.newaxis, np.newaxis]
    channels, filters, step = layer.channels, layer.filters, layer.filters
    if transposed:
        channels, filters, step = layer.filters, layer.channels, 1
    blocks: list[tuple[int, ...]] = []
    rows: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for tap, ((i, h), (j, w)) in _axes(layer, out):
        pixels = (numbers * out[0] + i[:, np.newaxis]) * out[1] + j
        inputs = (numbers * layer.image[0] + h[:, np.newaxis]) * layer.image[1] + w
        if transposed:
            pixels, inputs = inputs, pixels
        tile_rows = add_rows(pixels.size)
        first = sum(len(row) for row in rows)
        rows.append(padded_rows(inputs.ravel() * channels, tile_rows))
        places.append(padded_rows(pixels.ravel() * width, tile_rows))
        begin = tap * layer.channels * layer.filters
        most = max(channels, 1) if transposed and pixels.size <= _MOST_DOTS else _CHANNELS
        for channel in range(0, channels, most):
            depth = min(channels - channel, most)
            end = first + len(rows[-1])
            blocks.append((begin + channel * step, channel, depth, first, end, pixels.size, 0))
    sizes = layer.image if transposed else out
    g = Sizes(
        images,
        images * sizes[0] * sizes[1],
        filters,
        -(-filters // width),
        width,
        layer.filters if transposed else 0,
    )
    columns = np.arange(_CHANNELS)
    if not transposed and layer.forward_tables.blocks.in_place:
        # Every pixel sees all taps, so that several make one block.
        columns = layer.forward_tables.taps
        most, end = -(-columns.size // -(-columns.size // _CHANNELS)), blocks[0][4]
        starts = range(0, columns.size, most)
        pixels = blocks[0][5]
        blocks = [(k * step, 0, min(columns.size - k, most), 0, end, pixels, k) for k in starts]
    table = np.array(blocks, np.intp).reshape(-1, 7)
    # One that is empty, for filters of which no tap sees a pixel.
    none = np.empty(0, np.intp)
    tables = table, np.concatenate([none, *rows]), np.concatenate([none, *places]), columns
    return g, tables, window_taps(e, width)


def _run(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue,
    argmax: np.ndarray,
    transposed: bool,
) -> None:
    dtype = x.dtype
    width = simd.panel_width(dtype)
    g, tables, taps = _plan(layer, x.shape[0], e, width, transposed)
    parts = part_count(g.panels, x.shape[0] * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    z = scratch("products", g.panels * g.pixels * width, dtype)
    size = _CHANNELS * width if transposed else weight.size + width if layer.filters < width else 1
    packs = scratch("weights", (parts, size), dtype)
    flat = x.ravel(), weight.ravel(), packs, NOTHING[dtype] if bias is None else bias, y.ravel()
    _correlate(parts, *flat, g, tables, z, e, taps, argmax.ravel())


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
    for some in _some(layer, len(x)):
        _run(layer, x[some], weight, bias, y[some], e, argmax[some] if argmax.size else argmax, False)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    for some in _some(layer, len(dout)):
        _run(layer, dout[some], weight, None, dx[some], NO_EPILOGUE, NOWHERE, True)


@parallel
def _add_products(part, parts, x, dout, dweight, g, tables, packs):
    """Add a share of the gradient of the weights: a panel of filters, tap by tap, after another."""
    keep_out_of_line()
    taps, ranges, order, row, crow, col = tables
    packed, ready = packs[part], -1
    lo, hi = span(part, parts, g.panels * len(taps))
    for item in range(lo, hi):
        panel = item // len(taps)
        tap = item - panel * len(taps)
        filter0 = panel * g.panel
        many = min(g.filters - filter0, g.panel)
        if panel != ready:
            ready = panel
            for k in range(g.pixels):
                copy(dout, order[k] * g.filters + filter0, packed, k * g.panel, many)
        c0 = taps[tap, 1] + filter0
        add_ranges(
            x,
            taps[tap, 0],
            row,
            col,
            (0, row.size, tile_rows(row.size)),
            g.pixels,
            ranges[tap],
            packed,
            0,
            g.panel,
            dweight,
            c0,
            crow,
            many,
            packed[:0],
        )


@lru_cache(maxsize=256)
def _weight_plan(layer: Layer, images: int, width: int) -> tuple[Sizes, tuple[np.ndarray, ...]]:
    """Sizes, and tables: where each tap begins in the images and in the weights, and the pixels that see it.

    Pixels are numbered by rows, of all images together: those that see a tap are then in runs, equally far
    apart. The others are the place of each such pixel in `dout`, and the tile's.
    """
    (out_h, out_w), (height, line), channels = layer.out_image, layer.image, layer.channels
    rows, columns = layer.rows.forward(), layer.columns.forward()
    h, n, w = np.ix_(np.arange(out_h), np.arange(images), np.arange(out_w))
    order = (n * out_h + h) * out_w + w
    inputs = (n * height + h * rows.step) * line + w * columns.step
    row = padded_rows(np.arange(channels), add_rows(channels))
    tiles = len(row) // add_rows(channels)
    taps: list[tuple[int, int]] = []
    ranges: list[np.ndarray] = []
    for tap, ((i, _), (j, _)) in _axes(layer, layer.out_image):
        k, m = divmod(tap, layer.columns.kernel)
        place = (rows.origin + rows.taps[k]) * line + columns.origin + columns.taps[m]
        taps.append((place * channels, tap * channels * layer.filters))
        runs, length = len(i) * images, len(j)
        if length == out_w:
            runs, length = 1, runs * length
        ranges.append(np.tile((int(i[0]) * images * out_w + int(j[0]), length, out_w, runs), tiles))
    g = Sizes(images, images * out_h * out_w, layer.filters, -(-layer.filters // width), width, 0)
    tile = (
        row,
        padded_rows(np.arange(channels) * layer.filters, add_rows(channels)),
        inputs.ravel() * channels,
    )
    many = len(taps)
    starts = np.array(taps, np.intp).reshape(many, 2), np.array(ranges, np.intp).reshape(many, 4 * tiles)
    return g, (*starts, order.ravel(), *tile)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    for some in _some(layer, len(x)):
        _add_weight_gradient(layer, dout[some], x[some], dweight)


def _add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    images, width = x.shape[0], simd.panel_width(x.dtype)
    g, tables = _weight_plan(layer, images, width)
    parts = part_count(g.panels * len(tables[0]), images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    packs = scratch("weights", (parts, g.pixels * width), x.dtype)
    _add_products(parts, x.ravel(), dout.ravel(), dweight.ravel(), g, tables, packs)
