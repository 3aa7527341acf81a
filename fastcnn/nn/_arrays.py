"""What layers accept, and the order that kernels want: (N, C, H, W) shown, (N, H, W, C) stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._device import device_of, is_array
from .parameter import FLOATS

_FLOAT64 = np.dtype(np.float64)


def float_dtype(dtype: Any) -> np.dtype:
    """`dtype` if parameters can have it.

    Raises
    ------
    TypeError
        If it is neither float32 nor float64.
    """
    dtype = np.dtype(dtype)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: {dtype} is neither float32 nor float64")
    return dtype


def floats(name: str, array: Any, like: np.ndarray | None = None) -> np.ndarray:
    """`array`, if it is a float32 or float64 array, and of the dtype and device of `like`, a parameter.

    Raises
    ------
    TypeError
        Naming the dtype or the device, and how to convert.
    """
    if not isinstance(array, np.ndarray):
        array = _on_device(name, array)
    if like is not None and isinstance(like, np.ndarray) is not isinstance(array, np.ndarray):
        here, there = device_of(array).name, device_of(like).name
        raise TypeError(
            f"{name}: is on the device {here!r}, the parameters are on {there!r}; use {_MOVES[there]}, or "
            f"net.to({here!r})"
        )
    if array.dtype not in FLOATS:
        native = array.dtype.newbyteorder("=")
        if native not in FLOATS:
            raise TypeError(
                f"{name}: dtype {array.dtype} is neither float32 nor float64; use {name}.astype(np.float32)"
            )
        array = array.astype(native)
    if like is not None and array.dtype != like.dtype:
        convert = "net.double()" if array.dtype == _FLOAT64 else "net.float()"
        raise TypeError(
            f"{name}: dtype {array.dtype} differs from the parameters' {like.dtype}; use "
            f"{name}.astype(np.{like.dtype}), or {convert}"
        )
    return array


# How an array comes to a device.
_MOVES = {"cpu": "its numpy()", "cuda": "fastcnn.kernels.cuda.from_numpy"}


def _on_device(name: str, array: Any) -> Any:
    """What is no NumPy array as an array of a device."""
    if not is_array(array):
        raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    return device_of(array).array(array)


def gradient(dout: Any, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """`dout`, if it has the output's `shape` and `dtype`.

    Raises
    ------
    TypeError, ValueError
        If it has not.
    """
    if not isinstance(dout, np.ndarray):
        dout = _on_device("dout", dout)
    if dout.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"dout: dtype {dout.dtype} differs from the output's {dtype}")
    if dout.shape != tuple(shape):
        raise ValueError(f"dout: shape {dout.shape} is not the output's {tuple(shape)}")
    return dout


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` itself if kernels can read it as it is, else a copy in a pooled buffer."""
    if array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative:
        return array
    on = device_of(array)
    copy = on.empty(array.shape, np.dtype(array.dtype.type))
    on.copy(array, copy)
    return copy


def channels_last(array: np.ndarray) -> np.ndarray:
    """(N, C, ...) as contiguous (N, ..., C); no copy of what a layer returned."""
    if array.ndim == 4:
        return contiguous(array.transpose(0, 2, 3, 1))
    return contiguous(np.moveaxis(array, 1, -1)) if array.ndim > 2 else contiguous(array)


def channels_first(array: np.ndarray) -> np.ndarray:
    """(N, ..., C) shown as (N, C, ...)."""
    if array.ndim == 4:
        return array.transpose(0, 3, 1, 2)
    return np.moveaxis(array, -1, 1) if array.ndim > 2 else array


def images(array: Any, like: np.ndarray | None = None, channels: int | None = None) -> np.ndarray:
    """A layer's input, (N, C, H, W) or (C, H, W), as contiguous (N, H, W, C).

    Raises
    ------
    TypeError
        If it is no float array, or not of the dtype and device of `like`, a parameter's memory.
    ValueError
        If it has another rank, or not `channels` channels.
    """
    array = floats("input", array, like)
    if array.ndim not in (3, 4):
        raise ValueError(f"input: expected (N, C, H, W) or (C, H, W), got shape {array.shape}")
    if channels is not None and array.shape[-3] != channels:
        raise ValueError(
            f"input: shape {array.shape} has {array.shape[-3]} channels, the layer takes {channels}"
        )
    return channels_last(array if array.ndim == 4 else array[np.newaxis])


def shown(array: np.ndarray, batched: bool) -> np.ndarray:
    """(N, H, W, C) as (N, C, H, W), or its only image as (C, H, W)."""
    array = array.transpose(0, 3, 1, 2)
    return array if batched else array[0]


def stored(dout: Any, shape: tuple[int, int, int, int], dtype: np.dtype, batched: bool) -> np.ndarray:
    """The gradient of what `shown` returned for an array of `shape`, as contiguous (N, H, W, C)."""
    n, h, w, c = shape
    dout = gradient(dout, (n, c, h, w) if batched else (c, h, w), dtype)
    return channels_last(dout if batched else dout[np.newaxis])


# In which orders of axes an array may be stored, the usual first. Four axes are always images.
_ORDERS: dict[int, tuple[tuple[int, ...], ...]] = {
    3: ((0, 1, 2), (0, 2, 1), (1, 2, 0)),
    4: ((0, 2, 3, 1),),
    5: ((0, 2, 3, 4, 1), (0, 1, 2, 3, 4)),
}


def memory_order(array: np.ndarray) -> tuple[int, ...]:
    """In which order of axes an elementwise layer reads `array`: that of its memory, if it is a known one."""
    orders = _ORDERS.get(array.ndim)
    if orders is None:
        return tuple(range(array.ndim))
    for order in orders:
        if array.transpose(order).flags.c_contiguous:
            return order
    return orders[0]


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The transposition that undoes `order`."""
    result = [0] * len(order)
    for i, axis in enumerate(order):
        result[axis] = i
    return tuple(result)
