"""Windows of images: their geometry, as rows of a matrix and back; and sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from ..windows import windows
from .moments import batch_sums
from .simd import VECTOR_BITS
from .vectors import all_lanes, first_lanes, keep_in_line, load, pointer, prefetch, store, zeros


@kernel
def valid_range(out, stride, offset, size):
    """First and last + 1 of the j in range(out) for which ``0 <= j * stride + offset < size``."""
    first = min(out, max(0, -(offset // stride)))
    last = min(out, -((offset - size) // stride))
    return first, max(first, last)


@kernel
def _inside(run, w, h, g):
    """First and last + 1 of a run of taps, from pixel (h, w) on, that lie in the image."""
    keep_in_line()
    if h < 0 or h >= g.height:
        return 0, 0
    first = min(run, max(0, -w))
    return first, max(first, min(run, g.width - w))


@kernel
def _copy_run(x, source, cols, target, size, first, last, lanes):
    """cols[target : target + size] = x[source : source + size], and 0 before `first` and from `last` on."""
    keep_in_line()
    everything = all_lanes(x)
    k = 0
    if first == 0 and last == size:
        while k + lanes <= size:
            store(load(x, source + k, everything), cols, target + k, everything)
            k += lanes
    while k < size:
        inside = first_lanes(x, last - k) ^ first_lanes(x, first - k)
        store(load(x, source + k, inside), cols, target + k, first_lanes(x, size - k))
        k += lanes


@parallel
def _im2col(part, parts, x, cols, rows, g):
    """Taps that are neighbours in memory are copied in one run: all kW of a row unless they are dilated."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * x.itemsize)
    images, columns = pointer(x), pointer(cols)
    runs = 1 if g.dilation_w == 1 else g.kernel_w
    run = g.kernel_w // runs
    size = run * g.channels
    lo, hi = span(part, parts, rows)
    for row in range(lo, hi):
        line = row // g.out_w
        j = row - line * g.out_w
        n = line // g.out_h
        i = line - n * g.out_h
        target = row * g.kernel_h * g.kernel_w * g.channels
        for a in range(g.kernel_h):
            h = i * g.stride_h - g.top + a * g.dilation_h
            for b in range(0, g.kernel_w, run):
                w = j * g.stride_w - g.left + b * g.dilation_w
                first, last = _inside(run, w, h, g)
                source = ((n * g.height + h) * g.width + w) * g.channels
                first, last = first * g.channels, last * g.channels
                _copy_run(images, source, columns, target, size, first, last, lanes)
                target += size


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
        _im2col(part_count(shape[0], cols.size), x.reshape(-1), cols.reshape(-1), shape[0], g)
    return cols


@kernel
def _gathered(cols, line, at, size, mask, g):
    """The sum of all that windows hold of `size` elements, from `at` on, of a row of an image: one vector.

    `line` is the row, counted through all images.
    """
    keep_in_line()
    runs = 1 if g.dilation_w == 1 else g.kernel_w
    run = g.kernel_w // runs * g.channels
    step, window = g.stride_w * g.channels, g.kernel_h * g.kernel_w * g.channels
    n = line // g.height
    total = zeros(cols)
    for b in range(runs):
        # Window j has its run from `start` + j * step on.
        start = (b * g.dilation_w - g.left) * g.channels
        first = max(0, (at - run - start) // step + 1)
        last = min(g.out_w, (at + size - 1 - start) // step + 1)
        for a in range(g.kernel_h):
            reach = line - n * g.height + g.top - a * g.dilation_h
            i = reach // g.stride_h
            if reach < 0 or i * g.stride_h != reach or i >= g.out_h:
                continue
            source = (n * g.out_h + i) * g.out_w * window + (a * g.kernel_w + b) * g.channels
            for j in range(first, last):
                ahead = at - start - j * step
                inside = (first_lanes(cols, run - ahead) ^ first_lanes(cols, -ahead)) & mask
                prefetch(cols, source + (j + g.out_w) * window + ahead)
                total = total + load(cols, source + j * window + ahead, inside)
    return total


@parallel
def _col2im(part, parts, cols, x, lines, g):
    """Each row of an image gathers from all windows above it, always in the same order."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * x.itemsize)
    images, columns = pointer(x), pointer(cols)
    width = g.width * g.channels
    lo, hi = span(part, parts, lines)
    for line in range(lo, hi):
        for at in range(0, width, lanes):
            size = min(lanes, width - at)
            mask = first_lanes(images, size)
            store(_gathered(columns, line, at, size, mask, g), images, line * width + at, mask)


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
    rows = shape[0] * g.out_h * g.out_w
    checks.same_shape("cols", cols, (rows, g.kernel_h * g.kernel_w * g.channels))
    x = checks.output("out", out, shape, cols.dtype)
    if x.size:
        lines = shape[0] * g.height
        _col2im(part_count(lines, cols.size), cols.reshape(-1), x.reshape(-1), lines, g)
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
