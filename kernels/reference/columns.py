"""im2col and its adjoint col2im: images as matrices whose rows are windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .shapes import Padding, Pads, Pair, image_shape, pads, pair, require_shape, wide, window_count


def _windows(
    x_shape: Sequence[int], kernel_size: Pair, stride: Pair, pad: Pads, dilation: Pair
) -> tuple[tuple[int, int], Iterator[tuple[int, int, tuple[slice, slice, slice]]]]:
    """The output's (Ho, Wo), and for each output position (i, j) the slices of its window."""
    _, h, w, _ = image_shape("x_shape", x_shape)
    kernel_h, kernel_w = pair("kernel_size", kernel_size)
    stride_h, stride_w = pair("stride", stride)
    dilation_h, dilation_w = pair("dilation", dilation)
    ho = window_count(h, pad[0], kernel_h, stride_h, dilation_h)
    wo = window_count(w, pad[1], kernel_w, stride_w, dilation_w)

    def positions() -> Iterator[tuple[int, int, tuple[slice, slice, slice]]]:
        for i in range(ho):
            rows = slice(i * stride_h, i * stride_h + dilation_h * (kernel_h - 1) + 1, dilation_h)
            for j in range(wo):
                columns = slice(j * stride_w, j * stride_w + dilation_w * (kernel_w - 1) + 1, dilation_w)
                yield i, j, (slice(None), rows, columns)

    return (ho, wo), positions()


def im2col(
    x: np.ndarray, kernel_size: Pair, stride: Pair = 1, padding: Padding = 0, dilation: Pair = 1
) -> np.ndarray:
    """Copy every window of the zero-padded images into one row of a matrix.

    Row (n, i, j), column (kh, kw, c) holds
    ``x[n, i * stride + kh * dilation - top, j * stride + kw * dilation - left, c]``, zero outside the image.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)
    kernel_size, stride, dilation : int or pair of int
    padding : int, (height, width) or ((top, bottom), (left, right))

    Returns
    -------
    ndarray, dtype of `x`, shape (N * Ho * Wo, kH * kW * C)
        Rows in the order (n, i, j), columns in the order (kh, kw, c).

    Raises
    ------
    ValueError
        If the window does not fit into the padded image.

    References
    ----------
    Chellapilla, Puri, Simard: High Performance Convolutional Neural Networks for Document Processing,
    2006, section 2.1 (unrolling convolution).
    """
    n, _, _, c = image_shape("x", np.shape(x))
    kernel_h, kernel_w = pair("kernel_size", kernel_size)
    pad = pads(padding)
    (ho, wo), windows = _windows(np.shape(x), kernel_size, stride, pad, dilation)
    padded = np.pad(wide("x", x), ((0, 0), *pad, (0, 0)))
    cols = np.empty((n, ho, wo, kernel_h, kernel_w, c), x.dtype)
    for i, j, window in windows:
        cols[:, i, j] = padded[window]
    return cols.reshape(n * ho * wo, kernel_h * kernel_w * c)


def col2im(
    cols: np.ndarray,
    x_shape: Sequence[int],
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
) -> np.ndarray:
    """Add every row of a matrix back to the window it would have been copied from: the adjoint of `im2col`.

    Pixels that several windows share receive the sum. For every x and cols,
    ``sum(im2col(x) * cols) == sum(x * col2im(cols))``.

    Parameters
    ----------
    cols : ndarray, float32 or float64, shape (N * Ho * Wo, kH * kW * C)
    x_shape : (N, H, W, C)
    kernel_size, stride, dilation : int or pair of int
    padding : int, (height, width) or ((top, bottom), (left, right))

    Returns
    -------
    ndarray, dtype of `cols`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If the window does not fit into the padded image or `cols` has another shape.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    kernel_h, kernel_w = pair("kernel_size", kernel_size)
    (top, bottom), (left, right) = pad = pads(padding)
    (ho, wo), windows = _windows(x_shape, kernel_size, stride, pad, dilation)
    require_shape("cols", cols, (n * ho * wo, kernel_h * kernel_w * c))
    patches = wide("cols", cols).reshape(n, ho, wo, kernel_h, kernel_w, c)
    padded = np.zeros((n, top + h + bottom, left + w + right, c))
    for i, j, window in windows:
        padded[window] += patches[:, i, j]
    return padded[:, top : top + h, left : left + w].astype(cols.dtype)
