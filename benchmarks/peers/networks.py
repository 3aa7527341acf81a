"""The named networks with the same initial state for every side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastcnn import models

from ..shapes import Model

LEARNING_RATE = 1e-5
MODEL_OPS = ("train", "infer-1", "infer-256")


def build(shape: Model) -> Any:
    """fastcnn's network; other libraries copy its layers and its state."""
    return models.create(
        shape.model, input_shape=(shape.c, shape.h, shape.w), num_classes=shape.classes, seed=0
    )


def images(x: np.ndarray) -> np.ndarray:
    """(N, H, W, C) shown as (N, C, H, W)."""
    return x.transpose(0, 3, 1, 2)


@contextmanager
def without_dropout(net: Any) -> Iterator[None]:
    """Let a network of fastcnn's or PyTorch's drop nothing, so that two sides can be compared."""
    layers = [layer for layer in net.modules() if type(layer).__name__ == "Dropout"]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = 0.0
    try:
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
