"""ResNet-9, with which the second half of the CIFAR-10 diary (document B) works.

He et al., "Deep residual learning for image recognition" (2016), in the small form of the notebook that the
diary follows: 64 and 128 filters, a residual block, 256 and 512, a residual block, a linear layer.
"""

from __future__ import annotations

from .. import nn
from ._build import Shape, he


def _block(channels: int, filters: int, pool: bool = False) -> list[nn.Module]:
    # BatchNorm's shift makes a bias of the convolution superfluous.
    conv = nn.Conv2d(channels, filters, 3, padding=1, bias=False)
    block = [conv, nn.BatchNorm2d(filters), nn.ReLU()]
    return [*block, nn.MaxPool2d(2)] if pool else block


def _residual(channels: int) -> nn.Residual:
    return nn.Residual(nn.Sequential(*_block(channels, channels), *_block(channels, channels)))


def resnet9(input_shape: Shape = (3, 32, 32), num_classes: int = 10) -> nn.Sequential:
    """Build it for images of (C, H, W), 8x8 pixels or more.

    The last pooling takes the maximum of the whole map, which is 4x4 for CIFAR's 32x32.
    """
    body = nn.Sequential(
        nn.Sequential(*_block(input_shape[0], 64)),
        nn.Sequential(*_block(64, 128, pool=True)),
        _residual(128),
        nn.Sequential(*_block(128, 256, pool=True)),
        nn.Sequential(*_block(256, 512, pool=True)),
        _residual(512),
    )
    size = body.output_shape(input_shape)[1:]
    return he(nn.Sequential(*body, nn.MaxPool2d(size), nn.Flatten(), nn.Linear(512, num_classes)))
