"""BatchNorm1d and BatchNorm2d."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._device import device_of
from ..kernels.threads import between_jobs
from . import settings
from ._arrays import channels_first, channels_last, float_dtype, floats, gradient
from .module import Module
from .parameter import Parameter


class _BatchNorm(Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var of each channel (axis 1).

    Ioffe & Szegedy, "Batch normalization" (2015), algorithm 1. Training takes the batch's mean and biased
    variance, and moves the running ones, r = (1 - momentum) * r + momentum * batch, with the unbiased
    variance; evaluation takes the running ones.

    Parameters
    ----------
    num_features : int
        C.
    eps : float
    momentum : float or None
        None: the running statistics are the plain mean over all batches.
    affine : bool
        Whether there are weight and bias.
    track_running_stats : bool
        False: there are none, and evaluation takes the batch's statistics too. Set to False later, it stops
        training from moving those that there are, which evaluation takes nevertheless, as in PyTorch.
    dtype : float32 or float64

    Attributes
    ----------
    weight, bias : Parameter (C,) or None
        Ones and zeros at first.
    running_mean, running_var : (C,) array or None
    num_batches_tracked : int64 array or None
    """

    weight: Parameter | None
    bias: Parameter | None
    running_mean: np.ndarray
    running_var: np.ndarray
    num_batches_tracked: np.ndarray
    _ranks: tuple[int, ...]
    eps: float
    momentum: float | None
    _setting_checks: ClassVar = {
        "num_features": settings.count,
        "eps": settings.number,
        "momentum": settings.optional(settings.number),
        "affine": settings.flag,
        "track_running_stats": settings.flag,
    }

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: Any = np.float32,
    ):
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        features, dtype = self.num_features, float_dtype(dtype)
        self.register_parameter("weight", Parameter(np.ones(features, dtype)) if affine else None)
        self.register_parameter("bias", Parameter(np.zeros(features, dtype)) if affine else None)
        tracked = self.track_running_stats
        self.register_buffer("running_mean", np.zeros(features, dtype) if tracked else None)
        self.register_buffer("running_var", np.ones(features, dtype) if tracked else None)
        self.register_buffer("num_batches_tracked", np.array(0, np.int64) if tracked else None)

    @property
    def _has_statistics(self) -> bool:
        """Whether there are running statistics; `track_running_stats` says whether training moves them."""
        return self.running_mean is not None

    def reset_running_stats(self) -> None:
        """Start the running statistics afresh."""
        if self._has_statistics:
            self.running_mean[...] = 0
            self.running_var[...] = 1
            self.num_batches_tracked[...] = 0

    def reset_parameters(self) -> None:
        """Start running statistics, weight and bias afresh."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            self.weight.data[...] = 1
            self.bias.data[...] = 0

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)

    def _like(self) -> np.ndarray | None:
        """An array of the layer's dtype and on its device."""
        return self.weight.memory if self.weight is not None else self.running_mean

    def _input(self, input: np.ndarray, batch_statistics: bool) -> np.ndarray:
        x = floats("input", input, self._like())
        if x.ndim not in self._ranks:
            ranks = " or ".join(map(str, self._ranks))
            raise ValueError(f"input: expected {ranks} axes, got shape {x.shape}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"input: shape {x.shape} has {x.shape[1]} channels, the layer takes {self.num_features}"
            )
        if batch_statistics and x.size <= self.num_features:
            raise ValueError(
                f"input: batch statistics need two values of each channel or more, got shape {x.shape}"
            )
        return channels_last(x)

    def _begin(self, input: np.ndarray) -> tuple[np.ndarray, bool, tuple[Any, Any], float]:
        """Count a forward pass: its input, channels last, whether the batch's statistics serve, which
        running statistics take part, and with what momentum they change."""
        batch_statistics = self.training or not self._has_statistics
        x = self._input(input, batch_statistics)
        track = self.training and self.track_running_stats and self._has_statistics
        momentum = self.momentum
        if track:
            count = self.num_batches_tracked
            between_jobs(np.add, count, 1, count)
            if momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        running = (self.running_mean, self.running_var) if track or not batch_statistics else (None, None)
        return x, batch_statistics, running, 0.0 if momentum is None else momentum

    def forward(self, input: np.ndarray) -> np.ndarray:
        """Normalise (N, C, ...)."""
        x, batch_statistics, running, momentum = self._begin(input)
        on = device_of(x)
        y = on.empty(x.shape, x.dtype)
        weight = None if self.weight is None else self.weight.memory
        bias = None if self.bias is None else self.bias.memory
        _, mean, inv_std = on.kernels.batch_norm_forward(
            x,
            weight,
            bias,
            *running,
            batch_statistics,
            momentum,
            self.eps,
            out=y,
        )
        self._keep(x, mean, inv_std, batch_statistics)
        return channels_first(y)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Add to the gradients of weight and bias; return the input's."""
        x, mean, inv_std, batch_statistics = self._kept()
        dout = channels_last(gradient(dout, channels_first(x).shape, x.dtype))
        on = device_of(x)
        dx = on.empty(x.shape, x.dtype)
        weight = None if self.weight is None else self.weight.memory
        dweight, dbias = (
            parameter.grad_memory if parameter is not None and parameter.requires_grad else None
            for parameter in (self.weight, self.bias)
        )
        on.kernels.batch_norm_backward(
            dout,
            x,
            weight,
            mean,
            inv_std,
            batch_statistics,
            out=dx,
            out_dweight=dweight,
            out_dbias=dbias,
            accumulate=True,
        )
        self._forget()
        return channels_first(dx) if input_grad else None

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    __doc__ = f"Batch normalisation of (N, C) or (N, C, L).\n\n{_BatchNorm.__doc__}"
    _ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    __doc__ = f"Batch normalisation of (N, C, H, W).\n\n{_BatchNorm.__doc__}"
    _ranks = (4,)
