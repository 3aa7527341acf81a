"""What a CUDA kernel may be given; `fastcnn.kernels.checks`, for arrays of the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..checks import FLOATS, integer, padding2d, pair, same_shape, shape4, window_output
from .arrays import DeviceArray, as_device, contiguous, empty

__all__ = [
    "array",
    "blocks",
    "countable",
    "floating",
    "integer",
    "integers",
    "output",
    "padding2d",
    "pair",
    "same_shape",
    "shape4",
    "updated",
    "window_output",
]

_MOST_PIXELS = 2**31 - 1
# Along the second and the third axis of a grid.
_MOST_BLOCKS = 65535


def array(name: str, value: Any) -> DeviceArray:
    """An array of the device as kernels take it: C-contiguous, copied only where it must be.

    Raises
    ------
    TypeError
        If `value` is no array of a device.
    """
    return contiguous(as_device(value, name))


def floating(name: str, value: Any, ndim: int | None = None, dtype: np.dtype | None = None) -> DeviceArray:
    """A float32 or float64 array as kernels take it.

    Raises
    ------
    TypeError
        If `value` is no array of a device, not of float32 or float64, or not of `dtype` where that is given.
    ValueError
        If it has not `ndim` axes.
    """
    result = as_device(value, name)
    if result.dtype not in FLOATS:
        raise TypeError(f"{name}: dtype {result.dtype} is neither float32 nor float64")
    if dtype is not None and result.dtype != dtype:
        raise TypeError(
            f"{name}: dtype {result.dtype} differs from {np.dtype(dtype)}, the dtype of the other arrays"
        )
    if ndim is not None and result.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, got shape {result.shape}")
    return contiguous(result)


def integers(name: str, value: Any) -> DeviceArray:
    """Integers of one axis as kernels take them: int64.

    Raises
    ------
    TypeError
        If `value` is no array of a device, or not of integers.
    ValueError
        If it has not 1 axis.
    """
    result = as_device(value, name)
    if not np.issubdtype(result.dtype, np.integer):
        raise TypeError(f"{name}: dtype {result.dtype} is no integer")
    if result.ndim != 1:
        raise ValueError(f"{name}: expected 1 axis, got shape {result.shape}")
    return contiguous(result).astype(np.int64, copy=False)


def output(name: str, out: Any, shape: Sequence[int], dtype: Any) -> DeviceArray:
    """An array to write a result to: `out` if it fits, a new one if it is None.

    Raises
    ------
    TypeError
        If `out` is no array of a device.
    ValueError
        If it has another shape or dtype, or is not writable and C-contiguous.
    """
    if out is None:
        return empty(shape, dtype)
    result = as_device(out, name)
    if result.shape != tuple(shape) or result.dtype != np.dtype(dtype):
        raise ValueError(f"{name}: {result.dtype} {result.shape} is not {np.dtype(dtype)} {tuple(shape)}")
    if not (result.is_contiguous and result.writeable):
        raise ValueError(f"{name}: must be C-contiguous and writable")
    return result


def updated(name: str, value: Any, shape: Sequence[int], dtype: Any, of: str) -> DeviceArray:
    """An array to change in place, of the dtype of the argument `of`.

    Raises
    ------
    TypeError
        If `value` is no array of a device, or of another dtype.
    ValueError
        If it has another shape, or is not writable and C-contiguous.
    """
    result = as_device(value, name)
    if result.dtype != np.dtype(dtype):
        raise TypeError(f"{name}: dtype {result.dtype} differs from {np.dtype(dtype)}, the dtype of {of}")
    return output(name, result, shape, dtype)


def countable(name: str, pixels: int) -> int:
    """`pixels`, if kernels can count so many in 32 bits.

    Raises
    ------
    ValueError
        If they can't.
    """
    if pixels > _MOST_PIXELS:
        raise ValueError(
            f"{name}: {pixels} pixels are more than {_MOST_PIXELS}, the most that a kernel counts"
        )
    return pixels


def blocks(name: str, count: int) -> int:
    """`count`, if a grid can have so many blocks along its second or third axis.

    Raises
    ------
    ValueError
        If it can't.
    """
    if count > _MOST_BLOCKS:
        raise ValueError(f"{name}: makes {count} blocks of threads, more than the {_MOST_BLOCKS} of a device")
    return count
