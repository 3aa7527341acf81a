"""The named networks with the same initial state for every side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def _inverted(filters: int, stride: int, channels: int) -> nn.Module:
    """A block of MobileNetV2, six times as wide inside: Sandler et al. (2018), table 1."""
    inside = 6 * channels
    body = nn.Sequential(
        nn.Conv2d(channels, inside, 1, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(),
        nn.Conv2d(inside, inside, 3, stride=stride, padding=1, groups=inside, bias=False),
        nn.BatchNorm2d(inside),
        nn.ReLU(),
        nn.Conv2d(inside, filters, 1, bias=False),
        nn.BatchNorm2d(filters),
    )
    return nn.Residual(body) if stride == 1 and filters == channels else body


def _stem(shape: Model) -> list[nn.Module]:
    return [nn.Conv2d(shape.c, 32, 3, padding=1), nn.ReLU()]


def _separable_body(shape: Model) -> list[nn.Module]:
    blocks = *_separable(64, 1, 32), *_separable(128, 2, 64), *_separable(128, 1, 128)
    return [*_stem(shape), *blocks, nn.AvgPool2d(4)]


def _grouped_body(shape: Model) -> list[nn.Module]:
    return [*_stem(shape), *_grouped(32, 64), *_grouped(64, 128)]


def _lenet5_body(shape: Model) -> list[nn.Module]:
    """That of LeCun et al. (1998) with ReLU and maxima, as it is written today."""
    first = nn.Conv2d(shape.c, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)
    return [*first, nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]


def _resnet20_body(shape: Model) -> list[nn.Module]:
    stem = nn.Conv2d(shape.c, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return [*stem, *_resnet20(), nn.AvgPool2d((shape.h // 4, shape.w // 4))]


def _eegnet_body(shape: Model) -> list[nn.Module]:
    """EEGNet-8,2 over electrodes x samples: Lawhern et al. (2018), table 2, with ReLU for ELU."""
    return [
        nn.Conv2d(shape.c, 8, (1, 64), padding=(0, 32), bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, (shape.h, 1), groups=8, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d((1, 4)),
        nn.Dropout(0.25),
        nn.Conv2d(16, 16, (1, 16), padding=(0, 8), groups=16, bias=False),
        nn.Conv2d(16, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AvgPool2d((1, 8)),
        nn.Dropout(0.25),
    ]


def _dqn_body(shape: Model) -> list[nn.Module]:
    """Of frames of a game: Mnih et al., "Human-level control" (2015), methods."""
    layers = nn.Conv2d(shape.c, 32, 8, stride=4), nn.Conv2d(32, 64, 4, stride=2), nn.Conv2d(64, 64, 3)
    return [step for layer in layers for step in (layer, nn.ReLU())]


def _mobilenetv2_body(shape: Model) -> list[nn.Module]:
    blocks = _inverted(24, 1, 16), _inverted(24, 1, 24), _inverted(32, 2, 24), _inverted(32, 1, 32)
    stem = nn.Conv2d(shape.c, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return [*stem, *blocks, nn.AdaptiveAvgPool2d(1)]


# What lies between images and the first linear layer of the networks of `shapes.BLOCKS`, and the outputs of
# the linear layers before the last.
_BLOCKS: dict[str, tuple[Callable[[Model], list[nn.Module]], tuple[int, ...]]] = {
    "separable": (_separable_body, ()),
    "grouped": (_grouped_body, ()),
    "lenet5": (_lenet5_body, (120, 84)),
    "resnet20": (_resnet20_body, ()),
    "eegnet": (_eegnet_body, ()),
    "dqn": (_dqn_body, (512,)),
    "mobilenetv2": (_mobilenetv2_body, ()),
}


def _blocks(shape: Model) -> nn.Sequential:
    body, hidden = _BLOCKS[shape.model]
    layers = [*body(shape), nn.Flatten()]
    features = nn.Sequential(*layers).output_shape((shape.c, shape.h, shape.w))[0]
    for outputs in hidden:
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
