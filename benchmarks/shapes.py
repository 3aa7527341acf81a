"""The workloads: plain data, append-only.

A workload's name is how results are found again in later runs, so that neither a name nor what it stands for
is ever changed: add a line instead. Images are NHWC.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Conv(NamedTuple):
    """A convolution of n images of h x w pixels and c channels with f filters; padding on each side."""

    n: int
    h: int
    w: int
    c: int
    f: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1


class Pool(NamedTuple):
    """Square windows over n images."""

    n: int
    h: int
    w: int
    c: int
    kernel: int
    stride: int
    padding: int = 0


class Images(NamedTuple):
    """A batch of images."""

    n: int
    h: int
    w: int
    c: int


class Linear(NamedTuple):
    """A linear map of n rows."""

    n: int
    inputs: int
    outputs: int


class Scores(NamedTuple):
    """The scores of n samples."""

    n: int
    classes: int


class Flat(NamedTuple):
    """That many parameters."""

    size: int


class Model(NamedTuple):
    """A named model with n images of (c, h, w)."""

    model: str
    n: int
    c: int
    h: int
    w: int
    classes: int


class Workload(NamedTuple):
    """An operation of `peers.ours` on a shape."""

    name: str
    op: str
    shape: Any


CONVOLUTIONS = {
    # First layers: of the named models, and of ImageNet networks.
    "first-1-3x3-32": Conv(64, 48, 48, 1, 32, 3, padding=1),
    "first-1-3x3-16": Conv(64, 28, 28, 1, 16, 3, padding=1),
    "first-3-5x5-10": Conv(200, 32, 32, 3, 10, 5),
    "first-3-7x7-10": Conv(500, 32, 32, 3, 10, 7),
    "first-3-3x3-64": Conv(64, 32, 32, 3, 64, 3, padding=1),
    "first-3-7x7-64-stride2": Conv(4, 224, 224, 3, 64, 7, stride=2, padding=3),
    # Few channels.
    "10-3x3-10": Conv(200, 14, 14, 10, 10, 3),
    "16-3x3-32": Conv(64, 14, 14, 16, 32, 3),
    "20-3x3-40": Conv(64, 16, 16, 20, 40, 3, padding=1),
    "64-3x3-3": Conv(16, 64, 64, 64, 3, 3, padding=1),
    # 32 to 512 channels.
    "32-3x3-32": Conv(64, 32, 32, 32, 32, 3, padding=1),
    "32-3x3-64": Conv(64, 24, 24, 32, 64, 3, padding=1),
    "64-3x3-64": Conv(32, 32, 32, 64, 64, 3, padding=1),
    "64-3x3-128": Conv(64, 32, 32, 64, 128, 3, padding=1),
    "128-3x3-128": Conv(64, 16, 16, 128, 128, 3, padding=1),
    "256-3x3-256": Conv(32, 14, 14, 256, 256, 3, padding=1),
    "512-3x3-512": Conv(64, 4, 4, 512, 512, 3, padding=1),
    "100-3x3-100": Conv(32, 20, 20, 100, 100, 3, padding=1),
    # One image.
    "one-64-3x3-64": Conv(1, 56, 56, 64, 64, 3, padding=1),
    # Other kernels.
    "64-1x1-64": Conv(32, 32, 32, 64, 64, 1),
    "256-1x1-256": Conv(32, 14, 14, 256, 256, 1),
    "32-5x5-64": Conv(32, 28, 28, 32, 64, 5, padding=2),
    "32-7x7-32": Conv(16, 28, 28, 32, 32, 7, padding=3),
    # Strides, dilation, groups.
    "64-3x3-128-stride2": Conv(32, 32, 32, 64, 128, 3, stride=2, padding=1),
    "64-1x1-128-stride2": Conv(32, 32, 32, 64, 128, 1, stride=2),
    "64-3x3-64-dilation2": Conv(16, 32, 32, 64, 64, 3, padding=2, dilation=2),
    "depthwise-64-3x3": Conv(32, 32, 32, 64, 64, 3, padding=1, groups=64),
    "depthwise-64-3x3-stride2": Conv(32, 32, 32, 64, 64, 3, stride=2, padding=1, groups=64),
    "depthwise-64-5x5": Conv(32, 32, 32, 64, 64, 5, padding=2, groups=64),
    "grouped-128-3x3-128-by4": Conv(32, 16, 16, 128, 128, 3, padding=1, groups=4),
    "grouped-128-3x3-128-by32": Conv(32, 16, 16, 128, 128, 3, padding=1, groups=32),
    # One image, one channel, one filter: SciPy's convolutions.
    "single-28-5x5": Conv(1, 28, 28, 1, 1, 5),
    "single-512-7x7": Conv(1, 512, 512, 1, 1, 7),
}

MAX_POOLS = {
    "48-2x2-32": Pool(64, 48, 48, 32, 2, 2),
    "24-2x2-64": Pool(64, 24, 24, 64, 2, 2),
    "26-2x2-10": Pool(500, 26, 26, 10, 2, 2),
    "56-3x3-64-stride2": Pool(8, 56, 56, 64, 3, 2, padding=1),
}

AVERAGE_POOLS = {
    "12-2x2-32": Pool(64, 12, 12, 32, 2, 2),
    "32-2x2-64": Pool(64, 32, 32, 64, 2, 2),
    "8-8x8-512": Pool(64, 8, 8, 512, 8, 8),
}

BATCH_NORMS = {
    "26-10": Images(500, 26, 26, 10),
    "32-64": Images(64, 32, 32, 64),
    "4-512": Images(64, 4, 4, 512),
}

ACTIVATIONS = {
    "48-32": Images(64, 48, 48, 32),
    "14-64": Images(64, 14, 14, 64),
}

COLUMNS = {
    "24-3x3-32": Conv(64, 24, 24, 32, 64, 3, padding=1),
    "32-5x5-3": Conv(200, 32, 32, 3, 10, 5),
}

LINEARS = {
    "64-9216-128": Linear(64, 9216, 128),
    "500-1690-300": Linear(500, 1690, 300),
    "64-128-7": Linear(64, 128, 7),
    "1-9216-128": Linear(1, 9216, 128),
}

SCORES = {
    "64x7": Scores(64, 7),
    "500x10": Scores(500, 10),
    "256x1000": Scores(256, 1000),
}

# The batch is that of the training step.
MODELS = {
    "emotion": Model("emotion", 64, 1, 48, 48, 7),
    "cifar-batchnorm": Model("cifar-batchnorm", 500, 3, 32, 32, 10),
    "cifar-small": Model("cifar-small", 200, 3, 32, 32, 10),
    "mnist-prelu": Model("mnist-prelu", 64, 1, 28, 28, 10),
    "chapter9": Model("chapter9", 64, 1, 28, 28, 10),
    "resnet9": Model("resnet9", 64, 3, 32, 32, 10),
}

# Networks of other kinds of layers, built by `peers.networks`: depthwise separable, grouped, the two that
# everybody begins with, and those of signals, of games, and of telephones.
BLOCKS = {
    "separable": Model("separable", 64, 3, 32, 32, 10),
    "grouped": Model("grouped", 64, 3, 32, 32, 10),
    "lenet5": Model("lenet5", 64, 1, 28, 28, 10),
    "resnet20": Model("resnet20", 128, 3, 32, 32, 10),
    "eegnet": Model("eegnet", 64, 1, 22, 256, 4),
    "dqn": Model("dqn", 32, 4, 84, 84, 6),
    "mobilenetv2": Model("mobilenetv2", 64, 3, 32, 32, 10),
}

# The networks whose training steps and inference are summed up by a geometric mean.
SUMMARY = ("emotion", "cifar-batchnorm", "cifar-small", "mnist-prelu")

# (operations, shapes): each operation runs on each of the shapes beside it.
_TABLE: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("conv-forward", "conv-input", "conv-weight"), CONVOLUTIONS),
    (("max-pool-forward", "max-pool-backward"), MAX_POOLS),
    (("avg-pool-forward", "avg-pool-backward"), AVERAGE_POOLS),
    (("batch-norm-forward", "batch-norm-backward", "batch-norm-inference"), BATCH_NORMS),
    (
        (
            "relu-forward",
            "relu-backward",
            "leaky-relu-forward",
            "leaky-relu-backward",
            "prelu-forward",
            "prelu-backward",
            "dropout-forward",
        ),
        ACTIVATIONS,
    ),
    (("im2col", "col2im"), COLUMNS),
    (("linear-forward", "linear-input", "linear-weight"), LINEARS),
    (("cross-entropy",), SCORES),
    (("adam",), {"10M": Flat(10_000_000)}),
    (("train",), MODELS),
    (("infer-1",), {name: model._replace(n=1) for name, model in MODELS.items()}),
    (("infer-256",), {name: model._replace(n=256) for name, model in MODELS.items()}),
    (("train",), BLOCKS),
    (("infer-1",), {name: model._replace(n=1) for name, model in BLOCKS.items()}),
    (("infer-256",), {name: model._replace(n=256) for name, model in BLOCKS.items()}),
)

WORKLOADS: dict[str, Workload] = {
    f"{op}/{name}": Workload(f"{op}/{name}", op, shape)
    for ops, shapes in _TABLE
    for op in ops
    for name, shape in shapes.items()
}


def scaled_down(workload: Workload) -> Workload:
    """The same operation with as few images, pixels and rows as still show every edge: for tests."""
    shape = workload.shape
    if isinstance(shape, Conv):
        extent = shape.dilation * (shape.kernel - 1) + 1
        side = max(extent + 2 * shape.stride, 7)
        shape = shape._replace(n=min(shape.n, 2), h=min(shape.h, side), w=min(shape.w, side + 1))
    elif isinstance(shape, Pool):
        side = shape.kernel + 2 * shape.stride
        shape = shape._replace(n=min(shape.n, 3), h=min(shape.h, side), w=min(shape.w, side + 1))
    elif isinstance(shape, Images):
        shape = shape._replace(n=min(shape.n, 3), h=min(shape.h, 5), w=min(shape.w, 6))
    elif isinstance(shape, Linear):
        shape = shape._replace(n=min(shape.n, 5), inputs=min(shape.inputs, 300))
    elif isinstance(shape, Scores):
        shape = shape._replace(n=min(shape.n, 5))
    elif isinstance(shape, Flat):
        shape = Flat(1000)
    else:
        shape = shape._replace(n=min(shape.n, 2), h=min(shape.h, 36), w=min(shape.w, 36))
    return workload._replace(shape=shape)
