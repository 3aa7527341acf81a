"""Parameters, and the two flat arrays in which a model's parameters and gradients live.

A parameter shows PyTorch's axes and lives in the order that the kernels read. `consolidate` moves the
parameters of a model next to each other, so that optimisers, clipping and `zero_grad` work on a few long
arrays: see `runs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .._buffers import ALIGNMENT
from .._device import Device, assign, device, device_of, host, is_array

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


class _Layout:
    """Counts the changes of any parameter's place, for those who remember places."""

    version = 0


def layout_version() -> int:
    """A number that changes when any parameter moved to other memory, was frozen or unfrozen."""
    return _Layout.version


class Store:
    """Flat values and gradients; each parameter starts on a 64-byte boundary, the gaps stay zero."""

    __slots__ = ("data", "device", "grad")

    def __init__(self, size: int, dtype: np.dtype, on: Device):
        self.device = on
        self.data = on.zeros(size, dtype)
        self.grad = on.zeros(size, dtype)


def padded_size(size: int, dtype: np.dtype) -> int:
    """`size` elements rounded up to whole cache lines."""
    step = ALIGNMENT // dtype.itemsize
    return -(-size // step) * step


class Parameter:
    """A trained array with its gradient.

    Parameters
    ----------
    data : float32 or float64 array
        Initial values (copied), in PyTorch's shape.
    order : sequence of int, optional
        Memory axis i is shown axis order[i]: a convolution's (F, C, kH, kW) lives as (kH, kW, C, F) with
        order (2, 3, 1, 0). By default the array lives as it is shown.
    requires_grad : bool
        False: layers leave its gradient alone, and optimisers its values.

    Notes
    -----
    `data` and `grad` are views of the flat store, which changes when a container takes the parameter in;
    don't hold them over the construction of a model. `memory` and `grad_memory` are the same numbers,
    C-contiguous, in the kernels' order. The gradient always exists; it is zero at first.
    """

    __slots__ = (
        "__weakref__",
        "_data",
        "_grad",
        "_offset",
        "_order",
        "_requires_grad",
        "_store",
        "grad_memory",
        "memory",
    )

    memory: np.ndarray
    grad_memory: np.ndarray

    def __init__(self, data: Any, order: Sequence[int] | None = None, requires_grad: bool = True):
        on = device_of(data) if hasattr(data, "__cuda_array_interface__") else device("cpu")
        data = on.array(data)
        if data.dtype.newbyteorder("=") not in FLOATS:
            raise TypeError(f"data: dtype {data.dtype} is neither float32 nor float64")
        self._order = tuple(range(data.ndim)) if order is None else tuple(order)
        if sorted(self._order) != list(range(data.ndim)):
            raise ValueError(f"order: {order!r} is no permutation of the {data.ndim} axes of data")
        self._requires_grad = bool(requires_grad)
        # NumPy's one object for it, so that kernels can compare by identity.
        dtype = np.dtype(data.dtype.type)
        self._bind(Store(padded_size(data.size, dtype), dtype, on), 0, data.shape)
        self._data[...] = data

    def _bind(self, store: Store, offset: int, shape: tuple[int, ...]) -> None:
        """Live at `offset` of `store` from now on, without copying anything there."""
        self._store, self._offset = store, offset
        memory_shape = tuple(shape[axis] for axis in self._order)
        size = math.prod(shape)
        self.memory = store.data[offset : offset + size].reshape(memory_shape)
        self.grad_memory = store.grad[offset : offset + size].reshape(memory_shape)
        self._data = self.as_shown(self.memory)
        self._grad = self.as_shown(self.grad_memory)

    def as_shown(self, memory: np.ndarray) -> np.ndarray:
        """An array in the order of `memory` as a view with the axes of `data`."""
        return memory.transpose(*np.argsort(self._order).tolist()) if self._order else memory

    def _move(self, store: Store, offset: int) -> None:
        memory, grad = self.memory, self.grad_memory
        self._bind(store, offset, self.shape)
        assign(self.memory, memory)
        assign(self.grad_memory, grad)

    @property
    def device(self) -> str:
        """Where values and gradients are: 'cpu' or 'cuda'."""
        return self._store.device.name

    @property
    def data(self) -> np.ndarray:
        """The values, a view in PyTorch's shape. Assigning copies an array of this shape in."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._assign("data", self._data, value)

    @property
    def grad(self) -> np.ndarray:
        """The gradient, a view in PyTorch's shape. Assigning copies an array in, None zeroes it."""
        return self._grad

    @grad.setter
    def grad(self, value: Any) -> None:
        if value is None:
            self.grad_memory.fill(0)
        else:
            self._assign("grad", self._grad, value)

    def _assign(self, name: str, target: np.ndarray, value: Any) -> None:
        if not is_array(value):
            value = np.asarray(value)
        if value.dtype.kind != "f":
            raise TypeError(f"{name}: dtype {value.dtype} is no float")
        if value.shape != target.shape:
            raise ValueError(f"{name}: shape {value.shape} is not the parameter's {target.shape}")
        assign(target, value)

    @property
    def requires_grad(self) -> bool:
        """Whether layers compute its gradient and optimisers change it."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._requires_grad = bool(value)
        _Layout.version += 1

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def size(self) -> int:
        return self._data.size

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def dtype(self) -> np.dtype:
        return self._data.dtype

    def numel(self) -> int:
        """Number of elements, as PyTorch calls it."""
        return self._data.size

    def __len__(self) -> int:
        return len(self._data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(host(self._data), dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        text = f"Parameter containing:\n{host(self._data)!r}"
        if self.device != "cpu":
            text = f"{text}, device={self.device!r}"
        return text if self._requires_grad else f"{text}, requires_grad=False"

    def __reduce__(self) -> tuple:
        # A file has no device.
        return _unpickled, (host(self.memory).copy(), self._order, self._requires_grad)

    def __deepcopy__(self, memo: dict) -> Parameter:
        twin = Parameter(self._data, self._order, self._requires_grad)
        twin.grad_memory[...] = self.grad_memory
        memo[id(self)] = twin
        return twin


def _unpickled(memory: np.ndarray, order: tuple[int, ...], requires_grad: bool) -> Parameter:
    return Parameter(memory.transpose(*np.argsort(order).tolist()) if order else memory, order, requires_grad)


def consolidate(
    parameters: Sequence[Parameter], dtype: np.dtype | None = None, on: Device | None = None
) -> None:
    """Move `parameters` next to each other into one store, in order; nothing moves if they are there already.

    With `dtype` they and their gradients are converted, with `on` they go to that device. Otherwise
    parameters of several dtypes or devices stay where they are.
    """
    if not parameters:
        return
    kinds = {(parameter.dtype, parameter._store.device) for parameter in parameters}
    first = parameters[0]
    wanted = first.dtype if dtype is None else np.dtype(dtype), first._store.device if on is None else on
    if kinds == {wanted} and len(runs(parameters)) == 1:
        return
    mixed_dtypes = dtype is None and len({kind for kind, _ in kinds}) > 1
    if mixed_dtypes or (on is None and len({place for _, place in kinds}) > 1):
        return
    sizes = [padded_size(parameter.size, wanted[0]) for parameter in parameters]
    store = Store(sum(sizes), *wanted)
    for parameter, offset in zip(parameters, itertools.accumulate(sizes, initial=0), strict=False):
        parameter._move(store, offset)
    _Layout.version += 1


def runs(parameters: Sequence[Parameter]) -> list[tuple[int, int]]:
    """Index ranges (first, last + 1) of `parameters` that lie one after another in one store."""
    result = []
    first = 0
    for i in range(1, len(parameters) + 1):
        if i == len(parameters) or not _follows(parameters[i], parameters[i - 1]):
            result.append((first, i))
            first = i
    return result


def _follows(parameter: Parameter, before: Parameter) -> bool:
    end = before._offset + padded_size(before.size, before.dtype)
    return parameter._store is before._store and parameter._offset == end


def flat(parameters: Sequence[Parameter]) -> tuple[np.ndarray, np.ndarray]:
    """Values and gradients of a run of parameters, as 1-D views with the gaps between them."""
    first, last = parameters[0], parameters[-1]
    where = slice(first._offset, last._offset + padded_size(last.size, last.dtype))
    return first._store.data[where], first._store.grad[where]
