"""ONNX Runtime: inference of the named networks, and single forward operations; inputs and outputs are bound.

The graphs are written here with `onnx.helper` from fastcnn's layers. ONNX Runtime takes images as NCHW,
reorders them inside, and folds BatchNorm and activations into convolutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ..calls import SLOPE
from ..inputs import Arrays
from ..shapes import Conv, Pool, Workload
from . import Side, networks

_OPSET = 17
_threads = {"count": 0}


def version() -> str:
    """ONNX Runtime's."""
    return onnxruntime.__version__


def set_threads(threads: int) -> None:
    """Threads of an operator, for sessions to come."""
    _threads["count"] = threads


_OPS = (
    "conv-forward",
    "max-pool-forward",
    "avg-pool-forward",
    "batch-norm-inference",
    "relu-forward",
    "leaky-relu-forward",
    "linear-forward",
    "infer-1",
    "infer-256",
)


def variants(workload: Workload) -> tuple[str, ...]:
    """Inference only."""
    return ("onnxruntime",) if workload.op in _OPS else ()


def prepare(workload: Workload, arrays: Arrays, variant: str) -> Side:
    """See the package."""
    graph = _Graph()
    if workload.op in networks.MODEL_OPS:
        net = networks.build(workload.shape)
        net.eval()
        name, last, rank = "logits", graph.layer(net, "x"), 2
    else:
        name, last, rank = "y", _operation(graph, workload, arrays), arrays["x"].ndim
    x = arrays["x"]
    if x.ndim == 4:
        x = np.ascontiguousarray(networks.images(x))
    session = graph.session(x.shape, last, rank)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    shape = session.run(None, {"x": x})[0].shape
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
    binding.bind_ortvalue_output(last, y)

    def result() -> dict[str, np.ndarray]:
        session.run_with_iobinding(binding)
        array = y.numpy()
        return {name: np.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)}

    return Side(lambda: session.run_with_iobinding(binding), result)


def _operation(graph: _Graph, workload: Workload, a: Arrays) -> str:
    s = workload.shape
    if isinstance(s, Conv):
        attributes = _window((s.kernel,) * 2, (s.stride,) * 2, (s.padding,) * 2)
        weights = (a["weight"].transpose(3, 2, 0, 1), a["bias"])
        return graph.node("Conv", "x", *weights, **attributes, dilations=[s.dilation] * 2, group=s.groups)
    if isinstance(s, Pool):
        attributes = _window((s.kernel,) * 2, (s.stride,) * 2, (s.padding,) * 2)
        if workload.op == "max-pool-forward":
            return graph.node("MaxPool", "x", **attributes)
        return graph.node("AveragePool", "x", **attributes, count_include_pad=1)
    if workload.op == "batch-norm-inference":
        vectors = [a[name] for name in ("weight", "bias", "mean", "var")]
        return graph.node("BatchNormalization", "x", *vectors, epsilon=1e-5)
    if workload.op == "linear-forward":
        return graph.node("Gemm", "x", a["weight"], a["bias"])
    if workload.op == "leaky-relu-forward":
        return graph.node("LeakyRelu", "x", alpha=SLOPE)
    return graph.node("Relu", "x")


def _window(kernel: Any, stride: Any, padding: Any) -> dict[str, Any]:
    return {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}


class _Graph:
    """An ONNX graph in the making: nodes one after another, and the arrays that they read."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []

    def node(self, kind: str, *operands: str | np.ndarray, **attributes: Any) -> str:
        """Add a node that reads names or arrays; return its output's name."""
        names = [operand if isinstance(operand, str) else self._array(operand) for operand in operands]
        output = f"y{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def _array(self, array: np.ndarray) -> str:
        name = f"a{len(self.arrays)}"
        self.arrays.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def layer(self, layer: Any, x: str) -> str:
        """Add the nodes of fastcnn's `layer`."""
        kind = type(layer).__name__
        if kind == "Sequential":
            for child in layer:
                x = self.layer(child, x)
            return x
        if kind == "Residual":
            skip = x if layer.shortcut is None else self.layer(layer.shortcut, x)
            y = self.node("Add", self.layer(layer.body, x), skip)
            return y if layer.activation is None else self.layer(layer.activation, y)
        if kind == "Dropout":
            return x
        return self.node(*_LAYERS[kind](layer, x), **_attributes(kind, layer))

    def session(self, shape: tuple[int, ...], last: str, rank: int) -> Any:
        """A session that computes `last`, which has `rank` axes, from an input x of `shape`."""
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(last, TensorProto.FLOAT, [f"size{i}" for i in range(rank)])
        graph = helper.make_graph(self.nodes, "network", [x], [y], self.arrays)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _threads["count"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def _conv(layer: Any, x: str) -> tuple[Any, ...]:
    bias = () if layer.bias is None else (layer.bias.data,)
    return "Conv", x, layer.weight.data, *bias


def _batch_norm(layer: Any, x: str) -> tuple[Any, ...]:
    arrays = (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var)
    return "BatchNormalization", x, *arrays


_LAYERS: dict[str, Any] = {
    "Conv2d": _conv,
    "BatchNorm2d": _batch_norm,
    "Linear": lambda layer, x: ("Gemm", x, layer.weight.data, layer.bias.data),
    "ReLU": lambda layer, x: ("Relu", x),
    "LeakyReLU": lambda layer, x: ("LeakyRelu", x),
    # A slope for all channels, or one for each, broadcast over the pixels.
    "PReLU": lambda layer, x: ("PRelu", x, layer.weight.data),
    "MaxPool2d": lambda layer, x: ("MaxPool", x),
    "AvgPool2d": lambda layer, x: ("AveragePool", x),
    # To one pixel, as the networks have it.
    "AdaptiveAvgPool2d": lambda layer, x: ("GlobalAveragePool", x),
    "Flatten": lambda layer, x: ("Flatten", x),
}


def _attributes(kind: str, layer: Any) -> dict[str, Any]:
    if kind == "Conv2d":
        shared = {"dilations": list(layer.dilation), "group": layer.groups}
        if layer.padding == "same":
            window = {"kernel_shape": list(layer.kernel_size), "strides": list(layer.stride)}
            return {**window, **shared, "auto_pad": "SAME_UPPER"}
        padding = (0, 0) if layer.padding == "valid" else layer.padding
        return {**_window(layer.kernel_size, layer.stride, padding), **shared}
    if kind in ("MaxPool2d", "AvgPool2d"):
        counted = {"count_include_pad": 1} if kind == "AvgPool2d" else {}
        return {**_window(layer.kernel_size, layer.stride, layer.padding), **counted}
    return {
        "BatchNorm2d": lambda: {"epsilon": layer.eps},
        "Linear": lambda: {"transB": 1},
        "LeakyReLU": lambda: {"alpha": layer.negative_slope},
    }.get(kind, dict)()
