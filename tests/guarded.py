"""Memory that shows what a kernel does to memory that is not its own."""

import ctypes
import mmap
import sys
from types import SimpleNamespace

import numpy as np

from fastcnn.kernels.cpu import workspace

# Of each side of a buffer; in floats all of these bits are a NaN that no operation returns.
_GUARD = 4096
_BITS = 0xFF


class _Forgetful(dict):
    """A cache that keeps nothing."""

    def __setitem__(self, key, value):
        pass


class GuardedScratch:
    """While it is in place, each buffer is just as large as was asked for, full of NaN, between two guards.

    Otherwise buffers are shared and larger than most that ask for them, which hides what is written too far.
    """

    def __init__(self, monkeypatch):
        self._buffers = []
        monkeypatch.setattr(workspace, "_local", SimpleNamespace(buffers=_Forgetful(), views=_Forgetful()))
        monkeypatch.setattr(workspace, "_aligned", self._allocate)

    def _allocate(self, size, dtype):
        bytes_ = size * np.dtype(dtype).itemsize
        raw = np.full(bytes_ + 2 * _GUARD + 64, _BITS, np.uint8)
        first = _GUARD + -(raw.ctypes.data + _GUARD) % 64
        self._buffers.append((raw, first, bytes_))
        return np.frombuffer(raw.data, dtype, size, first)

    def check(self, what):
        """Fail if a guard was overwritten; and forget all buffers."""
        for raw, first, bytes_ in self._buffers:
            for side, guard in (("before", raw[:first]), ("behind", raw[first + bytes_ :])):
                assert (guard == _BITS).all(), f"{what}: overwritten {side} {bytes_} bytes of scratch"
        self._buffers.clear()


def before_a_gap(array):
    """A copy of an array that ends where no memory is: to read on is a segmentation fault."""
    if sys.platform == "win32":
        return array.copy()
    size = -(-max(array.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    gap = ctypes.c_void_p(memory.ctypes.data + size)
    nothing_allowed = 0
    if ctypes.CDLL(None).mprotect(gap, ctypes.c_size_t(mmap.PAGESIZE), nothing_allowed):
        raise OSError("mprotect")
    copy = memory[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
