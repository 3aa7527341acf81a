"""What a convolution reads and writes, as offset tables for the engine: made once a shape, then cached.

A `Correlation` describes out[n, i, j] = sum over taps of x[n, origin + step * (i, j) + tap] times weights, on
a grid (i, j) of outputs that may itself be spread over the result. With it the same driver runs the forward
pass (step = stride, taps = dilation * (kh, kw)) and each phase of the backward pass to the input
(step = 1, result spread by the stride).

The grid is cut into blocks of whole rows. A block's input window is copied with its zero padding to a scratch
area that stays in the cache, unless no tap ever leaves the image; then the image is read in place.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .tile import TILE_ROWS, padded_rows

# A block's window should stay in the second-level cache while every panel of weights passes by it.
_WINDOW_BYTES = 256 * 1024
_BLOCK_PIXELS = 512


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
    step: int  # input rows from one row of the grid to the next
    origin_h: int  # input row of the first tap of grid row 0; negative in the padding
    origin_w: int
    window_h: int  # rows and columns of a full block's window
    window_w: int
    tail: int  # where the tables of the last block begin
    out_first: int  # offset in the result of grid point (0, 0), in elements
    out_row: int  # and from one grid row to the next


class Correlation(NamedTuple):
    """Tables for one memory layout; `pixels` and `spread` hold a full block's, then the last block's."""

    blocks: Blocks
    pixels: np.ndarray  # offsets in the window of each grid point's first tap
    taps: np.ndarray  # offsets from there to tap (kh, kw) and channel c of one group
    spread: np.ndarray  # offsets in the result of each grid point, from its block's first


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


def _rows_per_block(rows: int, width: int, step: int, extent: int, row_bytes: int, multiple: int) -> int:
    """Rows of the grid in a block, a multiple of `multiple`: few wasted tile rows, little overlap of windows,
    all within the cache."""
    best, best_cost = multiple, np.inf
    for count in range(multiple, rows + 1, multiple):
        pixels = count * width
        window = ((count - 1) * step + extent) * row_bytes
        if count > multiple and (pixels > _BLOCK_PIXELS or window > _WINDOW_BYTES):
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
    in_place = all(
        axis.origin >= 0 and axis.origin + axis.window <= size
        for axis, size in ((rows, height), (columns, width))
    )
    pitch = (width if in_place else columns.window) * channels
    itemsize = 4  # of float32; float64 windows are twice as large and do as well in the second-level cache
    count = _rows_per_block(
        rows.outputs,
        columns.outputs,
        rows.step,
        rows.extent,
        columns.window * channels * itemsize,
        multiple,
    )
    last = rows.outputs - (-(-rows.outputs // count) - 1) * count

    def pixel_table(many: int, row_step: int, column_step: int) -> np.ndarray:
        return padded_rows(
            np.add.outer(np.arange(many) * row_step, np.arange(columns.outputs) * column_step).ravel()
        )

    pixel_steps = (rows.step * pitch, columns.step * channels)
    spread_steps = (rows.out_step * out_width * out_channels, columns.out_step * out_channels)
    full = pixel_table(count, *pixel_steps)
    taps = np.add.outer(np.array(rows.taps, np.intp) * pitch, np.array(columns.taps, np.intp) * channels)
    blocks = Blocks(
        image_h=height,
        image_w=width,
        channels=channels,
        in_place=int(in_place),
        blocks=-(-rows.outputs // count),
        rows=count,
        height=rows.outputs,
        width=columns.outputs,
        step=rows.step,
        origin_h=rows.origin,
        origin_w=columns.origin,
        window_h=(count - 1) * rows.step + rows.extent,
        window_w=width if in_place else columns.window,
        tail=len(full),
        out_first=(rows.out_first * out_width + columns.out_first) * out_channels,
        out_row=spread_steps[0],
    )
    return Correlation(
        blocks,
        np.concatenate([full, pixel_table(last, *pixel_steps)]),
        np.add.outer(taps.ravel(), np.arange(group)).ravel().astype(np.intp),
        np.concatenate([pixel_table(count, *spread_steps), pixel_table(last, *spread_steps)]),
    )
