"""What a kernel may be given: dtypes, ranks and shapes, checked once, with errors that name the argument."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, TypeVar

import numpy as np

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
FLOATS = (_FLOAT32, _FLOAT64)


class _Writable:
    """Lends the memory of a read-only array to a kernel that only reads it.

    Numba compiles a second version of a kernel for read-only arrays; this spares the seconds.
    """

    def __init__(self, array: np.ndarray):
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._owner = array


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` as kernels take it: C-contiguous, aligned, native, writable; copied only where it must be."""
    array = np.asarray(array)
    if type(array) is np.ndarray and array.flags.carray and array.dtype.isnative:
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    array = np.require(array, requirements=["C", "A"])
    if not array.flags.writeable:
        array = np.asarray(_Writable(array)) if array.size else array.copy()
    return array


def floating(name: str, array: Any, ndim: int | None = None, dtype: np.dtype | None = None) -> np.ndarray:
    """A float32 or float64 array as kernels take it.

    Raises
    ------
    TypeError
        If `array` is no array of float32 or float64, or not of `dtype` where that is given.
    ValueError
        If it has not `ndim` axes.
    """
    # What kernels are given thousands of times a second costs one look.
    if (
        type(array) is np.ndarray
        and (array.dtype is _FLOAT32 or array.dtype is _FLOAT64)
        and (dtype is None or array.dtype is dtype)
        and (ndim is None or array.ndim == ndim)
        and array.flags.carray
    ):
        return array
    array = np.asarray(array)
    native = array.dtype.newbyteorder("=")
    if native not in FLOATS:
        raise TypeError(f"{name}: dtype {array.dtype} is neither float32 nor float64")
    if dtype is not None and native != dtype:
        raise TypeError(
            f"{name}: dtype {array.dtype} differs from {np.dtype(dtype)}, the dtype of the other arrays"
        )
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, got shape {array.shape}")
    return contiguous(array)


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


Array = TypeVar("Array", bound=_Shaped)


def same_shape(name: str, array: Array, shape: Sequence[int]) -> Array:
    """`array` if it has `shape`; else a ValueError that names it."""
    if array.shape != tuple(shape):
        raise ValueError(f"{name}: shape {array.shape} is not {tuple(shape)}")
    return array


def fitting(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of `shape` and of the float `dtype` as kernels take it; errors are those of the two above."""
    if (
        type(array) is np.ndarray
        and array.shape == shape
        and array.dtype is dtype
        and dtype in FLOATS
        and array.flags.carray
    ):
        return array
    return same_shape(name, floating(name, array, None, dtype), shape)


def output(name: str, out: np.ndarray | None, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array to write a result to: `out` if it fits, a new one if it is None.

    Raises
    ------
    ValueError
        If `out` has another shape or dtype, or is not writable and C-contiguous.
    """
    if out is None:
        return np.empty(shape, dtype)
    if out.shape == shape and out.dtype is dtype and out.flags.carray:
        return out
    if out.shape != tuple(shape) or out.dtype != np.dtype(dtype):
        raise ValueError(f"{name}: {out.dtype} {out.shape} is not {np.dtype(dtype)} {tuple(shape)}")
    if not (out.flags.c_contiguous and out.flags.writeable and out.flags.aligned):
        raise ValueError(f"{name}: must be C-contiguous, aligned and writable")
    return out


def integer(name: str, value: Any, minimum: int = 0) -> int:
    """`value` as an int of at least `minimum`."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if result < minimum:
        raise ValueError(f"{name}: {value!r} is below {minimum}")
    return result


def _is_pair(value: Any) -> TypeGuard[tuple[int, int]]:
    return type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int


def pair(name: str, value: Any, minimum: int = 0) -> tuple[int, int]:
    """An int, or two, as (height, width)."""
    # As in `floating`: what layers hand over costs one look.
    if type(value) is int and value >= minimum:
        return value, value
    if _is_pair(value) and min(value) >= minimum:
        return value
    if np.ndim(value) == 0:
        one = integer(name, value, minimum)
        return one, one
    if len(value) == 1:
        return pair(name, value[0], minimum)
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or two, got {value!r}")
    return integer(name, value[0], minimum), integer(name, value[1], minimum)


def are_plain(*values: Any) -> bool:
    """Whether each is an int, or a pair of them, of Python's own type: equal to nothing but its like.

    Among keys of a cache that are checked so, no True is found for a 1.
    """
    for value in values:  # noqa: SIM110 (the generator would take longer than the tests)
        if type(value) is not int and not _is_pair(value):
            return False
    return True


def padding2d(value: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """An int, (height, width), or ((top, bottom), (left, right)), as the last."""
    if isinstance(value, str):
        raise TypeError(f"padding: kernels take numbers, got {value!r}")
    if type(value) is int or _is_pair(value):
        height, width = pair("padding", value)
        return (height, height), (width, width)
    if np.ndim(value) == 2:
        if np.shape(value) != (2, 2):
            raise ValueError(f"padding: expected ((top, bottom), (left, right)), got {value!r}")
        return pair("padding", value[0]), pair("padding", value[1])
    height, width = pair("padding", value)
    return (height, height), (width, width)


def shape4(name: str, value: Any) -> tuple[int, int, int, int]:
    """The shape of a batch of images, (N, H, W, C)."""
    if len(value) != 4:
        raise ValueError(f"{name}: expected (N, H, W, C), got {value!r}")
    n, h, w, c = (size if type(size) is int and size >= 0 else integer(name, size) for size in value)
    return n, h, w, c


def window_output(size: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int) -> int:
    """Number of windows along one axis: floor((size + padding - dilation * (kernel - 1) - 1) / stride) + 1.

    Raises
    ------
    ValueError
        If not even one window fits.
    """
    extent = dilation * (kernel - 1) + 1
    room = size + padding[0] + padding[1] - extent
    if room < 0:
        raise ValueError(
            f"kernel_size: {kernel} with dilation {dilation} spans {extent} pixels, more than the "
            f"{size + padding[0] + padding[1]} of the padded input"
        )
    return room // stride + 1
