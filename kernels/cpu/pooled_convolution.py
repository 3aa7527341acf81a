"""Convolution with ReLU and max-pooling as one operation: forward, and backward from the pooled gradient.

A network of convolutions, ReLUs and pools spends most of its memory traffic on images that only the next
layer reads, and three quarters of its backward pass on zeros: of a 2x2 window only the largest pixel has a
gradient. Forward pools each block of the convolution while it is in the cache; backward (see `sparse`)
multiplies only what is there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from .. import checks
from . import (
    depthwise,
    direct,
    direct_weights,
    few_pixels,
    narrow_groups,
    simd,
    sparse,
    winograd,
    winograd_lanes,
    winograd_rows_weights,
)
from .columns import conv2d_backward_bias
from .convolution import conv2d_backward_input, conv2d_backward_weight, forward_way, input_way
from .epilogue import Epilogue
from .pieces import clear_all
from .pooling import max_pool2d_backward
from .winograd_tiling import filters_of, tiles_of
from .workspace import NOWHERE, scratch

# The largest offset in a window that a byte holds beside `epilogue.DEAD`.
_MOST_PIXELS = 255
# Channels times filters from which on Winograd's dense sums take less time than sparse ones: for the gradient
# of the weights, whose sparse sums then leave the cache, and of the input.
_WINOGRAD_WEIGHT = 1 << 14
_WINOGRAD_INPUT = 1 << 13
# And with fewer, of the input, where its products are so much less: with three windows in four alive.
_DENSE_SHARE = 0.72 if simd.FULL_WIDTH else 0.0
# And from which on those of few pixels do, for the weights: each filter's sums are written for few products.
_FEW_PIXELS_WEIGHT = 1 << 12


def _epilogue(layer: direct.Layer, pool_size: Any, relu: bool, keeps: bool) -> Epilogue:
    return _known_epilogue(layer, checks.pair("pool_size", pool_size, 1), bool(relu), keeps)


@lru_cache(maxsize=512)
def _known_epilogue(layer: direct.Layer, pool_size: tuple[int, int], relu: bool, keeps: bool) -> Epilogue:
    pool_h, pool_w = pool_size
    if pool_h * pool_w > _MOST_PIXELS:
        raise ValueError(f"pool_size: {(pool_h, pool_w)} has more than {_MOST_PIXELS} pixels")
    height, width = layer.out_image
    if pool_h > height or pool_w > width:
        raise ValueError(
            f"pool_size: {(pool_h, pool_w)} is larger than the convolution's output {layer.out_image}"
        )
    return Epilogue(pool_h, pool_w, int(relu), height // pool_h, width // pool_w, layer.filters, int(keeps))


def _checked(dout: np.ndarray, argmax: Any, images: int, e: Epilogue) -> np.ndarray:
    """`argmax` for kernels, if it and `dout` have the shape of the forward pass's results."""
    shape = (images, e.out_h, e.out_w, e.filters)
    checks.same_shape("dout", dout, shape)
    argmax = np.asarray(argmax)
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax: expected uint8, got {argmax.dtype}")
    return np.require(checks.same_shape("argmax", argmax, shape), requirements="C")


def _ways(layer: direct.Layer, e: Epilogue, images: int, dtype: np.dtype) -> tuple[str, str]:
    """How to do the gradient of the weights and that of the input.

    Over what has a gradient, "sparse"; over all pixels, "dense"; or, that of the weights, "direct", which
    takes all pixels of a block at a time.
    """
    if depthwise.fits(layer) or narrow_groups.suits_forward(layer, dtype):
        return "dense", "dense"
    sparse_weight, sparse_input = sparse.pays(layer, e, dtype)
    size = layer.channels * layer.filters
    if winograd.suits(layer, images, dtype):
        weight = "sparse" if sparse_weight and size < _WINOGRAD_WEIGHT else "dense"
        sparse_input = sparse_input and size < _WINOGRAD_INPUT and not _dense_is_less(layer, e, dtype)
        return weight, "sparse" if sparse_input else "dense"
    way = input_way(layer, images, dtype, winograd.get_winograd())
    if few_pixels.suits_weight(layer, images) and way is not winograd_lanes.backward_input:
        return "sparse" if sparse_weight and size < _FEW_PIXELS_WEIGHT else "dense", "dense"
    # The other ways are those of few channels, which leave lanes of sparse sums empty.
    sparse_input = sparse_input and way is direct.backward_input
    return "sparse" if sparse_weight else "direct", "sparse" if sparse_input else "dense"


def _dense_is_less(layer: direct.Layer, e: Epilogue, dtype: np.dtype) -> bool:
    """Whether Winograd's gradient of the whole input is less work than that of what has one."""
    of = filters_of(layer)
    _, rows, columns = tiles_of(layer.image, of.dilation)
    dense = rows * columns * of.products * layer.filters * -(-layer.channels // simd.lanes(dtype))
    return dense < _DENSE_SHARE * e.out_h * e.out_w * sparse.input_work(layer, e, dtype)


def _unpooled(dout: np.ndarray, argmax: np.ndarray, layer: direct.Layer, pool_size: Any) -> np.ndarray:
    """The gradient of every pixel of the convolution, zeros included."""
    shape = (dout.shape[0], *layer.out_image, layer.filters)
    out = scratch("unpooled", math.prod(shape), dout.dtype).reshape(shape)
    return max_pool2d_backward(dout, argmax, shape, pool_size, out=out)


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
    *,
    out: np.ndarray | None = None,
    out_argmax: np.ndarray | None = None,
    with_argmax: bool = True,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`conv2d_forward`, then ReLU if `relu`, then the largest value of each window of `pool_size`.

    Windows neither overlap nor are padded; rows and columns that fill no window are dropped. NaN wins, and
    passes ReLU.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    weight : (kH, kW, C / groups, F), of x's dtype
    bias : (F,) or None
    pool_size : int or (height, width), of at most 255 pixels
    relu : bool
    stride, padding, dilation, groups
        The convolution's, as in `conv2d_forward`.
    out : (N, Hp, Wp, F), optional
        Overwritten with y.
    out_argmax : (N, Hp, Wp, F) uint8, optional
        Overwritten with argmax.
    with_argmax : bool
        False returns None for argmax, and does not compute it.

    Returns
    -------
    y : (N, Hp, Wp, F) array, Hp = floor(Ho / pool height)
    argmax : (N, Hp, Wp, F) uint8
        Offset kh * width + kw of the largest value in its window, the first of several, or 255 where
        `relu` is on and it is not above zero.

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit.
    """
    x = checks.floating("x", x, 4)
    weight = checks.floating("weight", weight, 4, x.dtype)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(x.shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    e = _epilogue(layer, pool_size, relu, with_argmax)
    shape = (x.shape[0], e.out_h, e.out_w, filters)
    y = checks.output("out", out, shape, x.dtype)
    argmax = None
    if with_argmax:
        argmax = checks.output("out_argmax", out_argmax, shape, np.dtype(np.uint8))
    if y.size:
        where = NOWHERE if argmax is None else argmax
        way = forward_way(layer, x.shape[0], x.dtype, e, winograd.get_winograd())
        way(layer, x, weight, bias, y, e, where)
    return y, argmax


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
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `conv2d_pool_forward` with respect to x.

    Parameters
    ----------
    dout : (N, Hp, Wp, F) float32 or float64
    argmax : (N, Hp, Wp, F) uint8
        As forward returned it.
    weight : (kH, kW, C / groups, F)
    x_shape : (N, H, W, C)
    pool_size, stride, padding, dilation, groups
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
    e = _epilogue(layer, pool_size, False, True)
    argmax = _checked(dout, argmax, shape[0], e)
    dx = checks.output("out", out, shape, dout.dtype)
    if not dx.size:
        return dx
    if _ways(layer, e, shape[0], dout.dtype)[1] == "sparse":
        sparse.input_gradient(dout, argmax, weight, layer, e, dx)
        return dx
    dense = _unpooled(dout, argmax, layer, pool_size)
    return conv2d_backward_input(dense, weight, shape, stride, padding, dilation, groups, out=dx)


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
    *,
    out: np.ndarray | None = None,
    out_bias: np.ndarray | None = None,
    accumulate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `conv2d_pool_forward` with respect to weight and bias.

    Parameters
    ----------
    dout : (N, Hp, Wp, F) float32 or float64
    argmax : (N, Hp, Wp, F) uint8
        As forward returned it.
    x : (N, H, W, C)
    kernel_size : int or (kH, kW)
    pool_size, stride, padding, dilation, groups
        Those of the forward pass.
    out : (kH, kW, C / groups, F), optional
    out_bias : (F,), optional
        Overwritten with the results, or added to if `accumulate` is true.

    Returns
    -------
    dweight : (kH, kW, C / groups, F) array
    dbias : (F,) array
    """
    dout = checks.floating("dout", dout, 4)
    x = checks.floating("x", x, 4, dout.dtype)
    filters = dout.shape[3]
    layer = direct.layer(x.shape, kernel_size, None, filters, stride, padding, dilation, groups)
    e = _epilogue(layer, pool_size, False, True)
    argmax = _checked(dout, argmax, x.shape[0], e)
    shape = (layer.rows.kernel, layer.columns.kernel, layer.channels // layer.groups, filters)
    dweight = checks.output("out", out, shape, dout.dtype)
    dbias = checks.output("out_bias", out_bias, (filters,), dout.dtype)
    for gradient, given in ((dweight, out), (dbias, out_bias)):
        if not accumulate or given is None:
            clear_all(gradient)
    if not dweight.size or not dout.size:
        return dweight, dbias
    if winograd_rows_weights.suits_pooled(layer, x.shape[0], dout.dtype, e):
        winograd_rows_weights.add_weight_gradient(layer, dout, x, dweight, e, argmax, dbias)
        return dweight, dbias
    way = _ways(layer, e, x.shape[0], dout.dtype)[0]
    if way == "sparse":
        sparse.add_weight_gradient(dout, argmax, x, layer, e, dweight, dbias)
    elif way == "dense":
        dense = _unpooled(dout, argmax, layer, pool_size)
        settings = kernel_size, stride, padding, dilation, groups
        conv2d_backward_weight(dense, x, *settings, out=dweight, accumulate=True)
        conv2d_backward_bias(dense, out=dbias, accumulate=True)
    else:
        direct_weights.add_weight_gradient(layer, dout, x, dweight, e, argmax, dbias)
    return dweight, dbias
