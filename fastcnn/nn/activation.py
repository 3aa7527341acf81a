"""ReLU, LeakyReLU, PReLU, Softmax, LogSoftmax and Identity."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._device import device_of
from . import settings
from ._arrays import (
    channels_first,
    channels_last,
    contiguous,
    float_dtype,
    floats,
    gradient,
    inverse,
    memory_order,
)
from .module import Module
from .parameter import Parameter


class Identity(Module):
    """Returns its input; whatever arguments it is made with are ignored, as in PyTorch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def forward(self, input: np.ndarray) -> np.ndarray:
        return input

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        return dout if input_grad else None

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)


class _Elementwise(Module):
    """y[i] = f(x[i]) for arrays of any rank, computed in the order of their memory."""

    def _forward(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Write f(x) to y, both contiguous; return which of them backward needs."""
        raise NotImplementedError

    def _backward(self, dout: np.ndarray, kept: np.ndarray, dx: np.ndarray) -> None:
        """Write dout * f'(x) to dx."""
        raise NotImplementedError

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)

    def forward(self, input: np.ndarray) -> np.ndarray:
        """(...) to (...)."""
        x = floats("input", input)
        order = memory_order(x)
        x = contiguous(x.transpose(order))
        y = device_of(x).empty(x.shape, x.dtype)
        self._keep(self._forward(x, y), order)
        return y.transpose(inverse(order))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input."""
        kept, order = self._kept()
        back = inverse(order)
        dout = gradient(dout, kept.transpose(back).shape, kept.dtype)
        dx = None
        if input_grad:
            dx = device_of(kept).empty(kept.shape, kept.dtype)
            self._backward(contiguous(dout.transpose(order)), kept, dx)
            dx = dx.transpose(back)
        self._forget()
        return dx


class ReLU(_Elementwise):
    """max(x, 0); NaN stays NaN.

    `inplace` is accepted for the sake of PyTorch code and changes nothing: the input is never modified.
    """

    _setting_checks: ClassVar = {"inplace": settings.flag}

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.inplace = inplace

    def _keep_output(self, y: np.ndarray) -> None:
        """Keep what `forward` would for a backward pass, of a result that was computed elsewhere."""
        order = memory_order(y)
        self._keep(y.transpose(order), order)

    def _forward(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return device_of(x).kernels.relu_forward(x, out=y)

    def _backward(self, dout: np.ndarray, kept: np.ndarray, dx: np.ndarray) -> None:
        device_of(dx).kernels.relu_backward(dout, kept, out=dx)


class LeakyReLU(_Elementwise):
    """x where x > 0, else negative_slope * x. `inplace` is accepted and changes nothing."""

    negative_slope: float
    _setting_checks: ClassVar = {"negative_slope": settings.number, "inplace": settings.flag}

    def __init__(self, negative_slope: float = 0.01, inplace: bool = False):
        super().__init__()
        self.negative_slope, self.inplace = negative_slope, inplace

    def _forward(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        device_of(x).kernels.leaky_relu_forward(x, self.negative_slope, out=y)
        return x

    def _backward(self, dout: np.ndarray, kept: np.ndarray, dx: np.ndarray) -> None:
        device_of(dx).kernels.leaky_relu_backward(dout, kept, self.negative_slope, out=dx)

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}"


class PReLU(Module):
    """x where x > 0, else weight * x with a learned slope: one, or one for each channel (axis 1).

    He et al., "Delving deep into rectifiers" (2015), section 2.1.

    Parameters
    ----------
    num_parameters : int
        1, or the number of channels.
    init : float
        The initial slope.
    dtype : float32 or float64
    """

    weight: Parameter
    _setting_checks: ClassVar = {"num_parameters": settings.count, "init": settings.number}

    def __init__(self, num_parameters: int = 1, init: float = 0.25, dtype: Any = np.float32):
        super().__init__()
        self.num_parameters, self.init = num_parameters, init
        self.weight = Parameter(np.full(self.num_parameters, self.init, float_dtype(dtype)))

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)

    def reset_parameters(self) -> None:
        """Set every slope to `init`."""
        self.weight.data[...] = self.init

    def forward(self, input: np.ndarray) -> np.ndarray:
        """(N, C, ...) to (N, C, ...)."""
        x = floats("input", input, self.weight.memory)
        channels = x.shape[1] if x.ndim > 1 else 1
        if self.num_parameters not in (1, channels):
            raise ValueError(
                f"input: shape {x.shape} has {channels} channels, the layer has {self.num_parameters} slopes"
            )
        flat = channels_last(_with_axis(x))
        on = device_of(x)
        y = on.empty(flat.shape, x.dtype)
        on.kernels.prelu_forward(flat, self.weight.memory, out=y)
        self._keep(flat, x.shape)
        return channels_first(y).reshape(x.shape)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Add to the gradient of the slopes; return the input's."""
        x, shape = self._kept()
        dout = channels_last(_with_axis(gradient(dout, shape, x.dtype)))
        on = device_of(x)
        dx = on.empty(x.shape, x.dtype)
        dweight = self.weight.grad_memory if self.weight.requires_grad else None
        on.kernels.prelu_backward(dout, x, self.weight.memory, out=dx, out_dweight=dweight, accumulate=True)
        self._forget()
        return channels_first(dx).reshape(shape) if input_grad else None

    def extra_repr(self) -> str:
        return f"num_parameters={self.num_parameters}"


def _with_axis(array: np.ndarray) -> np.ndarray:
    """`array` with at least one axis."""
    return array if array.ndim else array.reshape(1)


class _AlongAxis(Module):
    """Softmax or its logarithm along axis `dim`."""

    _kernel: str
    _setting_checks: ClassVar = {"dim": settings.whole}

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)

    def forward(self, input: np.ndarray) -> np.ndarray:
        """(...) to (...)."""
        x = floats("input", input)
        if not -x.ndim <= self.dim < x.ndim:
            raise ValueError(f"dim: {self.dim} is no axis of the input's shape {x.shape}")
        x = contiguous(np.moveaxis(x, self.dim, -1))
        on = device_of(x)
        y = on.empty(x.shape, x.dtype)
        getattr(on.kernels, self._kernel)(x, out=y)
        self._keep(y)
        return np.moveaxis(y, -1, self.dim)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input."""
        (y,) = self._kept()
        dout = gradient(dout, np.moveaxis(y, -1, self.dim).shape, y.dtype)
        dx = None
        if input_grad:
            on = device_of(y)
            dx = on.empty(y.shape, y.dtype)
            backward = getattr(on.kernels, f"{self._kernel}_backward")
            backward(contiguous(np.moveaxis(dout, self.dim, -1)), y, out=dx)
            dx = np.moveaxis(dx, -1, self.dim)
        self._forget()
        return dx

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class Softmax(_AlongAxis):
    """exp(x) / sum(exp(x)) along axis `dim`, which must be given: PyTorch's guess is deprecated."""

    _kernel = "softmax"


class LogSoftmax(_AlongAxis):
    """The logarithm of Softmax along axis `dim`, without overflow."""

    _kernel = "log_softmax"
