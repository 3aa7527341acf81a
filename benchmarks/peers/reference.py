"""The NumPy reference: what every side must compute. It is compared with, and never timed.

Networks are run layer by layer in float64, forward only; their gradients are compared between libraries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastcnn.kernels import reference

from ..calls import call
from ..inputs import Arrays
from ..shapes import Workload
from . import networks


def result(workload: Workload, arrays: Arrays) -> dict[str, np.ndarray]:
    """What `workload` computes from `arrays`."""
    if workload.op not in networks.MODEL_OPS:
        return call(reference, workload, arrays).result()
    net = networks.build(workload.shape)
    logits = run(net, arrays["x"].astype(np.float64), workload.op == "train")
    results = {"logits": logits}
    if workload.op == "train":
        losses, _ = reference.softmax_cross_entropy(logits, arrays["target"])
        results["loss"] = losses.mean()
    return results


def run(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    """The output of `layer`, dropout left out, for x of (N, H, W, C) or (N, K)."""
    kind = type(layer).__name__
    if kind == "Sequential":
        for child in layer:
            x = run(child, x, training)
        return x
    if kind == "Residual":
        skip = x if layer.shortcut is None else run(layer.shortcut, x, training)
        y = run(layer.body, x, training) + skip
        return y if layer.activation is None else run(layer.activation, y, training)
    return _LAYERS[kind](layer, x, training)


def _conv(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    weight = layer.weight.data.astype(np.float64).transpose(2, 3, 1, 0)
    bias = None if layer.bias is None else layer.bias.data.astype(np.float64)
    geometry = (layer.stride, _padding(layer), layer.dilation, layer.groups)
    return reference.conv2d_forward(x, weight, bias, *geometry)


def _padding(layer: Any) -> Any:
    if layer.padding == "valid":
        return 0
    if layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return tuple((span // 2, span - span // 2) for span in spans)
    return layer.padding


def _linear(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    return x @ layer.weight.data.T.astype(np.float64) + layer.bias.data


def _batch_norm(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    arrays = (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var)
    copies = [array.astype(np.float64) for array in arrays]
    return reference.batch_norm_forward(x, *copies, training, eps=layer.eps)[0]


def _prelu(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    return reference.prelu_forward(x, layer.weight.data.astype(np.float64))


def _max_pool(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    return reference.max_pool2d_forward(x, layer.kernel_size, layer.stride, layer.padding)[0]


def _avg_pool(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    return reference.avg_pool2d_forward(x, layer.kernel_size, layer.stride, layer.padding)


def _adaptive_avg_pool(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    return reference.adaptive_avg_pool2d_forward(x, layer.output_size)


def _flatten(layer: Any, x: np.ndarray, training: bool) -> np.ndarray:
    # PyTorch's order: channels first.
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


_LAYERS: dict[str, Any] = {
    "Conv2d": _conv,
    "Linear": _linear,
    "BatchNorm2d": _batch_norm,
    "ReLU": lambda layer, x, training: reference.relu_forward(x),
    "LeakyReLU": lambda layer, x, training: reference.leaky_relu_forward(x, layer.negative_slope),
    "PReLU": _prelu,
    "MaxPool2d": _max_pool,
    "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": _adaptive_avg_pool,
    "Dropout": lambda layer, x, training: x,
    "Flatten": _flatten,
}
