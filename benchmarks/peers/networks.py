"""The named networks with the same initial state for every side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastcnn import models, nn
from fastcnn._random import using

from ..shapes import Model

LEARNING_RATE = 1e-5
MODEL_OPS = ("train", "infer-1", "infer-256")


def _separable(filters: int, stride: int, channels: int) -> list[nn.Module]:
    """A depthwise convolution and one of single pixels, as in MobileNet."""
    return [
        nn.Conv2d(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, filters, 1, bias=False),
        nn.BatchNorm2d(filters),
        nn.ReLU(),
    ]


def _grouped(channels: int, filters: int) -> list[nn.Module]:
    """A convolution of groups of four channels and one of single pixels, as in ResNeXt."""
    return [
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels // 4),
        nn.ReLU(),
        nn.Conv2d(channels, filters, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]


def _blocks(shape: Model) -> nn.Sequential:
    """The networks of `shapes.BLOCKS`."""
    stem = [nn.Conv2d(shape.c, 32, 3, padding=1), nn.ReLU()]
    if shape.model == "separable":
        body = [*_separable(64, 1, 32), *_separable(128, 2, 64), *_separable(128, 1, 128), nn.AvgPool2d(4)]
    else:
        body = [*_grouped(32, 64), *_grouped(64, 128)]
    layers = [*stem, *body, nn.Flatten()]
    features = nn.Sequential(*layers).output_shape((shape.c, shape.h, shape.w))
    return nn.Sequential(*layers, nn.Linear(features[0], shape.classes))


def build(shape: Model) -> Any:
    """fastcnn's network; other libraries copy its layers and its state."""
    if shape.model not in models.names():
        with using(np.random.default_rng(0)):
            return _blocks(shape)
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
