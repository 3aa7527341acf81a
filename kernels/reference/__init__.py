"""The oracle: every kernel in NumPy alone, as the textbook has it.

It computes in float64 and rounds once, to the dtype of its input, and shares no code with what it checks.
"""

from .activation import (
    leaky_relu_backward,
    leaky_relu_forward,
    prelu_backward,
    prelu_forward,
    relu_backward,
    relu_forward,
)
from .batch import augment_batch, gather_batch
from .columns import col2im, im2col
from .convolution import conv2d_backward_bias, conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from .dropout import dropout_backward, dropout_forward
from .linear import linear_backward_input, linear_backward_weight, linear_forward
from .loss import (
    log_softmax,
    log_softmax_backward,
    soft_cross_entropy,
    soft_cross_entropy_backward,
    softmax,
    softmax_backward,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
)
from .normalization import (
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_pool_backward,
    batch_norm_pool_forward,
)
from .optimizer import adam_update, sgd_update
from .pooled_convolution import (
    conv2d_pool_backward_input,
    conv2d_pool_backward_weight,
    conv2d_pool_forward,
)
from .pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
    avg_pool2d_backward,
    avg_pool2d_forward,
    global_avg_pool2d_backward,
    global_avg_pool2d_forward,
    max_pool2d_backward,
    max_pool2d_forward,
)

__all__ = [
    "adam_update",
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "augment_batch",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_pool_backward",
    "batch_norm_pool_forward",
    "col2im",
    "conv2d_backward_bias",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv2d_forward",
    "conv2d_pool_backward_input",
    "conv2d_pool_backward_weight",
    "conv2d_pool_forward",
    "dropout_backward",
    "dropout_forward",
    "gather_batch",
    "global_avg_pool2d_backward",
    "global_avg_pool2d_forward",
    "im2col",
    "leaky_relu_backward",
    "leaky_relu_forward",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "log_softmax",
    "log_softmax_backward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "prelu_backward",
    "prelu_forward",
    "relu_backward",
    "relu_forward",
    "sgd_update",
    "soft_cross_entropy",
    "soft_cross_entropy_backward",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy",
    "softmax_cross_entropy_backward",
]
