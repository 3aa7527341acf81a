"""What a convolution reads and writes, as offset tables for the engine: made once a shape, then cached.

A `Correlation` describes out[n, i, j] = sum over taps of x[n, origin + step * (i, j) + tap] times weights, on
a grid (i, j) of outputs that may itself be spread over the result. With it the same driver runs the forward
pass (step = stride, taps = dilation * (kh, kw)) and each phase of the backward pass to the input
(step = 1, result spread by the stride).

The grid is cut into blocks of whole rows. A block's input window is copied with its zero padding to a scratch
area that stays in the cache, unless no tap ever leaves the image; then the image is read in place.

What a tap reads in the padding is zero and need not be multiplied. At the image's top and bottom whole rows
of taps are left out of a tile's sum. So are columns of taps at its left and right: pixels that miss the same
ones stand next to each other in the tables, and so share a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .tile import TILE_ROWS, add_rows, padded_rows

# A block's window should stay in the second-level cache while every panel of weights passes by it.
_WINDOW_BYTES = 256 * 1024
_BLOCK_PIXELS = 512
_GRADIENT_PIXELS = 1024
# Of filters of one tap, whose windows don't overlap: both sides of a product stay near, but few channels take
# so many that calls don't weigh.
_FEWEST_POINTS = 128
_POINT_BYTES = 160 * 1024
_ITEMSIZE = 4  # of float32; float64 windows are twice as large and do as well in the second-level cache
# In shorter sums of taps nothing is left out: looking what a tile needs takes as long.
_SHORTEST_SUM = 64
# Shorter runs of taps, or of pixels, don't repay that a tile's sum is cut into several.
_SHORTEST_RUN = 32
_SHORTEST_ROW = 8


class Blocks(NamedTuple):
    """The integers that the compiled drivers read."""

    image_h: int  # rows, columns and channels of an input image
    image_w: int
    channels: int
    in_place: int  # 1: no padding is ever read, the image itself is the window
    blocks: int  # blocks of rows in an image
    rows: int  # rows of the grid in a block; the last block may have fewer
    height: int  # rows of the grid
    width: int  # columns of the grid
    line: int  # a row of taps: kernel columns * channels of one group
    step: int  # input rows from one row of the grid to the next
    origin_h: int  # input row of the first tap of grid row 0; negative in the padding
    origin_w: int
    window_h: int  # rows and columns of a full block's window
    window_w: int
    tail: int  # where the tables of the last block begin
    out_first: int  # offset in the result of grid point (0, 0), in elements
    out_row: int  # and from one grid row to the next


class Correlation(NamedTuple):
    """Tables for one memory layout; all but `taps` and `reach` hold a full block's, then the last block's."""

    blocks: Blocks
    pixels: np.ndarray  # offsets in the window of each grid point's first tap
    taps: np.ndarray  # offsets from there to tap (kh, kw) and channel c of one group
    spread: np.ndarray  # offsets in the result of each grid point, from its block's first
    # Of each tile: its first and last row of the block, and first and end in a row of taps of what it needs.
    # Empty if all tiles sum over all taps.
    tiles: np.ndarray
    reach: np.ndarray  # of each row of the grid: first and end of the rows of taps that meet the image


class Gradient(NamedTuple):
    """Tables of the weights' gradient, of the rows that see `blocks.channels` of an image's `channels`."""

    blocks: Blocks
    channels: int
    pixels: np.ndarray  # offsets in the window of each grid point's first tap, row after row
    taps: np.ndarray  # offsets from there to tap (kh, kw) and channel c of one group
    places: np.ndarray  # offsets of the taps' rows in the sums
    # Of each tile of taps: first and end of the rows, and of the columns, of the grid where any meets the
    # image. Empty if no padding is ever read.
    tiles: np.ndarray


class Axis(NamedTuple):
    """One axis of a correlation: `outputs` many, `step` inputs apart, each over `taps` from `origin` on."""

    outputs: int
    step: int
    origin: int
    taps: tuple[int, ...]
    out_first: int
    out_step: int

    @property
    def window(self) -> int:
        """Inputs that all outputs together span."""
        return (self.outputs - 1) * self.step + self.extent

    @property
    def extent(self) -> int:
        return max(self.taps) + 1

    def inside(self, size: int) -> bool:
        """Whether no tap ever leaves the `size` inputs."""
        return self.origin >= 0 and self.origin + self.window <= size

    def reach(self, size: int) -> np.ndarray:
        """Of each output: the first of its taps that meets the `size` inputs, and the end of those.

        Both rise with the outputs, or both fall: what neighbours meet is known from the first and last of
        them. Where no tap meets an input, both are 0, or both the number of taps.
        """
        before, after = self._outside(size)
        if self.taps[0] > self.taps[-1]:
            before, after = after, before
        return np.stack([before.sum(1), len(self.taps) - after.sum(1)], axis=1)

    def met(self, size: int) -> np.ndarray:
        """Of each tap: the first of the outputs where it meets the `size` inputs, and the end of those."""
        before, after = self._outside(size)
        return np.stack([before.sum(0), self.outputs - after.sum(0)], axis=1)

    def _outside(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Which (output, tap) lie before the inputs, and which behind them."""
        places = np.add.outer(self.origin + self.step * np.arange(self.outputs), np.array(self.taps))
        return places < 0, places >= size


def forward_axis(count: int, stride: int, before: int, kernel: int, dilation: int) -> Axis:
    """The forward pass along one axis with `before` zeros of padding in front."""
    return Axis(count, stride, -before, tuple(dilation * k for k in range(kernel)), 0, 1)


def input_axes(
    size: int, stride: int, before: int, kernel: int, dilation: int
) -> list[tuple[Axis, tuple[int, ...]]]:
    """The backward pass to the input along one axis: a phase for each residue of the input modulo the stride.

    Input h takes dout[i] * weight[k] wherever h + before = stride * i + dilation * k. With h = stride * q + r
    that is i = q + (r + before - dilation * k) / stride, for the k for which the division is exact. Returned
    with each phase: the kernel positions k of its taps. Inputs that no tap reaches are in no phase.
    """
    phases = []
    for residue in range(min(stride, size)):
        exact = [k for k in range(kernel) if (residue + before - dilation * k) % stride == 0]
        if not exact:
            continue
        steps = [(residue + before - dilation * k) // stride for k in exact]
        origin = min(steps)
        count = (size - residue + stride - 1) // stride
        taps = tuple(step - origin for step in steps)
        phases.append((Axis(count, 1, origin, taps, residue, stride), tuple(exact)))
    return phases


def _rows_per_block(
    rows: int, width: int, step: int, extent: int, row_bytes: int, multiple: int, most: int
) -> int:
    """Rows of the grid in a block, a multiple of `multiple`, with `most` pixels: few wasted tile rows, little
    overlap of windows, all within the cache."""
    best, best_cost = multiple, np.inf
    for count in range(multiple, rows + 1, multiple):
        pixels = count * width
        window = ((count - 1) * step + extent) * row_bytes
        if count > multiple and (pixels > most or window > _WINDOW_BYTES):
            break
        blocks = -(-rows // count)
        tiles = -(-pixels // TILE_ROWS) * (rows // count) + -(-(rows % count) * width // TILE_ROWS)
        # A copied row costs far less than a computed one: the overlap counts a tenth.
        overlap = blocks * extent / (rows * step)
        cost = tiles * TILE_ROWS / (rows * width) + 0.1 * overlap
        if cost < best_cost:
            best, best_cost = count, cost
    return best


def correlation(
    rows: Axis,
    columns: Axis,
    image: tuple[int, int],
    channels: int,
    group: int,
    out_width: int,
    out_channels: int,
    multiple: int = 1,
) -> Correlation:
    """Tables for images of `image` pixels and `channels`, `group` of which feed one output channel.

    The result has rows of `out_width` pixels of `out_channels`. A block has a multiple of `multiple` rows.
    """
    height, width = image
    b = blocks(rows, columns, image, channels, channels, multiple, _BLOCK_PIXELS)._replace(
        line=len(columns.taps) * group,
        out_first=(rows.out_first * out_width + columns.out_first) * out_channels,
        out_row=rows.out_step * out_width * out_channels,
    )
    pitch = b.window_w * channels
    last = rows.outputs - (b.blocks - 1) * b.rows
    skips = not b.in_place and len(rows.taps) * len(columns.taps) * group >= _SHORTEST_SUM
    reach = columns.reach(width)
    if not skips or (reach[:, 1] - reach[:, 0]).min() * group < _SHORTEST_RUN:
        reach[:] = 0, len(columns.taps)

    def grid(row_step: int, column_step: int) -> np.ndarray:
        """Offsets of a full block's grid points, and of the last block's, in the tiles' order."""
        full = np.add.outer(np.arange(b.rows) * row_step, np.arange(b.width) * column_step).ravel()
        return np.concatenate([padded_rows(full[_order(many, reach)]) for many in (b.rows, last)])

    tiles = _tiles(grid(1, 0), reach[grid(0, 1)] * group)
    return Correlation(
        b,
        grid(rows.step * pitch, columns.step * channels),
        _taps(rows, columns, pitch, channels, group),
        grid(b.out_row, columns.out_step * out_channels),
        tiles if skips else tiles[:0],
        rows.reach(height),
    )


def gradient(
    rows: Axis,
    columns: Axis,
    image: tuple[int, int],
    channels: int,
    group: int,
    groups: int,
    filters: int,
    panel_width: int,
    multiple: int = 1,
) -> Gradient:
    """Tables for images of `image` pixels and `channels`, of `groups` groups of which `group` each are seen.

    Rows of the sums are `panel_width` apart. A block has a multiple of `multiple` rows.
    """
    height, width = image
    most = _GRADIENT_PIXELS
    if len(rows.taps) * len(columns.taps) == 1:
        most = min(max(_POINT_BYTES // ((group * groups + filters) * _ITEMSIZE), _FEWEST_POINTS), most)
    b = blocks(rows, columns, image, channels, group * groups, multiple, most)
    # Where no padding is read, the image itself is the window.
    between = channels if b.in_place else b.channels
    pitch = b.window_w * between
    taps = _taps(rows, columns, pitch, between, group)
    tile_rows = add_rows(len(taps))
    met = np.array(
        [(*row, *column) for row in rows.met(height) for column in columns.met(width) for _ in range(group)]
    )
    if b.width < _SHORTEST_ROW:
        met[:, 2:] = 0, b.width
    entries = padded_rows(np.arange(len(taps)), tile_rows)
    met = met[entries].reshape(-1, tile_rows, 4)
    tiles = np.stack([met[..., 0].min(1), met[..., 1].max(1), met[..., 2].min(1), met[..., 3].max(1)], axis=1)
    return Gradient(
        b,
        channels,
        np.add.outer(
            np.arange(b.rows) * rows.step * pitch, np.arange(b.width) * columns.step * between
        ).ravel(),
        taps[entries],
        entries * panel_width,
        tiles[:0] if b.in_place else tiles,
    )


def blocks(
    rows: Axis, columns: Axis, image: tuple[int, int], channels: int, seen: int, multiple: int, most: int
) -> Blocks:
    """The blocks of images of `channels`, `seen` of which are in a window."""
    height, width = image
    in_place = rows.inside(height) and columns.inside(width)
    count = _rows_per_block(
        rows.outputs,
        columns.outputs,
        rows.step,
        rows.extent,
        columns.window * seen * _ITEMSIZE,
        multiple,
        most,
    )
    return Blocks(
        image_h=height,
        image_w=width,
        channels=seen,
        in_place=int(in_place),
        blocks=-(-rows.outputs // count),
        rows=count,
        height=rows.outputs,
        width=columns.outputs,
        line=0,
        step=rows.step,
        origin_h=rows.origin,
        origin_w=columns.origin,
        window_h=(count - 1) * rows.step + rows.extent,
        window_w=width if in_place else columns.window,
        tail=-(-count * columns.outputs // TILE_ROWS) * TILE_ROWS,
        out_first=0,
        out_row=0,
    )


def _taps(rows: Axis, columns: Axis, pitch: int, between: int, group: int) -> np.ndarray:
    """Offsets of each tap and channel of a group; `pitch` from row to row, `between` from pixel to pixel."""
    taps = np.add.outer(np.array(rows.taps, np.intp) * pitch, np.array(columns.taps, np.intp) * between)
    return np.add.outer(taps.ravel(), np.arange(group)).ravel().astype(np.intp)


def _order(rows: int, reach: np.ndarray) -> np.ndarray:
    """The order of `rows` rows of grid points that brings those of equal `reach` together."""
    kind = np.cumsum(np.any(np.diff(reach, axis=0, prepend=reach[:1]), axis=1))
    return np.argsort(np.tile(kind, rows), kind="stable")


def _tiles(rows: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Of each tile of grid points in these rows: first and last row, and first and end of their `reach`."""
    rows = rows.reshape(-1, TILE_ROWS)
    reach = reach.reshape(-1, TILE_ROWS, 2)
    return np.stack([rows.min(1), rows.max(1), reach[..., 0].min(1), reach[..., 1].max(1)], axis=1)
