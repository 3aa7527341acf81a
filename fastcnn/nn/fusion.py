"""Runs of layers that Sequential computes in one pass over memory.

A run has the parameters, the state_dict and, to rounding, the results of its layers one by one, and their
random numbers. It belongs to no module tree: what backward needs of a call is what `forward` returns beside
the result.

- Conv2d, ReLU and MaxPool2d: the convolution is pooled while it is in the cache, and the gradient of what was
  not the largest of its window is not multiplied
- BatchNorm2d, ReLU and MaxPool2d
- Conv2d before these: without gradients, what the running statistics do to each channel is done to the
  weights instead, where these are fewer than the pixels
- LeakyReLU or PReLU before MaxPool2d, with a slope above zero, come behind it: where their input grows, so
  does their output, and the largest pixel of a window stays the largest

Only layers of exactly these classes fuse, and only windows that neither overlap nor are padded. A Residual's
sum and the ReLU behind it are one pass, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import numpy as np

from .._device import device_of, host
from .._grad_mode import is_grad_enabled
from ..kernels.threads import decide
from ._arrays import images, shown, stored
from .activation import LeakyReLU, PReLU, ReLU
from .batchnorm import BatchNorm2d
from .conv import Conv2d
from .module import Module, structure_version
from .pooling import MaxPool2d

Kind = TypeVar("Kind", bound=Module)

# As many pixels of a window as a byte tells apart beside "none".
_MOST_PIXELS = 255


class _Switch:
    enabled = True


def get_fusion() -> bool:
    """Whether Sequential computes runs of layers in one pass."""
    return _Switch.enabled


def set_fusion(enabled: bool) -> None:
    """Let Sequential compute runs of layers in one pass, or every layer by itself.

    The results are the same to rounding. With fusion, a layer inside of a run keeps nothing for a backward
    pass of its own: call the Sequential's, or switch fusion off to walk through the layers backward by hand.
    """
    if not isinstance(enabled, (bool, np.bool_)):
        raise TypeError(f"enabled: expected a bool, got {enabled!r}")
    _Switch.enabled = bool(enabled)


class ConvPool:
    """Conv2d, then ReLU or not, then MaxPool2d or not."""

    def __init__(self, conv: Conv2d, relu: bool, pool: MaxPool2d | None):
        self.conv, self.relu, self.pool = conv, relu, pool
        self.pool_size = (1, 1) if pool is None else pool.kernel_size
        # A changed layer makes a new run, so that what follows from its settings is computed once.
        self._kernel_size = conv.kernel_size
        self._geometry = (conv.stride, conv._pads, conv.dilation, conv.groups)
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def forward(
        self, input: np.ndarray, weights: tuple[np.ndarray, np.ndarray] | None = None
    ) -> tuple[np.ndarray, Any]:
        """The result, and what backward needs; with other `weights` and biases than the layer's if given."""
        conv = self.conv
        bias = None if conv.bias is None else conv.bias.memory
        x = images(input, conv.weight.memory, conv.in_channels)
        on = device_of(x)
        shape = self._shapes.get(x.shape)
        if shape is None:
            n, h, w, c = x.shape
            filters, height, width = pooled(conv.output_shape((c, h, w)), self.pool)
            shape = self._shapes[x.shape] = (n, height, width, filters)
        y = on.empty(shape, x.dtype)
        keeps = is_grad_enabled()
        argmax = on.empty(y.shape, np.uint8) if keeps else None
        on.kernels.conv2d_pool_forward(
            x,
            *(weights or (conv.weight.memory, bias)),
            self.pool_size,
            self.relu,
            *self._geometry,
            out=y,
            out_argmax=argmax,
            with_argmax=keeps,
        )
        batched = input.ndim == 4
        return shown(y, batched), (x, argmax, batched) if keeps else None

    def backward(self, dout: np.ndarray, kept: list[Any], input_grad: bool) -> np.ndarray | None:
        """Add to the parameters' gradients, return the input's; what forward returned comes from `kept`."""
        conv = self.conv
        x, argmax, batched = kept.pop()
        dout = stored(dout, argmax.shape, x.dtype, batched)
        on, weight, bias = device_of(x), conv.weight, conv.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            on.kernels.conv2d_pool_backward_weight(
                dout,
                argmax,
                x,
                self._kernel_size,
                self.pool_size,
                *self._geometry,
                out=weight.grad_memory if weight.requires_grad else None,
                out_bias=bias.grad_memory if bias is not None and bias.requires_grad else None,
                accumulate=True,
            )
        if not input_grad:
            return None
        shape = x.shape
        # The input's memory may now become its gradient's.
        del x
        dx = on.empty(shape, dout.dtype)
        on.kernels.conv2d_pool_backward_input(
            dout, argmax, weight.memory, shape, self.pool_size, *self._geometry, out=dx
        )
        return shown(dx, batched)


class NormPool:
    """BatchNorm2d, then ReLU or not, then MaxPool2d or not."""

    def __init__(self, norm: BatchNorm2d, relu: bool, pool: MaxPool2d | None):
        self.norm, self.relu, self.pool = norm, relu, pool
        self.pool_size = (1, 1) if pool is None else pool.kernel_size

    def forward(self, input: np.ndarray) -> tuple[np.ndarray, Any]:
        """The result, and what backward needs."""
        norm = self.norm
        x, batch_statistics, running, momentum = norm._begin(input)
        n, h, w, c = x.shape
        _, height, width = pooled((c, h, w), self.pool)
        on = device_of(x)
        y = on.empty((n, height, width, c), x.dtype)
        argmax = on.empty(y.shape, np.uint8)
        _, _, mean, inv_std = on.kernels.batch_norm_pool_forward(
            x,
            None if norm.weight is None else norm.weight.memory,
            None if norm.bias is None else norm.bias.memory,
            *running,
            batch_statistics,
            self.pool_size,
            self.relu,
            momentum,
            norm.eps,
            out=y,
            out_argmax=argmax,
        )
        saved = (x, argmax, mean, inv_std, batch_statistics) if is_grad_enabled() else None
        return shown(y, True), saved

    def backward(self, dout: np.ndarray, kept: list[Any], input_grad: bool) -> np.ndarray | None:
        """Add to the parameters' gradients, return the input's; what forward returned comes from `kept`."""
        norm = self.norm
        x, argmax, mean, inv_std, batch_statistics = kept.pop()
        on = device_of(x)
        dx = on.empty(x.shape, x.dtype)
        grads = [
            parameter.grad_memory if parameter is not None and parameter.requires_grad else None
            for parameter in (norm.weight, norm.bias)
        ]
        on.kernels.batch_norm_pool_backward(
            stored(dout, argmax.shape, x.dtype, True),
            argmax,
            x,
            None if norm.weight is None else norm.weight.memory,
            mean,
            inv_std,
            batch_statistics,
            self.pool_size,
            out=dx,
            out_dweight=grads[0],
            out_dbias=grads[1],
            accumulate=True,
        )
        return shown(dx, True) if input_grad else None


class ConvNorm:
    """Conv2d, then what NormPool does.

    Without gradients and with running statistics, y = (x * w + b - mean) * scale + shift is the convolution
    x * (w scale) with the bias (b - mean) * scale + shift.
    """

    def __init__(self, conv: Conv2d, norm: NormPool):
        self.conv, self.norm = conv, norm
        self.folded = ConvPool(conv, norm.relu, norm.pool)

    def forward(self, input: np.ndarray) -> tuple[np.ndarray, Any]:
        """The result, and what backward needs."""
        if self._folds(input):
            return self.folded.forward(input, self._weights())
        return self.norm.forward(self.conv(input))

    def _folds(self, input: Any) -> bool:
        conv, norm = self.conv, self.norm.norm
        if is_grad_enabled() or norm.training or not norm._has_statistics or not norm.eps > 0:
            return False
        # What is wrong with an input is the layers' to say.
        if getattr(input, "ndim", 0) != 4 or norm.running_mean.dtype != conv.weight.dtype:
            return False
        if norm.num_features != conv.out_channels or input.shape[1] != conv.in_channels:
            return False
        pixels = input.shape[0] * math.prod(conv.output_shape(input.shape[1:])[1:])
        return conv.weight.size <= pixels * conv.out_channels

    def _weights(self) -> tuple[np.ndarray, np.ndarray]:
        """The convolution's weights and biases, normalised as its results would be."""
        conv, norm = self.conv, self.norm.norm
        mean, var = norm.running_mean, norm.running_var
        scale, shift = (
            None if parameter is None else parameter.memory for parameter in (norm.weight, norm.bias)
        )
        on = device_of(mean)
        normalized = on.kernels.batch_norm_forward
        zeros = on.zeros(mean.size, mean.dtype)
        weight = on.empty(conv.weight.memory.shape, mean.dtype)
        normalized(conv.weight.memory, scale, None, zeros, var, False, eps=norm.eps, out=weight)
        bias = (zeros if conv.bias is None else conv.bias.memory)[np.newaxis]
        bias, _, _ = normalized(bias, scale, shift, mean, var, False, eps=norm.eps)
        return weight, bias[0]

    def backward(self, dout: np.ndarray, kept: list[Any], input_grad: bool) -> np.ndarray | None:
        """Add to the parameters' gradients, return the input's; what forward returned comes from `kept`."""
        grad: Any = self.norm.backward(dout, kept, True)
        return self.conv.backward(grad, input_grad=input_grad)


class Later:
    """A fused run with a pool, then an activation that stood before the pool.

    Where a learned slope is not above zero, the layers run one by one.
    """

    def __init__(self, run: ConvPool | NormPool, activation: LeakyReLU | PReLU, layers: Sequence[Module]):
        self.run, self.activation, self.layers = run, activation, layers

    def forward(self, input: np.ndarray) -> tuple[np.ndarray, Any]:
        """The result, and what backward needs."""
        activation = self.activation
        slope = activation.weight.memory if isinstance(activation, PReLU) else activation.negative_slope
        if decide(_is_positive, slope):
            x, saved = self.run.forward(input)
            return activation(x), saved
        for layer in self.layers:
            input = layer(input)
        return input, None

    def backward(self, dout: np.ndarray, kept: list[Any], input_grad: bool) -> np.ndarray | None:
        """Add to the parameters' gradients, return the input's; what forward returned comes from `kept`."""
        grad: Any = dout
        if kept[-1] is not None:
            grad = self.activation.backward(grad)
            return self.run.backward(grad, kept, input_grad)
        kept.pop()
        for layer in reversed(self.layers):
            grad = layer.backward(grad, input_grad=input_grad or layer is not self.layers[0])
        return grad


def _is_positive(slope: np.ndarray | float) -> bool:
    return bool((host(slope) > 0).all())


Run = ConvPool | NormPool | ConvNorm | Later

# The layers of the longest run.
_LONGEST = 4


def pooled(shape: tuple[int, int, int], pool: MaxPool2d | None) -> tuple[int, int, int]:
    """The shape of images after `pool`, if there is one."""
    return shape if pool is None else pool.output_shape(shape)


def fuse(layers: Sequence[Module], shared: Callable[[Module], bool]) -> list[tuple[int, int, Run | None]]:
    """Cut `layers` into runs: (first, last + 1, the run, or None for a single layer on its own).

    Layers that are `shared` with another call stay on their own.
    """
    plan: list[tuple[int, int, Run | None]] = []
    first = 0
    while first < len(layers):
        count, run = 1, None
        if not shared(layers[first]):
            open_end = next((i for i in range(first, len(layers)) if shared(layers[i])), len(layers))
            count, run = _run(layers[first : min(open_end, first + _LONGEST)])
        plan.append((first, first + count, run))
        first += count
    return plan


def _run(layers: Sequence[Any]) -> tuple[int, Run | None]:
    """The longest run at the beginning of `layers`: how many of them, and the run."""
    head, *rest = layers
    if not (is_exactly(head, Conv2d) and head.padding_mode == "zeros") and not is_exactly(head, BatchNorm2d):
        return 1, None
    if isinstance(head, Conv2d) and rest and is_exactly(rest[0], BatchNorm2d):
        count, run = _run(rest)
        return (count + 1, ConvNorm(head, run)) if isinstance(run, NormPool) else (1, None)
    make: Any = ConvPool if isinstance(head, Conv2d) else NormPool
    kinds = [_kind(layer) for layer in rest]
    if kinds[:2] in (["relu", "pool"], ["pool", "relu"]):
        pool = rest[kinds.index("pool")]
        return 3, make(head, True, pool)
    if kinds[:2] == ["slope", "pool"]:
        return 3, Later(make(head, False, rest[1]), rest[0], layers[:3])
    if kinds[:1] == ["relu"]:
        return 2, make(head, True, None)
    if kinds[:1] == ["pool"]:
        return 2, make(head, False, rest[0])
    return 1, None


def is_exactly(layer: Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether `layer` is of exactly this class, and nobody gave it a forward or backward of its own."""
    return type(layer) is kind and not {"forward", "backward"} & vars(layer).keys()


def _kind(layer: Module) -> str:
    if is_exactly(layer, ReLU):
        return "relu"
    if is_exactly(layer, PReLU) or is_exactly(layer, LeakyReLU):
        return "slope"
    if is_exactly(layer, MaxPool2d):
        touches = layer.stride == layer.kernel_size and layer.padding == (0, 0) and layer.dilation == (1, 1)
        small = layer.kernel_size[0] * layer.kernel_size[1] <= _MOST_PIXELS
        if touches and small and not layer.ceil_mode and not layer.return_indices:
            return "pool"
    return ""


class Plan:
    """The runs of one Sequential, found again when any module anywhere has changed."""

    def __init__(self) -> None:
        self._version = -1
        self._runs: list[tuple[int, int, Run | None]] = []

    def runs(
        self, layers: Sequence[Module], shared: Callable[[Module], bool]
    ) -> list[tuple[int, int, Run | None]]:
        """See `fuse`."""
        if not _Switch.enabled:
            return [(i, i + 1, None) for i in range(len(layers))]
        version = structure_version()
        if version != self._version:
            self._runs, self._version = fuse(layers, shared), version
        return self._runs
