"""Where the factors of a convolution lie: device functions that the kernels of all passes share.

Sums run over taps (kh, kw) and channels c in the order of the weights' memory. Kernels step through them by
whole slices, and through pixels (n, i, j) in the same way: a step is split once into digits, which are then
added with carries. That costs a few instructions where divisions would cost a hundred.
"""

from __future__ import annotations

from typing import NamedTuple

from numba.cuda.types import int32, uint32

from .jit import SIMULATED, device_function

# Numba widens every sum to 64 bits, which cost a GPU twice to four times as much. The simulator computes with
# Python's own integers.
narrow = int if SIMULATED else int32
_unsigned = int if SIMULATED else uint32


@device_function
def quotient(dividend, divisor):
    """Of numbers from 0 to 2**31 - 1: a fifth of the instructions of Python's division."""
    return narrow(_unsigned(dividend) // _unsigned(divisor))


@device_function
def digits(value, middle, low):
    """`value` as three digits, of which the last two count to `middle` and `low`."""
    rest = quotient(value, low)
    high = quotient(rest, middle)
    return high, narrow(rest - high * middle), narrow(value - rest * low)


@device_function
def advanced(number, step, middle, low):
    """The sum of two numbers of three digits."""
    high, mid, last = number
    high, mid, last = narrow(high + step[0]), narrow(mid + step[1]), narrow(last + step[2])
    if last >= low:
        last = narrow(last - low)
        mid = narrow(mid + 1)
    if mid >= middle:
        mid = narrow(mid - middle)
        high = narrow(high + 1)
    return high, mid, last


@device_function
def following(number, middle, low):
    """The next number of three digits."""
    high, mid, last = number
    last = narrow(last + 1)
    if last == low:
        last = narrow(0)
        mid = narrow(mid + 1)
    if mid == middle:
        mid = narrow(0)
        high = narrow(high + 1)
    return high, mid, last


class Axis(NamedTuple):
    """A pass along one axis: output q reads inputs origin + q * step + tap * tap_step."""

    outputs: int
    step: int
    origin: int
    taps: int  # how many
    tap_step: int
    first_tap: int  # where they are in the kernel
    every: int


@device_function
def forward_axis(phase, result, kernel, stride, dilation, before):
    """The forward pass along one axis, as an `Axis`; it has one phase."""
    return Axis(
        narrow(result),
        narrow(stride),
        narrow(-before),
        narrow(kernel),
        narrow(dilation),
        narrow(0),
        narrow(1),
    )


@device_function
def _divides(stride, more, less):
    """Whether `stride` divides a difference."""
    difference = abs(more - less)
    return difference == quotient(difference, stride) * stride


@device_function
def input_axis(phase, result, kernel, stride, dilation, before):
    """The pass to the input along one axis, for every stride-th input from `phase` on, like `forward_axis`.

    Input h = stride * q + phase takes dout[i] * weight[k] wherever h + before = stride * i + dilation * k, so
    i = q + (phase + before - dilation * k) / stride, for the k for which the division is exact.
    """
    first = 0
    while first < kernel and not _divides(stride, phase + before, dilation * first):
        first += 1
    every = 1
    while not _divides(stride, every * dilation, 0):
        every += 1
    return Axis(
        quotient(result - phase + stride - 1, stride),
        narrow(1),
        narrow((phase + before - dilation * first) // stride),
        quotient(kernel - first + every - 1, every),
        narrow(-quotient(every * dilation, stride)),
        narrow(first),
        narrow(every),
    )
