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


def he(net: nn.Sequential) -> nn.Sequential:
    """Draw weights from N(0, 2 / fan_in), for ReLUs behind them, and start biases at zero: He et al. (2015).

    The last layer has no ReLU behind it and is drawn from N(0, 1 / fan_in).
    """
    layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is layers[-1] else "relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return net
