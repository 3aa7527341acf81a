"""How kernels for CUDA are declared, compiled and launched.

A kernel is declared with the signatures that it is ever launched with. So every kernel can be listed and
compiled without a device (the tests read what ptxas says of each), a launch looks up its signature instead of
inferring types, and numbers become what the signature says.

Everything runs on one stream: launches need no synchronisation among each other, and a whole training step
can be captured as a CUDA graph. The stream is a blocking one: it also waits for the legacy default stream, on
which CuPy and PyTorch work, and they for it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import types
from numba.cuda.core import sigutils

from .. import jit as _cpu

SIMULATED = bool(cuda.config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulator import Simulated
else:
    from .driver import Launcher, wait

FLOATS = ("float32", "float64")
_DTYPE = re.compile(r"\bT\b")

# Of a block, where a kernel doesn't say otherwise in its ``launch_bounds``.
THREADS = 256

# Blocks of a grid along its axes, at most.
_MOST_BLOCKS = 2**31 - 1, 65535, 65535

# Every kernel by its name: what the tests compile.
KERNELS: dict[str, Kernel] = {}

Dim = int | tuple[int, ...]


def require_device() -> None:
    """Raise unless there is a CUDA device (or its simulator).

    Raises
    ------
    RuntimeError
        If there is none.
    """
    reason = _no_device()
    if reason:
        raise RuntimeError(f"cuda: no CUDA device can be used: {reason}")


@cache
def _no_device() -> str:
    """Why there is no device; empty if there is one."""
    try:
        # Creates the driver's context, and says what is missing where it can't.
        cuda.current_context()
    except Exception as error:  # the driver's errors have no base class of their own
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@cache
def stream() -> Any:
    """The stream of all launches and copies."""
    require_device()
    return cuda.stream()


def synchronize() -> None:
    """Wait until the device has done all that it was told."""
    if SIMULATED:
        require_device()
    else:
        wait(stream())


def device_function(function: Callable) -> Any:
    """Compile a function that kernels call, always inlined."""
    if SIMULATED:
        Simulated.namespaces.append(function.__globals__)
        return function
    return cuda.jit(device=True, forceinline=True)(function)


def _argument_types(signature: str) -> tuple[Any, ...]:
    parsed, _ = sigutils.normalize_signature(f"void({signature})")
    return tuple(parsed)


def _scalar(kind: Any) -> Callable[[Any], Any]:
    """How a number becomes one of the argument's type."""
    if isinstance(kind, types.Float) or kind is types.uint64:
        return np.dtype(str(kind)).type
    return lambda value: value


def _three(sizes: Dim) -> tuple[int, int, int]:
    x, y, z = (*((sizes,) if isinstance(sizes, int) else sizes), 1, 1)[:3]
    return int(x), int(y), int(z)


class _Compiled:
    """A kernel for one signature."""

    def __init__(self, kernel: Kernel, argument_types: tuple[Any, ...]):
        self._kernel = kernel
        self.argument_types = argument_types
        self.arrays = tuple(isinstance(kind, types.Array) for kind in argument_types)
        self._tuples = tuple(isinstance(kind, types.BaseTuple) for kind in argument_types)
        self._convert = tuple(_scalar(kind) for kind in argument_types)
        self._launcher: Any = None
        # Grids and blocks that were found to be possible.
        self._configured: dict[tuple[Dim, Dim], tuple[tuple[int, int, int], tuple[int, int, int]]] = {}

    def key(self) -> tuple:
        """What tells this signature from the kernel's others: dtype and rank of the arrays."""
        kinds = (kind for kind in self.argument_types if isinstance(kind, types.Array))
        return tuple((np.dtype(str(kind.dtype)), kind.ndim) for kind in kinds)

    def compile(self) -> Any:
        """Numba's kernel: from the cache on disk, or compiled."""
        dispatcher = cuda.jit(**self._kernel.options)(self._kernel.function)
        dispatcher._cache = _kernel_cache(self._kernel)
        return dispatcher.compile(self.argument_types)

    def _configure(self, grid: Dim, block: Dim) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        blocks, threads = _three(grid), _three(block)
        name = self._kernel.name
        if math.prod(threads) > self._kernel.threads:
            raise ValueError(f"{name}: {block} threads are above its launch bounds {self._kernel.threads}")
        if any(count > most for count, most in zip(blocks, _MOST_BLOCKS, strict=True)):
            raise ValueError(f"{name}: a grid of {blocks} blocks is above the device's {_MOST_BLOCKS}")
        self._configured[grid, block] = blocks, threads
        return blocks, threads

    def launch(self, grid: Dim, block: Dim, arguments: Sequence[Any]) -> None:
        blocks, threads = self._configured.get((grid, block)) or self._configure(grid, block)
        if SIMULATED:
            values = [
                (argument.simulated if is_array else convert(argument))
                for argument, is_array, convert in zip(arguments, self.arrays, self._convert, strict=True)
            ]
            self._kernel.simulated(blocks, threads, *values)
            return
        if self._launcher is None:
            require_device()
            handle = int(stream())
            self._launcher = Launcher(self._kernel.name, self.compile(), self.argument_types, handle)
        try:
            self._launcher.launch(blocks, threads, self.parameters(arguments))
        except OverflowError:
            # A number that is infinite in the kernel's dtype.
            with np.errstate(over="ignore"):
                converted = [convert(a) for a, convert in zip(arguments, self._convert, strict=True)]
            self._launcher.launch(blocks, threads, self.parameters(converted))

    def parameters(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments with arrays and tuples taken apart."""
        values: list[Any] = []
        for argument, is_array, is_tuple in zip(arguments, self.arrays, self._tuples, strict=True):
            if is_array:
                values += argument.parameters
            elif is_tuple:
                values += argument
            else:
                values.append(argument)
        return values


def _kernel_cache(kernel: Kernel) -> Any:
    """Numba's cache on disk, in the directory and under the version key of the CPU's kernels."""
    from numba.cuda.dispatcher import CUDACache, CUDACacheImpl

    class Impl(CUDACacheImpl):
        _locator_classes = [_cpu._Locator]  # noqa: RUF012 (Numba's own class attribute)

    class KernelCache(CUDACache):
        _impl_class = Impl

        def _index_key(self, signature: Any, codegen: Any) -> tuple:
            # Not the function's closure, which Numba would add, and which differs from process to process.
            return signature, codegen.magic_tuple(), kernel.name

        def save_overload(self, signature: Any, data: Any) -> None:
            # A directory that can't be written costs the speed of the next start and nothing else.
            with contextlib.suppress(OSError):
                super().save_overload(signature, data)

    return KernelCache(kernel.function)


class Kernel:
    """A function of the device with all its signatures.

    ``kernel[grid, block](*arguments)``, or ``kernel.launch(grid, block, *arguments)``, runs it on the one
    stream and returns at once. An array is a `DeviceArray`, as contiguous as the signature says. An empty
    grid launches nothing.
    """

    def __init__(self, function: Callable, name: str, signatures: Sequence[str], options: dict[str, Any]):
        self.function = function
        self.name = name
        self.options = options
        bounds = options.get("launch_bounds", THREADS)
        # Threads of its largest block.
        self.threads = bounds[0] if isinstance(bounds, tuple) else bounds
        self.signatures = [_Compiled(self, _argument_types(signature)) for signature in signatures]
        self._by_key = {compiled.key(): compiled for compiled in self.signatures}
        if len(self._by_key) != len(self.signatures):
            raise ValueError(f"{name}: two signatures have the same arrays")
        if SIMULATED:
            self.simulated = Simulated(function)
        self._array_positions = [k for k, is_array in enumerate(self.signatures[0].arrays) if is_array]

    def __getitem__(self, configuration: tuple[Dim, Dim]) -> Callable[..., None]:
        grid, block = configuration
        return lambda *arguments: self.launch(grid, block, *arguments)

    def launch(self, grid: Dim, block: Dim, *arguments: Any) -> None:
        """Run the kernel on `grid` blocks of `block` threads.

        Raises
        ------
        TypeError
            If no signature fits the arrays.
        RuntimeError
            If there is no device.
        """
        if grid == 0 or (type(grid) is tuple and 0 in grid):
            return
        arrays = [arguments[k] for k in self._array_positions]
        compiled = self._by_key.get(tuple([(array.dtype, array.ndim) for array in arrays]))
        if compiled is None or not all(array.is_contiguous for array in arrays):
            described = ", ".join(f"{array.dtype} {array.shape} {array.strides}" for array in arrays)
            raise TypeError(f"{self.name}: no signature fits the arrays {described}")
        compiled.launch(grid, block, arguments)


def kernel(
    *signatures: str, floats: Sequence[str] = FLOATS, name: str | None = None, **options: Any
) -> Callable[[Callable], Kernel]:
    """Declare a kernel.

    Parameters
    ----------
    signatures : str
        The types of the parameters, by Numba's names, with ``T`` for a floating dtype:
        ``"T[::1], T[:, ::1], T, int64"`` stands for one signature with float32 and one with float64. All
        arrays are C-contiguous.
    floats : dtypes that T stands for
    name : str, optional
        What tells apart the kernels that one factory makes.
    options
        Numba's for `cuda.jit`: ``max_registers``, ``launch_bounds``. Never fastmath: NaN must propagate.
        (Products and sums are contracted to fused multiply-adds all the same.)

    Returns
    -------
    decorator of a function, which makes it a `Kernel`
    """
    expanded = [
        _DTYPE.sub(dtype, signature)
        for signature in signatures
        for dtype in (floats if _DTYPE.search(signature) else ("",))
    ]

    def declare(function: Callable) -> Kernel:
        full = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        full = f"{full}[{name}]" if name else full
        if full in KERNELS:
            raise ValueError(f"kernel: {full} is declared twice")
        KERNELS[full] = Kernel(function, full, expanded, options)
        return KERNELS[full]

    return declare
