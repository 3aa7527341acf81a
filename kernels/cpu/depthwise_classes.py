"""Which pixels of a depthwise convolution see which taps: classes of pixels, bands, and strips.

Output pixels that see the same taps of the kernel are one class: the inner pixels, which see all of them, and
some lines along the border. Where channels are too few for a vector, neighbouring pixels count as one with
all of their channels, and the weights are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from . import simd
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue
from .geometry import Axis
from .sliding import ROWS, SIDES

# Rows of a band: enough to fill a tile with the pixels of one column along the border.
_ROWS = 8
_BAND_PIXELS = 256
# Elements of neighbouring pixels that count as one, at most: their repeated weights should stay in the cache.
_ELEMENTS_AS_ONE = 128


class Classes(NamedTuple):
    """Which pixels see which taps; all offsets are in elements.

    A band is some rows of the result that see the same rows of the kernel; its columns are cut into spans
    that see the same columns of the kernel. Tables of pixels are made for a full band: row by row, so that a
    band of fewer rows uses their beginning. A block is one band, or several whose rows are pooled together.
    Windows that slide see all of the kernel everywhere, and what they see beyond the image is zero.
    """

    blocks: np.ndarray  # (_, 6): first and last + 1 band, first row, rows, offsets of its input and result
    bands: np.ndarray  # (_, 6): first row, rows, first and last + 1 row of taps, first and last + 1 span
    spans: np.ndarray  # (_, 5): first pixel in the tables, columns, first tap, taps in a row, channels
    pixels: np.ndarray  # offset of each pixel's input
    places: np.ndarray  # offset of each pixel in the result
    taps: np.ndarray  # offset of each tap from the pixel's input
    weights: np.ndarray  # offset of each tap's weights
    steps: tuple[
        int, int, int, int
    ]  # input: first row, next row; result: first row, next row; see `_together`
    repeats: int  # of the weights: pixels that count as one, at most
    side: int  # of windows that slide; else 0
    sliding: np.ndarray  # offsets of their weights
    strips: np.ndarray  # (_, 2): first row of the result, and rows, that they make at a time
    rows: tuple[int, int]  # where windows begin in the image, and its rows
    columns: tuple[int, int, int]  # of padding before the image, of the image, and of the result
    nothing: np.ndarray  # a row of zeros, if windows slide


def _runs(axis: Axis, size: int) -> list[tuple[int, int, int, int]]:
    """Outputs in a row that see the same taps: the first, how many, first and last + 1 tap."""
    offsets = axis.origin + np.array(axis.taps)
    runs: list[tuple[int, int, int, int]] = []
    for i in range(axis.outputs):
        seen = np.flatnonzero((i * axis.step + offsets >= 0) & (i * axis.step + offsets < size))
        first, last = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        if runs and runs[-1][2:] == (first, last):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, first, last)
        else:
            runs.append((i, 1, first, last))
    return runs


def _blocks(
    runs: list[tuple[int, int, int, int]], rows: int, most: int, multiple: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Blocks and bands of at most `most` rows; a block has a multiple of `multiple` rows, if that isn't 1."""
    if multiple == 1:
        bands = [
            (row, min(most, first + many - row), tap0, tap1)
            for first, many, tap0, tap1 in runs
            for row in range(first, first + many, most)
        ]
        return [(i, i + 1, row, many) for i, (row, many, _, _) in enumerate(bands)], bands
    blocks, bands = [], []
    for row in range(0, rows, most):
        end, band = min(row + most, rows), len(bands)
        for first, many, tap0, tap1 in runs:
            top, bottom = max(row, first), min(end, first + many)
            if top < bottom:
                bands.append((top, bottom - top, tap0, tap1))
        blocks.append((band, len(bands), row, end - row))
    return blocks, bands


def _strips(rows: int, most: int, multiple: int) -> np.ndarray:
    """First rows and numbers of rows of strips of the same length, about `most`; none has one row."""
    units = rows // multiple
    count = -(-rows // max(most, 2 * ROWS))
    ends = np.arange(count + 1) * units // count * multiple
    return np.stack([ends[:-1], np.diff(ends)], axis=1)


def _grid(
    rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray, steps: tuple[int, int]
) -> np.ndarray:
    """Offsets of points, row by row."""
    return np.add.outer(np.array(rows, np.intp) * steps[0], np.array(columns, np.intp) * steps[1]).ravel()


def _classes(
    rows: Axis,
    columns: Axis,
    kernel_rows: Sequence[int],
    kernel_columns: Sequence[int],
    kernel_w: int,
    image: tuple[int, int],
    out_width: int,
    channels: int,
    most_as_one: int,
    dtype: np.dtype,
    multiple: int = 1,
) -> Classes:
    """The classes of a correlation whose taps have the weights of these rows and columns of the kernel.

    A block has a multiple of `multiple` rows.
    """
    height, width = image
    most = -(-max(_ROWS, _BAND_PIXELS // columns.outputs) // multiple) * multiple
    count = min(rows.outputs, most)
    blocks, bands = _blocks(_runs(rows, height), rows.outputs, count, multiple)
    pitch, out_pitch = width * channels, out_width * channels
    pixel_steps = rows.step * pitch, columns.step * channels
    place_steps = rows.out_step * out_pitch, columns.out_step * channels
    runs = _runs(columns, width)
    repeats = min(most_as_one, max(many for _, many, _, _ in runs))
    spans: list[tuple[int, int, int, int, int]] = []
    tables: tuple[list, ...] = ([], [], [], [])
    for first, many, tap0, tap1 in runs:
        first_tap = sum(table.size for table in tables[2])
        for column in range(first, first + many, repeats if repeats > 1 else many):
            as_one = min(repeats, first + many - column)
            j = np.arange(column, column + (many if repeats == 1 else 1))
            first_pixel = sum(table.size for table in tables[0])
            spans.append((first_pixel, len(j), first_tap, tap1 - tap0, as_one * channels))
            tables[0].append(_grid(np.arange(count), j, pixel_steps))
            tables[1].append(_grid(np.arange(count), j, place_steps))
        seen = slice(tap0, tap1)
        tables[2].append(_grid(rows.taps, columns.taps[seen], (pitch, channels)))
        steps = kernel_w * channels * repeats, channels * repeats
        tables[3].append(_grid(kernel_rows, kernel_columns[seen], steps))
    in_first = rows.origin * pitch + columns.origin * channels
    out_first = rows.out_first * out_pitch + columns.out_first * channels
    in_row, out_row = pixel_steps[0], place_steps[0]
    begins = [(in_first + block[2] * in_row, out_first + block[2] * out_row) for block in blocks]
    pixels, places, taps, weights = (np.concatenate(table) for table in tables)
    side = _side(rows, columns) if repeats == 1 else 0
    ordered_rows = [kernel_rows[rows.taps.index(a)] for a in range(side)]
    ordered_columns = [kernel_columns[columns.taps.index(b)] for b in range(side)]
    return Classes(
        np.hstack([blocks, begins]).astype(np.intp),
        np.array([(*band, 0, len(spans)) for band in bands], np.intp),
        np.array(spans, np.intp),
        pixels,
        places,
        taps,
        weights,
        (in_first, in_row, out_first, out_row),
        repeats,
        side,
        _grid(ordered_rows, ordered_columns, (kernel_w * channels, channels)),
        _strips(rows.outputs, most, multiple) if side else np.empty((0, 2), np.intp),
        (rows.origin, height),
        (-columns.origin, width, columns.outputs),
        np.zeros(pitch if side else 1, dtype),
    )


def _together(phases: Sequence[Classes]) -> Classes:
    """Those of all phases of an input, whose pixels lie between each other: threads do them image by image.

    Phases differ in where they begin, which blocks know, and in what they see; first rows are those of the
    first phase. If there are several, no windows slide.
    """
    blocks, bands, spans = [], [], []
    many_bands = many_spans = pixels = taps = 0
    for of in phases:
        blocks.append(np.add(of.blocks, (many_bands, many_bands, 0, 0, 0, 0)))
        bands.append(np.add(of.bands, (0, 0, 0, 0, many_spans, many_spans)))
        spans.append(np.add(of.spans, (pixels, 0, taps, 0, 0)))
        many_bands, many_spans = many_bands + len(of.bands), many_spans + len(of.spans)
        pixels, taps = pixels + of.pixels.size, taps + of.taps.size
    return phases[0]._replace(
        blocks=np.concatenate(blocks),
        bands=np.concatenate(bands),
        spans=np.concatenate(spans),
        pixels=np.concatenate([of.pixels for of in phases]),
        places=np.concatenate([of.places for of in phases]),
        taps=np.concatenate([of.taps for of in phases]),
        weights=np.concatenate([of.weights for of in phases]),
    )


def _side(rows: Axis, columns: Axis) -> int:
    """Pixels along each side of windows that are square and one pixel apart, if such may slide; else 0."""
    if rows.outputs < ROWS:
        return 0
    for side in SIDES:
        taps = list(range(side))
        if all(sorted(axis.taps) == taps and axis.step == axis.out_step == 1 for axis in (rows, columns)):
            return side
    return 0


def _most_as_one(layer: Layer, dtype: np.dtype) -> int:
    """Pixels that count as one: they need to have neighbours everywhere, and fewer channels than a vector.

    Windows that slide are faster from a quarter of a vector on.
    """
    lanes = simd.lanes(dtype)
    if layer.columns.stride > 1 or layer.channels >= lanes:
        return 1
    if 4 * layer.channels >= lanes and _side(layer.rows.forward(), layer.columns.forward()):
        return 1
    return max(1, _ELEMENTS_AS_ONE // layer.channels)


@lru_cache(maxsize=512)
def forward_classes(layer: Layer, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> Classes:
    """Those of the forward pass that ends in `e`, and of the gradient of the weights."""
    kernel_h, kernel_w = layer.rows.kernel, layer.columns.kernel
    rows, columns = layer.forward_axes(e)
    return _classes(
        rows,
        columns,
        range(kernel_h),
        range(kernel_w),
        kernel_w,
        layer.image,
        columns.outputs,
        layer.channels,
        _most_as_one(layer, dtype),
        dtype,
        max(e.pool_h, 1),
    )


@lru_cache(maxsize=512)
def input_classes(layer: Layer, dtype: np.dtype) -> Classes | None:
    """Those of the gradient to the input; None if no input meets a tap."""
    phases = [
        _classes(
            rows,
            columns,
            kernel_rows,
            kernel_columns,
            layer.columns.kernel,
            layer.out_image,
            layer.image[1],
            layer.channels,
            _most_as_one(layer, dtype),
            dtype,
        )
        for rows, kernel_rows in layer.rows.phases()
        for columns, kernel_columns in layer.columns.phases()
    ]
    return _together(phases) if phases else None
