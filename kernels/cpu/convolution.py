"""Convolution: forward, and backward to the input and to the weights.

The functions check their arguments and choose the way by the layer's sizes: `direct` and `direct_weights`
convolve by the definition, `split_pointwise`, `split_direct` and `split_weights` do so on a matrix unit if
there is one, `winograd`, `winograd_weights` and `winograd_strided` in fewer multiplications, so do
`winograd_rows` and `winograd_rows_weights` for few channels; `depthwise`, `image_lanes`, `winograd_lanes`,
`depth_lanes`, `few_channels` and `few_pixels` where sizes are too small to fill vectors or to repay packing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .. import checks
from ..threads import between_jobs
from . import (
    depth_lanes,
    depthwise,
    direct,
    direct_weights,
    few_channels,
    few_pixels,
    image_lanes,
    narrow_groups,
    simd,
    split_direct,
    split_pointwise,
    split_weights,
    winograd,
    winograd_lanes,
    winograd_lanes_weights,
    winograd_rows,
    winograd_rows_weights,
    winograd_strided,
    winograd_weights,
)
from .epilogue import NO_EPILOGUE, Epilogue, finish
from .pieces import clear_all
from .workspace import scratch

Way = Callable[..., None]

# With fewer multiply-adds, turning the weights' gradient over afterwards would weigh.
_LEAST_EXCHANGED = 1 << 16


# What is chosen depends on the sizes and, the last argument, on whether Winograd's algorithm is allowed.


@lru_cache(maxsize=1024)
def forward_way(layer: direct.Layer, images: int, dtype: np.dtype, e: Epilogue, allowed: bool) -> Way:
    """What does the forward pass that ends in `e`; it takes the layer, x, weight, bias, y, e and argmax."""
    if depthwise.fits(layer):
        return depthwise.forward
    if narrow_groups.suits_forward(layer, dtype):
        return narrow_groups.forward
    if depth_lanes.suits_forward(layer, images, dtype) and not (
        depth_lanes.yields(layer, layer.channels, layer.filters, dtype)
        and winograd_lanes.suits_forward(layer, images, dtype, e)
    ):
        return depth_lanes.forward
    if split_pointwise.suits_forward(layer, images, dtype, e):
        return split_pointwise.forward
    if few_pixels.suits_forward(layer, images, dtype):
        return few_pixels.forward
    if winograd.suits(layer, images, dtype) and winograd.ends_in(layer, e):
        return winograd.forward
    if max(layer.rows.stride, layer.columns.stride) > 1 and split_direct.suits(layer, images, dtype):
        return split_direct.forward
    if winograd_strided.suits(layer, images, dtype) and winograd.ends_in(layer, e):
        return winograd_strided.forward
    if winograd_lanes.suits_forward(layer, images, dtype, e):
        return winograd_lanes.forward
    if image_lanes.suits_forward(layer, images, dtype):
        return image_lanes.forward
    if winograd_rows.suits(layer, images, dtype, e):
        return winograd_rows.forward
    for way in (winograd, winograd_strided):
        if way.suits(layer, images, dtype):
            return partial(_finished_apart, way.forward)
    if split_direct.suits(layer, images, dtype):
        return split_direct.forward
    return direct.forward


def _finished_apart(
    way: Way,
    layer: direct.Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue,
    argmax: np.ndarray,
) -> None:
    """The forward pass by a way that can't end in `e`, and then what follows it."""
    shape = (len(x), *layer.out_image, layer.filters)
    z = scratch("unpooled", math.prod(shape), x.dtype).reshape(shape) if e.pool_h * e.pool_w > 1 else y
    way(layer, x, weight, bias, z)
    finish(z, y, e, argmax)


@lru_cache(maxsize=1024)
def input_way(layer: direct.Layer, images: int, dtype: np.dtype, allowed: bool) -> Way:
    """What computes the gradient to the input; it takes the layer, dout, weight and dx."""
    if depthwise.fits(layer):
        return depthwise.backward_input
    if narrow_groups.suits_input(layer, dtype):
        return narrow_groups.backward_input
    if depth_lanes.suits_input(layer, images, dtype) and not (
        depth_lanes.yields(layer, layer.filters, layer.channels, dtype)
        and winograd_lanes.suits_input(layer, images, dtype)
    ):
        return depth_lanes.backward_input
    if few_pixels.suits_input_first(layer, images, dtype):
        return few_pixels.backward_input
    if winograd_lanes.suits_input(layer, images, dtype):
        return winograd_lanes.backward_input
    if image_lanes.suits_input(layer, images, dtype):
        return image_lanes.backward_input
    if split_pointwise.suits_input(layer, images, dtype):
        return split_pointwise.backward_input
    if few_channels.suits(layer, dtype):
        return few_channels.backward_input
    if winograd.suits(layer, images, dtype):
        return winograd.backward_input
    if few_pixels.suits_input(layer, images):
        return few_pixels.backward_input
    if winograd_rows.suits_input(layer, images, dtype):
        return winograd_rows.backward_input
    if split_direct.suits_input(layer, images, dtype):
        return split_direct.backward_input
    return direct.backward_input


@lru_cache(maxsize=1024)
def _weight_way(layer: direct.Layer, images: int, dtype: np.dtype, allowed: bool) -> Way:
    if depthwise.fits(layer):
        return depthwise.add_weight_gradient
    if narrow_groups.suits_forward(layer, dtype):
        return narrow_groups.add_weight_gradient
    if split_pointwise.suits_weight(layer, images, dtype):
        return split_pointwise.add_weight_gradient
    if allowed and _exchange_pays(layer, images, dtype):
        return partial(_exchanged, _weight_way(layer.exchanged, images, dtype, allowed))
    if winograd_lanes_weights.suits(layer, images, dtype):
        return winograd_lanes_weights.add_weight_gradient
    if image_lanes.suits_weight(layer, images, dtype):
        return image_lanes.add_weight_gradient
    if winograd.suits(layer, images, dtype):
        return winograd_weights.add_weight_gradient
    if winograd_strided.suits(layer, images, dtype):
        return winograd_strided.add_weight_gradient
    if few_pixels.suits_weight(layer, images):
        return few_pixels.add_weight_gradient
    if winograd_rows_weights.suits(layer, images, dtype):
        return winograd_rows_weights.add_weight_gradient
    if split_weights.suits(layer, images, dtype):
        return split_weights.add_weight_gradient
    return direct_weights.add_weight_gradient


def _exchange_pays(layer: direct.Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the weights' gradient is summed faster with dout in the place of x, and x in that of dout.

    What is in dout's place fills the vectors.
    """
    if layer.exchanged is None or images * layer.multiply_adds < _LEAST_EXCHANGED:
        return False
    lanes = simd.lanes(dtype)
    channels, filters = (many / -(-many // lanes) for many in (layer.channels, layer.filters))
    if channels <= filters:
        return False
    # Vectors of images are full in either case; but they read all channels anew for each filter.
    of_images = winograd_lanes_weights.suits(layer, images, dtype) or image_lanes.suits_weight(
        layer, images, dtype
    )
    return not of_images or layer.channels >= 2 * lanes or 4 * layer.filters <= lanes


def _exchanged(way: Way, layer: direct.Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the weights' gradient by the `way` of the layer that reads x as dout and dout as x."""
    kernel_h, kernel_w, channels, filters = dweight.shape
    of = layer.exchanged
    flipped = scratch("exchanged", (kernel_h, kernel_w, filters, channels), dweight.dtype)
    clear_all(flipped)
    way(of, x, dout, flipped)
    between_jobs(np.add, dweight, flipped[::-1, ::-1].transpose(0, 1, 3, 2), dweight)


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

    Products with the zeros of the padding may be left out: a weight that is NaN or infinite reaches all
    outputs where it meets the image, and may reach those where it meets the padding.

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
    if y.size:
        way = forward_way(layer, x.shape[0], x.dtype, NO_EPILOGUE, winograd.get_winograd())
        way(layer, x, weight, bias, y)
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
        way = input_way(layer, shape[0], dout.dtype, winograd.get_winograd())
        way(layer, dout, weight, dx)
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

    Products with the zeros of the padding may be left out, as they may there. An x that is NaN or infinite
    reaches all taps that it meets, and may reach others.

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
        clear_all(dweight)
    if dweight.size and dout.size:
        way = _weight_way(layer, images, dout.dtype, winograd.get_winograd())
        way(layer, dout, x, dweight)
    return dweight
