"""The networks of the source documents, and ResNet-9, each for any size of image and number of classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .. import nn
from .._random import default_generator, using
from ..kernels import checks
from .chapter9 import chapter9
from .cifar import cifar_batchnorm, cifar_small
from .emotion import emotion
from .mnist import mnist_prelu
from .resnet import resnet9

__all__ = [
    "chapter9",
    "cifar_batchnorm",
    "cifar_small",
    "create",
    "emotion",
    "mnist_prelu",
    "names",
    "resnet9",
]

_MODELS = {
    "emotion": emotion,
    "cifar-small": cifar_small,
    "cifar-batchnorm": cifar_batchnorm,
    "chapter9": chapter9,
    "mnist-prelu": mnist_prelu,
    "resnet9": resnet9,
}


def names() -> list[str]:
    """What `create` can build."""
    return list(_MODELS)


def create(name: str, input_shape: Sequence[int], num_classes: int, seed: int | None = None) -> nn.Sequential:
    """Build a model by name.

    Parameters
    ----------
    name : str
        One of `names()`.
    input_shape : (C, H, W)
    num_classes : int
    seed : int, optional
        Draws the initial values, and leaves the default generator as it is; the default generator draws
        them where it is None.

    Returns
    -------
    Sequential
        ``net.config`` holds `name`, `input_shape` and `num_classes`.

    Raises
    ------
    ValueError
        If there is no such model, or the image is too small for it.
    """
    if name not in _MODELS:
        raise ValueError(f"name: {name!r} is none of {', '.join(_MODELS)}")
    if np.shape(input_shape) != (3,):
        raise ValueError(f"input_shape: expected (C, H, W), got {input_shape!r}")
    channels, height, width = (checks.integer("input_shape", size, 1) for size in input_shape)
    classes = checks.integer("num_classes", num_classes, 1)
    with using(default_generator() if seed is None else np.random.default_rng(seed)):
        try:
            net = _MODELS[name]((channels, height, width), classes)
        except ValueError as error:
            raise ValueError(
                f"input_shape: {(channels, height, width)} is too small for {name!r}: {error}"
            ) from None
    net.config = {"name": name, "input_shape": (channels, height, width), "num_classes": classes}
    return net
