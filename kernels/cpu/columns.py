"""Windows of images: their geometry, as rows of a matrix and back; and sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from ..windows import Windows, windows
from . import simd
from .moments import batch_sums
from .vectors import all_lanes, first_lanes, keep_in_line, lanes_of, load, pointer, prefetch, store, zeros
from .workspace import scratch


@kernel
def _copy_run(x, source, cols, target, size, first, last):
    """cols[target : target + size] = x[source : source + size], and 0 before `first` and from `last` on."""
    for k in range(0, size, lanes_of(x)):
        inside = first_lanes(x, last - k) ^ first_lanes(x, first - k)
        store(load(x, source + k, inside), cols, target + k, first_lanes(x, size - k))


@kernel
def _copy_runs(x, source, step, cols, target, window, size, count):
    """Copy `count` runs of `size` elements, `step` apart, to where they lie `window` apart."""
    keep_in_line()
    lanes, everything = lanes_of(x), all_lanes(x)
    whole = size // lanes * lanes
    some = first_lanes(x, size - whole)
    for _ in range(count):
        for k in range(0, whole, lanes):
            store(load(x, source + k, everything), cols, target + k, everything)
        if whole < size:
            store(load(x, source + whole, some), cols, target + whole, some)
        source += step
        target += window


@parallel
def _im2col(part, parts, x, cols, lines, g):
    """A line of windows at a time, row by row of their taps.

    Taps that are neighbours in memory are copied in one run: all kW of a row unless they are dilated.
    """
    keep_out_of_line()
    images, columns = pointer(x), pointer(cols)
    runs = 1 if g.dilation_w == 1 else g.kernel_w
    taps = g.kernel_w // runs
    size, step = taps * g.channels, g.stride_w * g.channels
    window = g.kernel_h * runs * size
    row_size = runs * size * g.out_w
    lo, hi = span(part, parts, lines)
    for line in range(lo, hi):
        n = line // g.out_h
        begin = line * g.out_w * window
        for a in range(g.kernel_h):
            # As much of where the next line goes is fetched: what is overwritten is read first.
            ahead = begin + (g.kernel_h + a) * row_size
            for k in range(ahead, ahead + row_size, lanes_of(columns)):
                prefetch(columns, k)
            h = (line - n * g.out_h) * g.stride_h - g.top + a * g.dilation_h
            row = (n * g.height + h) * g.width
            is_inside = 0 <= h < g.height
            for b in range(runs):
                before = b * g.dilation_w - g.left
                target = begin + (a * runs + b) * size
                # The windows whose whole run lies in the image.
                first = min(max(0, -(before // g.stride_w)), g.out_w)
                last = max(first, min(g.out_w, (g.width - taps - before) // g.stride_w + 1))
                if not is_inside:
                    first = last = 0
                for k in range(g.out_w - (last - first)):
                    j = k if k < first else k + last - first
                    w = j * g.stride_w + before
                    left = min(max(0, -w), taps)
                    right = max(left, min(taps, g.width - w)) if is_inside else left
                    left, right = left * g.channels, right * g.channels
                    _copy_run(images, (row + w) * g.channels, columns, target + j * window, size, left, right)
                source = (row + first * g.stride_w + before) * g.channels
                target += first * window
                _copy_runs(images, source, step, columns, target, window, size, last - first)


def im2col(
    x: np.ndarray,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Copy every window of the zero-padded images into one row of a matrix.

    ``cols[(n, i, j), (kh, kw, c)] = x[n, i * stride + kh * dilation - top, ..., c]``
    with zeros outside the image.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    kernel_size, stride, dilation : int or (height, width)
    padding : int, (height, width) or ((top, bottom), (left, right))
    out : (N * Ho * Wo, kH * kW * C), optional
        Overwritten with the result.

    Returns
    -------
    (N * Ho * Wo, kH * kW * C) array of x's dtype
        Rows in the order (n, i, j), columns in the order (kh, kw, c).

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, or the kernel is larger than the padded image.
    """
    x = checks.floating("x", x, 4)
    g = windows(x.shape, kernel_size, stride, checks.padding2d(padding), dilation)
    shape = (x.shape[0] * g.out_h * g.out_w, g.kernel_h * g.kernel_w * g.channels)
    cols = checks.output("out", out, shape, x.dtype)
    if cols.size:
        lines = x.shape[0] * g.out_h
        _im2col(part_count(lines, cols.size), x.reshape(-1), cols.reshape(-1), lines, g)
    return cols


@lru_cache(maxsize=512)
def _overlaps(g: Windows, lanes: int) -> np.ndarray:
    """For each vector of a row of an image and each run of taps: the windows whose runs overlap it.

    They are those from the first number to the last one - 1; the two between enclose those that hold all of
    it.
    """
    runs = 1 if g.dilation_w == 1 else g.kernel_w
    size, step = g.kernel_w // runs * g.channels, g.stride_w * g.channels
    begin = np.arange(0, g.width * g.channels, lanes)[:, np.newaxis]
    end = np.minimum(begin + lanes, g.width * g.channels)
    # Window j has its run from `start` + j * step on.
    start = (np.arange(runs) * g.dilation_w - g.left) * g.channels
    limits = begin - size - start, end - size - start - 1, begin - start, end - 1 - start
    bounds = np.stack([limit // step + 1 for limit in limits], axis=2).clip(0, g.out_w)
    bounds[:, :, 1:3] = bounds[:, :, 1:3].clip(bounds[:, :, :1], bounds[:, :, 3:])
    bounds[:, :, 2] = np.maximum(bounds[:, :, 1], bounds[:, :, 2])
    return bounds.astype(np.intp)


@kernel
def _rows_above(line, g, rows):
    """Note in `rows` where the taps in a row of an image begin in the matrix; returns how many there are."""
    n = line // g.height
    count = 0
    for a in range(g.kernel_h):
        reach = line - n * g.height + g.top - a * g.dilation_h
        i = reach // g.stride_h
        if reach >= 0 and i * g.stride_h == reach and i < g.out_h:
            rows[count] = ((n * g.out_h + i) * g.out_w * g.kernel_h + a) * g.kernel_w * g.channels
            count += 1
    return count


@kernel
def _add_runs(total, cols, rows, count, offset, mask):
    """`total` plus what all rows of taps hold at an offset."""
    keep_in_line()
    for k in range(count):
        total = total + load(cols, rows[k] + offset, mask)
    return total


@parallel
def _col2im(part, parts, cols, x, lines, g, overlaps, all_rows):
    """Each row of an image gathers from all windows above it, always in the same order."""
    keep_out_of_line()
    images, columns, rows = pointer(x), pointer(cols), pointer(all_rows[part])
    lanes, everything = lanes_of(images), all_lanes(images)
    vectors, runs = overlaps.shape[0], overlaps.shape[1]
    size = g.kernel_w // runs * g.channels
    window, step = g.kernel_h * g.kernel_w * g.channels, g.stride_w * g.channels
    width = g.width * g.channels
    # Of the line of windows that begins below a row, so many elements are fetched beside each of its vectors.
    row = g.out_w * window
    share = row // (g.stride_h * vectors) + 1
    lo, hi = span(part, parts, lines)
    for line in range(lo, hi):
        count = _rows_above(line, g, rows)
        n = line // g.height
        ahead = n * g.out_h * row + (line - n * g.height + g.top + 1) * row // g.stride_h
        for v in range(vectors):
            at = v * lanes
            mask = first_lanes(images, width - at)
            total = zeros(images)
            for k in range(ahead + v * share, ahead + (v + 1) * share, lanes):
                prefetch(columns, k)
            for b in range(runs):
                start = (b * g.dilation_w - g.left) * g.channels
                offset = b * size + at - start
                first, whole = overlaps[v, b, 0], overlaps[v, b, 1]
                rest, last = overlaps[v, b, 2], overlaps[v, b, 3]
                for j in range(first, last):
                    some = everything
                    if j < whole or j >= rest or v == vectors - 1:
                        before = at - start - j * step
                        some = (first_lanes(images, size - before) ^ first_lanes(images, -before)) & mask
                    total = _add_runs(total, columns, rows, count, offset + j * (window - step), some)
            store(total, images, line * width + at, mask)


def col2im(
    cols: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Add every row of a matrix back to the window it would have been copied from: the adjoint of `im2col`.

    Pixels that several windows share receive the sum.

    Parameters
    ----------
    cols : (N * Ho * Wo, kH * kW * C) float32 or float64
    x_shape : (N, H, W, C)
    kernel_size, stride, dilation : int or (height, width)
    padding : int, (height, width) or ((top, bottom), (left, right))
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array of cols' dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, or the kernel is larger than the padded image.
    """
    cols = checks.floating("cols", cols, 2)
    shape = checks.shape4("x_shape", x_shape)
    g = windows(shape, kernel_size, stride, checks.padding2d(padding), dilation)
    columns = shape[0] * g.out_h * g.out_w
    checks.same_shape("cols", cols, (columns, g.kernel_h * g.kernel_w * g.channels))
    x = checks.output("out", out, shape, cols.dtype)
    if x.size:
        lines = shape[0] * g.height
        parts = part_count(lines, cols.size)
        rows = scratch("rows of taps", (parts, g.kernel_h), np.intp)
        overlaps = _overlaps(g, simd.lanes(x.dtype))
        _col2im(parts, cols.reshape(-1), x.reshape(-1), lines, g, overlaps, rows)
    return x


def conv2d_backward_bias(
    dout: np.ndarray, *, out: np.ndarray | None = None, accumulate: bool = False
) -> np.ndarray:
    """Gradient to a bias that was added along the last axis: dout summed over all other axes, in float64.

    Parameters
    ----------
    dout : (..., F) float32 or float64
    out : (F,), optional
        Overwritten with the result, or added to if `accumulate` is true.

    Returns
    -------
    (F,) array of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or sizes don't fit.
    """
    dout = checks.floating("dout", dout)
    if not dout.ndim:
        raise ValueError("dout: expected (..., F), got a scalar")
    channels = dout.shape[-1]
    dbias = checks.output("out", out, (channels,), dout.dtype)
    accumulate = accumulate and out is not None
    if not dout.size:
        if not accumulate:
            between_jobs(dbias.fill, 0)
        return dbias
    batch_sums(dout, dbias, accumulate)
    return dbias
