"""What networks need beside the twins of the CPU's kernels, where NumPy serves on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from .arrays import DeviceArray, as_device, contiguous, empty
from .channel_sums import add_up, counters, layout
from .elementwise import binary, run, unary
from .jit import kernel


@binary
def _add(a, b, least):
    total = a + b
    return least if total <= least else total


def add(a: DeviceArray, b: DeviceArray, out: DeviceArray, least: float = -np.inf) -> None:
    """Overwrite `out`, which is C-contiguous, with max(a + b, least); all are of one shape and dtype.

    NaN stays NaN.
    """
    run(_add, out, _like(out, a), _like(out, b), least)


@unary
def _multiply(a, factor):
    return factor * a


def multiply(a: DeviceArray, factor: float, out: DeviceArray) -> None:
    """Overwrite `out`, which is C-contiguous, with factor * a; both are of one shape and dtype."""
    run(_multiply, out, _like(out, a), factor)


def _like(out: DeviceArray, array: Any) -> DeviceArray:
    array = as_device(array)
    if array.shape != out.shape or array.dtype != out.dtype:
        raise ValueError(f"an array of {array.dtype} {array.shape} is not like {out.dtype} {out.shape}")
    return contiguous(array)


@kernel("T[::1], float64[:, :, ::1], uint32[::1], float64[:, ::1], int64")
def _squares(x, partial, arrived, sums, lanes):
    """Overwrite `sums` with that of x's squares, and with how many elements are NaN or infinite."""
    total, beyond = 0.0, 0.0
    for i in range(cuda.blockIdx.x * lanes + cuda.threadIdx.x, x.size, cuda.gridDim.x * lanes):
        value = np.float64(x[i])
        total += value * value
        if not math.fabs(value) < math.inf:
            beyond += 1.0
    add_up((total, beyond), partial, arrived, sums, 1, lanes)


def squares(x: DeviceArray) -> DeviceArray:
    """(2, 1) float64: the sum of a flat array's squares, and how many of its elements are NaN or infinite."""
    grid = layout(max(x.size, 1), 1)
    partial, sums = empty((grid.blocks, 2, 1), np.float64), empty((2, 1), np.float64)
    _squares[grid.grid, grid.threads](x, partial, counters(1), sums, grid.lanes)
    return sums
