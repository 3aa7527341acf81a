"""Winograd's algorithm along rows, for images of few channels; filters lie in the lanes of vectors.

Four neighbours in a row of the result take 6 products for each channel and row of the kernel in place of 12
(F(4, 3), see `winograd_points`). Transforms are along rows alone, so cheap that few channels repay them.

A thread transforms the rows of the image under some rows of the result, for tiles that begin at any of their
elements: three of four are not used, but nothing is shuffled, and the last tile of a row ends with the row.
The products of a few tiles are then summed in registers, over the rows of the kernel and the channels, for
one vector of filters; what is done with the outputs is done there too. The last vector of filters ends with
the filters, and the last band of rows with the image: some results are computed twice.

For standard normal images and weights the largest error is below 5e-6 of the largest output. A NaN or an
infinity in an image may make NaN, or an infinity of any sign, of all outputs whose tile has it in a window.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from . import simd, winograd
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer, lone
from .elementwise import passes_caches
from .epilogue import NO_EPILOGUE, Epilogue
from .row_tiles import POOLED, RELU, SIZE, STORED, TILES, tile_products
from .vectors import all_lanes, fence, first_lanes, lanes_of, load, pointer, store
from .winograd_points import FILTER, INPUT, TILE, transform
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

# Columns of the kernels.
_TAPS = SIZE + 1 - TILE
# What is done with outputs, by the sizes of an epilogue's windows.
FINISHES = {(0, 0): STORED, (1, 1): RELU, (2, 2): POOLED}
# More channels fill vectors.
_MOST_CHANNELS = 31
# The transformed rows of a band should stay in the first-level cache; but with fewer rows too many are
# transformed twice.
_BAND_BYTES = 24 * 1024
_FEWEST_ROWS = 4
_MOST_ROWS = 16
# Bands that a batch is cut into at least, if its images have enough rows.
_TASKS = 4
# Tiles that are done with one vector of filters before the next.
_CHUNK = 64


class _Cycles(NamedTuple):
    """Measured, a product of the direct way being 1."""

    transform: float  # of a vector of the image
    product: float
    tile: float  # what begins and ends its sums
    pixel: float  # the same, the direct way
    finish: float  # of a pixel that is not stored as it is, the direct way: the block is read again


_CYCLES = _Cycles(25.0, 1.5, 30.0, 6.0, 14.0) if simd.FULL_WIDTH else _Cycles(35.0, 1.0, 9.0, 3.0, 0.0)
# Shorter vectors, of which there are more.
if simd.VECTOR_BITS == 128:
    _CYCLES = _CYCLES._replace(transform=12.0)


class Grid(NamedTuple):
    """The integers that the compiled driver reads."""

    image_h: int
    image_w: int
    channels: int
    origin_h: int  # input row and column of the first tap of the first output; negative in the padding
    origin_w: int
    window_w: int  # columns of the padded image
    height: int  # rows and columns of the result before pooling
    width: int
    filters: int
    rows: int  # of a band
    bands: int  # of an image
    window_h: int  # rows of the image under a band
    plane: int  # transformed elements of a row at one point
    out_row: int  # elements of a row of the result


class Tables(NamedTuple):
    """Offsets, in elements."""

    sources: np.ndarray  # of each tile of a band in its transformed rows; a multiple of `TILES`
    targets: np.ndarray  # of its first result
    taps: np.ndarray  # of a row of the kernel and a channel, from a tile's source


@kernel
def _some_tiles(finish, t0, t1, operands):
    """The tiles from `t0` to `t1` of a band, of one vector of filters; see `tile_products`."""
    keep_out_of_line()
    for t in range(t0, t1, TILES):
        if finish == POOLED:
            tile_products(POOLED, t, operands)
        elif finish == RELU:
            tile_products(RELU, t, operands)
        else:
            tile_products(STORED, t, operands)


@kernel
def _read_rows(x, n, first, g, window):
    """Copy the image's rows under the band from output row `first` on; `window` is zero beside them."""
    image, target = pointer(x), pointer(window)
    lanes, line = lanes_of(image), g.window_w * g.channels
    before = min(max(-g.origin_w, 0), g.window_w)
    skipped = max(g.origin_w, 0)
    size = max(min(g.image_w - skipped, g.window_w - before), 0) * g.channels
    whole = size // lanes * lanes
    everything, some = all_lanes(image), first_lanes(image, size - whole)
    for r in range(g.window_h):
        h = g.origin_h + first + r
        t = r * line + before * g.channels
        if h < 0 or h >= g.image_h:
            clear(window, t, size)
            continue
        s = ((n * g.image_h + h) * g.image_w + skipped) * g.channels
        for k in range(0, whole, lanes):
            store(load(image, s + k, everything), target, t + k, everything)
        store(load(image, s + whole, some), target, t + whole, some)


@kernel
def transform_band(x, n, first, g, window, spectrum):
    """The transformed rows under the band from output row `first` on: by row, point and element.

    The padding beside the image must be zero in `window`, and stays so.
    """
    lanes = lanes_of(x)
    _read_rows(x, n, first, g, window)
    for r in range(g.window_h):
        source, target = r * g.window_w * g.channels, r * SIZE * g.plane
        for k in range(0, g.plane, lanes):
            transform(SIZE, INPUT, window, source + k, g.channels, spectrum, target + k, g.plane)


@parallel
def _convolve(part, parts, x, images, weights, start, y, argmax, g, of, finish, around, e, windows, spectra):
    keep_out_of_line()
    lanes = lanes_of(x)
    window, spectrum = windows[part], spectra[part]
    tiles, depth = of.sources.size, of.taps.size
    tables = pointer(of.sources), pointer(of.targets), pointer(of.taps), depth
    clear(window, 0, window.size)
    lo, hi = span(part, parts, images * g.bands)
    for task in range(lo, hi):
        n = task // g.bands
        first = min(task % g.bands * g.rows, g.height - g.rows)
        transform_band(x, n, first, g, window, spectrum)
        y0 = n * (y.size // images) + first // max(e.pool_h, 1) * g.out_row
        for t in range(0, tiles, _CHUNK):
            for v in range(start.size // lanes):
                f = min(v * lanes, g.filters - lanes)
                inputs = pointer(spectrum), g.plane
                factors = pointer(weights), v * depth * SIZE * lanes, pointer(start), v * lanes
                results = pointer(y), pointer(argmax), y0 + f, g.filters
                operands = tables + inputs + factors + results + (around, e.relu, e.keeps)
                _some_tiles(finish, t, min(t + _CHUNK, tiles), operands)
    if around:
        fence()


@parallel
def _transform_weights(part, parts, weight, bias, weights, start):
    """Weights (kH, 3, C, F) by vector of filters, row, channel and point; and what sums start with."""
    keep_out_of_line()
    kernel_h, kernel_w, channels, filters = weight.shape
    flat = weight.reshape(weight.size)
    lanes = lanes_of(weight)
    lo, hi = span(part, parts, start.size // lanes)
    for v in range(lo, hi):
        f = min(v * lanes, filters - lanes)
        for k in range(kernel_h * channels):
            row = k // channels * kernel_w
            source = (row * channels + k % channels) * filters + f
            target = (v * kernel_h * channels + k) * SIZE * lanes
            transform(SIZE, FILTER, flat, source, channels * filters, weights, target, lanes)
        if bias.size > 0:
            copy(bias, f, start, v * lanes, lanes)
        else:
            clear(start, v * lanes, lanes)


@lru_cache(maxsize=512)
def plan(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> tuple[Grid, Tables]:
    lanes = simd.lanes(dtype)
    height, width = (e.out_h * e.pool_h, e.out_w * e.pool_w) if e.pool_h else layer.out_image
    channels, kernel_h = layer.channels, layer.rows.kernel
    # Where tiles may begin.
    plane = -(-(width + 1 - TILE) * channels // lanes) * lanes
    multiple = max(e.pool_h, 1)
    most = _BAND_BYTES // (SIZE * plane * dtype.itemsize) + 1 - kernel_h
    most = min(max(most, _FEWEST_ROWS), _MOST_ROWS, height // -(-_TASKS // images))
    most = max(most // multiple, 1)
    bands = -(-height // (most * multiple))
    rows = -(-height // (bands * multiple)) * multiple
    g = Grid(
        image_h=layer.image[0],
        image_w=layer.image[1],
        channels=channels,
        origin_h=-layer.rows.padding[0],
        origin_w=-layer.columns.padding[0],
        window_w=width + _TAPS - 1,
        height=height,
        width=width,
        filters=layer.filters,
        rows=rows,
        bands=-(-height // rows),
        window_h=rows + kernel_h - 1,
        plane=plane,
        out_row=width // multiple * layer.filters,
    )
    columns = np.minimum(np.arange(0, width, TILE), width - TILE)
    # By window of rows, column, and row in the window.
    tiles = np.add.outer(np.arange(0, rows, multiple) * width, columns)
    tiles = np.add.outer(tiles, np.arange(multiple) * width).ravel()
    tiles = np.concatenate([tiles, np.resize(tiles[-multiple:], -len(tiles) % TILES)])
    i, j = tiles // width, tiles % width
    return g, Tables(
        sources=i * (SIZE * plane) + j * channels,
        targets=(i // multiple * (width // multiple) + j // multiple) * layer.filters,
        taps=np.add.outer(np.arange(kernel_h) * (SIZE * plane), np.arange(channels)).ravel(),
    )


def window_size(g: Grid, lanes: int) -> int:
    """Elements of a band's rows of the padded image: the transforms of the last ones read on."""
    return g.window_h * g.window_w * g.channels + (SIZE - 1) * g.channels + lanes


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y` with the convolution of `x`, through the epilogue `e`, and `argmax` if that keeps it."""
    images, dtype = len(x), x.dtype
    lanes = simd.lanes(dtype)
    g, of = plan(layer, min(images, _TASKS), dtype, e)
    vectors = -(-layer.filters // lanes)
    weights = scratch("weights", vectors * of.taps.size * SIZE * lanes, dtype)
    start = scratch("start", vectors * lanes, dtype)
    biases = NOTHING[dtype] if bias is None else bias
    _transform_weights(part_count(vectors, weights.nbytes), weight, biases, weights, start)
    parts = part_count(images * g.bands, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    _convolve(
        parts,
        x.reshape(-1),
        images,
        weights,
        start,
        y.reshape(-1),
        argmax.reshape(-1),
        g,
        of,
        FINISHES[e.pool_h, e.pool_w],
        int(e.pool_h < 2 and layer.filters % lanes == 0 and passes_caches(y, 2)),
        e,
        scratch("windows", (parts, window_size(g, lanes)), dtype),
        scratch("spectra", (parts, g.window_h * SIZE * g.plane), dtype),
    )


@lru_cache(maxsize=512)
def _pays(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> bool:
    """Whether rows of tiles take less time than the direct way."""
    width = e.out_w * e.pool_w if e.pool_h else layer.out_image[1]
    if width < TILE:
        return False
    g, of = plan(layer, images, dtype, e)
    lanes = simd.lanes(dtype)
    vectors = -(-layer.filters // lanes)
    transforms = g.window_h * g.plane / lanes * _CYCLES.transform
    tiles = of.sources.size * vectors * (SIZE * of.taps.size * _CYCLES.product + _CYCLES.tile)
    pixel = _TAPS * of.taps.size + _CYCLES.pixel + (_CYCLES.finish if e.pool_h else 0)
    return transforms + tiles < g.rows * width * vectors * pixel * lone(layer.filters, dtype)


def fits(layer: Layer, dtype: np.dtype) -> bool:
    """Whether a layer's passes can and may be done by rows of tiles."""
    if not winograd.get_winograd() or dtype != np.float32 or layer.groups > 1:
        return False
    if any(side.stride > 1 or side.dilation > 1 for side in (layer.rows, layer.columns)):
        return False
    narrow = 0 < layer.channels <= _MOST_CHANNELS and layer.filters >= simd.lanes(dtype)
    return narrow and layer.columns.kernel == _TAPS and layer.out_image[1] >= TILE


def suits(layer: Layer, images: int, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> bool:
    """Whether the forward pass may be done here, and is faster than the direct way."""
    if not fits(layer, dtype) or (e.pool_h, e.pool_w) not in FINISHES:
        return False
    return _pays(layer, min(images, _TASKS), dtype, e)


def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input may be done here: to many channels from that of few filters.

    Of one filter alone there are so few products that writing the result takes longer, either way.
    """
    return layer.filters > 1 and layer.exchanged is not None and suits(layer.exchanged, images, dtype)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input: `dout` convolved with the filters' mirror images."""
    of = layer.exchanged
    assert of is not None, "see `suits_input`"
    kernel_h, kernel_w, channels, filters = weight.shape
    mirrored = scratch("mirrored", (kernel_h, kernel_w, filters, channels), weight.dtype)
    between_jobs(np.copyto, mirrored, weight[::-1, ::-1].transpose(0, 1, 3, 2))
    forward(of, dout, mirrored, None, dx)
