"""Scratch memory of the CPU kernels, and the two loops that fill it.

The loops stand in for slice assignments, whose error messages cost seconds of compilation. They count from 0
in slices, because an index that Numba can't tell to be positive is tested at every step.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from .. import checks
from ..jit import kernel
from ..threads import recording

# In place of an array that isn't given: of values, by dtype, and of places.
NOTHING = {dtype: np.empty(0, dtype) for dtype in checks.FLOATS}
NOWHERE = np.empty(0, np.uint8)

_ALIGNMENT = 64

# So many shapes of each thread's buffers are remembered.
_MOST_VIEWS = 4096


class _Local(threading.local):
    """A thread's buffers by use and dtype, and those cut to a shape."""

    def __init__(self) -> None:
        self.buffers: dict[Any, np.ndarray] = {}
        self.views: dict[Any, np.ndarray] = {}


_local = _Local()


def scratch(use: str, shape: int | tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Uninitialised memory of a shape, valid until this thread asks for the same `use` again.

    There is one growing buffer for each use and Python thread. Its pages are kept from call to call, so that
    a training step allocates nothing after its first. In a recording without calls each job gets memory of
    its own, in which what was prepared for it stays.
    """
    under_way = recording()
    if under_way is not None and not under_way.calls:
        return _cut(_aligned(_size(shape), dtype), shape)
    views = _local.views
    view = views.get((use, shape, dtype))
    if view is None:
        buffers, size = _local.buffers, _size(shape)
        buffer = buffers.get((use, dtype))
        if buffer is None or buffer.size < size:
            buffer = buffers[use, dtype] = _aligned(size, dtype)
            # They hold the buffer that this one replaces.
            views.clear()
        if len(views) >= _MOST_VIEWS:
            views.clear()
        view = views[use, shape, dtype] = _cut(buffer, shape)
    return view


def _size(shape: int | tuple[int, ...]) -> int:
    return max(shape if isinstance(shape, int) else math.prod(shape), 1)


def _cut(buffer: np.ndarray, shape: int | tuple[int, ...]) -> np.ndarray:
    return np.ndarray(shape, buffer.dtype, buffer)


def _aligned(size: int, dtype: np.dtype | type) -> np.ndarray:
    # A vector load from memory that is not aligned meets two cache lines and takes twice as long.
    raw = np.empty(size * np.dtype(dtype).itemsize + _ALIGNMENT, np.uint8)
    return np.frombuffer(raw.data, dtype, size, -raw.ctypes.data % _ALIGNMENT)


@kernel
def copy(source, s0, target, t0, size):
    """target[t0 : t0 + size] = source[s0 : s0 + size], both 1-D."""
    values, places = source[s0 : s0 + size], target[t0 : t0 + size]
    for i in range(places.size):
        places[i] = values[i]


@kernel
def clear(target, t0, size):
    """target[t0 : t0 + size] = 0, 1-D."""
    places = target[t0 : t0 + size]
    for i in range(places.size):
        places[i] = 0


@kernel
def set_start(bias, start):
    """What sums start with, 1-D: the biases, if there are any, and then zeros."""
    clear(start, 0, start.size)
    copy(bias, 0, start, 0, bias.size)
