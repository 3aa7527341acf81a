"""Where arrays are, and what computes on them there: NumPy's on the CPU, `DeviceArray`s on a CUDA device.

Layers, losses and optimisers ask `device_of` once for the array they were given, take memory and kernels from
what it says, and are the same for both. CUDA's part is imported when it is first asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from . import _buffers
from .kernels import cpu
from .kernels.cpu import arithmetic, transpose

# Elements of a piece of an array that stays in the cache.
_PIECE = 8192


class Cpu:
    """NumPy's arrays, and the kernels for them."""

    name = "cpu"
    kernels: ModuleType = cpu

    empty = staticmethod(_buffers.empty)
    zeros = staticmethod(_buffers.aligned_zeros)
    copy = staticmethod(transpose.copy)
    add = staticmethod(arithmetic.add)

    @staticmethod
    def array(array: Any) -> np.ndarray:
        """`array`, copied if it is on another device."""
        return host(array)

    @staticmethod
    def multiply(a: np.ndarray, factor: float, out: np.ndarray) -> None:
        """Overwrite `out` with factor * a; both have one memory layout."""
        np.multiply(a, factor, out=out)

    @staticmethod
    def sum_of_squares(array: np.ndarray) -> float:
        """Of a flat array, in float64, over pieces that stay in the cache."""
        total = 0.0
        scratch = _buffers.empty((_PIECE,), np.float64)
        for start in range(0, array.size, _PIECE):
            piece = array[start : start + _PIECE]
            squares = scratch[: piece.size]
            np.copyto(squares, piece)
            total += float(np.square(squares, out=squares).sum())
        return total

    @staticmethod
    def padded(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Images (N, H, W, C) of which row i shows row ``rows[i]`` of `x`, and column j ``columns[j]``."""
        for axis, source in ((1, rows), (2, columns)):
            shape = (*x.shape[:axis], len(source), *x.shape[axis + 1 :])
            # mode="clip" lets NumPy write to `out` directly; no index is out of range.
            x = np.take(x, source, axis, out=_buffers.empty(shape, x.dtype), mode="clip")
        return x

    @staticmethod
    def unpadded(
        dout: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: Sequence[int], corner: Sequence[int]
    ) -> np.ndarray:
        """The gradient of `padded` to images of `size`: each pixel has the sum of all that show it.

        From pixel `corner` on, the padded images show the whole one.
        """
        for axis, source in ((2, columns), (1, rows)):
            shape = (*dout.shape[:axis], size[axis - 1], *dout.shape[axis + 1 :])
            dx = _buffers.empty(shape, dout.dtype)
            sums, shown = np.moveaxis(dx, axis, 0), np.moveaxis(dout, axis, 0)
            before = corner[axis - 1]
            after = before + len(sums)
            np.copyto(sums, shown[before:after])
            for i in (*range(before), *range(after, len(source))):
                sums[source[i]] += shown[i]
            dout = dx
        return dout

    @staticmethod
    def is_finite(array: np.ndarray) -> bool:
        """Whether nothing of a flat array is NaN or infinite."""
        # One pass without a temporary. Only a sum of squares that is not finite needs the exact question.
        return math.isfinite(np.vdot(array, array)) or bool(np.isfinite(array).all())


class Cuda:
    """The arrays of the CUDA device, and the kernels for them; see `Cpu` for what methods do."""

    name = "cuda"

    def __init__(self) -> None:
        from .kernels import cuda
        from .kernels.cuda import arithmetic, padding
        from .kernels.cuda.jit import require_device

        require_device()
        self.kernels: ModuleType = cuda
        self.empty, self.zeros = cuda.empty, cuda.zeros
        self.add, self.multiply = arithmetic.add, arithmetic.multiply
        self.padded = padding.padded
        self._arithmetic, self._padding = arithmetic, padding

    def array(self, array: Any) -> Any:
        if hasattr(array, "__cuda_array_interface__"):
            return self.kernels.as_device(array)
        return self.kernels.from_numpy(np.asarray(array))

    def unpadded(
        self, dout: Any, rows: np.ndarray, columns: np.ndarray, size: Sequence[int], corner: Sequence[int]
    ) -> Any:
        return self._padding.unpadded(dout, rows, columns, size)

    @staticmethod
    def copy(source: Any, target: Any) -> None:
        """Overwrite `target` with `source`, of other strides."""
        target[...] = source

    def is_finite(self, array: Any) -> bool:
        return self._arithmetic.squares(array).numpy()[1, 0] == 0

    def sum_of_squares(self, array: Any) -> float:
        return float(self._arithmetic.squares(array).numpy()[0, 0])


Device = Cpu | Cuda

_CPU = Cpu()


@cache
def _cuda() -> Cuda:
    return Cuda()


def device(name: Any) -> Device:
    """The device of this name.

    Raises
    ------
    ValueError
        If it is neither 'cpu' nor 'cuda'.
    ImportError
        If it is 'cuda' and fastcnn[cuda] is not installed.
    RuntimeError
        If it is 'cuda' and no such device can be used.
    """
    if name == "cpu":
        return _CPU
    if name == "cuda":
        return _cuda()
    raise ValueError(f"device: {name!r} is neither 'cpu' nor 'cuda'")


def device_of(array: Any) -> Device:
    """Where an array is that a layer takes: NumPy's, or one with a ``__cuda_array_interface__``."""
    return _CPU if isinstance(array, np.ndarray) else _cuda()


def is_array(array: Any) -> bool:
    """Whether a layer takes `array`."""
    return isinstance(array, np.ndarray) or hasattr(array, "__cuda_array_interface__")


def host(array: Any) -> np.ndarray:
    """`array` as NumPy's: itself, or a copy, for which it waits, of what is on a device."""
    if isinstance(array, np.ndarray) or not hasattr(array, "__cuda_array_interface__"):
        return np.asarray(array)
    return _cuda().array(array).numpy()


def assign(target: Any, values: Any) -> None:
    """Overwrite `target` with values from anywhere, of any dtype, that have its shape."""
    if isinstance(target, np.ndarray) or getattr(values, "dtype", None) != target.dtype:
        values = host(values)
    target[...] = values
