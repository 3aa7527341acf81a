"""Convolution: forward, and backward to the input and to the weights.

`correlation` and `weight_gradient` are products on tiles, `winograd` takes fewer multiplications where
filters are 3x3, and `grouped` does groups that are too small for tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cpu import convolution as cpu
from ..cpu import direct
from . import checks, correlation, grouped, weight_gradient, winograd
from .arrays import DeviceArray
from .twin import twin_of


def _way(layer: direct.Layer, images: int, dtype: np.dtype) -> Any:
    """The module that does a layer of this kind, if it isn't the products on tiles."""
    if grouped.suits(layer):
        return grouped
    return winograd if winograd.suits(layer, images, dtype) else None


@twin_of(cpu.conv2d_forward)
def conv2d_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Any = None,
) -> DeviceArray:
    x = checks.floating("x", x, 4)
    weight = checks.floating("weight", weight, 4, x.dtype)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(x.shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    y = checks.output("out", out, (x.shape[0], *layer.out_image, filters), x.dtype)
    if y.size:
        way = _way(layer, x.shape[0], x.dtype) or correlation
        way.forward(layer, x, weight, bias, y)
    return y


@twin_of(cpu.conv2d_backward_input)
def conv2d_backward_input(
    dout: Any,
    weight: Any,
    x_shape: tuple[int, int, int, int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Any = None,
) -> DeviceArray:
    dout = checks.floating("dout", dout, 4)
    weight = checks.floating("weight", weight, 4, dout.dtype)
    shape = checks.shape4("x_shape", x_shape)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    checks.same_shape("dout", dout, (shape[0], *layer.out_image, filters))
    dx = checks.output("out", out, shape, dout.dtype)
    if dx.size:
        way = _way(layer, shape[0], dout.dtype) or correlation
        way.backward_input(layer, dout, weight, dx)
    return dx


@twin_of(cpu.conv2d_backward_weight)
def conv2d_backward_weight(
    dout: Any,
    x: Any,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Any = None,
    accumulate: bool = False,
) -> DeviceArray:
    dout = checks.floating("dout", dout, 4)
    x = checks.floating("x", x, 4, dout.dtype)
    images, filters = x.shape[0], dout.shape[3]
    layer = direct.layer(x.shape, kernel_size, None, filters, stride, padding, dilation, groups)
    checks.same_shape("dout", dout, (images, *layer.out_image, filters))
    shape = (layer.rows.kernel, layer.columns.kernel, layer.channels // layer.groups, filters)
    dweight = checks.output("out", out, shape, dout.dtype)
    if dweight.size:
        way = _way(layer, images, dout.dtype) or weight_gradient
        way.add_weight_gradient(layer, dout, x, dweight, accumulate and out is not None)
    return dweight
