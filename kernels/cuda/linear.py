"""The linear layer: convolution of images of one pixel, and so that product's kernels.

Its few rows, as a rule, leave most of the device idle unless the sum is split as well, as `splits` does.
"""

from __future__ import annotations

from typing import Any

from ..cpu import linear as cpu
from ..cpu.direct import Layer, layer
from . import checks, correlation
from .arrays import DeviceArray
from .twin import twin_of
from .weight_gradient import add_weight_gradient


def _layer(features: int, filters: int) -> Layer:
    return layer((1, 1, 1, features), (1, 1), features, filters, 1, 0, 1, 1)


@twin_of(cpu.linear_forward)
def linear_forward(x: Any, weight: Any, bias: Any = None, *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x, 2)
    weight = checks.floating("weight", weight, 2, x.dtype)
    (rows, depth), (inputs, filters) = x.shape, weight.shape
    if depth != inputs:
        raise ValueError(f"weight: {weight.shape} takes {inputs} features, but x has {depth}: {x.shape}")
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    y = checks.output("out", out, (rows, filters), x.dtype)
    if y.size:
        correlation.forward(_layer(inputs, filters), x, weight, bias, y)
    return y


@twin_of(cpu.linear_backward_input)
def linear_backward_input(dout: Any, weight: Any, *, out: Any = None) -> DeviceArray:
    dout = checks.floating("dout", dout, 2)
    weight = checks.floating("weight", weight, 2, dout.dtype)
    (rows, filters), (inputs, columns) = dout.shape, weight.shape
    if filters != columns:
        raise ValueError(
            f"dout: {dout.shape} has {filters} columns, but weight {weight.shape} makes {columns}"
        )
    dx = checks.output("out", out, (rows, inputs), dout.dtype)
    if dx.size:
        correlation.backward_input(_layer(inputs, filters), dout, weight, dx)
    return dx


@twin_of(cpu.linear_backward_weight)
def linear_backward_weight(dout: Any, x: Any, *, out: Any = None, accumulate: bool = False) -> DeviceArray:
    dout = checks.floating("dout", dout, 2)
    x = checks.floating("x", x, 2, dout.dtype)
    (rows, filters), (many, inputs) = dout.shape, x.shape
    if rows != many:
        raise ValueError(f"dout: {dout.shape} has {rows} rows, but x has {many}: {x.shape}")
    dweight = checks.output("out", out, (inputs, filters), dout.dtype)
    if dweight.size:
        add_weight_gradient(_layer(inputs, filters), dout, x, dweight, accumulate and out is not None)
    return dweight
