"""What the models share: He's initial values, and sizes that follow from the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import nn

Shape = tuple[int, int, int]


def features(layers: Sequence[nn.Module], input_shape: Shape) -> int:
    """Number of values of one image behind `layers`.

    Raises
    ------
    ValueError
        If the image is too small for them.
    """
    shape: tuple[int, ...] = input_shape
    for layer in layers:
        shape = layer.output_shape(shape)
    return math.prod(shape)


def he(net: nn.Sequential, slope: float = 0.0) -> nn.Sequential:
    """Draw weights from N(0, 2 / ((1 + slope^2) fan_in)), biases zero: He et al. (2015), equation 15.

    `slope` is the activations', below zero. The last layer has no activation behind it and keeps PyTorch's
    smaller values, with which the first losses are near the logarithm of the number of classes.
    """
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers[:-1]:
        nn.init.kaiming_normal_(layer.weight, a=slope)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return net
