"""Convolution with ReLU and max-pooling as one operation.

Forward pools windows of 1, 2 or 4 pixels where the sums are, in registers: of four results one is written.
Backward reads the pooled gradient through argmax, so that the image of zeros around it is never written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from ..cpu import direct
from ..cpu import pooled_convolution as cpu
from . import checks, correlation, grouped, weight_gradient, winograd
from .arrays import DeviceArray, blocks
from .columns import sum_rows
from .convolution import conv2d_forward
from .correlation import Pool
from .correlation_memory import DEAD
from .jit import THREADS, kernel
from .splits import nothing
from .taps import digits, quotient
from .twin import twin_of

# The largest offset in a window that a byte holds beside `DEAD`.
_MOST_PIXELS = 255


def _pool(layer: direct.Layer, pool_size: Any, relu: bool = False, keeps: bool = False) -> Pool:
    height, width = checks.pair("pool_size", pool_size, 1)
    if height * width > _MOST_PIXELS:
        raise ValueError(f"pool_size: {(height, width)} has more than {_MOST_PIXELS} pixels")
    if height > layer.out_image[0] or width > layer.out_image[1]:
        raise ValueError(
            f"pool_size: {(height, width)} is larger than the convolution's output {layer.out_image}"
        )
    return Pool(height, width, 1, int(relu), int(keeps))


def _pooled_shape(images: int, layer: direct.Layer, pool: Pool) -> tuple[int, int, int, int]:
    height, width = layer.out_image
    return images, height // pool.height, width // pool.width, layer.filters


def _checked(dout: DeviceArray, argmax: Any, images: int, layer: direct.Layer, pool: Pool) -> DeviceArray:
    """`argmax` for kernels, if it and `dout` have the shape of the forward pass's results."""
    shape = _pooled_shape(images, layer, pool)
    checks.same_shape("dout", dout, shape)
    argmax = checks.array("argmax", argmax)
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax: expected uint8, got {argmax.dtype}")
    return checks.same_shape("argmax", argmax, shape)


@kernel("T[::1], T[::1], uint8[::1], UniTuple(int32, 9)")
def _pool_images(z, y, argmax, sizes):
    """ReLU and max-pooling of images that are in memory; NaN wins, and passes ReLU."""
    height, width, filters, rows, columns, pool_h, pool_w, relu, keeps = sizes
    for k in range(cuda.grid(1), y.size, cuda.gridsize(1)):
        zero = z.dtype.type(0)
        window = k // filters
        n, i, j = digits(window, rows, columns)
        first = ((n * height + i * pool_h) * width + j * pool_w) * filters + k - window * filters
        best, where = z[first], 0
        for offset in range(1, pool_h * pool_w):
            down = quotient(offset, pool_w)
            value = z[first + (down * width + offset - down * pool_w) * filters]
            if value > best or value != value:
                best, where = value, offset
        if relu and not best > zero:
            where = DEAD
            if best <= zero:
                best = zero
        y[k] = best
        if keeps:
            argmax[k] = where


@twin_of(cpu.conv2d_pool_forward)
def conv2d_pool_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    pool_size: Any = 1,
    relu: bool = True,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Any = None,
    out_argmax: Any = None,
    with_argmax: bool = True,
) -> tuple[DeviceArray, DeviceArray | None]:
    x = checks.floating("x", x, 4)
    weight = checks.floating("weight", weight, 4, x.dtype)
    kh, kw, channels, filters = weight.shape
    layer = direct.layer(x.shape, (kh, kw), channels, filters, stride, padding, dilation, groups)
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    pool = _pool(layer, pool_size, relu, with_argmax)
    shape = _pooled_shape(x.shape[0], layer, pool)
    y = checks.output("out", out, shape, x.dtype)
    argmax = checks.output("out_argmax", out_argmax, shape, np.dtype(np.uint8)) if with_argmax else None
    if not y.size:
        return y, argmax
    if winograd.suits(layer, x.shape[0], x.dtype) and winograd.pools(pool):
        winograd.forward(layer, x, weight, bias, y, pool, argmax)
        return y, argmax
    if pool.is_fused and not grouped.suits(layer):
        correlation.forward(layer, x, weight, bias, y, pool, argmax)
        return y, argmax
    z = conv2d_forward(x, weight, bias, stride, padding, dilation, groups)
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    sizes = (*layer.out_image, filters, *shape[1:3], pool.height, pool.width, pool.relu, pool.keeps)
    _pool_images[blocks(y.size), THREADS](z.ravel(), y.ravel(), where, sizes)
    return y, argmax


@twin_of(cpu.conv2d_pool_backward_input)
def conv2d_pool_backward_input(
    dout: Any,
    argmax: Any,
    weight: Any,
    x_shape: tuple[int, int, int, int],
    pool_size: Any = 1,
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
    pool = _pool(layer, pool_size)
    argmax = _checked(dout, argmax, shape[0], layer, pool)
    dx = checks.output("out", out, shape, dout.dtype)
    if dx.size:
        way = winograd if winograd.suits(layer, shape[0], dout.dtype) else correlation
        way.backward_input(layer, dout, weight, dx, pool, argmax)
    return dx


@twin_of(cpu.conv2d_pool_backward_weight)
def conv2d_pool_backward_weight(
    dout: Any,
    argmax: Any,
    x: Any,
    kernel_size: Any,
    pool_size: Any = 1,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    out: Any = None,
    out_bias: Any = None,
    accumulate: bool = False,
) -> tuple[DeviceArray, DeviceArray]:
    dout = checks.floating("dout", dout, 4)
    x = checks.floating("x", x, 4, dout.dtype)
    filters = dout.shape[3]
    layer = direct.layer(x.shape, kernel_size, None, filters, stride, padding, dilation, groups)
    pool = _pool(layer, pool_size)
    argmax = _checked(dout, argmax, x.shape[0], layer, pool)
    shape = (layer.rows.kernel, layer.columns.kernel, layer.channels // layer.groups, filters)
    dweight = checks.output("out", out, shape, dout.dtype)
    dbias = checks.output("out_bias", out_bias, (filters,), dout.dtype)
    if dweight.size:
        way = winograd if winograd.suits(layer, x.shape[0], x.dtype) else weight_gradient
        way.add_weight_gradient(layer, dout, x, dweight, accumulate and out is not None, pool, argmax)
    sum_rows(dout, dbias, accumulate and out_bias is not None, pool.height * pool.width, argmax)
    return dweight, dbias
