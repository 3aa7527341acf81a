"""The two NumPy networks of the CIFAR-10 diary (document B)."""

from __future__ import annotations

from .. import nn
from ._build import Shape, features, he


def cifar_small(input_shape: Shape = (3, 32, 32), num_classes: int = 10) -> nn.Sequential:
    """The diary's network of 27/03/2025, which fitted ten samples in 37 epochs; the softmax is the loss's."""
    body = [
        nn.Conv2d(input_shape[0], 10, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(10, 10, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    hidden = nn.Linear(features(body, input_shape), 64)
    return he(nn.Sequential(*body, hidden, nn.ReLU(), nn.Linear(64, num_classes)))


def cifar_batchnorm(input_shape: Shape = (3, 32, 32), num_classes: int = 10) -> nn.Sequential:
    """The diary's network of 16/04/2025, with BatchNorm and dropout, which reached 61% on the test set."""
    body = [
        nn.Conv2d(input_shape[0], 10, 7),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
    ]
    hidden = nn.Linear(features(body, input_shape), 300)
    return he(nn.Sequential(*body, hidden, nn.LeakyReLU(), nn.Linear(300, num_classes)))
