"""Runs kernels in Python, on Numba's simulated `cuda` module, for tests where there is no GPU.

Numba's own runner starts an operating-system thread for each of the device's and lets them fight for the
interpreter. Here one runs at a time: without barriers all of them in this thread, one after the other; with
barriers each up to the next one, in turn. That is some ten times faster, the same in every run, and it
notices a barrier that only a part of a block reaches.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.np import numpy_support
from numba.cuda.simulator.kernelapi import Dim3, FakeCUDAModule
from numba.cuda.types import Type

Dims = tuple[int, int, int]


class _Shared:
    """`cuda.shared`: one array for each place in the source that asks for one."""

    def __init__(self) -> None:
        self.arrays: dict[tuple, np.ndarray] = {}

    def array(self, shape: Any, dtype: Any, alignment: int | None = None) -> np.ndarray:
        frame = sys._getframe(1)
        place = frame.f_code, frame.f_lasti
        if place not in self.arrays:
            kind = numpy_support.as_dtype(dtype) if isinstance(dtype, Type) else np.dtype(dtype)
            self.arrays[place] = np.empty(shape, kind)
        return self.arrays[place]


class Module(FakeCUDAModule):
    """What the name `cuda` stands for in a kernel; its thread is the one whose turn it is."""

    threadIdx = blockIdx = Dim3(0, 0, 0)

    def __init__(self, grid: Dims, block: Dims):
        super().__init__(grid, block, 0)
        self._shared = _Shared()
        self.barrier: Callable[[], None] | None = None

    @property
    def laneid(self) -> int:
        index, size = self.threadIdx, self.blockDim
        return (index.x + size.x * (index.y + size.y * index.z)) % 32

    def syncthreads(self) -> None:
        if self.barrier is None:
            raise RuntimeError("a barrier that the simulator did not find in the kernel's source")
        self.barrier()


class _Thread(threading.Thread):
    """A thread of blocks that have barriers; it runs while it has the turn."""

    def __init__(self, body: Callable[[], None], index: Dim3):
        super().__init__(daemon=True)
        self.body = body
        self.index = index
        # Plain locks, held until there is something to wait no longer for.
        self.turn, self.stopped = threading.Lock(), threading.Lock()
        self.turn.acquire()
        self.stopped.acquire()
        self.finished = self.ended = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run the kernel once for each block, until told to end."""
        while True:
            self.turn.acquire()
            if self.ended:
                return
            try:
                self.body()
            except BaseException as error:
                if self.ended:
                    return
                self.error = error
            self.finished = True
            self.stopped.release()

    def wait_at_barrier(self) -> None:
        self.stopped.release()
        self.turn.acquire()
        if self.ended:
            raise SystemExit

    def proceed(self) -> None:
        """Give it the turn until it meets a barrier or the kernel's end."""
        self.turn.release()
        self.stopped.acquire()

    def end(self) -> None:
        self.ended = True
        self.turn.release()


def _has_barriers(function: Any, seen: set[int]) -> bool:
    """Whether a function, or one that it calls, says `syncthreads`."""
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return False
    seen.add(id(function))
    names = function.__code__.co_names
    if "syncthreads" in names:
        return True
    called = [function.__globals__.get(name) for name in names]
    called += [cell.cell_contents for cell in function.__closure__ or ()]
    return any(_has_barriers(each, seen) for each in called)


def _run_block(module: Module, running: Sequence[_Thread]) -> None:
    """Run one block, whose threads wait for each other."""
    for thread in running:
        thread.finished = False
    while not running[0].finished:
        for thread in running:
            module.threadIdx, module.barrier = thread.index, thread.wait_at_barrier
            thread.proceed()
            if thread.error is not None:
                raise thread.error
        if len({thread.finished for thread in running}) > 1:
            raise RuntimeError("a barrier that some threads of a block wait at and others never reach")


def _three(dimensions: int | Sequence[int]) -> Dims:
    sizes = (dimensions,) if isinstance(dimensions, int) else tuple(dimensions)
    x, y, z = (*map(int, sizes), 1, 1)[:3]
    return x, y, z


def _indices(dimensions: Dims) -> list[Dim3]:
    x, y, z = dimensions
    return [Dim3(i, j, k) for k in range(z) for j in range(y) for i in range(x)]


class Simulated:
    """A kernel for the simulator, called with the grid, the block and NumPy arrays and numbers."""

    # The modules of kernels and of what they call, in which the name `cuda` means the running kernel's.
    namespaces: list[dict[str, Any]] = []  # noqa: RUF012 (one list for all)

    def __init__(self, function: Callable):
        self.function = function
        self.namespaces.append(function.__globals__)

    def __call__(self, grid: int | Sequence[int], block: int | Sequence[int], *arguments: Any) -> None:
        module = Module(_three(grid), _three(block))
        blocks, indices = _indices(_three(grid)), _indices(_three(block))

        def body() -> None:
            self.function(*arguments)

        swapped = [namespace for namespace in self.namespaces if namespace.get("cuda") is cuda]
        for namespace in swapped:
            namespace["cuda"] = module
        try:
            if _has_barriers(self.function, set()):
                self._run_together(module, blocks, [_Thread(body, index) for index in indices])
            else:
                for module.blockIdx in blocks:
                    for module.threadIdx in indices:
                        body()
        finally:
            for namespace in swapped:
                namespace["cuda"] = cuda

    def _run_together(self, module: Module, blocks: Sequence[Dim3], threads: Sequence[_Thread]) -> None:
        for thread in threads:
            thread.start()
        try:
            for module.blockIdx in blocks:
                _run_block(module, threads)
        finally:
            for thread in threads:
                thread.end()
