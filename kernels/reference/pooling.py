"""Max, average, adaptive average and global average pooling, with their gradients.

Output sizes and window bounds follow PyTorch: ``padding`` is at most half the kernel, and ``ceil_mode``
rounds the number of windows up, but drops a last one that would start beyond the image and the padding
before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .shapes import (
    Padding,
    Pads,
    Pair,
    fitting_windows,
    image_shape,
    pads,
    pair,
    require_shape,
    wide,
    window_count,
)

Window = tuple[slice, slice, slice]


def _pool_pads(padding: Padding, kernel: tuple[int, int]) -> Pads:
    pad = pads(padding)
    for size, sides in zip(kernel, pad, strict=True):
        if max(sides) > size // 2:
            raise ValueError(f"padding: {padding!r} is more than half of kernel_size {kernel}")
    return pad


def _taps(
    output: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Iterator[tuple[int, Window]]:
    """Each offset kh * kW + kw with the slices of the padded images that lie under it, over all windows."""
    for offset, (kh, kw) in enumerate(np.ndindex(*kernel)):
        top, left = kh * dilation[0], kw * dilation[1]
        rows = slice(top, top + (output[0] - 1) * stride[0] + 1, stride[0])
        columns = slice(left, left + (output[1] - 1) * stride[1] + 1, stride[1])
        yield offset, (slice(None), rows, columns)


def _room_after(
    x_shape: Sequence[int],
    pad: Pads,
    output: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """How far the last window reaches beyond the image's bottom and right edge (0 if it does not)."""
    reach = [(output[a] - 1) * stride[a] + (kernel[a] - 1) * dilation[a] + 1 for a in (0, 1)]
    return max(0, reach[0] - pad[0][0] - x_shape[1]), max(0, reach[1] - pad[1][0] - x_shape[2])


def max_pool2d_forward(
    x: np.ndarray,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Largest value of each window, and where in the window it was.

    Padding is never chosen. Of equal values the first wins (row by row); NaN wins over everything, the last
    NaN of a window over its others.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)
    kernel_size, dilation : int or pair of int
    stride : int or pair of int, optional
        `kernel_size` where it is None.
    padding : int, (height, width) or ((top, bottom), (left, right)), at most half of `kernel_size`
    ceil_mode : bool

    Returns
    -------
    y : ndarray, dtype of `x`, shape (N, Ho, Wo, C)
    argmax : ndarray, the smallest unsigned dtype that holds kH * kW - 1, shape (N, Ho, Wo, C)
        Offset kh * kW + kw within the window. A dilated window that sees padding only gives -inf and 0.

    Raises
    ------
    ValueError
        If no window fits or the padding exceeds half the kernel.
    """
    n, h, w, c = image_shape("x", x.shape)
    kernel, dilated = pair("kernel_size", kernel_size), pair("dilation", dilation)
    step = pair("stride", kernel_size if stride is None else stride)
    pad = _pool_pads(padding, kernel)
    ho = window_count(h, pad[0], kernel[0], step[0], dilated[0], ceil_mode)
    wo = window_count(w, pad[1], kernel[1], step[1], dilated[1], ceil_mode)
    below, beside = _room_after(x.shape, pad, (ho, wo), kernel, step, dilated)
    margins = ((0, 0), (pad[0][0], below), (pad[1][0], beside), (0, 0))
    padded = np.pad(wide("x", x), margins)
    is_image = np.pad(np.ones(x.shape, bool), margins)

    y = np.full((n, ho, wo, c), -np.inf)
    argmax = np.zeros((n, ho, wo, c), np.min_scalar_type(kernel[0] * kernel[1] - 1))
    empty = np.ones((n, ho, wo, c), bool)
    for offset, window in _taps((ho, wo), kernel, step, dilated):
        value = padded[window]
        take = is_image[window] & (empty | (value > y) | np.isnan(value))
        y[take] = value[take]
        argmax[take] = offset
        empty[take] = False
    return y.astype(x.dtype), argmax


def max_pool2d_backward(
    dout: np.ndarray,
    argmax: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    dilation: Pair = 1,
) -> np.ndarray:
    """Gradient of `max_pool2d_forward`: dout goes to the pixel that each window chose.

    A pixel that several windows chose receives the sum.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, Ho, Wo, C)
    argmax : ndarray of unsigned integers, shape (N, Ho, Wo, C)
        From the forward call.
    x_shape : (N, H, W, C)
    kernel_size, stride, padding, dilation
        Those of the forward call; `ceil_mode` shows in the shape of `dout`.

    Returns
    -------
    ndarray, dtype of `dout`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If the shapes are not those of a forward call.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    kernel, dilated = pair("kernel_size", kernel_size), pair("dilation", dilation)
    step = pair("stride", kernel_size if stride is None else stride)
    pad = _pool_pads(padding, kernel)
    _, ho, wo, _ = image_shape("dout", dout.shape)
    for axis, count in enumerate((ho, wo)):
        along = ((h, w)[axis], pad[axis], kernel[axis], step[axis], dilated[axis])
        if count < 1 or count not in (fitting_windows(*along), fitting_windows(*along, ceil_mode=True)):
            raise ValueError(f"dout: shape {dout.shape} is not that of images {tuple(x_shape)} after pooling")
    require_shape("dout", dout, (n, ho, wo, c))
    require_shape("argmax", argmax, dout.shape)

    (top, _), (left, _) = pad
    below, beside = _room_after(x_shape, pad, (ho, wo), kernel, step, dilated)
    dout64 = wide("dout", dout)
    padded = np.zeros((n, top + h + below, left + w + beside, c))
    for offset, window in _taps((ho, wo), kernel, step, dilated):
        padded[window] += np.where(argmax == offset, dout64, 0)
    return padded[:, top : top + h, left : left + w].astype(dout.dtype)


def _average_windows(
    x_shape: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None,
    padding: Padding,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[tuple[int, int], Iterator[tuple[int, int, Window, int]]]:
    """(Ho, Wo), and for each output position (i, j) the slices of its window in the image and its divisor."""
    _, h, w, _ = image_shape("x_shape", x_shape)
    kernel_h, kernel_w = pair("kernel_size", kernel_size)
    stride_h, stride_w = pair("stride", kernel_size if stride is None else stride)
    (top, bottom), (left, right) = pad = _pool_pads(padding, (kernel_h, kernel_w))
    if divisor_override == 0:
        raise ValueError("divisor_override: must not be 0")
    ho = window_count(h, pad[0], kernel_h, stride_h, ceil_mode=ceil_mode)
    wo = window_count(w, pad[1], kernel_w, stride_w, ceil_mode=ceil_mode)

    def windows() -> Iterator[tuple[int, int, Window, int]]:
        for i, j in np.ndindex(ho, wo):
            row, column = i * stride_h - top, j * stride_w - left
            # A window of ceil_mode may reach beyond the padding: what lies there never counts.
            row_end, column_end = min(row + kernel_h, h + bottom), min(column + kernel_w, w + right)
            counted = (row_end - row) * (column_end - column)
            row, column = max(row, 0), max(column, 0)
            row_end, column_end = min(row_end, h), min(column_end, w)
            if not count_include_pad:
                counted = (row_end - row) * (column_end - column)
            divisor = counted if divisor_override is None else divisor_override
            yield i, j, (slice(None), slice(row, row_end), slice(column, column_end)), divisor

    return (ho, wo), windows()


def avg_pool2d_forward(
    x: np.ndarray,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> np.ndarray:
    """Sum of each window over its divisor: `divisor_override`, or the pixels of the window.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)
    kernel_size : int or pair of int
    stride : int or pair of int, optional
        `kernel_size` where it is None.
    padding : int, (height, width) or ((top, bottom), (left, right)), at most half of `kernel_size`
    ceil_mode : bool
    count_include_pad : bool
        Whether padding counts among a window's pixels. What `ceil_mode` adds beyond the padding never does.
    divisor_override : int, optional

    Returns
    -------
    ndarray, dtype of `x`, shape (N, Ho, Wo, C)

    Raises
    ------
    ValueError
        If no window fits, the padding exceeds half the kernel or the divisor is 0.
    """
    n, _, _, c = image_shape("x", x.shape)
    (ho, wo), windows = _average_windows(
        x.shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    x64 = wide("x", x)
    y = np.empty((n, ho, wo, c))
    for i, j, window, divisor in windows:
        y[:, i, j] = x64[window].sum(axis=(1, 2)) / divisor
    return y.astype(x.dtype)


def avg_pool2d_backward(
    dout: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> np.ndarray:
    """Gradient of `avg_pool2d_forward`: each pixel of a window receives dout over the window's divisor.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, Ho, Wo, C)
    x_shape : (N, H, W, C)
    kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        Those of the forward call.

    Returns
    -------
    ndarray, dtype of `dout`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If the shapes are not those of a forward call.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    (ho, wo), windows = _average_windows(
        x_shape, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    require_shape("dout", dout, (n, ho, wo, c))
    dout64 = wide("dout", dout)
    dx = np.zeros((n, h, w, c))
    for i, j, window, divisor in windows:
        dx[window] += dout64[:, i, j][:, None, None, :] / divisor
    return dx.astype(dout.dtype)


def _adaptive_windows(
    x_shape: Sequence[int], output: tuple[int, int]
) -> Iterator[tuple[int, int, Window, int]]:
    """Each output position (i, j), the slices of its window and the number of pixels in it."""
    _, h, w, _ = image_shape("x_shape", x_shape)
    if h < 1 or w < 1:
        raise ValueError(f"x_shape: {tuple(x_shape)} has no pixels")
    for i, j in np.ndindex(*output):
        row, row_end = i * h // output[0], math.ceil((i + 1) * h / output[0])
        column, column_end = j * w // output[1], math.ceil((j + 1) * w / output[1])
        pixels = (row_end - row) * (column_end - column)
        yield i, j, (slice(None), slice(row, row_end), slice(column, column_end)), pixels


def adaptive_avg_pool2d_forward(x: np.ndarray, output_size: Pair) -> np.ndarray:
    """Mean of the windows that cut the image into `output_size` pieces of (nearly) equal size.

    Window i of `out` along an axis of `size` spans floor(i * size / out) to ceil((i + 1) * size / out), so
    neighbours overlap by a pixel where `out` does not divide `size`.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)
    output_size : int or pair of int

    Returns
    -------
    ndarray, dtype of `x`, shape (N, oh, ow, C)

    Raises
    ------
    ValueError
        If the image or the output has no pixels.
    """
    n, _, _, c = image_shape("x", x.shape)
    oh, ow = pair("output_size", output_size)
    x64 = wide("x", x)
    y = np.empty((n, oh, ow, c))
    for i, j, window, pixels in _adaptive_windows(x.shape, (oh, ow)):
        y[:, i, j] = x64[window].sum(axis=(1, 2)) / pixels
    return y.astype(x.dtype)


def adaptive_avg_pool2d_backward(dout: np.ndarray, x_shape: Sequence[int]) -> np.ndarray:
    """Gradient of `adaptive_avg_pool2d_forward`: each pixel of a window receives dout over the window's size.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, oh, ow, C)
    x_shape : (N, H, W, C)

    Returns
    -------
    ndarray, dtype of `dout`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If the shapes are not those of a forward call.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    _, oh, ow, _ = image_shape("dout", dout.shape)
    require_shape("dout", dout, (n, *pair("output_size", (oh, ow)), c))
    dout64 = wide("dout", dout)
    dx = np.zeros((n, h, w, c))
    for i, j, window, pixels in _adaptive_windows(x_shape, (oh, ow)):
        dx[window] += dout64[:, i, j][:, None, None, :] / pixels
    return dx.astype(dout.dtype)


def global_avg_pool2d_forward(x: np.ndarray) -> np.ndarray:
    """Mean of each channel over the whole image.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)

    Returns
    -------
    ndarray, dtype of `x`, shape (N, C)

    Raises
    ------
    ValueError
        If the images have no pixels.
    """
    _, h, w, _ = image_shape("x", x.shape)
    if h < 1 or w < 1:
        raise ValueError(f"x: shape {x.shape} has no pixels")
    return wide("x", x).mean(axis=(1, 2)).astype(x.dtype)


def global_avg_pool2d_backward(dout: np.ndarray, x_shape: Sequence[int]) -> np.ndarray:
    """Gradient of `global_avg_pool2d_forward`: every pixel receives dout / (H * W).

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, C)
    x_shape : (N, H, W, C)

    Returns
    -------
    ndarray, dtype of `dout`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If `dout` has another shape or the images have no pixels.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    require_shape("dout", dout, (n, c))
    if h < 1 or w < 1:
        raise ValueError(f"x_shape: {tuple(x_shape)} has no pixels")
    dx = np.empty((n, h, w, c), dout.dtype)
    dx[...] = wide("dout", dout)[:, None, None, :] / (h * w)
    return dx
