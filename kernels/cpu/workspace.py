"""Scratch memory of the CPU kernels: one growing buffer for each use and Python thread, never shared."""

from __future__ import annotations

import threading

import numpy as np

_local = threading.local()


def scratch(use: str, size: int, dtype: np.dtype | type) -> np.ndarray:
    """`size` elements of uninitialised memory, 1-D, valid until this thread asks for the same `use` again.

    The pages are kept from call to call, so that a training step allocates nothing after its first.
    """
    buffers = _local.__dict__
    key = f"{use}-{np.dtype(dtype).char}"
    buffer = buffers.get(key)
    if buffer is None or buffer.size < size:
        buffer = np.empty(max(size, 1), dtype)
        buffers[key] = buffer
    return buffer[:size]
