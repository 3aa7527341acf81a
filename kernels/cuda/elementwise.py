"""Kernels of single elements: four a thread, all loaded before the first is stored.

One load in flight a thread is half of what it takes to saturate an H100's memory at full occupancy: by
Little's law its 3.3 TB/s times about 0.7 microseconds are 17 KB a multiprocessor, and 2048 threads with 4
bytes are 8 KB. Neighbouring threads load neighbouring addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cuda

from .arrays import DeviceArray
from .jit import THREADS, Kernel, device_function, kernel

# Elements of a block.
CHUNK = 4 * THREADS


def chunks(size: int) -> int:
    """Blocks of a grid with `CHUNK` elements a block."""
    return -(-size // CHUNK)


def unary(function: Callable) -> Kernel:
    """The kernel ``y[i] = function(x[i], number)`` over flat arrays, called with y, x and the number."""
    element = device_function(function)

    @kernel("T[::1], T[::1], T", name=function.__name__)
    def elements(y, x, number):
        i = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
        if i + 3 * THREADS < y.size:
            a, b, c, d = x[i], x[i + THREADS], x[i + 2 * THREADS], x[i + 3 * THREADS]
            y[i] = element(a, number)
            y[i + THREADS] = element(b, number)
            y[i + 2 * THREADS] = element(c, number)
            y[i + 3 * THREADS] = element(d, number)
        else:
            for k in range(i, y.size, THREADS):
                y[k] = element(x[k], number)

    return elements


def binary(function: Callable) -> Kernel:
    """The kernel ``y[i] = function(a[i], b[i], number)`` over flat arrays, called with y, a, b and number."""
    element = device_function(function)

    @kernel("T[::1], T[::1], T[::1], T", name=function.__name__)
    def pairs(y, a, b, number):
        i = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
        if i + 3 * THREADS < y.size:
            a0, b0 = a[i], b[i]
            a1, b1 = a[i + THREADS], b[i + THREADS]
            a2, b2 = a[i + 2 * THREADS], b[i + 2 * THREADS]
            a3, b3 = a[i + 3 * THREADS], b[i + 3 * THREADS]
            y[i] = element(a0, b0, number)
            y[i + THREADS] = element(a1, b1, number)
            y[i + 2 * THREADS] = element(a2, b2, number)
            y[i + 3 * THREADS] = element(a3, b3, number)
        else:
            for k in range(i, y.size, THREADS):
                y[k] = element(a[k], b[k], number)

    return pairs


def run(elements: Kernel, y: DeviceArray, *arguments: Any) -> DeviceArray:
    """Launch a kernel of elements over C-contiguous arrays of y's size; returns y."""
    if y.size:
        flat = [a.reshape(-1) if isinstance(a, DeviceArray) else a for a in (y, *arguments)]
        elements.launch(chunks(y.size), THREADS, *flat)
    return y
