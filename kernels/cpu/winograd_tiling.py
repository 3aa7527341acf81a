"""How Winograd's algorithm cuts a convolution: pieces of filters, tiles of outputs, blocks and panels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import kernel
from . import simd
from .direct import Layer, share
from .tile import TILE_ROWS
from .winograd_points import TILE

# Rows and columns of the pieces of filters: more need more points, whose numbers differ more in size.
PIECES = (3, 4, 5)
# Tiles in a block, about: the transformed weights stream past once for each.
_BLOCK = 32
# Rows of so many tiles are not cut.
WIDEST = 64
# With no more tiles and no fewer weights than these, the transformed weights would go to memory and come back
# for little work. All tiles are one block then, and weights are transformed for so many channels at a time.
_FEW_TILES = 96
_MANY_WEIGHTS = 1 << 14
_CHUNK = 64
# So many channels of a pixel are read one after another, where they are those of several groups.
_CHANNELS_TOGETHER = 64
# A tile's elements are written in turn. With so many channels they lie together: else each of them is on a
# page of its own, and processors remember the places of fewer. With less, products would read short runs.
_MANY_CHANNELS = 128
# What is transformed comes from the last cache, or from memory, if it is more.
_NEAR_BYTES = 4 << 20


class Tiling(NamedTuple):
    """The integers that the compiled drivers read."""

    groups: int
    together: int  # of them, whose images are transformed together
    height: int  # of an image
    width: int
    channels: int  # of a group
    x_pixel: int  # those of all groups: from one pixel of the image to the next
    top: int  # zeros above the image and left of it; negative where pixels are cut off
    left: int
    out_height: int
    out_width: int
    filters: int  # of a group
    y_pixel: int  # those of all groups
    dilation_h: int  # pixels from one of a tile, or of a filter, to the next
    dilation_w: int
    form: tuple[int, ...]  # as many entries as a window has rows, and no more meaning
    area: int  # elements of a window
    taps: int  # rows of a piece of a filter
    cuts: int  # pieces of a filter, and how many of them are beside each other
    cuts_w: int
    depth: int  # channels of all pieces
    phase_rows: int  # rows of tiles that begin at the same one of `dilation_h` x `dilation_w` pixels
    tile_rows: int  # in an image, phase after phase
    tile_columns: int
    tiles: int  # in all images
    block: int  # tiles that are multiplied together
    panel: int  # filters that are multiplied together
    panels: int  # of a group
    chunk: int  # channels whose weights are transformed together where they are used; 0: all are, beforehand
    input_size: int  # elements of a block's transformed input,
    input_tile: int  # from one tile to the next there,
    input_step: int  # and from one of a window's elements to the next
    weight_step: int  # that of a panel of the transformed weights
    product_step: int  # and of a panel of the products


@kernel
def panel_filters(g, panel, lanes):
    """The first of a panel's filters, in its group, and how many: whole vectors of them.

    Where a group's filters don't fill the last vector, it begins earlier, and what it shares is computed
    twice. Of filters that are fewer than a vector holds there are just those.
    """
    before = panel % g.panels * g.panel
    many = min((g.filters - before + lanes - 1) // lanes * lanes, g.panel, g.filters)
    return min(before, g.filters - many), many


@kernel
def piece_tap(cut, tap, height, width, cuts_w, side):
    """The place of a tap of a piece with `side` rows in the filter; -1 if it has none."""
    kh, kw = cut // cuts_w * side + tap // side, cut % cuts_w * side + tap % side
    return kh * width + kw if kh < height and kw < width else -1


@kernel
def row_origin(g, row):
    """The image of a row of tiles, and its first pixel's row and column."""
    n = row // g.tile_rows
    r = row - n * g.tile_rows
    if g.phase_rows == g.tile_rows:
        return n, r * 4, 0
    phase = r // g.phase_rows
    top = phase // g.dilation_w
    return n, top + (r - phase * g.phase_rows) * 4 * g.dilation_h, phase - top * g.dilation_w


@kernel
def steps_to(distance, step):
    """Steps that reach `distance` or pass it: 0 and less for one that is not positive."""
    return (distance + step - 1) // step


@kernel
def _next_rows(values, g, first, last, height, line, before):
    """`next_pixels` of images of `height` lines, whose tiles begin `before` lines above their outputs."""
    rows = (last - first) // g.tile_columns
    if rows == 0 or last >= g.tiles:
        return values[:0]
    n, h, _ = row_origin(g, last // g.tile_columns)
    begin = (n * height + max(h - before, 0)) * line
    return values[begin : begin + rows * TILE * line]


@kernel
def next_pixels(x, y, g, first, last):
    """Of images and of outputs what as many tiles have as from `first` to `last`, that follow these.

    It is nothing for less than a row of tiles.
    """
    pixels = _next_rows(x, g, first, last, g.height, g.width * g.x_pixel, g.top + TILE - len(g.form))
    return pixels, _next_rows(y, g, first, last, g.out_height, g.out_width * g.y_pixel, 0)


@kernel
def in_turn(one, other, time, times):
    """What is fetched of two arrays at one of so many times: a share of the first, then one of the other."""
    if time % 2 == 0:
        return share(one, 0, one.size, time // 2, time // 2 + 1, (times + 1) // 2)
    return share(other, 0, other.size, time // 2, time // 2 + 1, times // 2)


@kernel
def is_far(transformed):
    """Whether no near cache holds what is transformed."""
    return transformed.size * transformed.itemsize > _NEAR_BYTES


@kernel
def with_far(transformed, far, one, other, time, times):
    """`in_turn`; but if `transformed` is part of what is `far`, this at every other time."""
    if not far:
        return in_turn(one, other, time, times)
    if time % 2 == 1:
        return in_turn(one, other, time // 2, times // 2)
    return transformed


def block_tiles(tile_columns: int, tiles: int) -> int:
    """Tiles in a block: about a multiple of the engine's rows, and whole rows of tiles where these fit."""
    if tile_columns > WIDEST:
        return min(_BLOCK // TILE_ROWS * TILE_ROWS, tiles)
    counts = [rows * tile_columns for rows in range(1, WIDEST // tile_columns + 1)]
    counts = [count for count in counts if 2 * count >= _BLOCK] or counts
    waste = {count: -count % TILE_ROWS / count + abs(count - _BLOCK) / (16 * _BLOCK) for count in counts}
    return min(min(counts, key=waste.__getitem__), tiles)


def tiles_of(size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int]:
    """Rows of tiles of a phase of an image, those of all phases, and tiles in a row."""
    rows, columns = (-(-length // (step * TILE)) for length, step in zip(size, dilation, strict=True))
    return rows, rows * dilation[0] * dilation[1], columns


class Filters(NamedTuple):
    """What `tiling` needs to know of a layer's filters."""

    kernel: tuple[int, int]
    dilation: tuple[int, int]
    taps: int  # rows and columns of a piece
    groups: int

    @property
    def side(self) -> int:
        """Rows and columns of a window."""
        return self.taps + TILE - 1

    @property
    def cuts(self) -> tuple[int, int]:
        """Pieces in height and in width."""
        return -(-self.kernel[0] // self.taps), -(-self.kernel[1] // self.taps)

    @property
    def products(self) -> int:
        """Products for a tile, of each channel and filter."""
        return self.side**2 * self.cuts[0] * self.cuts[1]


@lru_cache(maxsize=256)
def filters_of(layer: Layer) -> Filters:
    """Sizes of a layer's filters, in the pieces that need the fewest products."""
    sides = layer.rows, layer.columns
    kernel, dilation = zip(*((side.kernel, side.dilation) for side in sides), strict=True)
    choices = [Filters(kernel, dilation, taps, layer.groups) for taps in PIECES]
    return min(choices, key=lambda of: of.products)


@lru_cache(maxsize=256)
def tiling(
    x_shape: tuple[int, ...], out_shape: tuple[int, ...], padding: tuple[int, int], of: Filters
) -> tuple[Tiling, tuple[np.ndarray, ...]]:
    """The sizes, and the engine's tables: rows of the transformed input, channels, rows of the products.

    `x_shape` is (N, H, W, C), `out_shape` is (Ho, Wo, F), and `padding` is that above and to the left.
    """
    images, height, width, x_pixel = x_shape
    out_height, out_width, y_pixel = out_shape
    channels, filters = x_pixel // of.groups, y_pixel // of.groups
    phase_rows, tile_rows, tile_columns = tiles_of((out_height, out_width), of.dilation)
    tiles = images * tile_rows * tile_columns
    cuts = of.cuts[0] * of.cuts[1]
    depth = cuts * channels
    few = cuts == of.groups == 1 and tiles <= _FEW_TILES and channels * filters >= _MANY_WEIGHTS
    block = tiles if few else block_tiles(tile_columns, tiles)
    rows = np.arange(-(-block // TILE_ROWS) * TILE_ROWS)
    lanes = simd.lanes(np.float32)
    # Filters that are more than a vector and less than two end a panel of one, but none of two.
    whole = filters > lanes and (filters % lanes == 0 or filters >= simd.panel_width(np.float32))
    panel = simd.panel_width(np.float32) if whole else lanes
    chunk = -(-channels // -(-channels // _CHUNK)) if few else 0
    together = max(
        n
        for n in range(1, of.groups + 1)
        if of.groups % n == 0 and (n == 1 or n * depth <= _CHANNELS_TOGETHER)
    )
    inner = chunk or together * depth
    # One vector more in each step: at a power of two all 36 elements would compete for the same cache lines.
    row, element = inner, len(rows) * inner + lanes
    if inner >= _MANY_CHANNELS:
        row, element = of.side**2 * inner + lanes, inner
    size = max(len(rows) * row, of.side**2 * element)
    steps = (size, row, element, inner * panel + lanes, len(rows) * panel + lanes)
    image = (height, width, channels, x_pixel, *padding, out_height, out_width, filters, y_pixel)
    cut = (tile_rows, tile_columns, tiles, block, panel, -(-filters // panel), chunk)
    pieces = (*of.dilation, (0,) * of.side, of.side**2, of.taps, cuts, of.cuts[1], depth)
    g = Tiling(of.groups, together, *image, *pieces, phase_rows, *cut, *steps)
    return g, (rows * row, np.arange(chunk or depth), rows * panel)
