"""The network of the emotion-recognition diary (document A), "CNN we are building".

Conv, ReLU, pool, conv, ReLU, pool, fully connected, ReLU, fully connected, softmax, on 48x48 grey faces of
seven emotions. The diary gives no widths: 32 and 64 filters of 3x3 and 128 hidden units are ours.
"""

from __future__ import annotations

from .. import nn
from ._build import Shape, features, he


def emotion(input_shape: Shape = (1, 48, 48), num_classes: int = 7) -> nn.Sequential:
    """Build it for images of (C, H, W); the softmax is the loss's."""
    body = [
        nn.Conv2d(input_shape[0], 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    ]
    hidden = nn.Linear(features(body, input_shape), 128)
    return he(nn.Sequential(*body, hidden, nn.ReLU(), nn.Linear(128, num_classes)))
