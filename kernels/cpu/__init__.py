"""The Numba CPU kernels: the names and results of `fastcnn.kernels.reference`, compiled and parallel."""

from .convolution import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from .linear import linear_backward_input, linear_backward_weight, linear_forward

__all__ = [
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
]
