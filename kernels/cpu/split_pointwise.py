"""Convolutions with filters of one pixel, on the matrix unit: a linear layer's products of all pixels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from . import split_linear
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue
from .workspace import NOTHING, NOWHERE


def _is_linear(layer: Layer) -> bool:
    """Whether each pixel of the result is a linear map of the same pixel of the image, all by one matrix."""
    sides = layer.rows, layer.columns
    return layer.groups == 1 and all(s.kernel == s.stride == 1 and not any(s.padding) for s in sides)


@lru_cache(maxsize=1024)
def suits_forward(layer: Layer, images: int, dtype: np.dtype, e: Epilogue) -> bool:
    """Whether the forward pass that ends in `e` is faster there."""
    channels, filters, pixels = layer.channels, layer.filters, _pixels(layer, images)
    ends = e == NO_EPILOGUE or (bool(e.relu) and e.pool_h == e.pool_w == 1)
    return ends and _is_linear(layer) and split_linear.suits(pixels, channels, filters, 1, 1, dtype)


@lru_cache(maxsize=1024)
def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is faster there."""
    channels, filters, pixels = layer.channels, layer.filters, _pixels(layer, images)
    return _is_linear(layer) and split_linear.suits(pixels, filters, channels, 1, filters, dtype)


@lru_cache(maxsize=1024)
def suits_weight(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient of the weights is faster there."""
    channels, filters, pixels = layer.channels, layer.filters, _pixels(layer, images)
    return _is_linear(layer) and split_linear.suits(channels, pixels, filters, channels, 1, dtype)


def _pixels(layer: Layer, images: int) -> int:
    return images * layer.image[0] * layer.image[1]


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite y with the convolution of x, or with its ReLU if `e` says so."""
    channels, filters = layer.channels, layer.filters
    biases = NOTHING[x.dtype] if bias is None else bias
    results = y.reshape(-1, filters)
    split_linear.product(x, (channels, 1), weight, (filters, 1), channels, biases, results, False, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite dx with the gradient to the input."""
    channels, filters = layer.channels, layer.filters
    results = dx.reshape(-1, channels)
    split_linear.product(
        dout, (filters, 1), weight, (1, filters), filters, NOTHING[dout.dtype], results, False
    )


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    channels, filters = layer.channels, layer.filters
    results = dweight.reshape(channels, filters)
    pixels = _pixels(layer, len(x))
    split_linear.product(x, (1, channels), dout, (filters, 1), pixels, NOTHING[x.dtype], results, True)
