"""Convolution: forward, and backward to the input and to the weights.

The functions check their arguments and choose the way: `direct` convolves by the definition, `winograd` and
`winograd_weights` in fewer multiplications where filters are 3x3.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checks
from . import depthwise, direct, few_channels, image_lanes, winograd, winograd_weights


def conv2d_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Two-dimensional cross-correlation, as neural networks call convolution.

    y[n, i, j, f] = bias[f] + sum over kh, kw, c of
    x[n, i * stride + kh * dilation - padding, ..., c] * weight[kh, kw, c, f]

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    weight : (kH, kW, C / groups, F), of x's dtype
    bias : (F,) or None
    stride, dilation : int or (h, w)
    padding : int, (h, w), or ((top, bottom), (left, right)), zeros on each side
    groups : int
        The channels and filters are cut into this many groups that don't see each other.
    out : (N, Ho, Wo, F), optional
        Overwritten with the result.

    Returns
    -------
    (N, Ho, Wo, F) array, Ho = floor((H + top + bottom - dilation * (kH - 1) - 1) / stride) + 1

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit, or the kernel is larger than the padded image.
    """
    x = checks.floating("x", x, 4)
    weight = checks.floating("weight", weight, 4, x.dtype)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(x.shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    y = checks.output("out", out, (x.shape[0], *layer.out_image, filters), x.dtype)
    if y.size and depthwise.fits(layer):
        depthwise.forward(layer, x, weight, bias, y)
    elif y.size and image_lanes.suits_forward(layer, x.shape[0], x.dtype):
        image_lanes.forward(layer, x, weight, bias, y)
    elif y.size and winograd.suits(layer, x.shape[0], x.dtype):
        winograd.forward(layer, x, weight, bias, y)
    elif y.size:
        layer.run(x, layer.forward_tables, weight, layer.positions, False, bias, y)
    return y


def conv2d_backward_input(
    dout: np.ndarray,
    weight: np.ndarray,
    x_shape: tuple[int, int, int, int],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `conv2d_forward` with respect to x.

    Parameters
    ----------
    dout : (N, Ho, Wo, F) float32 or float64
    weight : (kH, kW, C / groups, F)
    x_shape : (N, H, W, C)
    stride, padding, dilation, groups
        Those of the forward pass.
    out : (N, H, W, C), optional
        Overwritten with the result.

    Returns
    -------
    (N, H, W, C) array
    """
    dout = checks.floating("dout", dout, 4)
    weight = checks.floating("weight", weight, 4, dout.dtype)
    shape = checks.shape4("x_shape", x_shape)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    checks.same_shape("dout", dout, (shape[0], *layer.out_image, filters))
    dx = checks.output("out", out, shape, dout.dtype)
    if dx.size:
        if layer.rows.skips or layer.columns.skips:
            dx.fill(0)
        if depthwise.fits(layer):
            depthwise.backward_input(layer, dout, weight, dx)
            return dx
        if image_lanes.suits_input(layer, shape[0], dout.dtype):
            image_lanes.backward_input(layer, dout, weight, dx)
            return dx
        if few_channels.suits(layer, dout.dtype):
            few_channels.backward_input(layer, dout, weight, dx)
            return dx
        if winograd.suits(layer, shape[0], dout.dtype):
            winograd.backward_input(layer, dout, weight, dx)
            return dx
        for table, positions in layer.input_tables:
            layer.run(dout, table, weight, positions, True, None, dx)
    return dx


def conv2d_backward_weight(
    dout: np.ndarray,
    x: np.ndarray,
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: np.ndarray | None = None,
    accumulate: bool = False,
) -> np.ndarray:
    """Gradient of `conv2d_forward` with respect to the weight.

    Parameters
    ----------
    dout : (N, Ho, Wo, F) float32 or float64
    x : (N, H, W, C)
    kernel_size : int or (kH, kW)
    stride, padding, dilation, groups
        Those of the forward pass.
    out : (kH, kW, C / groups, F), optional
        Overwritten with the result, or added to if `accumulate` is true.

    Returns
    -------
    (kH, kW, C / groups, F) array
    """
    dout = checks.floating("dout", dout, 4)
    x = checks.floating("x", x, 4, dout.dtype)
    images, filters = x.shape[0], dout.shape[3]
    layer = direct.layer(x.shape, kernel_size, None, filters, stride, padding, dilation, groups)
    checks.same_shape("dout", dout, (images, *layer.out_image, filters))
    shape = (layer.rows.kernel, layer.columns.kernel, layer.channels // layer.groups, filters)
    dweight = checks.output("out", out, shape, dout.dtype)
    if not accumulate or out is None:
        dweight.fill(0)
    if dweight.size and dout.size and depthwise.fits(layer):
        depthwise.add_weight_gradient(layer, dout, x, dweight)
    elif dweight.size and dout.size and image_lanes.suits_weight(layer, images, dout.dtype):
        image_lanes.add_weight_gradient(layer, dout, x, dweight)
    elif dweight.size and dout.size and winograd.suits(layer, images, dout.dtype):
        winograd_weights.add_backward_weight(layer, dout, x, dweight)
    elif dweight.size and dout.size:
        layer.add_weight_gradient(dout, x, dweight)
    return dweight
