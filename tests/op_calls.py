"""Calls of every operation of the kernels' interface: cases by name, and the arguments of a case.

Their shapes cover one image, one channel, channels around the length of a vector, images that are not square,
every stride, padding and dilation, and empty batches. The case "large" has work for a second thread.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from fastcnn.kernels import reference

Arguments = dict[str, Any]

ASYMMETRIC = ((0, 2), (1, 0))


def _normal(rng: np.random.Generator, dtype: type, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def _output(shape: tuple, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, int]:
    """(Ho, Wo) of windows over images of (N, H, W, C)."""
    kernel, stride, dilation = (np.broadcast_to(value, 2) for value in (kernel, stride, dilation))
    pads = np.sum(padding, axis=1) if np.ndim(padding) == 2 else 2 * np.broadcast_to(padding, 2)
    sizes = (np.array(shape[1:3]) + pads - dilation * (kernel - 1) - 1) // stride + 1
    return int(sizes[0]), int(sizes[1])


# ------------------------------------------------------------------ windows as columns

COLUMNS = {
    # x, kernel_size, stride, padding, dilation
    "one pixel": ((1, 1, 1, 1), 1, 1, 0, 1),
    "one channel": ((1, 5, 7, 1), 3, 1, 1, 1),
    "three channels": ((2, 7, 6, 3), (3, 2), (2, 1), ASYMMETRIC, 1),
    "dilated": ((2, 9, 8, 10), 3, 1, (2, 1), (2, 3)),
    "stride 3": ((1, 8, 11, 16), 2, 3, 0, 1),
    "kernel as large as the image": ((3, 4, 5, 17), (4, 5), 1, 0, 1),
    "33 channels": ((1, 3, 4, 33), 3, 2, 1, 1),
    "64 channels": ((1, 4, 3, 64), 1, 1, 0, 1),
    "no images": ((0, 5, 5, 3), 3, 1, 1, 1),
    "large": ((3, 24, 25, 4), 3, 1, 1, 1),
}


def im2col(rng, dtype, x, kernel, stride, padding, dilation) -> Arguments:
    windows = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    return {"x": _normal(rng, dtype, *x), **windows}


def col2im(rng, dtype, x, kernel, stride, padding, dilation) -> Arguments:
    arguments = im2col(rng, dtype, x, kernel, stride, padding, dilation)
    shape = reference.im2col(**arguments).shape
    del arguments["x"]
    return {"cols": _normal(rng, dtype, *shape), "x_shape": x, **arguments}


# ------------------------------------------------------------------ convolution and linear maps

CONVOLUTIONS = {
    # x, filters, kernel, stride, padding, dilation, groups
    "one of each": ((1, 1, 1, 1), 1, (1, 1), 1, 0, 1, 1),
    "one channel": ((2, 7, 5, 1), 3, (3, 3), 1, 1, 1, 1),
    "three channels": ((1, 8, 9, 3), 10, (5, 5), 1, 2, 1, 1),
    "asymmetric": ((2, 6, 7, 3), 16, (3, 2), (2, 1), ASYMMETRIC, 1, 1),
    "stride 2": ((1, 9, 8, 10), 17, (3, 3), 2, 1, 1, 1),
    "stride 3": ((2, 10, 11, 16), 15, (2, 4), 3, (0, 1), 1, 1),
    "stride beyond the kernel": ((1, 9, 10, 3), 4, (1, 2), 3, 0, 1, 1),
    "dilated": ((1, 10, 9, 17), 33, (3, 3), 1, 2, 2, 1),
    "dilated and strided": ((1, 11, 12, 4), 5, (3, 2), (2, 3), 1, (3, 2), 1),
    "kernel as large as the image": ((3, 4, 5, 16), 10, (4, 5), 1, 0, 1, 1),
    "1 x 1": ((2, 3, 5, 33), 64, (1, 1), 1, 0, 1, 1),
    "1 x 1, in blocks": ((5, 11, 13, 24), 40, (1, 1), 1, 0, 1, 1),
    "1 x 1, groups in blocks": ((3, 14, 15, 48), 34, (1, 1), 1, 0, 1, 2),
    "stride 2, in blocks": ((2, 61, 57, 20), 18, (3, 3), 2, 1, 1, 1),
    "64 channels": ((1, 5, 4, 64), 31, (3, 3), 1, 1, 1, 1),
    "three channels, wide": ((2, 12, 13, 3), 33, (5, 5), 1, ((1, 2), (0, 3)), 1, 1),
    "three channels, stride 2": ((1, 40, 44, 3), 64, (7, 7), 2, 3, 1, 1),
    "one channel, in blocks": ((1, 90, 24, 1), 16, (3, 3), 1, 1, 1, 1),
    "two channels, dilated": ((3, 20, 44, 2), 17, (3, 2), (3, 2), ASYMMETRIC, (1, 3), 1),
    "two channels, stride beyond the kernel": ((2, 25, 44, 2), 17, (3, 2), (4, 5), ASYMMETRIC, (2, 1), 1),
    "images in lanes": ((33, 9, 8, 3), 10, (5, 5), 1, 1, 1, 1),
    "images in lanes, stride 2": ((48, 9, 10, 6), 6, (3, 3), 2, 1, 1, 1),
    "groups": ((2, 6, 5, 12), 8, (3, 3), 1, 1, 1, 4),
    "depthwise": ((1, 7, 6, 10), 10, (3, 3), 2, 1, 1, 10),
    "depthwise, 33 channels": ((2, 9, 11, 33), 33, (3, 3), 1, 1, 1, 33),
    "depthwise, 64 channels, stride 2": ((1, 8, 13, 64), 64, (3, 3), 2, 1, 1, 64),
    "depthwise, dilated, asymmetric": ((1, 12, 20, 17), 17, (5, 3), (2, 1), ASYMMETRIC, (1, 2), 17),
    "depthwise, stride beyond the kernel": ((1, 9, 10, 20), 20, (1, 2), 3, 0, 1, 20),
    "depthwise, no input is seen": ((2, 1, 1, 20), 20, (1, 1), 3, 1, 1, 20),
    "depthwise, strides of three and two": ((2, 13, 11, 20), 20, (4, 3), (3, 2), ASYMMETRIC, 1, 20),
    "depthwise, more padding than kernel": ((1, 3, 3, 5), 5, (2, 2), 1, 3, 1, 5),
    "depthwise, 7 x 7": ((1, 19, 6, 32), 32, (7, 7), 1, 3, 1, 32),
    "depthwise, one channel": ((1, 40, 170, 1), 1, (7, 7), 1, 1, 1, 1),
    "depthwise, three channels": ((2, 9, 60, 3), 3, (3, 3), 1, 1, 2, 3),
    "depthwise, 3 x 3, padding of 3": ((2, 6, 5, 20), 20, (3, 3), 1, 3, 1, 20),
    "depthwise, 3 x 3, asymmetric": ((1, 12, 2, 16), 16, (3, 3), 1, ASYMMETRIC, 1, 16),
    "depthwise, 5 x 5": ((2, 11, 9, 40), 40, (5, 5), 1, 2, 1, 40),
    "depthwise, 5 x 5, asymmetric": ((1, 13, 3, 20), 20, (5, 5), 1, ((4, 1), (3, 6)), 1, 20),
    "depthwise, 7 x 7 of fewer pixels": ((2, 3, 2, 20), 20, (7, 7), 1, 3, 1, 20),
    "depthwise, 7 x 7, padding of 8": ((1, 2, 5, 33), 33, (7, 7), 1, ((8, 1), (0, 8)), 1, 33),
    "depthwise, one row": ((2, 1, 9, 16), 16, (3, 3), 1, 1, 1, 16),
    "depthwise, two filters each": ((1, 5, 6, 17), 34, (3, 3), 1, 1, 1, 17),
    "groups of four": ((2, 11, 13, 24), 24, (3, 3), 1, 1, 1, 6),
    "groups of three, strided": ((2, 13, 12, 27), 27, (2, 3), (2, 1), ASYMMETRIC, 1, 9),
    "groups, more filters than channels": ((1, 9, 8, 10), 30, (3, 3), 1, 2, (1, 2), 5),
    "groups, fewer filters than channels": ((1, 7, 12, 36), 18, (1, 1), 1, 0, 1, 9),
    "groups of many": ((2, 13, 10, 36), 40, (3, 3), 1, 1, 1, 2),
    "groups of many, 5 x 5": ((3, 12, 11, 51), 60, (5, 5), 1, 2, 1, 3),
    "more padding than kernel": ((1, 3, 3, 3), 3, (2, 2), 1, 3, 1, 1),
    "few pixels": ((1, 4, 5, 130), 120, (3, 3), 1, 1, 1, 1),
    "few pixels, strided": ((2, 7, 6, 130), 120, (3, 3), (2, 1), ASYMMETRIC, (1, 2), 1),
    "few filters": ((2, 13, 11, 37), 3, (3, 3), 1, 1, 1, 1),
    "few filters, dilated and strided": ((2, 23, 22, 20), 2, (3, 3), (2, 3), ASYMMETRIC, (1, 2), 1),
    "one filter, 1 x 1": ((3, 19, 16, 40), 1, (1, 1), 1, 0, 1, 1),
    "three channels, many filters": ((2, 11, 13, 3), 48, (3, 3), 1, 1, 1, 1),
    "no images": ((0, 6, 6, 3), 4, (3, 3), 1, 1, 1, 1),
    "20 channels, 24 filters": ((2, 14, 13, 20), 24, (3, 3), 1, 1, 1, 1),
    "many channels, dilated": ((2, 16, 15, 32), 32, (3, 3), 1, 2, 2, 1),
    "many channels, 5 x 5": ((3, 14, 13, 32), 32, (5, 5), 1, 2, 1, 1),
    "many filters, 7 x 7, stride 2": ((2, 24, 26, 3), 32, (7, 7), 2, 3, 1, 1),
    "large": ((4, 20, 18, 16), 32, (3, 3), 1, 1, 1, 1),
}


def conv2d_forward(rng, dtype, x, filters, kernel, stride, padding, dilation, groups) -> Arguments:
    return {
        "x": _normal(rng, dtype, *x),
        "weight": _normal(rng, dtype, *kernel, x[3] // groups, filters),
        "bias": _normal(rng, dtype, filters) if filters != 10 else None,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def conv2d_backward_input(rng, dtype, x, filters, kernel, stride, padding, dilation, groups) -> Arguments:
    output = _output(x, kernel, stride, padding, dilation)
    return {
        "dout": _normal(rng, dtype, x[0], *output, filters),
        "weight": _normal(rng, dtype, *kernel, x[3] // groups, filters),
        "x_shape": x,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }


def conv2d_backward_weight(rng, dtype, x, filters, kernel, stride, padding, dilation, groups) -> Arguments:
    arguments = conv2d_backward_input(rng, dtype, x, filters, kernel, stride, padding, dilation, groups)
    del arguments["weight"], arguments["x_shape"]
    return {**arguments, "x": _normal(rng, dtype, *x), "kernel_size": kernel}


POOLED_CONVOLUTIONS = {
    # x, filters, kernel, pool, relu, stride, padding, dilation, groups
    "one of each": ((1, 1, 1, 1), 1, (1, 1), 1, True, 1, 0, 1, 1),
    "ReLU alone": ((2, 7, 5, 3), 17, (3, 3), 1, True, 1, 1, 1, 1),
    "a pool alone": ((2, 8, 9, 16), 10, (3, 3), 2, False, 1, 1, 1, 1),
    "rows and columns left over": ((1, 9, 11, 10), 33, (3, 3), 2, True, 1, (1, 0), 1, 1),
    "oblong windows": ((2, 10, 7, 3), 16, (5, 5), (3, 2), True, 1, 2, 1, 1),
    "one window": ((3, 6, 5, 17), 5, (3, 3), (6, 5), True, 1, 1, 1, 1),
    "asymmetric": ((2, 8, 9, 33), 15, (3, 2), 2, True, 1, ASYMMETRIC, 1, 1),
    "strided": ((1, 17, 15, 20), 31, (3, 3), 2, True, (2, 1), 1, 1, 1),
    "dilated rows": ((1, 12, 9, 17), 16, (3, 3), 2, True, 1, 2, (2, 1), 1),
    "dilated": ((1, 12, 13, 16), 4, (3, 3), 2, True, 1, 2, 2, 1),
    "stride beyond the kernel": ((1, 14, 13, 40), 4, (1, 2), 2, True, 3, 0, 1, 1),
    "more padding than kernel": ((1, 4, 5, 35), 3, (2, 2), 2, True, 1, 3, 1, 1),
    "groups": ((2, 8, 6, 12), 8, (3, 3), 2, True, 1, 1, 1, 4),
    "groups of four": ((2, 10, 9, 20), 20, (3, 3), 2, True, 1, 1, 1, 5),
    "groups of many": ((2, 12, 14, 40), 48, (3, 3), 2, True, 1, 1, 1, 2),
    "long runs": ((1, 6, 6, 130), 16, (3, 3), 2, True, 1, 1, 1, 1),
    "wide": ((1, 4, 70, 16), 16, (3, 3), 2, True, 1, 1, 1, 1),
    "few filters": ((2, 13, 17, 37), 3, (3, 3), 2, True, 1, 1, 1, 1),
    "few filters, ReLU alone": ((1, 16, 15, 40), 2, (5, 5), 1, True, 1, 2, 1, 1),
    "depthwise": ((2, 13, 11, 33), 33, (3, 3), 2, True, 1, 1, 1, 33),
    "depthwise, ReLU alone": ((1, 20, 9, 16), 16, (3, 3), 1, True, 1, 1, 1, 16),
    "depthwise, three channels": ((2, 19, 60, 3), 3, (5, 5), (3, 2), True, 1, 2, 1, 3),
    "depthwise, strided": ((2, 23, 12, 20), 20, (3, 3), 2, False, 2, 1, 1, 20),
    "20 channels, 28 filters": ((2, 14, 12, 20), 28, (3, 3), 2, True, 1, 1, 1, 1),
    "many channels, a pool of three": ((2, 19, 17, 32), 32, (3, 3), 3, True, 1, 1, 1, 1),
    "many channels, dilated, ReLU alone": ((2, 16, 15, 32), 36, (3, 3), 1, True, 1, 2, 2, 1),
    "many channels, wide": ((1, 9, 270, 32), 32, (3, 3), (1, 2), False, 1, 1, 1, 1),
    "many filters, stride 2, a pool of three": ((2, 24, 26, 3), 32, (7, 7), 3, True, 2, 3, 1, 1),
    "no images": ((0, 6, 6, 3), 4, (3, 3), 2, True, 1, 1, 1, 1),
    "large": ((5, 20, 18, 32), 41, (3, 3), 2, True, 1, 1, 1, 1),
}


def conv2d_pool_forward(rng, dtype, x, filters, kernel, pool, relu, *geometry) -> Arguments:
    arguments = conv2d_forward(rng, dtype, x, filters, kernel, *geometry)
    return {**arguments, "pool_size": pool, "relu": relu}


def conv2d_pool_backward_input(rng, dtype, x, filters, kernel, pool, relu, *geometry) -> Arguments:
    forward = conv2d_pool_forward(rng, dtype, x, filters, kernel, pool, relu, *geometry)
    _, argmax = reference.conv2d_pool_forward(**forward)
    for name in ("x", "bias", "relu"):
        del forward[name]
    return {**forward, "dout": _normal(rng, dtype, *argmax.shape), "argmax": argmax, "x_shape": x}


def conv2d_pool_backward_weight(rng, dtype, x, filters, kernel, *settings) -> Arguments:
    arguments = conv2d_pool_backward_input(rng, dtype, x, filters, kernel, *settings)
    del arguments["weight"], arguments["x_shape"]
    return {**arguments, "x": _normal(rng, dtype, *x), "kernel_size": kernel}


LINEAR = {
    # rows, features, filters
    "one of each": (1, 1, 1),
    "few": (2, 3, 5),
    "16 filters": (7, 10, 16),
    "one less": (17, 16, 15),
    "one more": (3, 33, 17),
    "64 features": (5, 64, 33),
    "deep": (4, 700, 10),
    "one row": (1, 40, 150),
    "four rows": (4, 513, 64),
    "no rows": (0, 5, 3),
    "many rows": (400, 90, 300),
    "large": (64, 1037, 301),
    "a row, far weight": (1, 2051, 133),
    "three rows, far weight": (3, 1025, 257),
    "far apart rows of the weight": (9, 270, 1024),
}


def linear_forward(rng, dtype, rows, features, filters) -> Arguments:
    x, weight = _normal(rng, dtype, rows, features), _normal(rng, dtype, features, filters)
    return {"x": x, "weight": weight, "bias": _normal(rng, dtype, filters) if rows != 2 else None}


def linear_backward_input(rng, dtype, rows, features, filters) -> Arguments:
    return {"dout": _normal(rng, dtype, rows, filters), "weight": _normal(rng, dtype, features, filters)}


def linear_backward_weight(rng, dtype, rows, features, filters) -> Arguments:
    return {"dout": _normal(rng, dtype, rows, filters), "x": _normal(rng, dtype, rows, features)}


# ------------------------------------------------------------------ pooling

MAX_POOLS = {
    # x, kernel_size, stride, padding, dilation, ceil_mode
    "one pixel": ((1, 1, 1, 1), 1, None, 0, 1, False),
    "2 x 2": ((2, 6, 8, 3), 2, None, 0, 1, False),
    "overlapping": ((1, 7, 9, 10), 3, 2, 1, 1, False),
    "stride 1": ((1, 5, 4, 16), (2, 3), 1, (1, 0), 1, False),
    "stride 3, asymmetric": ((2, 8, 7, 17), (4, 2), 3, ((0, 2), (1, 0)), 1, False),
    "dilated": ((1, 9, 10, 33), (3, 2), (1, 2), 1, (2, 3), False),
    "rounded up": ((1, 6, 8, 64), 3, 2, 1, 1, True),
    "rounded up beyond the padding": ((2, 5, 7, 3), 2, 3, 1, 1, True),
    "kernel as large as the image": ((3, 4, 5, 15), (4, 5), None, 0, 1, False),
    "a window of padding": ((1, 2, 5, 3), (2, 1), 1, (1, 0), (3, 1), False),
    "more than 256 taps": ((1, 18, 17, 2), 17, 1, 0, 1, False),
    "beside each other": ((2, 9, 14, 5), 3, 1, 1, 1, False),
    "beside each other, dilated": ((2, 9, 13, 17), 3, (2, 1), 1, 2, True),
    "no images": ((0, 4, 4, 3), 2, None, 0, 1, False),
    "large": ((3, 32, 34, 16), 2, None, 0, 1, False),
}


def max_pool2d_forward(rng, dtype, x, kernel, stride, padding, dilation, ceil_mode) -> Arguments:
    return {
        # Few different values: most windows have ties.
        "x": rng.integers(-2, 3, x).astype(dtype),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": ceil_mode,
    }


def max_pool2d_backward(rng, dtype, x, kernel, stride, padding, dilation, ceil_mode) -> Arguments:
    forward = max_pool2d_forward(rng, dtype, x, kernel, stride, padding, dilation, ceil_mode)
    _, argmax = reference.max_pool2d_forward(**forward)
    del forward["x"], forward["ceil_mode"]
    return {"dout": _normal(rng, dtype, *argmax.shape), "argmax": argmax, "x_shape": x, **forward}


AVERAGE_POOLS = {
    # x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    "one pixel": ((1, 1, 1, 1), 1, None, 0, False, True, None),
    "2 x 2": ((2, 6, 8, 3), 2, None, 0, False, True, None),
    "padding counts": ((1, 7, 9, 10), 3, 2, 1, False, True, None),
    "padding does not count": ((1, 7, 9, 16), 3, 2, 1, False, False, None),
    "asymmetric": ((2, 8, 7, 17), (4, 2), 3, ((0, 2), (1, 0)), False, False, None),
    "rounded up": ((1, 6, 8, 33), 3, 2, 1, True, True, None),
    "rounded up, padding does not count": ((1, 6, 9, 64), (3, 2), 2, 1, True, False, None),
    "divisor": ((1, 5, 4, 15), (2, 3), 1, 1, False, True, 5),
    "negative divisor": ((1, 5, 4, 3), 2, 1, 0, False, False, -2),
    "kernel as large as the image": ((3, 4, 5, 3), (4, 5), None, 0, False, True, None),
    "beside each other": ((2, 9, 14, 5), 3, 1, 1, False, True, None),
    "beside each other, padding does not count": ((2, 7, 13, 17), (2, 3), (2, 1), 1, True, False, None),
    "beside each other, with a divisor": ((2, 7, 13, 3), (3, 2), (3, 1), 0, False, True, 5),
    "many channels": ((2, 11, 8, 525), 6, 5, 1, False, True, None),
    "no images": ((0, 4, 4, 3), 2, None, 0, False, True, None),
    "large": ((3, 32, 34, 16), 2, None, 0, False, True, None),
}


def avg_pool2d_forward(rng, dtype, x, kernel, stride, padding, ceil_mode, include, divisor) -> Arguments:
    return {
        "x": _normal(rng, dtype, *x),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "ceil_mode": ceil_mode,
        "count_include_pad": include,
        "divisor_override": divisor,
    }


def avg_pool2d_backward(rng, dtype, x, *settings) -> Arguments:
    forward = avg_pool2d_forward(rng, dtype, x, *settings)
    shape = reference.avg_pool2d_forward(**forward).shape
    del forward["x"]
    return {"dout": _normal(rng, dtype, *shape), "x_shape": x, **forward}


ADAPTIVE_POOLS = {
    # x, output_size
    "one pixel": ((1, 1, 1, 1), 1),
    "even": ((2, 6, 8, 3), (3, 2)),
    "uneven": ((1, 7, 5, 10), (3, 4)),
    "one": ((2, 5, 4, 17), 1),
    "more than there are": ((1, 3, 2, 33), (5, 7)),
    "many channels": ((2, 7, 5, 512), 1),
    "no images": ((0, 4, 4, 3), 2),
    "large": ((3, 33, 32, 16), (7, 5)),
}


def adaptive_avg_pool2d_forward(rng, dtype, x, output_size) -> Arguments:
    return {"x": _normal(rng, dtype, *x), "output_size": output_size}


def adaptive_avg_pool2d_backward(rng, dtype, x, output_size) -> Arguments:
    height, width = np.broadcast_to(output_size, 2)
    return {"dout": _normal(rng, dtype, x[0], height, width, x[3]), "x_shape": x}


GLOBAL_POOLS = {case: (x,) for case, (x, _) in ADAPTIVE_POOLS.items()}


def global_avg_pool2d_forward(rng, dtype, x) -> Arguments:
    return {"x": _normal(rng, dtype, *x)}


def global_avg_pool2d_backward(rng, dtype, x) -> Arguments:
    return {"dout": _normal(rng, dtype, x[0], x[3]), "x_shape": x}


# ------------------------------------------------------------------ element by element, and by channels

ELEMENTS = {
    "one": ((1,),),
    "15": ((15,),),
    "16": ((16,),),
    "17": ((17,),),
    "a block and one less": ((2047,),),
    "a block and one more": ((1025,),),
    "images": ((2, 3, 5, 7),),
    "none": ((0, 4),),
    "large": ((7, 90, 111),),
}

CHANNELS = {
    "one channel": ((5, 1),),
    "3": ((2, 4, 5, 3),),
    "10": ((4, 3, 5, 10),),
    "15": ((3, 15),),
    "16": ((3, 2, 16),),
    "17": ((3, 17),),
    "33": ((2, 33),),
    "64": ((2, 64),),
    "more than a row": ((3, 300),),
    "none": ((0, 7),),
    "large": ((9, 30, 33, 10),),
}


def x(rng, dtype, shape) -> Arguments:
    return {"x": _normal(rng, dtype, *shape)}


def dout(rng, dtype, shape) -> Arguments:
    return {"dout": _normal(rng, dtype, *shape)}


def dout_and_y(rng, dtype, shape) -> Arguments:
    return {"dout": _normal(rng, dtype, *shape), "y": _normal(rng, dtype, *shape).clip(0)}


def leaky_relu_forward(rng, dtype, shape) -> Arguments:
    return {"x": _normal(rng, dtype, *shape), "negative_slope": 0.2}


def leaky_relu_backward(rng, dtype, shape) -> Arguments:
    return {"dout": _normal(rng, dtype, *shape), **leaky_relu_forward(rng, dtype, shape)}


def prelu_forward(rng, dtype, shape) -> Arguments:
    slopes = 1 if shape[-1] in (15, 64) else shape[-1]
    return {"x": _normal(rng, dtype, *shape), "weight": _normal(rng, dtype, slopes)}


def prelu_backward(rng, dtype, shape) -> Arguments:
    return {"dout": _normal(rng, dtype, *shape), **prelu_forward(rng, dtype, shape)}


def dropout(name: str) -> Callable[..., Arguments]:
    def build(rng, dtype, shape) -> Arguments:
        p = {15: 0.0, 16: 1.0, 17: 0.9}.get(prod(shape), 0.3)
        return {name: _normal(rng, dtype, *shape), "p": p, "seed": 2**64 - 5}

    return build


NORMS = {f"{case}, {kind}": (*spec, kind) for case, spec in CHANNELS.items() for kind in ("training", "eval")}
NORMS["large"] = NORMS.pop("large, training")


def batch_norm_forward(rng, dtype, shape, kind) -> Arguments:
    channels = shape[-1]
    mean, weight, bias = (_normal(rng, dtype, channels) for _ in range(3))
    affine = channels not in (16, 33)
    return {
        "x": 3 * _normal(rng, dtype, *shape) + 10 * mean,
        "weight": weight if affine else None,
        "bias": bias if affine else None,
        "running_mean": 10 * mean,
        "running_var": 9 * rng.uniform(0.5, 1.5, channels).astype(dtype),
        "training": kind == "training",
        "momentum": 0.3,
    }


def batch_norm_backward(rng, dtype, shape, kind) -> Arguments:
    forward = batch_norm_forward(rng, dtype, shape, kind)
    _, mean, inv_std = reference.batch_norm_forward(**forward)
    kept = {name: forward[name] for name in ("x", "weight", "training")}
    return {"dout": _normal(rng, dtype, *shape), **kept, "mean": mean, "inv_std": inv_std}


NORM_POOLS = {
    # x, pool_size, relu, training
    "one channel": ((3, 5, 6, 1), 2, True, True),
    "3 channels": ((2, 7, 5, 3), (2, 1), True, True),
    "10 channels, eval": ((2, 6, 7, 10), 2, True, False),
    "15 channels, no ReLU": ((1, 9, 7, 15), 3, False, True),
    "16 channels": ((2, 4, 4, 16), 2, True, True),
    "17 channels, eval, no ReLU": ((2, 5, 4, 17), (1, 3), False, False),
    "33 channels": ((1, 4, 6, 33), 2, True, True),
    "64 channels": ((2, 3, 2, 64), (3, 2), True, True),
    "100 channels": ((2, 3, 4, 100), 2, True, True),
    "no pool": ((3, 5, 7, 10), 1, True, True),
    "no pool, 3 channels, eval": ((3, 9, 11, 3), 1, True, False),
    "no pool, 100 channels, no ReLU": ((2, 5, 7, 100), 1, False, True),
    "window as large as the image": ((4, 3, 5, 2), (3, 5), True, True),
    "no images": ((0, 4, 4, 3), 2, True, True),
    "large": ((6, 33, 34, 10), 2, True, True),
}


def batch_norm_pool_forward(rng, dtype, shape, pool_size, relu, training) -> Arguments:
    norm = batch_norm_forward(rng, dtype, shape, "training" if training else "eval")
    return {**norm, "pool_size": pool_size, "relu": relu}


def batch_norm_pool_backward(rng, dtype, shape, pool_size, relu, training) -> Arguments:
    forward = batch_norm_pool_forward(rng, dtype, shape, pool_size, relu, training)
    y, argmax, mean, inv_std = reference.batch_norm_pool_forward(**forward)
    kept = {name: forward[name] for name in ("x", "weight", "training", "pool_size")}
    return {
        "dout": _normal(rng, dtype, *y.shape),
        "argmax": argmax,
        **kept,
        "mean": mean,
        "inv_std": inv_std,
    }


# ------------------------------------------------------------------ softmax and losses

ROWS = {
    "one class": ((3, 1),),
    "3": ((1, 3),),
    "10": ((4, 10),),
    "more axes": ((2, 3, 4, 7),),
    "16": ((5, 16),),
    "17": ((6, 17),),
    "64": ((33, 64),),
    "none": ((0, 5),),
    "large": ((800, 10),),
}

LOSSES = {
    # rows, classes, class weights, smoothing
    "one class": (3, 1, False, 0.0),
    "one row": (1, 7, False, 0.0),
    "10": (8, 10, False, 0.0),
    "weights": (7, 16, True, 0.0),
    "smoothing": (9, 17, False, 0.1),
    "both": (33, 64, True, 0.3),
    "none": (0, 5, True, 0.1),
    "large": (800, 10, True, 0.1),
}


def log_softmax_backward(rng, dtype, shape) -> Arguments:
    y = reference.log_softmax(_normal(rng, dtype, *shape))
    return {"dout": _normal(rng, dtype, *shape), "y": y}


def softmax_cross_entropy(rng, dtype, rows, classes, weighted, smoothing) -> Arguments:
    target = rng.integers(0, classes, rows)
    target[1::4] = -100
    return {
        "x": 3 * _normal(rng, dtype, rows, classes),
        "target": target,
        "weight": rng.uniform(0.5, 2, classes).astype(dtype) if weighted else None,
        "label_smoothing": smoothing,
    }


def softmax_cross_entropy_backward(rng, dtype, rows, *settings) -> Arguments:
    return {"dlosses": _normal(rng, dtype, rows), **softmax_cross_entropy(rng, dtype, rows, *settings)}


def soft_cross_entropy(rng, dtype, rows, classes, weighted, smoothing) -> Arguments:
    arguments = softmax_cross_entropy(rng, dtype, rows, classes, weighted, smoothing)
    return {**arguments, "target": reference.softmax(_normal(rng, dtype, rows, classes))}


def soft_cross_entropy_backward(rng, dtype, rows, *settings) -> Arguments:
    return {"dlosses": _normal(rng, dtype, rows), **soft_cross_entropy(rng, dtype, rows, *settings)}


# ------------------------------------------------------------------ optimisers

SGD_STEPS = {
    "one": (1, {}),
    "15, decay": (15, {"weight_decay": 0.1}),
    "16, momentum": (16, {"momentum": 0.9}),
    "17, Nesterov": (17, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "first": (1023, {"momentum": 0.9, "dampening": 0.5, "first": True}),
    "dampening": (1025, {"momentum": 0.9, "dampening": 0.5}),
    "none": (0, {"momentum": 0.9}),
    "large": (70_001, {"momentum": 0.9, "nesterov": True}),
}

ADAM_STEPS = {
    "one": (1, {"step": 1}),
    "15, decay": (15, {"step": 2, "weight_decay": 0.1}),
    "16, AdamW": (16, {"step": 3, "weight_decay": 0.1, "decoupled": True}),
    "17": (17, {"step": 1000, "beta1": 0.5, "beta2": 0.9, "eps": 1e-3}),
    "a block and more": (1025, {"step": 7}),
    "none": (0, {"step": 1}),
    "large": (70_001, {"step": 20, "weight_decay": 0.1}),
}


def sgd_update(rng, dtype, size, settings) -> Arguments:
    velocity = _normal(rng, dtype, size) if "momentum" in settings else None
    arrays = {"param": _normal(rng, dtype, size), "grad": _normal(rng, dtype, size), "velocity": velocity}
    return {**arrays, "lr": 0.1, **settings}


def adam_update(rng, dtype, size, settings) -> Arguments:
    names = ("param", "grad", "exp_avg", "exp_avg_sq")
    arrays = {name: _normal(rng, dtype, size) for name in names}
    arrays["exp_avg_sq"] = arrays["exp_avg_sq"] ** 2 + dtype(0.01)
    return {**arrays, "lr": 0.1, **settings}


# ------------------------------------------------------------------ batches

BATCHES = {
    # images, batch
    "one pixel": ((1, 1, 1, 1), 1),
    "one channel": ((5, 7, 6, 1), 4),
    "colour": ((3, 8, 9, 3), 7),
    "17 channels": ((2, 4, 5, 17), 3),
    "none": ((3, 4, 4, 3), 0),
    "large": ((4, 33, 32, 3), 20),
}


def gather_batch(rng, dtype, shape, size) -> Arguments:
    images = rng.integers(0, 256, shape) if dtype is np.uint8 else rng.random(shape)
    scale = rng.uniform(0.5, 2, shape[3]) / (255 if dtype is np.uint8 else 1)
    return {
        "images": images.astype(dtype),
        "index": rng.integers(0, shape[0], size),
        "scale": scale.astype(np.float32),
        "shift": _normal(rng, np.float32, shape[3]),
    }


def augment_batch(rng, dtype, shape, size) -> Arguments:
    params = np.zeros((size, 9), np.float32)
    params[:, 0] = rng.integers(0, 2, size)
    params[:, 1:3] = rng.integers(-4, 5, (size, 2))
    params[:, 3] = rng.uniform(-0.2, 0.2, size)
    params[:, 4] = rng.uniform(0.7, 1.3, size)
    params[:, 5] = rng.uniform(0, 0.2, size) * rng.integers(0, 2, size)
    params[:, 6:8] = rng.integers(-3, 9, (size, 2))
    params[:, 8] = rng.integers(0, 5, size)
    # One image as it is, and one that leaves the frame.
    params[:1] = (0, 0, 0, 0, 1, 0, 0, 0, 0)
    params[1:2, 1] = 100
    return {**gather_batch(rng, dtype, shape, size), "params": params, "seed": 2**64 - 9}
