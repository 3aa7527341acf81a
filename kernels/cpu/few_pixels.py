"""Convolutions of few pixels with many weights, as matrix products.

A layer deep in a network sees one small image with megabytes of weights: their way through the memory is all
that counts. A product reads each of them once, in the order in which they lie; the pixels' columns, which a
direct convolution avoids, are small beside them.
"""

from __future__ import annotations

import numpy as np

from .columns import col2im, im2col
from .direct import Layer
from .linear import linear_backward_input, linear_backward_weight, linear_forward
from .workspace import scratch

# With more pixels, or fewer weights, direct convolution takes less time.
_MOST_PIXELS = 256
_FEWEST_WEIGHTS = 1 << 17


def suits(layer: Layer, images: int) -> bool:
    """Whether a layer has few pixels and many weights."""
    pixels = images * layer.out_image[0] * layer.out_image[1]
    weights = layer.rows.kernel * layer.columns.kernel * layer.channels * layer.filters
    return layer.groups == 1 and 0 < pixels <= _MOST_PIXELS and weights >= _FEWEST_WEIGHTS


def _windows(layer: Layer) -> tuple[tuple, ...]:
    rows, columns = layer.rows, layer.columns
    kernel, stride, padding, dilation = zip(rows[1:], columns[1:], strict=True)
    return kernel, stride, padding, dilation


def _columns(layer: Layer, images: int, dtype: np.dtype) -> np.ndarray:
    """Scratch for the columns of all pixels."""
    shape = (
        images * layer.out_image[0] * layer.out_image[1],
        layer.rows.kernel * layer.columns.kernel * layer.channels,
    )
    return scratch("columns", shape[0] * shape[1], dtype).reshape(shape)


def forward(layer: Layer, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """Overwrite `y` with the convolution of `x`."""
    columns = im2col(x, *_windows(layer), out=_columns(layer, x.shape[0], x.dtype))
    linear_forward(columns, weight.reshape(-1, layer.filters), bias, out=y.reshape(-1, layer.filters))


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    columns = _columns(layer, dx.shape[0], dx.dtype)
    linear_backward_input(dout.reshape(-1, layer.filters), weight.reshape(-1, layer.filters), out=columns)
    col2im(columns, dx.shape, *_windows(layer), out=dx)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    columns = im2col(x, *_windows(layer), out=_columns(layer, x.shape[0], x.dtype))
    gradient = dweight.reshape(-1, layer.filters)
    linear_backward_weight(dout.reshape(-1, layer.filters), columns, out=gradient, accumulate=True)
