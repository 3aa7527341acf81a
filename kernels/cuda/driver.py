"""What every step asks of the CUDA driver, without the layers that Numba has around it.

A launch through Numba's dispatcher makes an object of each argument, and of each array a chain of views,
which takes many times as long as a small kernel. Here one call packs the arguments into memory from which the
driver reads them (the driver's manual, cuLaunchKernel, kernelParams). What a kernel's parameters are is
Numba's to say: a test compares them with its own preparation of every kernel's arguments.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cuda.bindings import driver as api
from numba import cuda
from numba.cuda import types

# The letters of `struct` for Numba's numbers.
_LETTERS = {
    types.uint8: "B",
    types.uint16: "H",
    types.uint32: "I",
    types.int32: "i",
    types.int64: "q",
    types.uint64: "Q",
    types.float32: "f",
    types.float64: "d",
}

# Bytes of a piece of pinned memory, and how many pieces there are.
_SLOT = 1 << 18
_SLOTS = 16


def letters(kind: Any) -> str:
    """The parameters that a kernel has for an argument of this type, as `struct` writes them."""
    if isinstance(kind, types.Array):
        # Two that Numba keeps for its own, the number of elements, their size, address, shape and strides.
        return "q" * (5 + 2 * kind.ndim)
    if isinstance(kind, types.BaseTuple):
        return "".join(map(letters, kind))
    return _LETTERS[kind]


_process = os.getpid()


def call(what: str, function: Callable[..., tuple[Any]], *arguments: Any) -> None:
    """Call a function of the driver that answers with a code only.

    Raises
    ------
    RuntimeError
        If the code is an error, saying what was asked for. Errors of kernels that were queued before come up
        at any later call.
    """
    (code,) = function(*arguments)
    if code == api.CUresult.CUDA_ERROR_INVALID_CONTEXT:
        # The first call of this thread.
        cuda.current_context()
        (code,) = function(*arguments)
    if code == api.CUresult.CUDA_SUCCESS:
        return
    if code == api.CUresult.CUDA_ERROR_NOT_INITIALIZED and os.getpid() != _process:
        raise RuntimeError(
            f"{what}: this process was forked from one that used CUDA, which CUDA forbids: spawn it instead"
        )
    raise RuntimeError(f"{what}: the driver answers {code.name}")


class Launcher:
    """A compiled kernel, and memory for its arguments."""

    def __init__(self, name: str, kernel: Any, argument_types: Sequence[Any], stream: int):
        self.name = name
        # Numba unloads the kernel when this is gone.
        self._kernel = kernel
        self._function = int(kernel.library.get_cufunc().handle)
        self._stream = stream
        fields = "".join(map(letters, argument_types))
        self._struct = struct.Struct(fields)
        self._memory = ctypes.create_string_buffer(self._struct.size)
        # The driver takes an array of pointers, one to each parameter; each is aligned to its size.
        ends = [struct.calcsize(fields[: k + 1]) for k in range(len(fields))]
        starts = [end - struct.calcsize(field) for end, field in zip(ends, fields, strict=True)]
        first = ctypes.addressof(self._memory)
        self._pointers = np.array([first + start for start in starts], np.uint64)
        self._parameters = self._pointers.ctypes.data
        self._lock = threading.Lock()

    def launch(self, grid: tuple[int, int, int], block: tuple[int, int, int], values: Sequence[Any]) -> None:
        """Queue the kernel; `values` are all its parameters, arrays and tuples taken apart."""
        with self._lock:
            self._struct.pack_into(self._memory, 0, *values)
            # The driver copies the parameters before it returns.
            shared_bytes, extra = 0, 0
            where = shared_bytes, self._stream, self._parameters, extra
            call(self.name, api.cuLaunchKernel, self._function, *grid, *block, *where)


class Staging:
    """Copies to the device that are queued, and whose source may change at once.

    The driver may read a source long after the call, if it is pinned memory or the device reads the host's
    pages itself. So small arrays are copied to pinned memory first, and large ones are waited for.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        # Asking for pinned memory makes the device wait, so it is asked for once.
        pinned = cuda.pinned_array((_SLOTS, _SLOT), np.uint8)
        self._slots = deque((slot, cuda.event(timing=False)) for slot in pinned)
        self._lock = threading.Lock()

    def send(self, host: np.ndarray, pointer: int) -> None:
        """Overwrite the memory at `pointer` with a C-contiguous array of the host."""
        if host.nbytes > _SLOT:
            to_device(pointer, host.ctypes.data, host.nbytes, self._stream)
            wait(self._stream)
            return
        with self._lock:
            # The one that was used longest ago: mostly, its copy is done.
            slot, sent = self._slots[0]
            self._slots.rotate(-1)
            call("wait for a copy", api.cuEventSynchronize, sent.handle)
            slot[: host.nbytes] = host.reshape(-1).view(np.uint8)
            to_device(pointer, slot.ctypes.data, host.nbytes, self._stream)
            call("mark a copy", api.cuEventRecord, sent.handle, self._stream.handle)


def to_device(pointer: int, host: int, nbytes: int, stream: Any) -> None:
    """Queue a copy from the host's memory at one address to the device's at another."""
    call("copy to the device", api.cuMemcpyHtoDAsync, pointer, host, nbytes, stream.handle)


def to_host(host: np.ndarray, pointer: int, stream: Any) -> None:
    """Overwrite a C-contiguous array of the host with what is at `pointer`, and wait for it."""
    call("copy to the host", api.cuMemcpyDtoHAsync, host.ctypes.data, pointer, host.nbytes, stream.handle)
    wait(stream)


def wait(stream: Any) -> None:
    """Wait until all that was queued is done."""
    call("wait for the device", api.cuStreamSynchronize, stream.handle)
