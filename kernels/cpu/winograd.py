"""Convolution in a quarter to a half of the multiplications: Winograd's F(4x4, 3x3).

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4. The output is cut into
tiles of 4x4 pixels, counted in one row over all images. A thread transforms the windows of one block of tiles
(see `winograd_transforms`), multiplies each of their elements by its own matrix of transformed weights, a
panel of filters at a time, and transforms the products back. Block and panel fit the second-level cache.

Filters of 4x4 and 5x5 take windows of 7x7 and 8x8. Larger ones are cut into pieces of 3x3 to 5x5, filled up
with zeros. A piece sees the image moved by its place in the filter, so that the pieces count as more
channels: 7x7 filters as four times as many of 4x4, for which 16 outputs take 196 products instead of 784.
With dilation a tile's pixels are so far apart, and the tiles interleave.

Sums of products that differ in size cost accuracy: for standard normal images and weights the largest error
is below 7e-6 of the largest output with filters of 3x3, at 16 to 512 channels, and below 2e-5 with larger
ones, the channels of all pieces counted; that of direct convolution is below 3e-6. A NaN in the image, or an
infinity, which the transform turns into NaN, makes all outputs NaN whose tile has it in its 6x6 window, or in
that of one piece.
"""

from __future__ import annotations

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue, window_taps
from .square_tile import HAS_REGISTERS, multiply_square
from .tile import add_panel, overwrite_ranges
from .vectors import keep_in_line, lanes_of, pointer, prefetch
from .winograd_blocks import finish, products, shares, transform_input, windows
from .winograd_points import TILE
from .winograd_tiling import (
    PIECES,
    WIDEST,
    Filters,
    Tiling,
    filters_of,
    is_far,
    next_pixels,
    panel_filters,
    piece_tap,
    tiles_of,
    tiling,
    with_far,
)
from .winograd_transforms import (
    transpose_square,
    weight_vector,
)
from .workspace import NOTHING, NOWHERE, clear, copy, scratch, set_start

# Fewer channels or filters leave too little to multiply between the transforms.
_FEWEST_CHANNELS = 16
# Fewer tiles don't repay the transform of the weights, nor do tiles with fewer pixels in use, on average.
_FEWEST_TILES = 8
_FEWEST_PIXELS = 7
# Of larger filters, which have more weights to transform.
_FEWEST_TILES_LARGE = 24
# Products that must be spared, as a ratio, for what the transforms take.
_LEAST_GAIN = 2
# The most channels, those of all pieces counted, for which the error was measured.
_MOST_CUT_CHANNELS = 512
WINDOW = PIECES[0] + TILE - 1
# Channels whose weights are fetched before they are transformed.
_AHEAD = 3
# A block's pixels are fetched while the one before it is multiplied, if they are no more: they should stay in
# the second-level cache, and with more channels there is less to wait for.
_FETCHED_BYTES = 600 << 10

_enabled = True


def set_winograd(enabled: bool) -> None:
    """Use Winograd's algorithm for float32 convolutions where it is faster, or never.

    It takes filters of more than one row and column. It is on from the start. Results differ from direct
    convolution's by up to 2e-5 of the largest of them, 7e-6 with filters of 3x3 and stride 1, and a NaN or an
    infinity spreads to the whole tiles of 4x4 outputs that it has a part in.
    """
    global _enabled
    if not isinstance(enabled, (bool, np.bool_)):
        raise TypeError(f"enabled: expected a bool, got {enabled!r}")
    _enabled = bool(enabled)


def get_winograd() -> bool:
    """Whether convolutions may use Winograd's algorithm."""
    return _enabled


@kernel
def _transform_weights(weight, transposed, g, panel, k0, u, u0, square):
    """G g G^T of a panel of filters and a vector of channels from `k0` on, to rows of `u`.

    If `transposed`, the channels of the image are the weight's filters, and the taps are flipped.
    """
    keep_out_of_line()
    lanes = lanes_of(weight)
    filter0, many = panel_filters(g, panel, lanes)
    group = panel // g.panels
    taps = g.taps * g.taps
    if transposed:
        pitch = g.groups * g.depth
        for c in range(0, many, lanes):
            for tap in range(taps):
                source = ((taps - 1 - tap) * g.filters + filter0 + c) * pitch + group * g.depth + k0
                transpose_square(weight, source, pitch, square, tap * lanes * lanes, lanes)
            for i in range(lanes):
                place = u0 + i * g.panel + c
                weight_vector(g.form, square, i * lanes, lanes * lanes, u, place, g.weight_step)
        return
    values = pointer(weight)
    for i in range(lanes):
        source = (k0 + i) * g.y_pixel + group * g.filters + filter0
        # Weights that nobody has read for long arrive meanwhile.
        for tap in range(taps):
            for c in range(0, many, lanes):
                prefetch(values, (tap * g.depth + _AHEAD) * g.y_pixel + source + c)
        for c in range(0, many, lanes):
            place = u0 + i * g.panel + c
            weight_vector(g.form, weight, source + c, g.depth * g.y_pixel, u, place, g.weight_step)


@parallel
def _cut_filters(part, parts, weight, height, width, channels, filters, g, transposed, pieces):
    """Copy the filters by pieces, those of the mirror image if `transposed`, filled up with zeros."""
    keep_out_of_line()
    taps = g.taps * g.taps
    runs = channels if transposed else 1
    size = channels * filters // runs
    lo, hi = span(part, parts, taps * g.cuts)
    for task in range(lo, hi):
        cut = task // taps
        place = task - cut * taps
        tap = piece_tap(cut, place, height, width, g.cuts_w, g.taps)
        # The mirror images' taps will be read backwards.
        first = (taps - 1 - place if transposed else place) * g.cuts * channels * filters + cut * size
        source = (height * width - 1 - tap if transposed else tap) * channels * filters
        for run in range(runs):
            target = first + run * g.cuts * size
            if tap < 0:
                clear(pieces, target, size)
            else:
                copy(weight, source + run * size, pieces, target, size)


@parallel
def _transform_all_weights(part, parts, weight, transposed, bias, g, u, start, squares):
    keep_out_of_line()
    if part == 0:
        set_start(bias, start)
    lanes = lanes_of(weight)
    slices = (g.depth + lanes - 1) // lanes
    lo, hi = span(part, parts, g.groups * g.panels * slices)
    for task in range(lo, hi):
        panel = task // slices
        k0 = min((task - panel * slices) * lanes, g.depth - lanes)
        place = panel * g.area * g.weight_step + k0 * g.panel
        _transform_weights(weight, transposed, g, panel, k0, u, place, squares[part])


@kernel
def _multiply(v, u, m, g, panel, element, k0, rows, zeros, tables, ahead):
    """Multiply an element of `rows` tiles, its channels from `k0` on, with that of a panel of filters.

    Meanwhile a cache fetches `ahead`.
    """
    keep_in_line()
    lanes = lanes_of(v)
    width = panel_filters(g, panel, lanes)[1]
    v0, m0 = element * g.input_step + k0, element * g.product_step
    u0 = (panel * g.area + element) * g.weight_step
    if HAS_REGISTERS and width == lanes and g.depth % lanes == 0:
        pitches = g.input_tile, g.panel, g.panel
        for k in range(0, g.depth, lanes):
            multiply_square(v, v0 + k, u, u0 + k * g.panel, m, m0, pitches, rows, k, ahead)
            ahead = ahead[:0]
        return
    all_k = tables[0][:0]
    overwrite_ranges(
        v,
        v0,
        tables[0],
        tables[1],
        0,
        rows,
        g.depth,
        all_k,
        u,
        u0,
        g.panel,
        zeros,
        0,
        m,
        m0,
        tables[2],
        width,
        ahead,
    )


@parallel
def _correlate(part, parts, x, u, bias, y, g, tables, zeros, offsets, columns, vs, ms, zs, e, taps, argmax):
    keep_out_of_line()
    v, m = vs[part], ms[part]
    far = is_far(u)
    # The work is every block for every panel, so that few blocks keep all threads busy.
    sets, panels = g.groups // g.together, g.together * g.panels
    item, end = span(part, parts, (g.tiles + g.block - 1) // g.block * sets * panels)
    while item < end:
        task = item // panels
        begin = item - task * panels
        many = min(panels - begin, end - item)
        item += many
        block = task // sets
        group0 = (task - block * sets) * g.together
        first = block * g.block
        last = min(first + g.block, g.tiles)
        c0 = group0 * g.channels
        c1 = c0 + g.together * g.channels
        for cut in range(g.cuts):
            target = v[cut * g.channels :]
            transform_input(x, g, cut, first, last, c0, c1, offsets[part], zeros, columns[part], target)
        # Meanwhile the next block's pixels are fetched, those that it reads and those that it writes.
        pixels, results = next_pixels(x, y, g, first, last)
        if e.pool_h > 0:
            results = y[:0]
        if (pixels.size + results.size) * x.itemsize > _FETCHED_BYTES:
            pixels = results = x[:0]
        for panel in range(group0 * g.panels + begin, group0 * g.panels + begin + many):
            k0 = (panel // g.panels - group0) * g.depth
            for element in range(g.area):
                time = (panel - group0 * g.panels - begin) * g.area + element
                # Weights that are far away are read anew for each block: two elements, two before their time.
                place = (panel * g.area + element + 2) * g.weight_step
                weights = u[place : place + 2 * g.weight_step]
                ahead = with_far(weights, far, pixels, results, time, many * g.area)
                _multiply(v, u, m, g, panel, element, k0, last - first, zeros, tables, ahead)
            finish(m, g, first, last, bias, panel, y, e, taps, argmax, zs[part])


@parallel
def _transform_all_input(part, parts, x, bias, g, start, zeros, offsets, columns, v):
    """The only block's tiles, one chunk of channels behind the other."""
    keep_out_of_line()
    if part == 0:
        set_start(bias, start)
    first, last = span(0, 1, g.tiles)
    chunks = (g.channels + g.chunk - 1) // g.chunk
    lo, hi = span(part, parts, chunks)
    for chunk in range(lo, hi):
        c0, c1 = span(chunk, chunks, g.channels)
        target = v[chunk * g.input_size :]
        transform_input(x, g, 0, first, last, c0, c1, offsets[part], zeros, columns[part], target)


@parallel
def _correlate_few(
    part, parts, v, weight, transposed, bias, y, g, tables, us, squares, ms, zs, e, taps, argmax
):
    """One block of tiles for many weights, which are transformed by chunk and never leave the cache."""
    keep_out_of_line()
    lanes = lanes_of(y)
    u = us[part]
    m = ms[part]
    # Not the literal 0, for which Numba would compile second versions.
    first, last = span(0, 1, g.tiles)
    panel0, panel1 = span(part, parts, g.panels)
    chunks = (g.channels + g.chunk - 1) // g.chunk
    for panel in range(panel0, panel1):
        clear(m, 0, m.size)
        for chunk in range(chunks):
            k0, k1 = span(chunk, chunks, g.channels)
            for begin in range(k0, k1, lanes):
                k = min(begin, k1 - lanes)
                _transform_weights(weight, transposed, g, panel, k, u, (k - k0) * g.panel, squares[part])
            for element in range(g.area):
                add_panel(
                    v,
                    chunk * g.input_size + element * g.input_step,
                    tables[0],
                    tables[1],
                    0,
                    tables[0].size,
                    k1 - k0,
                    u,
                    element * g.weight_step,
                    g.panel,
                    m,
                    element * g.product_step,
                    tables[2],
                    panel_filters(g, panel, lanes)[1],
                )
        finish(m, g, first, last, bias, panel, y, e, taps, argmax, zs[part])


def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether Winograd's algorithm can do a layer's passes, is faster, and is wanted."""
    if not _enabled or dtype != np.float32:
        return False
    if layer.rows.stride > 1 or layer.columns.stride > 1:
        return False
    if not all(_fills_vectors(size // layer.groups) for size in (layer.channels, layer.filters)):
        return False
    of = filters_of(layer)
    # The passes differ in their tiles by the padding only.
    return _gains(of, layer) and all(_repays(images, image, of) for image in (layer.image, layer.out_image))


def _gains(of: Filters, layer: Layer) -> bool:
    """Whether the pieces of a layer's filters have enough taps, and few enough channels."""
    if TILE * TILE * of.kernel[0] * of.kernel[1] < _LEAST_GAIN * of.products:
        return False
    cuts = of.cuts[0] * of.cuts[1]
    return cuts == 1 or (of.groups == 1 and cuts * max(layer.channels, layer.filters) <= _MOST_CUT_CHANNELS)


def _fills_vectors(size: int) -> bool:
    """Whether as many channels or filters are enough, and as many as a vector has lanes."""
    return size >= max(simd.lanes(np.float32), _FEWEST_CHANNELS)


def _repays(images: int, image: tuple[int, int], of: Filters) -> bool:
    _, rows, columns = tiles_of(image, of.dilation)
    tiles = images * rows * columns
    fewest = _FEWEST_TILES if of.products == WINDOW**2 else _FEWEST_TILES_LARGE
    return tiles >= fewest and images * image[0] * image[1] >= _FEWEST_PIXELS * tiles


def ends_in(layer: Layer, e: Epilogue) -> bool:
    """Whether `forward` can end in `e`: no window may reach from one block of tiles into the next."""
    if not e.pool_h:
        return True
    if layer.rows.dilation > 1 or layer.columns.dilation > 1:
        return False
    return TILE % e.pool_h == 0 and -(-layer.out_image[1] // TILE) <= WIDEST


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` through `e`; see `suits` and `ends_in`."""
    image = (e.out_h * e.pool_h, e.out_w * e.pool_w) if e.pool_h else layer.out_image
    of = filters_of(layer)
    padding = layer.rows.padding[0], layer.columns.padding[0]
    g, tables = tiling(x.shape, (*image, layer.filters), padding, of)
    _convolve(g, tables, x, _in_pieces(weight, of, g, False), False, bias, y, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input: `dout` convolved with the filters' mirror images."""
    sides = layer.rows, layer.columns
    top, left = (side.dilation * (side.kernel - 1) - side.padding[0] for side in sides)
    of = filters_of(layer)
    g, tables = tiling(dout.shape, dx.shape[1:], (top, left), of)
    _convolve(g, tables, dout, _in_pieces(weight, of, g, True), True, None, dx, NO_EPILOGUE, NOWHERE)


def _in_pieces(weight: np.ndarray, of: Filters, g: Tiling, transposed: bool) -> np.ndarray:
    """The filters as (r, r, cuts * C, F), or as (r, r, C, cuts * F) if the passes' roles are exchanged."""
    if of.kernel == (of.taps, of.taps):
        return weight
    pieces = scratch("pieces", g.taps**2 * g.cuts * weight[0, 0].size, weight.dtype)
    parts = part_count(g.taps**2 * g.cuts, pieces.nbytes)
    _cut_filters(parts, weight.reshape(-1), *weight.shape, g, int(transposed), pieces)
    return pieces


def _convolve(g, tables, x, weight, transposed, bias, y, e, argmax):
    panels = g.groups * g.panels
    start = scratch("start", panels * g.panel, x.dtype)
    x, weight, y = x.reshape(-1), weight.reshape(-1), y.reshape(-1)
    bias = NOTHING[x.dtype] if bias is None else bias
    end = (e, window_taps(e, g.panel), argmax.reshape(-1))
    run = _run_few if g.chunk else _run_many
    run(x, weight, int(transposed), bias, start, y, g, tables, panels, end)


def _run_many(x, weight, transposed, bias, start, y, g, tables, panels, end):
    u = scratch("weights", panels * g.area * g.weight_step, x.dtype)
    parts = part_count(panels * -(-g.depth // simd.lanes(x.dtype)), u.nbytes)
    _transform_all_weights(parts, weight, transposed, bias, g, u, start, _squares(g, parts))
    parts = part_count(-(-g.tiles // g.block) * panels, g.tiles * g.area * g.depth * g.y_pixel)
    vs = shares("input", parts, g.input_size)
    zeros = np.zeros(g.panel, x.dtype)
    memory = (zeros, *windows(g, parts), vs, *products(g, end[0], parts))
    _correlate(parts, x, u, start, y, g, tables, *memory, *end)


def _run_few(x, weight, transposed, bias, start, y, g, tables, panels, end):
    chunks = -(-g.channels // g.chunk)
    v = scratch("input", chunks * g.input_size, x.dtype)
    parts = part_count(chunks, v.nbytes)
    _transform_all_input(parts, x, bias, g, start, np.zeros(g.panel, x.dtype), *windows(g, parts), v)
    parts = part_count(panels, g.tiles * g.area * g.channels * g.filters)
    us = shares("weights", parts, g.area * g.weight_step)
    memory = (us, _squares(g, parts), *products(g, end[0], parts))
    _correlate_few(parts, v, weight, transposed, start, y, g, tables, *memory, *end)


def _squares(g: Tiling, parts: int) -> np.ndarray:
    return shares("squares", parts, g.taps**2 * simd.lanes(np.float32) ** 2)
