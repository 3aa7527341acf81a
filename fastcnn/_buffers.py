"""Aligned memory for activations and gradients, used again as soon as nobody holds it.

A training step asks for the same sizes every time, so that after the first step it allocates nothing and
touches no fresh pages. A buffer goes out again only when its reference count says that no array, memoryview
or foreign tensor made from it is left: what a caller received is never overwritten by a later call.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: one cache line, one 512-bit vector

# Free buffers that this many requests passed by belong to a shape that is no longer in use.
_FORGET_AFTER = 2000
# Free buffers above this many bytes are dropped, the longest unused first, when another size is needed.
_KEEP_BYTES = 1 << 30


class _Buffer:
    """Raw bytes and the offset of the first aligned one."""

    __slots__ = ("last_used", "offset", "raw")

    def __init__(self, size: int):
        self.raw = np.empty(size + ALIGNMENT, np.uint8)
        self.offset = -self.raw.__array_interface__["data"][0] % ALIGNMENT
        self.last_used = 0

    def references(self) -> int:
        return sys.getrefcount(self.raw)


# What `references` says of a buffer that nobody holds: measured, because it differs between Python versions.
_UNHELD = _Buffer(0).references()


class Pool:
    """Buffers by size, with the counters of `stats`."""

    def __init__(self) -> None:
        self.buffers: dict[int, list[_Buffer]] = {}
        self.lock = threading.Lock()
        self.hits = 0
        self.misses = 0
        self.taken = 0

    def take(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array over a buffer that nobody holds."""
        size = -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        with self.lock:
            self.taken += size
            for buffer in self.buffers.get(size, ()):
                if buffer.references() == _UNHELD:
                    self.hits += 1
                    break
            else:
                self.misses += 1
                buffer = self._more(size)
                self.buffers.setdefault(size, []).append(buffer)
            buffer.last_used = self.hits + self.misses
            # NumPy makes the owner of the memory, and no array in between, the base of every later view.
            return np.ndarray(shape, dtype, buffer.raw, buffer.offset)

    def _more(self, size: int) -> _Buffer:
        self._forget()
        return _Buffer(size)

    def part_with(self, size: int) -> _Buffer | None:
        """A buffer that nobody holds, and that this pool forgets; None if there is none of the size."""
        with self.lock:
            many = self.buffers.get(size, [])
            for i, buffer in enumerate(many):
                if buffer.references() == _UNHELD:
                    return many.pop(i)
            return None

    def bytes(self) -> int:
        """Those of all buffers, held or not."""
        with self.lock:
            return sum(buffer.raw.nbytes for many in self.buffers.values() for buffer in many)

    def _forget(self) -> None:
        """Drop free buffers: those out of use, and the oldest where there is too much of them."""
        now = self.hits + self.misses
        free = sorted(
            (buffer for many in self.buffers.values() for buffer in many if buffer.references() == _UNHELD),
            key=lambda buffer: buffer.last_used,
            reverse=True,
        )
        kept = 0
        dropped = set()
        for buffer in free:
            kept += buffer.raw.nbytes
            if kept > _KEEP_BYTES or now - buffer.last_used > _FORGET_AFTER:
                dropped.add(id(buffer))
        if dropped:
            for size, many in list(self.buffers.items()):
                self.buffers[size] = [buffer for buffer in many if id(buffer) not in dropped]
                if not self.buffers[size]:
                    del self.buffers[size]


_pool = Pool()


class OwnPool(Pool):
    """Buffers that only one user takes, and that nobody else gets as long as the pool is there.

    It takes over those that nobody holds before it makes new ones.
    """

    def _more(self, size: int) -> _Buffer:
        return _pool.part_with(size) or _Buffer(size)

    def owns(self, array: np.ndarray) -> bool:
        """Whether an array lies in one of these buffers, and holds it."""
        return self._buffer_of(array) is not None

    def _buffer_of(self, array: np.ndarray) -> _Buffer | None:
        owner: Any = array
        while isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        size = getattr(owner, "nbytes", 0) - ALIGNMENT
        with self.lock:
            return next((buffer for buffer in self.buffers.get(size, ()) if owner is buffer.raw), None)

    def released(self, kept: Any) -> Any:
        """The same tuples and lists of arrays, which no longer hold these buffers: others may get them."""

        def release(array: np.ndarray) -> np.ndarray:
            buffer = self._buffer_of(array)
            return array if buffer is None else np.asarray(_Place(array, buffer))

        return _mapped(release, kept)

    @staticmethod
    def held(kept: Any) -> Any:
        """What was `released`, with arrays that hold their buffers."""

        def hold(array: np.ndarray) -> np.ndarray:
            return array.base.array(array) if isinstance(array.base, _Place) else array

        return _mapped(hold, kept)


class _Place:
    """Where an array lies in a buffer. It keeps the memory valid, and counts for nothing."""

    def __init__(self, array: np.ndarray, buffer: _Buffer) -> None:
        self.__array_interface__ = array.__array_interface__
        self._buffer = buffer

    def array(self, like: np.ndarray) -> np.ndarray:
        """An array like that made from this place, which holds the buffer."""
        raw = self._buffer.raw
        offset = like.__array_interface__["data"][0] - raw.__array_interface__["data"][0]
        return np.ndarray(like.shape, like.dtype, raw, offset, like.strides)


def _mapped(function: Callable[[np.ndarray], np.ndarray], item: Any) -> Any:
    """Tuples and lists, of tuples and lists, with another array for each."""
    if isinstance(item, np.ndarray):
        return function(item)
    if type(item) in (tuple, list):
        return type(item)(_mapped(function, inner) for inner in item)
    return item


class _Current(threading.local):
    """The pool that this thread takes buffers from."""

    pool: Pool = _pool


_current = _Current()


@contextlib.contextmanager
def taking_from(pool: Pool) -> Iterator[None]:
    """Let `empty` take its buffers from a pool, on this thread."""
    before, _current.pool = _current.pool, pool
    try:
        yield
    finally:
        _current.pool = before


def _after_fork_in_child() -> None:
    _pool.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised C-contiguous array, aligned to 64 bytes, over memory that nobody else holds."""
    return _current.pool.take(shape, np.dtype(dtype))


def aligned_zeros(size: int, dtype: Any) -> np.ndarray:
    """`size` zeros, aligned to 64 bytes, in memory of their own."""
    dtype = np.dtype(dtype)
    raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    return np.ndarray((size,), dtype, raw, -raw.__array_interface__["data"][0] % ALIGNMENT)


def stats() -> dict[str, int]:
    """Requests met from the pool (`hits`) and by new memory (`misses`), bytes `taken`, the pool's `bytes`."""
    size = _pool.bytes()
    return {"hits": _pool.hits, "misses": _pool.misses, "taken": _pool.taken, "bytes": size}


def clear() -> None:
    """Forget all buffers; those that somebody holds stay valid."""
    with _pool.lock:
        _pool.buffers.clear()
