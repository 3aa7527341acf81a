"""The network of the MNIST cookbook (document D)."""

from __future__ import annotations

from .. import nn
from ._build import Shape, features, he


def mnist_prelu(input_shape: Shape = (1, 28, 28), num_classes: int = 10) -> nn.Sequential:
    """32 and 64 filters of 3x3, learned slopes (PReLU), 128 hidden units, dropout of one half.

    The cookbook's first fully connected layer takes 1024 values; here their number follows from the image.
    """
    body = [
        nn.Conv2d(input_shape[0], 32, 3, padding=1),
        nn.PReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.PReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    hidden = nn.Linear(features(body, input_shape), 128)
    head = [hidden, nn.PReLU(), nn.Dropout(0.5), nn.Linear(128, num_classes)]
    return he(nn.Sequential(*body, *head), slope=0.25)
