"""An MNIST network out of the layers of the Chapter 9 notebook (document C).

The notebook builds 'same' and 'valid' convolution, max and average pooling, Flatten, Dense and Dropout from
scratch and tries them one or two at a time; this network uses each of them.
"""

from __future__ import annotations

from .. import nn
from ._build import Shape, features, he


def chapter9(input_shape: Shape = (1, 28, 28), num_classes: int = 10) -> nn.Sequential:
    """Build it for images of (C, H, W); the softmax is the loss's."""
    body = [
        nn.Conv2d(input_shape[0], 16, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
    ]
    hidden = nn.Linear(features(body, input_shape), 64)
    head = [hidden, nn.ReLU(), nn.Dropout(0.25), nn.Linear(64, num_classes)]
    return he(nn.Sequential(*body, *head))
