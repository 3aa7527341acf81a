"""What the parity tests of the CPU's and of CUDA's kernels have in common, over the table in ops.py."""

import inspect
import re

import numpy as np
import pytest
from ops import OPERATIONS

from fastcnn.kernels import cpu

ROWS = [
    pytest.param(operation, dtype, id=f"{operation.name}-{np.dtype(dtype)}")
    for operation in OPERATIONS
    for dtype in operation.dtypes
]
every_row = pytest.mark.parametrize(("operation", "dtype"), ROWS)


def arrays(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}


def assert_close(operation, arguments, actual, expected, message):
    assert len(actual) == len(expected), message
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, message
        assert ours.shape == theirs.shape, message
        tolerance = operation.tolerance(arguments, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=message)


def error(actual, expected):
    """The largest error, in units of the largest result."""
    return np.abs(actual - expected).max() / np.abs(expected).max()


def assert_same_bits(actual, expected, message):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, message
        assert ours.tobytes() == theirs.tobytes(), message


def outputs(operation):
    """Names of the arguments that results can be written to, in the order of the results."""
    parameters = inspect.signature(getattr(cpu, operation.name)).parameters
    return [name for name in parameters if name == "out" or name.startswith("out_")]


def assert_names_an_argument(operation, error):
    """The message begins with the name of an argument, or names."""
    match = re.match(r"(\w+)(, \w+)*: ", str(error.value))
    assert match, error.value
    assert match[1] in inspect.signature(getattr(cpu, operation.name)).parameters, error.value


# The reference multiplies these with the zeros of the padding. Depthwise convolution leaves those taps out,
# and on the CPU direct convolution leaves most out: test_direct_convolution.py has its rules for NaN.
MEETS_NO_PADDING = {
    "conv2d_forward": "weight",
    "conv2d_backward_weight": "dout",
    "conv2d_pool_forward": "weight",
    "conv2d_pool_backward_weight": "dout",
}

IMAGES = np.ones((2, 3, 3, 4), np.float32)
LOGITS = np.ones((2, 3), np.float32)
VECTOR = np.ones(4, np.float32)
PHOTOS = {"images": IMAGES, "scale": VECTOR, "shift": VECTOR}

REFUSED = [
    # function, arguments, beginning of the message
    ("im2col", {"x": IMAGES, "kernel_size": 5}, "kernel_size: 5"),
    ("im2col", {"x": IMAGES, "kernel_size": 2, "dilation": 3}, "kernel_size: 2"),
    ("im2col", {"x": IMAGES, "kernel_size": 0}, "kernel_size: 0"),
    ("im2col", {"x": IMAGES, "kernel_size": 1, "stride": 0}, "stride: 0"),
    ("im2col", {"x": IMAGES, "kernel_size": 1, "dilation": 0}, "dilation: 0"),
    ("im2col", {"x": IMAGES[:, :0], "kernel_size": 1, "padding": 1}, ""),
    ("col2im", {"cols": LOGITS, "x_shape": (1, 3, 3, 1), "kernel_size": 2}, "cols: "),
    ("max_pool2d_forward", {"x": IMAGES, "kernel_size": 4}, "kernel_size: 4"),
    ("max_pool2d_forward", {"x": IMAGES, "kernel_size": 3, "padding": 2}, "padding: 2"),
    ("avg_pool2d_forward", {"x": IMAGES, "kernel_size": 2, "divisor_override": 0}, "divisor_override: "),
    ("avg_pool2d_backward", {"dout": IMAGES, "x_shape": (2, 5, 5, 4), "kernel_size": 2}, "dout: "),
    ("adaptive_avg_pool2d_forward", {"x": IMAGES, "output_size": 0}, "output_size: 0"),
    ("global_avg_pool2d_forward", {"x": IMAGES[:, :, :0]}, "x: "),
    ("prelu_forward", {"x": IMAGES, "weight": VECTOR[:3]}, "weight: "),
    ("batch_norm_forward", {"x": IMAGES[:1, :1, :1], "training": True}, "x: "),
    ("batch_norm_forward", {"x": IMAGES, "training": False}, "running_mean, running_var: "),
    ("dropout_forward", {"x": IMAGES, "p": 1.5, "seed": 0}, "p: 1.5"),
    ("dropout_forward", {"x": IMAGES, "p": np.nan, "seed": 0}, "p: nan"),
    ("dropout_forward", {"x": IMAGES, "p": 0.5, "seed": -1}, "seed: -1"),
    ("dropout_forward", {"x": IMAGES, "p": 0.5, "seed": 2**64}, "seed: "),
    ("softmax_cross_entropy", {"x": LOGITS, "target": np.array([0, 3])}, "target: 3"),
    ("softmax_cross_entropy", {"x": LOGITS, "target": np.array([-1, 0])}, "target: -1"),
    ("softmax_cross_entropy", {"x": LOGITS, "target": np.array([0])}, "target: "),
    (
        "softmax_cross_entropy",
        {"x": LOGITS, "target": np.zeros(2, int), "label_smoothing": 1.5},
        "label_smoothing: 1.5",
    ),
    ("soft_cross_entropy", {"x": LOGITS, "target": LOGITS[:, :2]}, "target: "),
    (
        "sgd_update",
        {"param": VECTOR, "grad": VECTOR, "velocity": None, "lr": 1, "momentum": 0.9},
        "velocity: ",
    ),
    ("sgd_update", {"param": VECTOR, "grad": VECTOR[:3], "velocity": None, "lr": 1}, "grad: "),
    ("gather_batch", {**PHOTOS, "index": np.array([0, 2])}, "index: 2"),
    ("gather_batch", {**PHOTOS, "index": np.array([-1])}, "index: -1"),
]

EXTREMES = [
    [np.inf, 0, 1],
    [-np.inf, 0, 1],
    [-np.inf, -np.inf, -np.inf],
    [np.inf, -np.inf, np.nan],
    [1e38, -1e38, 0],
    [1e8, 1e8, 1e8],
    [-0.0, 0.0, -1e-45],
]
