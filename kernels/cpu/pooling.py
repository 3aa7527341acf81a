"""Max, average, adaptive average and global average pooling, with their gradients.

Output sizes and window bounds follow PyTorch. Where windows overlap, a gradient is computed by rows of dx,
each gathering from the windows above it: no two threads ever write to one pixel, and the order of the sums is
fixed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..jit import keep_out_of_line
from ..threads import parallel, part_count, span
from ..windows import (
    Axis,
    Windows,
    adaptive_axis,
    argmax_dtype,
    average_axes,
    pool_padding,
    pool_settings,
    pooled_windows,
    windows,
)
from . import pool_pairs, pool_tables, pool_vectors, simd
from .pieces import fill
from .pool_tables import Side
from .workspace import NOWHERE, scratch

# In its place, every pixel of a window counts.
_INT64 = np.dtype(np.int64)

# Below so many channels, the windows around a pixel take longer by vectors than channel by channel; below so
# many also those that are apart.
_NARROW = 33
_NARROW_APART = 6


class _Tables(NamedTuple):
    """The windows of a pooling as kernels read them."""

    joined: np.ndarray
    taps: pool_vectors.Taps
    list_size: int  # of all kinds of windows together

    @staticmethod
    def of(rows: Side, columns: Side, taps: pool_vectors.Taps) -> _Tables:
        """Those of two axes."""
        kinds = len(rows.kinds) * len(columns.kinds)
        return _Tables(pool_tables.joined(rows, columns), taps, 2 * (rows.most * columns.most + 1) * kinds)

    def lists(self, parts: int) -> np.ndarray:
        """Room for each part's lists of taps."""
        return scratch("taps", (parts, self.list_size), _INT64)


class _Largest(NamedTuple):
    """What calls of `max_pool2d_forward` that differ in numbers only have in common."""

    image: tuple[int, int, int]  # of the result
    dtype: np.dtype  # of argmax
    tables: _Tables


# Planning takes Python as long as the kernels take for a small image.
@lru_cache(maxsize=512)
def _plan_largest(
    image: tuple[int, ...], kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> _Largest:
    pads = pool_padding(padding, kernel_size)
    g = windows((1, *image), kernel_size, stride, pads, dilation, ceil_mode)
    return _Largest(
        (g.out_h, g.out_w, g.channels),
        argmax_dtype(g),
        _Tables.of(
            pool_tables.largest(g.height, g.out_h, g.kernel_h, g.stride_h, g.top, g.dilation_h),
            pool_tables.largest(g.width, g.out_w, g.kernel_w, g.stride_w, g.left, g.dilation_w),
            _taps(g),
        ),
    )


def max_pool2d_forward(
    x: np.ndarray,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    out: np.ndarray | None = None,
    out_argmax: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Largest value of each window, and where in the window it was.

    Padding is never chosen. Of equal values the first wins (row by row); NaN wins over everything, the last
    NaN of a window over its others.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    kernel_size, dilation : int or (height, width)
    stride : int or (height, width), optional
        `kernel_size` where it is None.
    padding : int, (height, width) or ((top, bottom), (left, right)), at most half of `kernel_size`
    ceil_mode : bool
        Round the number of windows up, but drop a last one that would start beyond the image and the padding
        before it.
    out : (N, Ho, Wo, C), optional
        Overwritten with y.
    out_argmax : (N, Ho, Wo, C), optional
        Overwritten with argmax.

    Returns
    -------
    y : (N, Ho, Wo, C) array of x's dtype
    argmax : (N, Ho, Wo, C) array of the smallest unsigned dtype that holds kH * kW - 1
        Offset kh * kW + kw within the window. A dilated window that sees padding only gives -inf and 0.

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, no window fits, or the padding exceeds half the kernel.
    """
    x = checks.floating("x", x, 4)
    settings = pool_settings(kernel_size, stride, padding, dilation)
    plan = _plan_largest(x.shape[1:], *settings, bool(ceil_mode))
    shape = (x.shape[0], *plan.image)
    y = checks.output("out", out, shape, x.dtype)
    argmax = checks.output("out_argmax", out_argmax, shape, plan.dtype)
    if y.size:
        parts = part_count(shape[0] * shape[1], x.size)
        flat, tables = (x.ravel(), y.ravel(), argmax.ravel()), plan.tables
        pool_vectors.max_forward(parts, *flat, tables.joined, tables.lists(parts), tables.taps)
    return y, argmax


def _taps(g: Windows) -> pool_vectors.Taps:
    return pool_vectors.Taps(g.height, g.width, g.channels, g.kernel_w, g.dilation_h, g.dilation_w)


def max_pool2d_backward(
    dout: np.ndarray,
    argmax: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `max_pool2d_forward`: dout goes to the pixel that each window chose.

    A pixel that several windows chose receives the sum.

    Parameters
    ----------
    dout : (N, Ho, Wo, C) float32 or float64
    argmax : (N, Ho, Wo, C) unsigned integers
        From the forward call.
    x_shape : (N, H, W, C)
    kernel_size, stride, padding, dilation
        Those of the forward call; its `ceil_mode` shows in the shape of `dout`.
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are not those of a forward call.
    """
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    settings = pool_settings(kernel_size, stride, padding, dilation)
    g, dtype, apart = _plan_chosen(dout.shape, shape, *settings)
    if argmax.dtype is not dtype and argmax.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"argmax: dtype {argmax.dtype} is not {dtype}")
    argmax = checks.contiguous(checks.same_shape("argmax", argmax, dout.shape))
    dx = checks.output("out", out, shape, dout.dtype)
    if not dx.size:
        return dx
    if apart is not None and g.channels < _NARROW_APART:
        parts = part_count(len(dx) * g.out_h, dx.size)
        flat = dout.reshape(-1), argmax.reshape(-1), dx.reshape(-1)
        pool_vectors.scatter_narrow(parts, *flat, apart.windows, *_places(g), apart.taps)
    elif apart is not None:
        _scatter(dout, argmax, 1.0, dx, apart)
    elif pool_pairs.suits(g, dx.dtype):
        pool_pairs.max_backward(dout, argmax, dx, g, _are_far(dout, argmax, dx))
    elif g.channels * (g.width if g.stride_w == 1 else 1) < _NARROW:
        _scatter_narrow(dout, argmax, dx, g)
    else:
        line = g.out_w * g.channels
        rows = (g.height, g.out_h, g.kernel_h, g.stride_h, g.top, g.dilation_h)
        columns = (g.width, g.out_w, g.kernel_w, g.stride_w, g.left, g.dilation_w)
        pool_vectors.max_backward(
            part_count(shape[0] * g.height, dx.size),
            dout.reshape(-1),
            argmax.reshape(-1),
            dx.reshape(-1),
            g.out_h * line,
            pool_tables.around(*rows, (line, g.kernel_w)),
            pool_tables.around(*columns, (g.channels, 1)),
            g.height,
            g.width * g.channels,
            _are_far(dout, argmax, dx),
        )
    return dx


def _are_far(*arrays: np.ndarray) -> bool:
    """Whether arrays come from memory and go there: they fill more than half of the last cache.

    Overlapping windows take a third of the time if it is told to fetch them ahead, and else a tenth more.
    """
    return sum(array.nbytes for array in arrays) > simd.cache_bytes(3) // 2


class _Apart(NamedTuple):
    """Windows inside of the image, from its corner on, that don't overlap."""

    windows: pool_vectors.Apart
    taps: pool_vectors.Taps

    @staticmethod
    def of(g: Windows) -> _Apart:
        """Windows that are such."""
        return _Apart(pool_vectors.Apart(g.out_h, g.out_w, g.stride_h, g.stride_w, g.kernel_h), _taps(g))


@lru_cache(maxsize=512)
def _plan_chosen(
    dout_shape: tuple[int, ...], x_shape: tuple[int, ...], *settings: Any
) -> tuple[Windows, np.dtype, _Apart | None]:
    """The windows of a max-pooling, the dtype of argmax, and how the windows lie if they are apart."""
    g = pooled_windows(dout_shape, x_shape, *settings)
    return g, argmax_dtype(g), _Apart.of(g) if _are_apart(g) else None


def _are_apart(g: Windows) -> bool:
    """Whether windows are as in `_Apart`."""
    return (
        (g.top, g.left, g.dilation_h, g.dilation_w) == (0, 0, 1, 1)
        and g.stride_h >= g.kernel_h
        and g.stride_w >= g.kernel_w
        and (g.out_h - 1) * g.stride_h + g.kernel_h <= g.height
        and (g.out_w - 1) * g.stride_w + g.kernel_w <= g.width
    )


def _scatter(dout: np.ndarray, argmax: np.ndarray, factor: float, dx: np.ndarray, g: _Apart) -> None:
    """Overwrite dx with the gradient."""
    parts = part_count(dx.shape[0] * g.windows.out_h, dx.size)
    lists = scratch("taps", (parts, 2 * (g.windows.kernel_h * g.taps.kernel_w + 1)), _INT64)
    pool_vectors.scatter(parts, dout.ravel(), argmax.ravel(), factor, dx.ravel(), g.windows, lists, g.taps)


@lru_cache(maxsize=512)
def _distances(g: Windows) -> np.ndarray:
    """Of each tap of a window from its first: down, to the right, and in elements."""
    taps = np.arange(g.kernel_h * g.kernel_w)
    down, right = taps // g.kernel_w * g.dilation_h, taps % g.kernel_w * g.dilation_w
    return np.stack([down, right, (down * g.width + right) * g.channels], axis=1)


@lru_cache(maxsize=512)
def _places(g: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Where in dx the windows of a row begin, one for each channel, and how far each tap is from there."""
    windows, channels = np.divmod(np.arange(g.out_w * g.channels), g.channels)
    return windows * (g.stride_w * g.channels) + channels, np.ascontiguousarray(_distances(g)[:, 2])


def _scatter_narrow(dout: np.ndarray, argmax: np.ndarray, dx: np.ndarray, g: Windows) -> None:
    """Overwrite dx with the gradient, one channel at a time."""
    parts = part_count(dx.shape[0] * g.height, dx.size)
    flat = dout.reshape(-1), argmax.reshape(-1), dx.reshape(-1)
    at = pool_vectors.Lattice(g.out_h, g.out_w, g.stride_h, g.stride_w, g.top, g.left)
    pool_vectors.max_backward_narrow(parts, *flat, _distances(g), _taps(g), at)


@parallel
def _mean_backward(part, parts, dout, dx, rows, columns, height, channels):
    keep_out_of_line()
    step = np.uintp(channels)
    one = dx.dtype.type(1)
    lo, hi = span(part, parts, dx.shape[0])
    for row in range(lo, hi):
        n = row // height
        h = row - n * height
        line = dx[row]
        fill(line, 0)
        for i in range(rows.shape[0]):
            if h < rows[i, 0] or h >= rows[i, 1]:
                continue
            gradient = dout[n * rows.shape[0] + i]
            source = np.uintp(0)
            for j in range(columns.shape[0]):
                factor = one / dx.dtype.type(rows[i, 2] * columns[j, 2])
                target = np.uintp(columns[j, 0]) * step
                for _ in range(columns[j, 0], columns[j, 1]):
                    for c in range(step):
                        line[target + c] += gradient[source + c] * factor
                    target += step
                source += step


class _Mean(NamedTuple):
    """What calls of an average pooling that differ in numbers only have in common."""

    image: tuple[int, int, int]  # of the result
    axes: tuple[Axis, Axis]
    tables: _Tables
    apart: _Apart | None
    factor: float  # of one divisor for all, where windows are apart
    back: _Tables | None  # of the pooling of dout that is the gradient

    @staticmethod
    def of(image: tuple[int, ...], rows: Axis, columns: Axis) -> _Mean:
        """The windows of two tables."""
        height, width, channels = image
        out = len(rows.table), len(columns.table), channels
        apart = back = None
        if rows.step and columns.step:
            step = rows.step, columns.step
            apart = _Apart.of(Windows(height, width, channels, *out[:2], *step, *step, 0, 0, 1, 1))
        factor = 1 / (rows.divisor * columns.divisor) if apart else 0.0
        sides = pool_tables.mean(rows), pool_tables.mean(columns)
        tables = _Tables.of(*sides, pool_vectors.Taps(height, width, channels, sides[1].most, 1, 1))
        if apart is None and sides[1].slides:
            above, beside = pool_tables.mirrored(rows, height), pool_tables.mirrored(columns, width)
            if above is not None and beside is not None:
                back = _Tables.of(above, beside, pool_vectors.Taps(*out, beside.most, 1, 1))
        return _Mean(out, (rows, columns), tables, apart, factor, back)


@lru_cache(maxsize=512)
def _plan_sliding(
    image: tuple[int, ...],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    kernel_size: Any,
    stride: Any,
    padding: Any,
) -> _Mean:
    settings = kernel_size, stride, padding, ceil_mode, count_include_pad, divisor
    return _Mean.of(image, *average_axes((1, *image), *settings))


@lru_cache(maxsize=512)
def _plan_adaptive(image: tuple[int, ...], oh: int, ow: int) -> _Mean:
    return _Mean.of(image, adaptive_axis(image[0], oh), adaptive_axis(image[1], ow))


def _run_mean(x: np.ndarray, plan: _Mean, y: np.ndarray) -> np.ndarray:
    if y.size:
        parts = part_count(len(x) * plan.image[0], x.size)
        _run_windows(parts, x, y, plan.tables)
    return y


def _run_windows(parts: int, x: np.ndarray, y: np.ndarray, tables: _Tables) -> None:
    lists = tables.lists(parts)
    pool_vectors.mean_forward(parts, x.ravel(), y.ravel(), tables.joined, lists, tables.taps)


def _run_mean_backward(dout: np.ndarray, plan: _Mean, dx: np.ndarray) -> np.ndarray:
    n, height, width, channels = dx.shape
    if dx.size and plan.apart is not None:
        _scatter(dout, NOWHERE, plan.factor, dx, plan.apart)
    elif dx.size and plan.back is not None:
        _run_windows(part_count(n * height, dx.size), dout, dx, plan.back)
    elif dx.size:
        out_h, out_w, _ = plan.image
        gradients = dout.reshape(n * out_h, out_w * channels)
        lines = dx.reshape(n * height, width * channels)
        parts = part_count(len(lines), dx.size)
        _mean_backward(parts, gradients, lines, *(axis.table for axis in plan.axes), height, channels)
    return dx


def avg_pool2d_forward(
    x: np.ndarray,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Sum of each window over its divisor: `divisor_override`, or the pixels of the window.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    kernel_size : int or (height, width)
    stride : int or (height, width), optional
        `kernel_size` where it is None.
    padding : int, (height, width) or ((top, bottom), (left, right)), at most half of `kernel_size`
    ceil_mode : bool
    count_include_pad : bool
        Whether padding counts among the pixels of a window. What `ceil_mode` adds beyond it never does.
    divisor_override : int, optional
    out : (N, Ho, Wo, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, Ho, Wo, C) array of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, no window fits, the padding exceeds half the kernel, or the
        divisor is 0.
    """
    x = checks.floating("x", x, 4)
    divisor = None if divisor_override is None else operator.index(divisor_override)
    settings = pool_settings(kernel_size, stride, padding)[:3]
    plan = _plan_sliding(x.shape[1:], bool(ceil_mode), bool(count_include_pad), divisor, *settings)
    return _run_mean(x, plan, checks.output("out", out, (x.shape[0], *plan.image), x.dtype))


def avg_pool2d_backward(
    dout: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `avg_pool2d_forward`: each pixel of a window receives dout over the window's divisor.

    Parameters
    ----------
    dout : (N, Ho, Wo, C) float32 or float64
    x_shape : (N, H, W, C)
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        Those of the forward call.
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are not those of a forward call.
    """
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    divisor = None if divisor_override is None else operator.index(divisor_override)
    settings = pool_settings(kernel_size, stride, padding)[:3]
    plan = _plan_sliding(shape[1:], bool(ceil_mode), bool(count_include_pad), divisor, *settings)
    checks.same_shape("dout", dout, (shape[0], *plan.image))
    return _run_mean_backward(dout, plan, checks.output("out", out, shape, dout.dtype))


def adaptive_avg_pool2d_forward(
    x: np.ndarray, output_size: int | Sequence[int], *, out: np.ndarray | None = None
) -> np.ndarray:
    """Mean of the windows that cut the image into `output_size` pieces of (nearly) equal size.

    Window i of `count` along an axis of `size` spans floor(i * size / count) to ceil((i + 1) * size / count),
    so that neighbours overlap by a pixel where `count` does not divide `size`.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    output_size : int or (height, width)
    out : (N, oh, ow, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, oh, ow, C) array of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, or the image or the output has no pixels.
    """
    x = checks.floating("x", x, 4)
    oh, ow = checks.pair("output_size", output_size, 1)
    y = checks.output("out", out, (x.shape[0], oh, ow, x.shape[3]), x.dtype)
    return _run_mean(x, _plan_adaptive(x.shape[1:], oh, ow), y)


def adaptive_avg_pool2d_backward(
    dout: np.ndarray, x_shape: Sequence[int], *, out: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of `adaptive_avg_pool2d_forward`: each pixel of a window receives dout over the window's size.

    Parameters
    ----------
    dout : (N, oh, ow, C) float32 or float64
    x_shape : (N, H, W, C)
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are not those of a forward call.
    """
    dout = checks.floating("dout", dout, 4)
    shape = checks.shape4("x_shape", x_shape)
    oh, ow = checks.pair("dout", dout.shape[1:3], 1)
    checks.same_shape("dout", dout, (shape[0], oh, ow, shape[3]))
    dx = checks.output("out", out, shape, dout.dtype)
    return _run_mean_backward(dout, _plan_adaptive(shape[1:], oh, ow), dx)


def global_avg_pool2d_forward(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Mean of each channel over the whole image.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    out : (N, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, C) array of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, or the images have no pixels.
    """
    x = checks.floating("x", x, 4)
    y = checks.output("out", out, (x.shape[0], x.shape[3]), x.dtype)
    return _run_mean(x, _plan_adaptive(x.shape[1:], 1, 1), y)


def global_avg_pool2d_backward(
    dout: np.ndarray, x_shape: Sequence[int], *, out: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of `global_avg_pool2d_forward`: every pixel receives dout / (H * W).

    Parameters
    ----------
    dout : (N, C) float32 or float64
    x_shape : (N, H, W, C)
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are not those of a forward call.
    """
    dout = checks.floating("dout", dout, 2)
    shape = checks.shape4("x_shape", x_shape)
    checks.same_shape("dout", dout, (shape[0], shape[3]))
    dx = checks.output("out", out, shape, dout.dtype)
    return _run_mean_backward(dout, _plan_adaptive(shape[1:], 1, 1), dx)
