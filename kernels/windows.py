"""Windows that slide over images: where they lie, and how they are told to kernels.

The windows of a pooling are the product of two tables, one for each axis of the image, with a row for each
output: first pixel, last pixel + 1, and a number.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import checks


class Windows(NamedTuple):
    """Images and the windows that slide over them, as kernels read them."""

    height: int
    width: int
    channels: int
    out_h: int
    out_w: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    top: int
    left: int
    dilation_h: int
    dilation_w: int


def window_count(
    size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, ceil_mode: bool
) -> int:
    """Windows along one axis. `ceil_mode` rounds up, but none may start beyond the image and its padding.

    Raises
    ------
    ValueError
        If there is no image, or no window fits.
    """
    if size < 1:
        raise ValueError(f"x: an image needs at least 1 pixel along each axis, got {size}")
    if not ceil_mode:
        return checks.window_output(size, kernel, stride, padding, dilation)
    # Rounding up lets a window reach stride - 1 pixels beyond the padding.
    count = checks.window_output(size, kernel, stride, (padding[0], padding[1] + stride - 1), dilation)
    count -= (count - 1) * stride >= size + padding[0]
    if count < 1:
        raise ValueError(f"kernel_size: {kernel} with dilation {dilation} does not fit into {size} pixels")
    return count


def windows(
    x_shape: Sequence[int],
    kernel_size: Any,
    stride: Any,
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: Any,
    ceil_mode: bool = False,
) -> Windows:
    """The geometry of a call; `padding` has been checked."""
    kernel = checks.pair("kernel_size", kernel_size, 1)
    step, spacing = checks.pair("stride", stride, 1), checks.pair("dilation", dilation, 1)
    return _windows(tuple(x_shape[1:]), kernel, step, padding, spacing, bool(ceil_mode))


@lru_cache(maxsize=512)
def _windows(
    image: tuple[int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Windows:
    height, width, channels = image
    out_h = window_count(height, kernel[0], stride[0], padding[0], dilation[0], ceil_mode)
    out_w = window_count(width, kernel[1], stride[1], padding[1], dilation[1], ceil_mode)
    first = padding[0][0], padding[1][0]
    return Windows(height, width, channels, out_h, out_w, *kernel, *stride, *first, *dilation)


def pool_settings(kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1) -> tuple[Any, ...]:
    """The arguments of a pooling as keys of a cache, what was left out filled in."""
    stride = kernel_size if stride is None else stride
    if checks.are_plain(kernel_size, stride, padding, dilation):
        return kernel_size, stride, padding, dilation
    kernel, step = checks.pair("kernel_size", kernel_size, 1), checks.pair("stride", stride, 1)
    return kernel, step, checks.padding2d(padding), checks.pair("dilation", dilation, 1)


def pool_padding(padding: Any, kernel_size: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padding of each side of an image to be pooled, at most half of the kernel."""
    kernel = checks.pair("kernel_size", kernel_size, 1)
    pads = checks.padding2d(padding)
    for size, sides in zip(kernel, pads, strict=True):
        if max(sides) > size // 2:
            raise ValueError(f"padding: {padding!r} is more than half of kernel_size {kernel}")
    return pads


def argmax_dtype(g: Windows) -> np.dtype:
    """The smallest dtype that holds every offset in a window."""
    return _smallest_dtype(g.kernel_h * g.kernel_w - 1)


@lru_cache(maxsize=512)
def _smallest_dtype(largest: int) -> np.dtype:
    return np.min_scalar_type(largest)


def pooled_windows(
    dout_shape: Sequence[int],
    x_shape: Sequence[int],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> Windows:
    """The geometry of a max-pooling whose gradient has `dout_shape`, which may have been rounded up or not.

    Raises
    ------
    ValueError
        If it has not the shape that either gives.
    """
    pads = pool_padding(padding, kernel_size)
    g = windows(x_shape, kernel_size, stride, pads, dilation, ceil_mode=True)
    tall = _rounded_either_way(dout_shape[1], g.height, g.kernel_h, g.stride_h, pads[0], g.dilation_h)
    wide = _rounded_either_way(dout_shape[2], g.width, g.kernel_w, g.stride_w, pads[1], g.dilation_w)
    if not (tall and wide) or tuple(dout_shape[::3]) != tuple(x_shape[::3]):
        raise ValueError(f"dout: shape {tuple(dout_shape)} is no output of pooling x_shape {tuple(x_shape)}")
    return g._replace(out_h=dout_shape[1], out_w=dout_shape[2])


def _rounded_either_way(
    count: int, size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int
) -> bool:
    """Whether one axis has `count` windows, with ceil_mode or without."""
    room = size + sum(padding) - dilation * (kernel - 1) - 1
    return count in (room // stride + 1, window_count(size, kernel, stride, padding, dilation, True))


@lru_cache(maxsize=512)
def tap_table(size: int, count: int, kernel: int, stride: int, before: int, dilation: int) -> np.ndarray:
    """For each window along one axis: first pixel, last + 1, and the number of the tap at the first."""
    begin = np.arange(count) * stride - before
    tap = np.maximum(0, -(begin // dilation))
    first = begin + tap * dilation
    last = np.minimum(begin + (kernel - 1) * dilation + 1, size)
    # A window may see padding only, on both sides or between its taps.
    empty = (tap >= kernel) | (first >= last)
    first[empty] = last[empty] = tap[empty] = 0
    return np.stack([first, last, tap], axis=1).astype(np.int64)


class Axis(NamedTuple):
    """The windows of an average pooling along one axis; the tables' numbers multiply to the divisor."""

    table: np.ndarray
    longest: int  # most pixels of a window
    step: int  # pixels of each window if they touch, don't overlap, and have one divisor; else 0
    divisor: float  # of the first window

    @staticmethod
    def of(table: np.ndarray) -> Axis:
        """The windows of a table."""
        first, last, divisors = table.T
        step = last[0]
        ends = np.arange(1, len(table) + 1) * step
        same = (first == ends - step) & (last == ends) & (divisors == divisors[0])
        return Axis(table, int((last - first).max()), int(step) if same.all() else 0, float(divisors[0]))


@lru_cache(maxsize=512)
def sliding_axis(
    size: int,
    kernel: int,
    stride: int,
    padding: tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Axis:
    """The windows of `avg_pool2d_forward` along one axis; `divisor` replaces their sizes."""
    count = window_count(size, kernel, stride, padding, 1, ceil_mode)
    first = np.arange(count) * stride - padding[0]
    # A window of ceil_mode may reach beyond the padding: what lies there never counts.
    last = np.minimum(first + kernel, size + padding[1])
    inside = first.clip(0), last.clip(max=size)
    counted = last - first if count_include_pad else inside[1] - inside[0]
    if divisor is not None:
        counted[:] = divisor
    return Axis.of(np.stack([*inside, counted], axis=1).astype(np.int64))


@lru_cache(maxsize=512)
def adaptive_axis(size: int, count: int) -> Axis:
    """Window i spans floor(i * size / count) to ceil((i + 1) * size / count)."""
    if size < 1:
        raise ValueError(f"x: an image needs at least 1 pixel along each axis, got {size}")
    first = np.arange(count) * size // count
    last = -(-np.arange(1, count + 1) * size // count)
    return Axis.of(np.stack([first, last, last - first], axis=1).astype(np.int64))


def average_axes(
    x_shape: Sequence[int],
    kernel_size: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[Axis, Axis]:
    """The windows of `avg_pool2d_forward` along both axes."""
    kernel = checks.pair("kernel_size", kernel_size, 1)
    step = kernel if stride is None else checks.pair("stride", stride, 1)
    pads = pool_padding(padding, kernel_size)
    # The divisor is the product of both tables' factors.
    divisors: tuple[int | None, int | None] = (None, None)
    if divisor_override is not None:
        if divisor_override == 0:
            raise ValueError("divisor_override: must not be 0")
        divisors = (operator.index(divisor_override), 1)
    rows, columns = (
        sliding_axis(
            x_shape[1 + axis],
            kernel[axis],
            step[axis],
            pads[axis],
            bool(ceil_mode),
            bool(count_include_pad),
            divisors[axis],
        )
        for axis in (0, 1)
    )
    return rows, columns
