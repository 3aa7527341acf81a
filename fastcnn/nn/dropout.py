"""Dropout."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .._device import device_of
from .._random import draw_seed
from ..kernels.threads import between_jobs
from . import settings
from ._arrays import contiguous, floats, gradient, inverse, memory_order
from .module import Module


def _draw(seed: np.ndarray) -> None:
    seed[...] = draw_seed()


class Dropout(Module):
    """In training each value is zeroed with probability `p`, the others are divided by 1 - p; else the
    identity.

    Srivastava et al., "Dropout" (2014), section 10 (inverted). The mask is not stored: backward draws it
    again from the seed, one number that each forward pass takes from ``fastcnn.default_generator()``.

    Parameters
    ----------
    p : float
        Between 0 and 1.
    inplace : bool
        Accepted for the sake of PyTorch code; the input is never modified.
    """

    p: float
    _setting_checks: ClassVar = {"p": settings.share, "inplace": settings.flag}

    def __init__(self, p: float = 0.5, inplace: bool = False):
        super().__init__()
        self.p, self.inplace = p, inplace

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the input."""
        return tuple(input_shape)

    def forward(self, input: np.ndarray) -> np.ndarray:
        """(...) to (...)."""
        x = floats("input", input)
        if not self.training or self.p == 0:
            self._keep(None, x.shape, x.dtype, None)
            return x
        order = memory_order(x)
        stored = contiguous(x.transpose(order))
        on = device_of(x)
        y = on.empty(stored.shape, x.dtype)
        seed = np.empty((), np.uint64)
        between_jobs(_draw, seed)
        on.kernels.dropout_forward(stored, self.p, seed, out=y)
        self._keep(order, x.shape, x.dtype, seed)
        return y.transpose(inverse(order))

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of the input."""
        order, shape, dtype, seed = self._kept()
        dout = gradient(dout, shape, dtype)
        self._forget()
        if not input_grad:
            return None
        if order is None:
            return dout
        dout = contiguous(dout.transpose(order))
        on = device_of(dout)
        dx = on.empty(dout.shape, dtype)
        on.kernels.dropout_backward(dout, self.p, seed, out=dx)
        return dx.transpose(inverse(order))

    def extra_repr(self) -> str:
        return f"p={self.p}, inplace={self.inplace}"
