"""Linear, Flatten and Unflatten."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from .._device import device_of
from . import init, settings
from ._arrays import contiguous, float_dtype, floats, gradient
from .module import Module
from .parameter import Parameter


class Linear(Module):
    """y = x @ weight^T + bias over the last axis of x.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    dtype : float32 or float64

    Attributes
    ----------
    weight : Parameter (out_features, in_features)
    bias : Parameter (out_features,) or None
        Both drawn from U(-b, b), b = 1 / sqrt(in_features), as in PyTorch.
    """

    weight: Parameter
    bias: Parameter | None
    _setting_checks: ClassVar = {"in_features": settings.count, "out_features": settings.count}

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: Any = np.float32):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        dtype = float_dtype(dtype)
        self.weight = Parameter(np.zeros((self.out_features, self.in_features), dtype), order=(1, 0))
        self.register_parameter("bias", Parameter(np.zeros(self.out_features, dtype)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new initial values from the default generator."""
        init.default_(self.weight, self.bias)

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output, without the axis of the batch."""
        return (*input_shape[:-1], self.out_features)

    def forward(self, input: np.ndarray) -> np.ndarray:
        """(..., in_features) to (..., out_features)."""
        x = floats("input", input, self.weight.memory)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"input: shape {x.shape} does not end in the {self.in_features} features that the layer takes"
            )
        lead = x.shape[:-1]
        rows = contiguous(x).reshape(math.prod(lead), self.in_features)
        on = device_of(x)
        y = on.empty((len(rows), self.out_features), x.dtype)
        bias = None if self.bias is None else self.bias.memory
        on.kernels.linear_forward(rows, self.weight.memory, bias, out=y)
        self._keep(rows, lead)
        return y.reshape(*lead, self.out_features)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Add to the gradients of weight and bias; return the input's."""
        rows, lead = self._kept()
        dout = contiguous(gradient(dout, (*lead, self.out_features), rows.dtype))
        dout = dout.reshape(len(rows), self.out_features)
        on = device_of(rows)
        if self.weight.requires_grad:
            on.kernels.linear_backward_weight(dout, rows, out=self.weight.grad_memory, accumulate=True)
        if self.bias is not None and self.bias.requires_grad:
            on.kernels.conv2d_backward_bias(dout, out=self.bias.grad_memory, accumulate=True)
        shape = rows.shape
        del rows
        self._forget()
        if not input_grad:
            return None
        dx = on.empty(shape, dout.dtype)
        on.kernels.linear_backward_input(dout, self.weight.memory, out=dx)
        return dx.reshape(*lead, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def _axis(name: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"{name}: axis {axis} is out of range for {ndim} axes")
    return axis % ndim


class _Reshape(Module):
    """A layer that changes nothing but the shape."""

    def _new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        raise NotImplementedError

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output, without the axis of the batch."""
        return self._new_shape((1, *input_shape))[1:]

    def forward(self, input: np.ndarray) -> np.ndarray:
        x = floats("input", input)
        y = contiguous(x).reshape(self._new_shape(x.shape))
        self._keep(x.shape, y.shape, x.dtype)
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        x_shape, y_shape, dtype = self._kept()
        dout = gradient(dout, y_shape, dtype)
        self._forget()
        return contiguous(dout).reshape(x_shape) if input_grad else None


class Flatten(_Reshape):
    """Axes `start_dim` to `end_dim` as one, in PyTorch's order: C, H, W."""

    _setting_checks: ClassVar = {"start_dim": settings.whole, "end_dim": settings.whole}

    def __init__(self, start_dim: int = 1, end_dim: int = -1):
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def _new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        first = _axis("start_dim", self.start_dim, max(len(shape), 1))
        last = _axis("end_dim", self.end_dim, max(len(shape), 1))
        if first > last:
            raise ValueError(
                f"start_dim: {self.start_dim} comes after end_dim {self.end_dim} in shape {shape}"
            )
        return (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :])

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """Sizes of axes, at most one of them -1."""
    sizes = tuple(value)
    if sizes.count(-1) > 1 or any(
        isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < -1 for size in sizes
    ):
        raise ValueError(f"{name}: {value!r} must be sizes, at most one of them -1")
    return tuple(int(size) for size in sizes)


class Unflatten(_Reshape):
    """Axis `dim` cut into `unflattened_size`, of which one may be -1."""

    _setting_checks: ClassVar = {"dim": settings.whole, "unflattened_size": _sizes}

    def __init__(self, dim: int, unflattened_size: tuple[int, ...]):
        super().__init__()
        self.dim, self.unflattened_size = dim, unflattened_size

    def _new_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = _axis("dim", self.dim, len(shape))
        sizes = self.unflattened_size
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and known and shape[dim] % known == 0:
            sizes = tuple(shape[dim] // known if size == -1 else size for size in sizes)
        if math.prod(sizes) != shape[dim]:
            raise ValueError(
                f"unflattened_size: {self.unflattened_size} does not divide axis {self.dim} of shape {shape}"
            )
        return (*shape[:dim], *sizes, *shape[dim + 1 :])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, unflattened_size={self.unflattened_size}"
