"""ReLU, LeakyReLU and PReLU, with their gradients: one pass over memory each."""

from __future__ import annotations

from typing import Any

from ..cpu import activation as cpu
from . import checks
from .arrays import DeviceArray
from .elementwise import binary, run, unary
from .twin import twin_of


def _alike(dout: Any, name: str, array: Any) -> tuple[DeviceArray, DeviceArray]:
    """dout and the array `name` of the forward call, of the same dtype and shape."""
    array = checks.floating(name, array)
    return checks.same_shape("dout", checks.floating("dout", dout, None, array.dtype), array.shape), array


@unary
def _relu(x, zero):
    return zero if x <= zero else x


@twin_of(cpu.relu_forward)
def relu_forward(x: Any, *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x)
    return run(_relu, checks.output("out", out, x.shape, x.dtype), x, 0)


@binary
def _relu_backward(dout, y, zero):
    return zero if y <= zero else dout


@twin_of(cpu.relu_backward)
def relu_backward(dout: Any, y: Any, *, out: Any = None) -> DeviceArray:
    dout, y = _alike(dout, "y", y)
    return run(_relu_backward, checks.output("out", out, dout.shape, dout.dtype), dout, y, 0)


@unary
def _leaky_relu(x, slope):
    return x if x > 0 else slope * x


@twin_of(cpu.leaky_relu_forward)
def leaky_relu_forward(x: Any, negative_slope: float = 0.01, *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x)
    return run(_leaky_relu, checks.output("out", out, x.shape, x.dtype), x, negative_slope)


@binary
def _leaky_relu_backward(dout, x, slope):
    return dout if x > 0 else slope * dout


@twin_of(cpu.leaky_relu_backward)
def leaky_relu_backward(dout: Any, x: Any, negative_slope: float = 0.01, *, out: Any = None) -> DeviceArray:
    dout, x = _alike(dout, "x", x)
    return run(
        _leaky_relu_backward, checks.output("out", out, dout.shape, dout.dtype), dout, x, negative_slope
    )
