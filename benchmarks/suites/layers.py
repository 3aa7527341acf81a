"""Layers of `fastcnn.nn` on their own: what they add to their kernels shows here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from benchmarks import parity

from .common import Timed

_BATCH = 64

# (constructor, positional arguments, shape of one input)
_LAYERS: dict[str, tuple[str, tuple[Any, ...], tuple[int, ...]]] = {
    "Conv2d 32-64": ("Conv2d", (32, 64, 3, 1, 1), (32, 24, 24)),
    "Conv2d 1-32": ("Conv2d", (1, 32, 3, 1, 1), (1, 48, 48)),
    "Linear 9216-128": ("Linear", (9216, 128), (9216,)),
    "BatchNorm2d 64": ("BatchNorm2d", (64,), (64, 32, 32)),
    "MaxPool2d": ("MaxPool2d", (2,), (32, 48, 48)),
    "AvgPool2d": ("AvgPool2d", (2,), (32, 12, 12)),
    "ReLU": ("ReLU", (), (32, 48, 48)),
    "LeakyReLU": ("LeakyReLU", (), (32, 48, 48)),
    "PReLU": ("PReLU", (), (32, 48, 48)),
    "Dropout": ("Dropout", (0.25,), (32, 48, 48)),
    "Flatten": ("Flatten", (), (64, 12, 12)),
}


class _Case(NamedTuple):
    forward: Callable[[], np.ndarray]
    step: Callable[[], np.ndarray]


@cache
def _case(name: str) -> _Case:
    """A layer with its input, checked and compiled."""
    from benchmarks.peers import reference
    from fastcnn import nn

    kind, arguments, shape = _LAYERS[name]
    layer = getattr(nn, kind)(*arguments)
    rng = np.random.default_rng(0)
    # As a layer before it would have left it: channels-last in memory.
    axes = (0, 2, 3, 1) if len(shape) == 3 else (0, 1)
    x = rng.standard_normal((_BATCH, *shape), np.float32)
    x = np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
    layer.eval()
    small = x[:2].transpose(axes)
    expected = reference.run(layer, small.astype(np.float64), False)
    found = layer(x[:2])
    parity.check({"y": found.transpose(axes) if found.ndim == 4 else found}, {"y": expected})
    layer.train()
    dout = np.ones_like(layer(x))

    def step() -> np.ndarray:
        layer(x)
        return layer.backward(dout)

    step()
    return _Case(lambda: layer(x), step)


class Layers(Timed):
    """Forward, and forward with backward to the input and the parameters."""

    params = tuple(_LAYERS)
    param_names = ("layer",)

    def setup(self, name: str) -> None:
        """Compile and check, once a process."""
        self.case = _case(name)

    def time_forward(self, name: str) -> None:
        """In training mode."""
        self.case.forward()

    def time_forward_backward(self, name: str) -> None:
        """Both passes."""
        self.case.step()
