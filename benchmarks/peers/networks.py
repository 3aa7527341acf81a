"""The named networks with the same initial state for every side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
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


def _residual(filters: int, stride: int, channels: int) -> nn.Residual:
    """Two convolutions of 3x3, and a way around them: a convolution of 1x1 where the shapes differ."""
    body = [
        nn.Conv2d(channels, filters, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(filters),
        nn.ReLU(),
        nn.Conv2d(filters, filters, 3, padding=1, bias=False),
        nn.BatchNorm2d(filters),
    ]
    around = [nn.Conv2d(channels, filters, 1, stride=stride, bias=False), nn.BatchNorm2d(filters)]
    return nn.Residual(nn.Sequential(*body), nn.Sequential(*around) if stride > 1 else None, nn.ReLU())


def _resnet20() -> list[nn.Module]:
    """As He et al., "Deep residual learning for image recognition" (2016), section 4.2."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    return [_residual(after, after // before, before) for before, after in pairwise(widths)]


def _body(shape: Model) -> list[nn.Module]:
    """What lies between images and the first linear layer."""
    if shape.model == "lenet5":
        first = nn.Conv2d(shape.c, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        return [*first, nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    if shape.model == "resnet20":
        stem = nn.Conv2d(shape.c, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        return [*stem, *_resnet20(), nn.AvgPool2d((shape.h // 4, shape.w // 4))]
    stem = nn.Conv2d(shape.c, 32, 3, padding=1), nn.ReLU()
    if shape.model == "separable":
        return [
            *stem,
            *_separable(64, 1, 32),
            *_separable(128, 2, 64),
            *_separable(128, 1, 128),
            nn.AvgPool2d(4),
        ]
    return [*stem, *_grouped(32, 64), *_grouped(64, 128)]


def _blocks(shape: Model) -> nn.Sequential:
    """The networks of `shapes.BLOCKS`."""
    layers = [*_body(shape), nn.Flatten()]
    features = nn.Sequential(*layers).output_shape((shape.c, shape.h, shape.w))[0]
    # LeNet-5 is that of LeCun et al. (1998) with ReLU and maxima, as it is written today.
    for outputs in (120, 84) if shape.model == "lenet5" else ():
        layers += [nn.Linear(features, outputs), nn.ReLU()]
        features = outputs
    return nn.Sequential(*layers, nn.Linear(features, shape.classes))


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
