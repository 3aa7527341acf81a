"""Images with copies of their own pixels around them, and the gradient of that.

Which pixel stands where is given for each axis by itself: row i of the padded images shows row ``rows[i]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numba import cuda

from .arrays import DeviceArray, blocks, empty, from_numpy
from .jit import THREADS, kernel
from .pooling import split


@kernel("T[::1], T[::1], int32[::1], int32[::1], UniTuple(int64, 3)")
def _pad(x, y, rows, columns, sizes):
    height, width, channels = sizes
    for at in range(cuda.grid(1), y.size, cuda.gridsize(1)):
        n, i, j, c = split(at, channels, columns.size, rows.size)
        y[at] = x[((n * height + rows[i]) * width + columns[j]) * channels + c]


@kernel("T[::1], T[::1], int32[::1], int32[::1], int32[::1], int32[::1], UniTuple(int64, 3)")
def _unpad(dout, dx, row_starts, rows, column_starts, columns, sizes):
    """Each pixel gathers from all that show it, always in the same order."""
    height, width, channels = sizes
    for at in range(cuda.grid(1), dx.size, cuda.gridsize(1)):
        n, i, j, c = split(at, channels, width, height)
        total = dx.dtype.type(0)
        for a in range(row_starts[i], row_starts[i + 1]):
            line = (n * rows.size + rows[a]) * columns.size
            for b in range(column_starts[j], column_starts[j + 1]):
                total += dout[(line + columns[b]) * channels + c]
        dx[at] = total


@lru_cache(maxsize=256)
def _shown(source: bytes) -> DeviceArray:
    return from_numpy(np.frombuffer(source, np.int64).astype(np.int32))


@lru_cache(maxsize=256)
def _showing(source: bytes, size: int) -> tuple[DeviceArray, DeviceArray]:
    """Of each of `size` pixels, where those that show it begin in a list, and that list."""
    shown = np.frombuffer(source, np.int64)
    places = np.argsort(shown, kind="stable")
    starts = np.searchsorted(shown[places], np.arange(size + 1))
    return from_numpy(starts.astype(np.int32)), from_numpy(places.astype(np.int32))


def padded(x: DeviceArray, rows: np.ndarray, columns: np.ndarray) -> DeviceArray:
    """Images (N, H, W, C) of which row i shows row ``rows[i]`` of `x`, and column j ``columns[j]``.

    `rows` and `columns` are int64, on the host, and below H and W.
    """
    n, height, width, channels = x.shape
    y = empty((n, len(rows), len(columns), channels), x.dtype)
    tables = _shown(rows.tobytes()), _shown(columns.tobytes())
    _pad.launch(blocks(y.size), THREADS, x.ravel(), y.ravel(), *tables, (height, width, channels))
    return y


def unpadded(dout: DeviceArray, rows: np.ndarray, columns: np.ndarray, size: Sequence[int]) -> DeviceArray:
    """The gradient of `padded` to images of `size`: each pixel has the sum of all that show it."""
    n, _, _, channels = dout.shape
    height, width = size
    dx = empty((n, height, width, channels), dout.dtype)
    tables = *_showing(rows.tobytes(), height), *_showing(columns.tobytes(), width)
    flat = dout.ravel(), dx.ravel()
    _unpad.launch(blocks(dx.size), THREADS, *flat, *tables, (height, width, channels))
    return dx
