"""Memory of the device, used again as soon as nobody holds it.

Asking the driver for memory makes it wait for the device, and a captured graph may not ask at all. So blocks
are kept, by size, and a training step asks for the same sizes every time. Because everything runs on one
stream, a block may go out again while kernels that read its old content are still queued: the next writer
queues after them.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import cuda

from .jit import SIMULATED, require_device

# Bytes that every block is aligned to, and a multiple of: a segment of 128 bytes is the unit of memory
# traffic, and this is what the driver aligns to.
GRAIN = 512


def _new_block(size: int) -> tuple[int, Any]:
    """Address of `size` fresh bytes, and what frees them when it is gone."""
    if SIMULATED:
        raw = np.empty(size + GRAIN, np.uint8)
        address = raw.__array_interface__["data"][0]
        return address + -address % GRAIN, raw
    raw = cuda.device_array(size, np.uint8)
    return raw.__cuda_array_interface__["data"][0], raw


class Memory:
    """A block of the pool, which gets it back when the last array over it is gone.

    It does not hold the driver's allocation: the collector of garbage would free that first where both are
    in a cycle, and then give the block back to the pool all the same.
    """

    __slots__ = ("pointer", "size")

    def __init__(self, pointer: int, size: int):
        self.pointer = pointer
        self.size = size

    def __del__(self) -> None:
        _pool.put(self.size, self.pointer)


class _Pool:
    def __init__(self) -> None:
        # Addresses by size, and what owns the memory at each address, held or not.
        self.free: dict[int, list[int]] = {}
        self.owners: dict[int, Any] = {}
        self.lock = threading.Lock()
        self.hits = self.misses = self.bytes = 0

    def take(self, nbytes: int) -> Memory:
        size = -(-max(nbytes, 1) // GRAIN) * GRAIN
        with self.lock:
            addresses = self.free.get(size)
            if addresses:
                self.hits += 1
                return Memory(addresses.pop(), size)
            self.misses += 1
        require_device()
        try:
            pointer, owner = _new_block(size)
        except Exception:
            # Perhaps out of memory, and what is kept for other sizes would do. If it wasn't that, the second
            # try says so.
            self.clear()
            pointer, owner = _new_block(size)
        self.owners[pointer] = owner
        self.bytes += size
        return Memory(pointer, size)

    def put(self, size: int, pointer: int) -> None:
        # A list's append is atomic; a lock here could meet itself, when a collection of garbage runs inside
        # `take`.
        self.free.setdefault(size, []).append(pointer)

    def clear(self) -> None:
        with self.lock:
            dropped, self.free = self.free, {}
        for size, addresses in dropped.items():
            for pointer in addresses:
                # The driver frees it once what is queued is done.
                del self.owners[pointer]
                self.bytes -= size


_pool = _Pool()


def take(nbytes: int) -> Memory:
    """At least `nbytes` uninitialised bytes that nobody else holds."""
    return _pool.take(nbytes)


def stats() -> dict[str, int]:
    """Requests met from the pool (`hits`) and by the driver (`misses`), and the `bytes` taken from it."""
    return {"hits": _pool.hits, "misses": _pool.misses, "bytes": _pool.bytes}


def clear() -> None:
    """Give the driver back all memory that nobody holds."""
    _pool.clear()
