"""Arrays of the device: NumPy's shapes, strides and views over memory that only kernels touch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from . import pool, strided
from .jit import SIMULATED, THREADS, kernel, stream
from .strided import blocks

if not SIMULATED:
    from .driver import Staging, to_host


class Flags(NamedTuple):
    """What NumPy's ``flags`` says of the same layout."""

    c_contiguous: bool
    writeable: bool
    aligned: bool = True


@lru_cache(maxsize=4096)
def _c_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    strides = []
    for size in reversed(shape):
        strides.append(itemsize)
        itemsize *= max(size, 1)
    return tuple(reversed(strides))


def _is_contiguous(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether elements follow each other in C order; the strides of axes of length 1 don't matter."""
    if 0 in shape:
        return True
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != itemsize:
            return False
        itemsize *= size
    return True


class DeviceArray:
    """An array of a device.

    `transpose`, `reshape` and slices make views, as in NumPy, and code that only asks for shapes and views
    works on either kind of array. Arithmetic is for kernels; ``numpy()`` copies to the host.
    """

    __slots__ = (
        "__weakref__",
        "dtype",
        "is_contiguous",
        "ndim",
        "owner",
        "pointer",
        "shape",
        "size",
        "strides",
        "writeable",
    )

    # NumPy must not take an array for a sequence of numbers.
    __array_ufunc__ = None

    def __init__(
        self,
        pointer: int,
        owner: Any,
        shape: tuple[int, ...],
        dtype: np.dtype,
        strides: tuple[int, ...] | None = None,
        writeable: bool = True,
    ):
        self.pointer = pointer
        self.owner = owner
        self.shape = shape
        self.dtype = dtype
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.strides = _c_strides(shape, dtype.itemsize) if strides is None else strides
        self.is_contiguous = strides is None or _is_contiguous(shape, strides, dtype.itemsize)
        self.writeable = writeable

    # ---------------------------------------------------------------- what NumPy arrays say of themselves

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def flags(self) -> Flags:
        return Flags(self.is_contiguous, self.writeable)

    @property
    def T(self) -> DeviceArray:
        return self.transpose()

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __bool__(self) -> bool:
        raise TypeError("whether a DeviceArray is true is known on the device only: ask its numpy()")

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype})"

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("a DeviceArray is copied to the host by its numpy(), not by np.asarray")

    def __copy__(self) -> DeviceArray:
        return self.copy()

    def __deepcopy__(self, memo: dict) -> DeviceArray:
        return self.copy()

    def __reduce__(self) -> tuple:
        # Where a file is read there may be no device.
        return np.asarray, (self.numpy(),)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer if self.size else 0, not self.writeable),
            "strides": None if self.is_contiguous else self.strides,
            "version": 3,
            # The one stream and the legacy default stream wait for each other.
            "stream": None if SIMULATED else 1,
        }

    # ---------------------------------------------------------------- views

    def _view(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
        return DeviceArray(self.pointer + offset, self.owner, shape, self.dtype, strides, self.writeable)

    def transpose(self, *axes: Any) -> DeviceArray:
        """A view with its axes in another order, reversed if none is given."""
        if len(axes) == 1 and not isinstance(axes[0], int):
            axes = tuple(axes[0])
        order = tuple(range(self.ndim))[::-1] if not axes else tuple(axis % self.ndim for axis in axes)
        if sorted(order) != list(range(self.ndim)):
            raise ValueError(f"axes: {axes} don't name each of {self.ndim} axes once")
        return self._view(0, tuple(self.shape[k] for k in order), tuple(self.strides[k] for k in order))

    def reshape(self, *shape: Any) -> DeviceArray:
        """The elements in another shape: a view of a C-contiguous array, else of a copy."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if wanted == (-1,):
            return self.ravel()
        if -1 in wanted:
            known = -math.prod(wanted)
            if wanted.count(-1) > 1 or known == 0 or self.size % known:
                raise ValueError(f"shape: {self.shape} does not become {wanted}")
            wanted = tuple(self.size // known if size == -1 else size for size in wanted)
        if math.prod(wanted) != self.size:
            raise ValueError(f"shape: {self.shape} does not become {wanted}")
        source = contiguous(self)
        return DeviceArray(source.pointer, source.owner, wanted, self.dtype, None, source.writeable)

    def ravel(self) -> DeviceArray:
        """The elements in one axis."""
        source = contiguous(self)
        return DeviceArray(source.pointer, source.owner, (self.size,), self.dtype, None, source.writeable)

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view by integers, slices, None and an ellipsis."""
        keys = key if isinstance(key, tuple) else (key,)
        named = sum(k is not None and k is not Ellipsis for k in keys)
        if named > self.ndim or keys.count(Ellipsis) > 1:
            raise IndexError(f"index: {key!r} has too many parts for shape {self.shape}")
        if Ellipsis not in keys:
            keys = (*keys, Ellipsis)
        at = keys.index(Ellipsis)
        keys = (*keys[:at], *[slice(None)] * (self.ndim - named), *keys[at + 1 :])
        offset, axis = 0, 0
        shape, strides = [], []
        for k in keys:
            if k is None:
                shape.append(1)
                strides.append(0)
                continue
            size, stride = self.shape[axis], self.strides[axis]
            axis += 1
            if isinstance(k, slice):
                start, stop, step = k.indices(size)
                shape.append(len(range(start, stop, step)))
                strides.append(stride * step)
                offset += start * stride if shape[-1] else 0
            elif isinstance(k, (int, np.integer)) and not isinstance(k, bool):
                if not -size <= k < size:
                    raise IndexError(f"index: {k} is not in [0, {size})")
                offset += int(k) % size * stride
            else:
                raise TypeError(f"index: expected integers, slices, None or an ellipsis, got {k!r}")
        return self._view(offset, tuple(shape), tuple(strides))

    # ---------------------------------------------------------------- contents

    @property
    def parameters(self) -> tuple[int, ...]:
        """What a kernel is given for this C-contiguous array; see `driver.letters`."""
        itemsize = self.dtype.itemsize
        return 0, 0, self.size, itemsize, self.pointer, *self.shape, *_c_strides(self.shape, itemsize)

    @property
    def simulated(self) -> np.ndarray:
        """The memory of this C-contiguous array, which is the host's in the simulator."""
        if not self.size:
            return np.empty(self.shape, self.dtype)
        memory = memoryview((ctypes.c_char * self.nbytes).from_address(self.pointer))
        return np.ndarray(self.shape, self.dtype, memory)

    def numpy(self, out: np.ndarray | None = None) -> np.ndarray:
        """A copy on the host; waits for the device.

        Parameters
        ----------
        out : ndarray of this array's shape and dtype, optional
            Overwritten with the elements, and returned.

        Raises
        ------
        ValueError
            If `out` has another shape or dtype, or is read-only.
        """
        if out is None:
            out = np.empty(self.shape, self.dtype)
        elif not out.flags.writeable:
            raise ValueError("out: must be writable")
        elif out.shape != self.shape or out.dtype != self.dtype:
            raise ValueError(f"out: {out.dtype} {out.shape} is not {self.dtype} {self.shape}")
        if self.size:
            host = out if out.flags.c_contiguous else np.empty(self.shape, self.dtype)
            _to_host(contiguous(self), host)
            if host is not out:
                out[...] = host
        return out

    def item(self) -> float | int:
        """The only element, as a Python number; waits for the device."""
        return self.numpy().item()

    def copy(self) -> DeviceArray:
        """A C-contiguous array of its own with the same elements."""
        result = empty(self.shape, self.dtype)
        result[...] = self
        return result

    def astype(self, dtype: Any, copy: bool = True) -> DeviceArray:
        """The elements as another dtype; without `copy`, this array if it has it.

        Raises
        ------
        TypeError
            If `dtype` is none of float32, float64, int64 and this array's own, or this one's are no numbers.
        """
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self.copy() if copy else self
        if dtype.name not in _WIDE or self.dtype.name not in _NUMBERS:
            raise TypeError(
                f"dtype: {self.dtype} does not become {dtype} on the device, only {', '.join(_WIDE)}"
            )
        result = empty(self.shape, dtype)
        _convert.launch(blocks(self.size), THREADS, self.ravel(), result.ravel())
        return result

    def fill(self, value: float) -> None:
        """Set every element to `value`."""
        self[...] = value

    def __setitem__(self, key: Any, value: Any) -> None:
        """Overwrite a view with a number, an array of its shape and dtype, or a NumPy array of its shape."""
        target = self if key is Ellipsis else self[key]
        if not target.writeable:
            raise ValueError("a read-only array can't be changed")
        if isinstance(value, np.ndarray) and value.ndim:
            value = from_numpy(value.astype(target.dtype, copy=False))
        elif not hasattr(value, "__cuda_array_interface__"):
            number = np.asarray(value, target.dtype)
            if number.ndim == 0 and target.is_contiguous:
                strided.fill(target, number)
                return
            value = _broadcast(from_numpy(number), target.shape)
        source = as_device(value)
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(f"{source.dtype} {source.shape} is not {target.dtype} {target.shape}")
        if strided.overlap(target, source):
            source = source.copy()
        strided.copy(target, source)


def _broadcast(number: DeviceArray, shape: tuple[int, ...]) -> DeviceArray:
    return DeviceArray(number.pointer, number.owner, shape, number.dtype, (0,) * len(shape), False)


@cache
def _staging() -> Staging:
    return Staging(stream())


def _to_host(array: DeviceArray, host: np.ndarray) -> None:
    """Copy to a C-contiguous array of the host, and wait for it."""
    if SIMULATED:
        host[...] = array.simulated
    else:
        to_host(host, array.pointer, stream())


def _to_device(host: np.ndarray, array: DeviceArray) -> None:
    """Copy from a C-contiguous array of the host, which may change when this returns."""
    if SIMULATED:
        array.simulated[...] = host
    else:
        _staging().send(host, array.pointer)


def empty(shape: int | Sequence[int], dtype: Any = np.float32) -> DeviceArray:
    """An uninitialised C-contiguous array, over memory that nobody else holds.

    Raises
    ------
    TypeError
        If `dtype` is none of booleans or numbers of up to 8 bytes.
    ValueError
        If a size is negative.
    RuntimeError
        If there is no device.
    """
    sizes = (int(shape),) if isinstance(shape, (int, np.integer)) else tuple(map(int, shape))
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape: {sizes} has a negative size")
    dtype = np.dtype(dtype)
    if dtype.kind not in "biufc" or dtype.itemsize > 8:
        raise TypeError(f"dtype: {dtype} is none of booleans or numbers of up to 8 bytes")
    memory = pool.take(math.prod(sizes) * dtype.itemsize)
    return DeviceArray(memory.pointer, memory, sizes, dtype)


def zeros(shape: int | Sequence[int], dtype: Any = np.float32) -> DeviceArray:
    """A C-contiguous array of zeros."""
    result = empty(shape, dtype)
    result.fill(0)
    return result


def from_numpy(array: np.ndarray) -> DeviceArray:
    """A copy on the device of a NumPy array, C-contiguous.

    Raises
    ------
    TypeError, RuntimeError
        Like `empty`.
    """
    array = np.asarray(array)
    array = np.require(array.astype(array.dtype.newbyteorder("="), copy=False), requirements=["C", "A"])
    result = empty(array.shape, array.dtype)
    if array.size:
        _to_device(array, result)
    return result


def as_device(array: Any, name: str = "array") -> DeviceArray:
    """`array` as a `DeviceArray` over the same memory.

    Parameters
    ----------
    array : DeviceArray, or anything with a ``__cuda_array_interface__``
    name : str
        The argument's, for errors.

    Raises
    ------
    TypeError
        If it is no array of a device, or has a mask or the other byte order.
    ValueError
        If its elements are not aligned to their size.
    """
    if type(array) is DeviceArray:
        return array
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        kind = "a NumPy array" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise TypeError(
            f"{name}: expected an array of the device, got {kind}; "
            "fastcnn.kernels.cuda.from_numpy(...) copies a NumPy array there"
        )
    if interface.get("mask") is not None:
        raise TypeError(f"{name}: an array with a mask can't be used")
    _wait_for(interface.get("stream"))
    pointer, read_only = interface["data"]
    dtype = np.dtype(interface["typestr"])
    if not dtype.isnative:
        raise TypeError(f"{name}: dtype {dtype.str} is of the other byte order")
    if pointer % dtype.itemsize:
        raise ValueError(
            f"{name}: the address {pointer} is no multiple of the {dtype.itemsize} bytes of {dtype}"
        )
    strides = interface.get("strides")
    strides = None if strides is None else tuple(strides)
    return DeviceArray(pointer, array, tuple(interface["shape"]), dtype, strides, not read_only)


def _wait_for(foreign: int | None) -> None:
    """Wait for the stream that a foreign array is written on, unless it is the legacy default stream, 1."""
    if foreign not in (None, 1) and not SIMULATED:
        cuda.external_stream(foreign).synchronize()


def contiguous(array: DeviceArray) -> DeviceArray:
    """`array` if it is C-contiguous, else a copy that is."""
    return array if array.is_contiguous else array.copy()


_WIDE = ("float32", "float64", "int64")
_NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64")


@kernel(*(f"{kind}[::1], {wide}[::1]" for wide in _WIDE for kind in _NUMBERS if kind != wide))
def _convert(source, target):
    for i in range(cuda.grid(1), source.size, cuda.gridsize(1)):
        target[i] = source[i]
