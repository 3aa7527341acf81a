"""Max, average, adaptive average and global average pooling, with their gradients.

A thread computes one output, or four pixels of a gradient that lie below each other; neighbouring threads
have neighbouring channels, so that all accesses are to whole segments of memory. Gradients are gathered:
each pixel sums over its windows in a fixed order, and no two threads write to one place.

Windows come as tables, one for each axis (see `kernels/windows.py`). How many pixels a window has is a
constant of the compiled kernel, so that its loads are all under way before the first is needed; where a
window has fewer, at the edge of an image, its first pixel is read again and not used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from .. import windows as geometry
from ..cpu import pooling as cpu
from ..windows import Axis, Windows, argmax_dtype, average_axes, pool_padding, pooled_windows, windows
from . import checks
from .arrays import THREADS, DeviceArray, from_numpy
from .channel_sums import fold, layout, place
from .jit import FLOATS, Kernel, device_function, kernel
from .twin import twin_of

# Pixels of a gradient that one thread computes.
_ROWS = 4
# Windows with more pixels are summed by a block each.
_MANY = 36


# ------------------------------------------------------------------ the tables on the device


@lru_cache(maxsize=512)
def _taps(size: int, count: int, kernel: int, stride: int, before: int, dilation: int) -> DeviceArray:
    """For each window along one axis: first pixel, last + 1, and the number of the tap at the first."""
    table = geometry.tap_table(size, count, kernel, stride, before, dilation)
    return from_numpy(table.astype(np.int32))


@lru_cache(maxsize=512)
def _taps_over(size: int, count: int, kernel: int, stride: int, before: int, dilation: int) -> DeviceArray:
    """For each pixel along one axis, the windows that it is in, and the number of its tap in each."""
    table = geometry.tap_table(size, count, kernel, stride, before, dilation)
    return from_numpy(_windows_over(table, size, dilation, 1))


class _Means(NamedTuple):
    """The windows of an average pooling along one axis, on the device."""

    windows: int
    longest: int  # most pixels of a window
    bounds: DeviceArray  # (windows, 3): first pixel, last + 1
    factors: DeviceArray  # (windows,): those of both axes multiply to one over the divisor
    over: DeviceArray  # (size, most, 2): for each pixel (window, ...), then (-1, ...)s


def _means(axis: Axis, size: int, dtype: np.dtype) -> _Means:
    return _means_of(axis.table.tobytes(), axis.longest, size, dtype)


@lru_cache(maxsize=512)
def _means_of(table_bytes: bytes, longest: int, size: int, dtype: np.dtype) -> _Means:
    table = np.frombuffer(table_bytes, np.int64).reshape(-1, 3)
    factors = (1 / table[:, 2]).astype(dtype)
    over = _windows_over(table, size, 1, 0)
    return _Means(len(table), longest, *map(from_numpy, (table.astype(np.int32), factors, over)))


def _windows_over(table: np.ndarray, size: int, dilation: int, step: int) -> np.ndarray:
    """(size, most, 2) int32: for each pixel (window, number) of its windows, in order, then (-1, 0).

    The number is that of the window's row in `table`, plus `step` for each pixel from the window's first on.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for window, (first, last, number) in enumerate(table.tolist()):
        for tap, pixel in enumerate(range(first, last, dilation)):
            found[pixel].append((window, number + step * tap))
    result = np.zeros((size, max(1, max(map(len, found))), 2), np.int32)
    result[..., 0] = -1
    for pixel, pairs in enumerate(found):
        result[pixel, : len(pairs)] = np.array(pairs).reshape(-1, 2)
    return result


# ------------------------------------------------------------------ kernels


@device_function
def split(at, channels, width, height):
    """Element number `at` of (images, height, width, channels) as (image, row, column, channel)."""
    pixel = at // channels
    line = pixel // width
    image = line // height
    return image, line - image * height, pixel - line * width, at - pixel * channels


_INDICES = ("uint8", "uint16", "uint32")


def _with_indices(signature: str) -> list[str]:
    """`signature` for every dtype that numbers the taps of a window."""
    return [signature.replace("INDEX", dtype) for dtype in _INDICES]


@cache
def _max_forward(kernel_h: int, kernel_w: int) -> Kernel:
    @kernel(
        *_with_indices(
            "T[::1], T[::1], INDEX[::1], int32[:, ::1], int32[:, ::1], int64, int64, int64, int64, int64"
        ),
        name=f"{kernel_h}x{kernel_w}",
    )
    def max_forward(x, y, argmax, rows, columns, height, width, channels, dilation_h, dilation_w):
        at = cuda.grid(1)
        if at >= y.size:
            return
        n, i, j, c = split(at, channels, columns.shape[0], rows.shape[0])
        top, bottom, left, right = rows[i, 0], rows[i, 1], columns[j, 0], columns[j, 1]
        where = rows[i, 2] * kernel_w + columns[j, 2]
        first = where
        best = x.dtype.type(-math.inf)
        for a in range(kernel_h):
            h = top + a * dilation_h
            line = (n * height + (h if h < bottom else top)) * width
            for b in range(kernel_w):
                w = left + b * dilation_w
                value = x[(line + (w if w < right else left)) * channels + c]
                # NaN wins over everything, and the last NaN over the others.
                if h < bottom and w < right and (value > best or value != value):
                    best = value
                    where = first + a * kernel_w + b
        y[at] = best
        argmax[at] = where

    return max_forward


@cache
def _max_backward(most_h: int, most_w: int) -> Kernel:
    """The kernel for images of which a pixel is in up to `most_h` times `most_w` windows."""

    @kernel(
        *_with_indices(
            "T[::1], INDEX[::1], T[::1], int32[:, :, ::1], int32[:, :, ::1], "
            "int64, int64, int64, int64, int64"
        ),
        name=f"{most_h}x{most_w}",
    )
    def max_backward(dout, argmax, dx, rows, columns, threads, out_h, out_w, channels, kernel_w):
        at = cuda.grid(1)
        if at >= threads:
            return
        height, width = rows.shape[0], columns.shape[0]
        n, group, w, c = split(at, channels, width, (height + _ROWS - 1) // _ROWS)
        sums = cuda.local.array(_ROWS, dx.dtype)
        for r in range(_ROWS):
            h = min(group * _ROWS + r, height - 1)
            sums[r] = 0
            for p in range(most_h):
                i = rows[h, p, 0]
                line = (n * out_h + max(i, 0)) * out_w
                for q in range(most_w):
                    j = columns[w, q, 0]
                    source = (line + max(j, 0)) * channels + c
                    gradient, tap = dout[source], argmax[source]
                    if i >= 0 and j >= 0 and tap == rows[h, p, 1] * kernel_w + columns[w, q, 1]:
                        sums[r] += gradient
        target = ((n * height + group * _ROWS) * width + w) * channels + c
        for r in range(_ROWS):
            if group * _ROWS + r < height:
                dx[target + r * width * channels] = sums[r]

    return max_backward


@cache
def _mean_forward(most_h: int, most_w: int) -> Kernel:
    """The kernel for windows of up to `most_h` times `most_w` pixels."""

    @kernel(
        "T[::1], T[::1], int32[:, ::1], int32[:, ::1], T[::1], T[::1], int64, int64, int64",
        name=f"{most_h}x{most_w}",
    )
    def mean_forward(x, y, rows, columns, row_factors, column_factors, height, width, channels):
        at = cuda.grid(1)
        if at >= y.size:
            return
        n, i, j, c = split(at, channels, columns.shape[0], rows.shape[0])
        top, bottom, left, right = rows[i, 0], rows[i, 1], columns[j, 0], columns[j, 1]
        total = x.dtype.type(0)
        for a in range(most_h):
            h = top + a
            # A window of padding only has no first pixel.
            line = (n * height + (h if h < bottom else min(top, height - 1))) * width
            for b in range(most_w):
                w = left + b
                value = x[(line + (w if w < right else min(left, width - 1))) * channels + c]
                if h < bottom and w < right:
                    total += value
        y[at] = total * (row_factors[i] * column_factors[j])

    return mean_forward


def _mean_of_many(dtype: str) -> Kernel:
    """The kernel for large windows, one block each and a tile of channels."""

    @kernel(
        "T[::1], T[::1], int32[:, ::1], int32[:, ::1], T[::1], T[::1], int64, int64, int64, int64",
        floats=(dtype,),
        name=dtype,
    )
    def mean_of_many(x, y, rows, columns, row_factors, column_factors, height, width, channels, across):
        shared = cuda.shared.array(THREADS, dtype)
        lanes = cuda.blockDim.x // across
        lane, c = place(across)
        line = cuda.blockIdx.x // columns.shape[0]
        j = cuda.blockIdx.x - line * columns.shape[0]
        n = line // rows.shape[0]
        i = line - n * rows.shape[0]
        wide = columns[j, 1] - columns[j, 0]
        total = x.dtype.type(0)
        if c < channels:
            for pixel in range(lane, (rows[i, 1] - rows[i, 0]) * wide, lanes):
                a = pixel // wide
                h, w = rows[i, 0] + a, columns[j, 0] + pixel - a * wide
                total += x[((n * height + h) * width + w) * channels + c]
        shared[cuda.threadIdx.x] = total
        fold(shared, across, lanes)
        if lane == 0 and c < channels:
            y[cuda.blockIdx.x * channels + c] = shared[cuda.threadIdx.x] * (
                row_factors[i] * column_factors[j]
            )

    return mean_of_many


@cache
def _mean_backward(most_h: int, most_w: int) -> Kernel:
    """The kernel for images of which a pixel is in up to `most_h` times `most_w` windows."""

    @kernel(
        "T[::1], T[::1], int32[:, :, ::1], int32[:, :, ::1], T[::1], T[::1], int64, int64",
        name=f"{most_h}x{most_w}",
    )
    def mean_backward(dout, dx, rows, columns, row_factors, column_factors, threads, channels):
        at = cuda.grid(1)
        if at >= threads:
            return
        height, width = rows.shape[0], columns.shape[0]
        out_h, out_w = row_factors.size, column_factors.size
        n, group, w, c = split(at, channels, width, (height + _ROWS - 1) // _ROWS)
        sums = cuda.local.array(_ROWS, dx.dtype)
        for r in range(_ROWS):
            h = min(group * _ROWS + r, height - 1)
            sums[r] = 0
            for p in range(most_h):
                i = rows[h, p, 0]
                line = n * out_h + max(i, 0)
                for q in range(most_w):
                    j = columns[w, q, 0]
                    gradient = dout[(line * out_w + max(j, 0)) * channels + c]
                    if i >= 0 and j >= 0:
                        sums[r] += gradient * (row_factors[i] * column_factors[j])
        target = ((n * height + group * _ROWS) * width + w) * channels + c
        for r in range(_ROWS):
            if group * _ROWS + r < height:
                dx[target + r * width * channels] = sums[r]

    return mean_backward


# Those of the usual windows are known from the start.
for _window in ((2, 2), (3, 3)):
    _max_forward(*_window)
    _mean_forward(*_window)
for _windows_of_a_pixel in ((1, 1), (2, 2)):
    _max_backward(*_windows_of_a_pixel)
    _mean_backward(*_windows_of_a_pixel)
_MEANS_OF_MANY = {np.dtype(dtype): _mean_of_many(dtype) for dtype in FLOATS}


# ------------------------------------------------------------------ max-pooling


def _blocks(threads: int) -> int:
    return -(-threads // THREADS)


def _axes(g: Windows) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tables of both axes are made from."""
    return (
        (g.height, g.out_h, g.kernel_h, g.stride_h, g.top, g.dilation_h),
        (g.width, g.out_w, g.kernel_w, g.stride_w, g.left, g.dilation_w),
    )


@twin_of(cpu.max_pool2d_forward)
def max_pool2d_forward(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    out: Any = None,
    out_argmax: Any = None,
) -> tuple[DeviceArray, DeviceArray]:
    x = checks.floating("x", x, 4)
    stride = kernel_size if stride is None else stride
    g = windows(x.shape, kernel_size, stride, pool_padding(padding, kernel_size), dilation, ceil_mode)
    shape = (x.shape[0], g.out_h, g.out_w, g.channels)
    y = checks.output("out", out, shape, x.dtype)
    argmax = checks.output("out_argmax", out_argmax, shape, argmax_dtype(g))
    if y.size:
        rows, columns = (_taps(*axis) for axis in _axes(g))
        flat = x.reshape(-1), y.reshape(-1), argmax.reshape(-1)
        sizes = g.height, g.width, g.channels, g.dilation_h, g.dilation_w
        _max_forward(g.kernel_h, g.kernel_w)[_blocks(y.size), THREADS](*flat, rows, columns, *sizes)
    return y, argmax


@twin_of(cpu.max_pool2d_backward)
def max_pool2d_backward(
    dout: Any,
    argmax: Any,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: Any = None,
) -> DeviceArray:
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    stride = kernel_size if stride is None else stride
    g = pooled_windows(dout.shape, shape, kernel_size, stride, padding, dilation)
    argmax = checks.array("argmax", argmax)
    if argmax.dtype != argmax_dtype(g):
        raise TypeError(f"argmax: dtype {argmax.dtype} is not {argmax_dtype(g)}")
    checks.same_shape("argmax", argmax, dout.shape)
    dx = checks.output("out", out, shape, dout.dtype)
    if dx.size:
        rows, columns = (_taps_over(*axis) for axis in _axes(g))
        threads = shape[0] * -(-g.height // _ROWS) * g.width * g.channels
        run = _max_backward(rows.shape[1], columns.shape[1])[_blocks(threads), THREADS]
        flat = dout.reshape(-1), argmax.reshape(-1), dx.reshape(-1)
        run(*flat, rows, columns, threads, g.out_h, g.out_w, g.channels, g.kernel_w)
    return dx


# ------------------------------------------------------------------ average pooling


def _run_mean(x: DeviceArray, row_axis: Axis, column_axis: Axis, y: DeviceArray) -> DeviceArray:
    if not y.size:
        return y
    n, height, width, channels = x.shape
    rows, columns = _means(row_axis, height, x.dtype), _means(column_axis, width, x.dtype)
    flat = x.reshape(-1), y.reshape(-1), rows.bounds, columns.bounds, rows.factors, columns.factors
    pixels = rows.longest * columns.longest
    if pixels <= _MANY:
        run = _mean_forward(rows.longest, columns.longest)[_blocks(y.size), THREADS]
        run(*flat, height, width, channels)
    else:
        block = layout(pixels, channels)
        grid = n * rows.windows * columns.windows, block.tiles
        _MEANS_OF_MANY[x.dtype][grid, block.threads](*flat, height, width, channels, block.columns)
    return y


def _run_mean_backward(dout: DeviceArray, row_axis: Axis, column_axis: Axis, dx: DeviceArray) -> DeviceArray:
    if dx.size:
        n, height, width, channels = dx.shape
        rows, columns = _means(row_axis, height, dx.dtype), _means(column_axis, width, dx.dtype)
        threads = n * -(-height // _ROWS) * width * channels
        run = _mean_backward(rows.over.shape[1], columns.over.shape[1])[_blocks(threads), THREADS]
        flat = dout.reshape(-1), dx.reshape(-1)
        run(*flat, rows.over, columns.over, rows.factors, columns.factors, threads, channels)
    return dx


@twin_of(cpu.avg_pool2d_forward)
def avg_pool2d_forward(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Any = None,
) -> DeviceArray:
    x = checks.floating("x", x, 4)
    settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    axes = average_axes(x.shape, *settings)
    shape = (x.shape[0], len(axes[0].table), len(axes[1].table), x.shape[3])
    return _run_mean(x, *axes, checks.output("out", out, shape, x.dtype))


@twin_of(cpu.avg_pool2d_backward)
def avg_pool2d_backward(
    dout: Any,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Any = None,
) -> DeviceArray:
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    settings = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    axes = average_axes(shape, *settings)
    checks.same_shape("dout", dout, (shape[0], len(axes[0].table), len(axes[1].table), shape[3]))
    return _run_mean_backward(dout, *axes, checks.output("out", out, shape, dout.dtype))


@twin_of(cpu.adaptive_avg_pool2d_forward)
def adaptive_avg_pool2d_forward(x: Any, output_size: int | Sequence[int], *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x, 4)
    n, height, width, channels = x.shape
    oh, ow = checks.pair("output_size", output_size, 1)
    y = checks.output("out", out, (n, oh, ow, channels), x.dtype)
    return _run_mean(x, geometry.adaptive_axis(height, oh), geometry.adaptive_axis(width, ow), y)


@twin_of(cpu.adaptive_avg_pool2d_backward)
def adaptive_avg_pool2d_backward(dout: Any, x_shape: Sequence[int], *, out: Any = None) -> DeviceArray:
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    oh, ow = checks.pair("dout", dout.shape[1:3], 1)
    checks.same_shape("dout", dout, (shape[0], oh, ow, shape[3]))
    dx = checks.output("out", out, shape, dout.dtype)
    axes = geometry.adaptive_axis(shape[1], oh), geometry.adaptive_axis(shape[2], ow)
    return _run_mean_backward(dout, *axes, dx)


@twin_of(cpu.global_avg_pool2d_forward)
def global_avg_pool2d_forward(x: Any, *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x, 4)
    n, height, width, channels = x.shape
    y = checks.output("out", out, (n, channels), x.dtype)
    return _run_mean(x, geometry.adaptive_axis(height, 1), geometry.adaptive_axis(width, 1), y)


@twin_of(cpu.global_avg_pool2d_backward)
def global_avg_pool2d_backward(dout: Any, x_shape: Sequence[int], *, out: Any = None) -> DeviceArray:
    dout = checks.floating("dout", dout, 2)
    shape = checks.shape4("x_shape", x_shape)
    checks.same_shape("dout", dout, (shape[0], shape[3]))
    dx = checks.output("out", out, shape, dout.dtype)
    axes = geometry.adaptive_axis(shape[1], 1), geometry.adaptive_axis(shape[2], 1)
    return _run_mean_backward(dout, *axes, dx)
