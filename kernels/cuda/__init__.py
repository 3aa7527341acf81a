"""The Numba CUDA kernels: the names and results of `fastcnn.kernels.reference`, over arrays of a device.

Arrays are `DeviceArray`s, made by `from_numpy`, `empty` and `zeros`, or whatever else has a
``__cuda_array_interface__``, such as CuPy's arrays and PyTorch's tensors, which are used where they are.
Results are `DeviceArray`s, whose ``numpy()`` brings them to the host.

A call returns when its work is queued; it never waits for the device. So what only the device can see raises
no exception: what comes of a label that is no class, or an index that is no image, is NaN.

Needs the extra ``fastcnn[cuda]``, and a device or Numba's simulator of one (``NUMBA_ENABLE_CUDASIM=1``).
"""

try:
    import numba_cuda as _numba_cuda  # noqa: F401 (Numba's own, older CUDA target won't do)
except ImportError as error:
    raise ImportError("fastcnn.kernels.cuda needs numba-cuda: pip install 'fastcnn[cuda]'") from error

from .activation import (
    leaky_relu_backward,
    leaky_relu_forward,
    prelu_backward,
    prelu_forward,
    relu_backward,
    relu_forward,
)
from .arrays import DeviceArray, as_device, empty, from_numpy, zeros
from .batch import augment_batch, gather_batch
from .columns import col2im, conv2d_backward_bias, im2col
from .convolution import conv2d_backward_input, conv2d_backward_weight, conv2d_forward
from .dropout import dropout_backward, dropout_forward
from .jit import synchronize
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
    "DeviceArray",
    "adam_update",
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "as_device",
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
    "empty",
    "from_numpy",
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
    "synchronize",
    "zeros",
]
