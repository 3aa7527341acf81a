"""A layer held still, so that it can be differentiated numerically."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

import fastcnn


class FixedFunction:
    """A layer as a function of its input and parameters alone.

    Every call starts from the same state of the random generator, so that dropout drops the same elements.
    On leaving the ``with`` block the generator, the parameters and the running statistics are as they were,
    and the gradients are zero.
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.name = type(layer).__name__

    def __enter__(self) -> FixedFunction:
        self._generator = fastcnn.default_generator()
        self._state = self._generator.bit_generator.state
        self._values = self.layer.state_dict()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._generator.bit_generator.state = self._state
        self.layer.load_state_dict(self._values)
        self.layer.zero_grad()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The layer's output, in an array of its own."""
        self._generator.bit_generator.state = self._state
        return np.array(self.layer(x))

    def backward(self, x: np.ndarray, dout: np.ndarray) -> np.ndarray:
        """Gradient of ``sum(layer(x) * dout)`` with respect to `x`; the parameters' go to their ``.grad``."""
        self.layer.zero_grad()
        self(x)
        return np.array(self.layer.backward(dout))
