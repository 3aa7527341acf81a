"""Layers, with torch.nn's names, signatures, parameter shapes and numerics, on NumPy arrays.

``y = layer(x)`` runs a layer, ``dx = layer.backward(dy)`` goes back through it and adds to the gradients of
its parameters. Images are (N, C, H, W); they are stored channels-last.
"""

from . import init
from .activation import Identity, LeakyReLU, LogSoftmax, PReLU, ReLU, Softmax
from .batchnorm import BatchNorm1d, BatchNorm2d
from .container import Residual, Sequential
from .conv import Conv2d
from .dropout import Dropout
from .linear import Flatten, Linear, Unflatten
from .loss import CrossEntropyLoss
from .module import Module
from .parameter import Parameter
from .pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "Identity",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "Module",
    "PReLU",
    "Parameter",
    "ReLU",
    "Residual",
    "Sequential",
    "Softmax",
    "Unflatten",
    "init",
]
