"""ReLU, LeakyReLU and PReLU, with their gradients: one pass over memory each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64, uint32

from ..cpu import activation as cpu
from . import checks
from .arrays import DeviceArray, empty
from .channel_sums import counters, fold, is_last, layout, place
from .elementwise import CHUNK, binary, chunks, run, unary
from .jit import THREADS, device_function, kernel
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


def _leaky(x, slope):
    return x if x > 0 else slope * x


_leaky_element = device_function(_leaky)
_leaky_relu = unary(_leaky)


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


def _slopes(x: DeviceArray, weight: Any) -> DeviceArray:
    weight = checks.floating("weight", weight, 1, x.dtype)
    if not x.ndim:
        raise ValueError("x: expected (..., C), got a scalar")
    if weight.shape not in ((1,), x.shape[-1:]):
        raise ValueError(
            f"weight: shape {weight.shape} is neither (1,) nor {x.shape[-1:]}, the channels of x"
        )
    return weight


@device_function
def _slope(slopes, first, offset):
    """The slope of the element `offset` after one of channel `first`; divides 32 bits, which is quick."""
    return slopes[(np.uint32(first) + np.uint32(offset)) % np.uint32(slopes.size)]


@kernel("T[::1], T[::1], T[::1]")
def _prelu(y, x, slopes):
    start = cuda.blockIdx.x * CHUNK
    first, offset = start % slopes.size, cuda.threadIdx.x
    if start + CHUNK <= y.size:
        i = start + offset
        a, b, c, d = x[i], x[i + THREADS], x[i + 2 * THREADS], x[i + 3 * THREADS]
        y[i] = _leaky_element(a, _slope(slopes, first, offset))
        y[i + THREADS] = _leaky_element(b, _slope(slopes, first, offset + THREADS))
        y[i + 2 * THREADS] = _leaky_element(c, _slope(slopes, first, offset + 2 * THREADS))
        y[i + 3 * THREADS] = _leaky_element(d, _slope(slopes, first, offset + 3 * THREADS))
    else:
        for k in range(offset, y.size - start, THREADS):
            y[start + k] = _leaky_element(x[start + k], _slope(slopes, first, k))


@twin_of(cpu.prelu_forward)
def prelu_forward(x: Any, weight: Any, *, out: Any = None) -> DeviceArray:
    x = checks.floating("x", x)
    weight = _slopes(x, weight)
    y = checks.output("out", out, x.shape, x.dtype)
    if x.size:
        _prelu.launch(chunks(x.size), THREADS, y.reshape(-1), x.reshape(-1), weight)
    return y


@kernel("T[::1], T[::1], T[::1], T[::1], T[::1], float64[:, ::1], uint32[::1], UniTuple(int64, 3), int64")
def _prelu_backward(dout, x, slopes, dx, dslopes, partial, arrived, sizes, accumulate):
    """dx, and the slopes' gradients: of each block in `partial`, added up by the last block of each tile."""
    sums = cuda.shared.array(THREADS, float64)
    ticket = cuda.shared.array(1, uint32)
    rows, columns, lanes = sizes
    thread, channels = cuda.threadIdx.x, slopes.size
    lane, channel = place(columns)
    total = 0.0
    if channel < channels:
        slope = slopes[channel]
        for row in range(cuda.blockIdx.x * lanes + lane, rows, cuda.gridDim.x * lanes):
            i = row * channels + channel
            gradient, value = dout[i], x[i]
            if value > 0:
                dx[i] = gradient
            else:
                dx[i] = slope * gradient
                total += gradient * value
    sums[thread] = total
    fold(sums, columns, lanes)
    if lane == 0 and channel < channels:
        partial[cuda.blockIdx.x, channel] = sums[thread]
    if not is_last(arrived, ticket):
        return
    total = 0.0
    if channel < channels:
        for block in range(lane, cuda.gridDim.x, lanes):
            total += partial[block, channel]
    sums[thread] = total
    fold(sums, columns, lanes)
    if lane == 0 and channel < channels:
        dslopes[channel] = dslopes[channel] + sums[thread] if accumulate else sums[thread]


@twin_of(cpu.prelu_backward)
def prelu_backward(
    dout: Any, x: Any, weight: Any, *, out: Any = None, out_dweight: Any = None, accumulate: bool = False
) -> tuple[DeviceArray, DeviceArray]:
    dout, x = _alike(dout, "x", x)
    weight = _slopes(x, weight)
    dx = checks.output("out", out, dout.shape, dout.dtype)
    dweight = checks.output("out_dweight", out_dweight, weight.shape, dout.dtype)
    added = accumulate and out_dweight is not None
    if x.size:
        rows = x.size // weight.size
        grid = layout(rows, weight.size)
        partial = empty((grid.blocks, weight.size), np.float64)
        flat = (array.reshape(-1) for array in (dout, x))
        arguments = *flat, weight, dx.reshape(-1), dweight, partial, counters(grid.tiles)
        _prelu_backward.launch(grid.grid, grid.threads, *arguments, (rows, grid.columns, grid.lanes), added)
    elif not added:
        dweight.fill(0)
    return dx, dweight
