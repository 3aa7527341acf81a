"""Convolution, ReLU and max-pooling, one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from .convolution import conv2d_backward_bias, conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from .pooling import max_pool2d_forward
from .shapes import pads, pair, require_shape, window_count

# In place of an offset in the window: ReLU let nothing pass.
_DEAD = 255


def conv2d_pool_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    pool_size: Any = 1,
    relu: bool = True,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """`conv2d_forward`, ReLU if `relu`, and max-pooling with windows that touch: (y, argmax).

    argmax is the offset in the window as `max_pool2d_forward` has it for the convolution itself, or 255 where
    ReLU made y zero (or y is NaN).
    """
    z = conv2d_forward(x, weight, bias, stride, padding, dilation, groups)
    y, argmax = max_pool2d_forward(z, pool_size)
    if not relu:
        return y, argmax
    return np.where(y <= 0, 0, y).astype(y.dtype), np.where(y > 0, argmax, _DEAD).astype(np.uint8)


def conv2d_pool_backward_input(
    dout: np.ndarray,
    argmax: np.ndarray,
    weight: np.ndarray,
    x_shape: tuple[int, int, int, int],
    pool_size: Any = 1,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> np.ndarray:
    """Gradient of x: that of each window goes to its largest pixel, and through the convolution."""
    kernel = weight.shape[:2]
    dense = _unpooled(dout, argmax, x_shape, kernel, pool_size, stride, padding, dilation)
    return conv2d_backward_input(dense, weight, x_shape, stride, padding, dilation, groups)


def conv2d_pool_backward_weight(
    dout: np.ndarray,
    argmax: np.ndarray,
    x: np.ndarray,
    kernel_size: Any,
    pool_size: Any = 1,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of weight and bias."""
    dense = _unpooled(dout, argmax, x.shape, kernel_size, pool_size, stride, padding, dilation)
    dweight = conv2d_backward_weight(dense, x, kernel_size, stride, padding, dilation, groups)
    return dweight, conv2d_backward_bias(dense)


def _unpooled(
    dout: np.ndarray,
    argmax: np.ndarray,
    x_shape: tuple[int, ...],
    kernel_size: Any,
    pool_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> np.ndarray:
    """The gradient of the convolution's result: zero, but for the largest pixel of each window."""
    n, *image, _ = x_shape
    sides = zip(
        image, pads(padding), pair("", kernel_size), pair("", stride), pair("", dilation), strict=True
    )
    height, width = (window_count(*side) for side in sides)
    pool_h, pool_w = pair("pool_size", pool_size)
    rows, columns, filters = dout.shape[1:]
    if (rows, columns) != (height // pool_h, width // pool_w):
        raise ValueError(f"dout: shape {dout.shape} is not that of {(height, width)} pixels after pooling")
    require_shape("argmax", argmax, dout.shape)
    dense = np.zeros((n, height, width, filters), dout.dtype)
    for kh in range(pool_h):
        for kw in range(pool_w):
            pixels = dense[:, kh : rows * pool_h : pool_h, kw : columns * pool_w : pool_w]
            pixels[...] = np.where(argmax == kh * pool_w + kw, dout, 0)
    return dense
