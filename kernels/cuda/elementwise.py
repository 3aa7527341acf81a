"""Kernels of single elements: one thread an element, neighbours at neighbouring addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda

from .arrays import DeviceArray, blocks
from .jit import THREADS, Kernel, device_function, kernel


def unary(function: Callable) -> Kernel:
    """The kernel ``y[i] = function(x[i], number)`` over flat arrays, called with y, x and the number."""
    element = device_function(function)

    @kernel("T[::1], T[::1], T", name=function.__name__)
    def elements(y, x, number):
        for i in range(cuda.grid(1), y.size, cuda.gridsize(1)):
            y[i] = element(x[i], number)

    return elements


def binary(function: Callable) -> Kernel:
    """The kernel ``y[i] = function(a[i], b[i], number)`` over flat arrays, called with y, a, b, the number."""
    element = device_function(function)

    @kernel("T[::1], T[::1], T[::1], T", name=function.__name__)
    def pairs(y, a, b, number):
        for i in range(cuda.grid(1), y.size, cuda.gridsize(1)):
            y[i] = element(a[i], b[i], number)

    return pairs


def run(elements: Kernel, y: DeviceArray, *arguments: Any) -> DeviceArray:
    """Launch a kernel of elements over C-contiguous arrays of y's size; returns y."""
    flat = [a.reshape(-1) if isinstance(a, DeviceArray) and a.size else a for a in (y, *arguments)]
    if y.size:
        elements[blocks(y.size), THREADS](*flat)
    return y
