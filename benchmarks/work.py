"""How much arithmetic and memory traffic a workload needs at least, by formula.

FLOPs count a multiply-add as two, on the textbook's direct sum: Winograd's or an FFT's savings show as a rate
above the machine's peak. Zeros of the padding count, as is usual. Bytes count every input array read once and
every output array written once: less is impossible unless a cache still holds them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from .shapes import Conv, Images, Linear, Model, Pool, Scores, Workload

FLOAT = 4
LABEL = 8


class Work(NamedTuple):
    """What a workload asks for: FLOPs and bytes."""

    flops: int
    bytes: int


def outputs(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Windows along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_image(shape: Conv | Pool) -> tuple[int, int]:
    """(Ho, Wo)."""
    dilation = getattr(shape, "dilation", 1)
    height, width = (
        outputs(size, shape.kernel, shape.stride, shape.padding, dilation) for size in (shape.h, shape.w)
    )
    return height, width


def of(workload: Workload) -> Work:
    """The FLOPs and bytes of `workload`."""
    return _FORMULAS[workload.op](workload.shape)


def _conv(s: Conv) -> Work:
    # All three passes are the same sum, N * Ho * Wo * F * kH * kW * C / groups multiply-adds, between an
    # image, an output and a weight array, of which two are read and one is written.
    ho, wo = output_image(s)
    x, y = s.n * s.h * s.w * s.c, s.n * ho * wo * s.f
    weight = s.kernel**2 * (s.c // s.groups) * s.f
    return Work(2 * s.n * ho * wo * weight, FLOAT * (x + y + weight))


def _pool(argmax_bytes: int) -> Any:
    # Compares or adds are no multiply-adds; forward and backward move the same arrays.
    def work(s: Pool) -> Work:
        ho, wo = output_image(s)
        outs = s.n * ho * wo * s.c
        return Work(0, FLOAT * (s.n * s.h * s.w * s.c + outs) + argmax_bytes * outs)

    return work


def _elementwise(arrays: int) -> Any:
    def work(s: Images) -> Work:
        return Work(0, FLOAT * arrays * math.prod(s))

    return work


def _columns(s: Conv) -> Work:
    ho, wo = output_image(s)
    return Work(0, FLOAT * (s.n * s.h * s.w * s.c + s.n * ho * wo * s.kernel**2 * s.c))


def _linear(s: Linear) -> Work:
    arrays = s.n * s.inputs + s.n * s.outputs + s.inputs * s.outputs
    return Work(2 * s.n * s.inputs * s.outputs, FLOAT * arrays)


def _cross_entropy(s: Scores) -> Work:
    # Scores and labels are read, losses and the scores' gradient written.
    return Work(0, FLOAT * (2 * s.n * s.classes + s.n) + LABEL * s.n)


def _adam(s: Any) -> Work:
    # Reads parameter, gradient and both moments, writes all but the gradient.
    return Work(0, FLOAT * 7 * s.size)


def _train(s: Model) -> Work:
    """Three times the forward pass, but for the first layer, whose input needs no gradient.

    Bytes: the parameters are read forward and backward, their gradients written, then Adam's seven; the
    images are read twice. Activations are left out: a cache may hold them.
    """
    layers, parameters = _layers(s)
    flops = 3 * sum(layers) - layers[0]
    return Work(s.n * flops, FLOAT * (10 * parameters + 2 * s.n * s.c * s.h * s.w))


def _infer(s: Model) -> Work:
    layers, parameters = _layers(s)
    return Work(s.n * sum(layers), FLOAT * (parameters + s.n * s.c * s.h * s.w))


@lru_cache(maxsize=64)
def _layers(s: Model) -> tuple[tuple[int, ...], int]:
    """FLOPs of each convolution and linear layer for one image, and the number of parameters."""
    from .peers import networks

    net = networks.build(s)
    layers = layer_flops(net, (s.c, s.h, s.w))
    return tuple(layers), sum(parameter.size for parameter in net.parameters())


def layer_flops(layer: Any, shape: tuple[int, ...]) -> Iterator[int]:
    """FLOPs of each convolution and linear layer in `layer`, for one image of `shape`, without batch axis."""
    kind = type(layer).__name__
    if kind == "Sequential":
        for child in layer:
            yield from layer_flops(child, shape)
            shape = child.output_shape(shape)
    elif kind == "Residual":
        for child in (layer.body, layer.shortcut):
            if child is not None:
                yield from layer_flops(child, shape)
    elif kind == "Conv2d":
        # weight.size is F * C / groups * kH * kW: the multiply-adds of one output pixel.
        _, ho, wo = layer.output_shape(shape)
        yield 2 * ho * wo * layer.weight.size
    elif kind == "Linear":
        yield 2 * layer.weight.size


_FORMULAS: dict[str, Any] = {
    "conv-forward": _conv,
    "conv-input": _conv,
    "conv-weight": _conv,
    "max-pool-forward": _pool(1),
    "max-pool-backward": _pool(1),
    "avg-pool-forward": _pool(0),
    "avg-pool-backward": _pool(0),
    # Training reads x twice, for the statistics first; backward reads dout and x twice.
    "batch-norm-forward": _elementwise(3),
    "batch-norm-backward": _elementwise(5),
    "batch-norm-inference": _elementwise(2),
    "relu-forward": _elementwise(2),
    "relu-backward": _elementwise(3),
    "leaky-relu-forward": _elementwise(2),
    "leaky-relu-backward": _elementwise(3),
    "prelu-forward": _elementwise(2),
    "prelu-backward": _elementwise(3),
    "dropout-forward": _elementwise(2),
    "im2col": _columns,
    "col2im": _columns,
    "linear-forward": _linear,
    "linear-input": _linear,
    "linear-weight": _linear,
    "cross-entropy": _cross_entropy,
    "adam": _adam,
    "train": _train,
    "infer-1": _infer,
    "infer-256": _infer,
}
