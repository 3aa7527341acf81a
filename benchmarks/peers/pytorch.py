"""PyTorch, eager: its operators without autograd's bookkeeping, and its networks with fused Adam.

Images are in both memory formats, NCHW and channels-last; the better one counts. Operators write into buffers
made beforehand where PyTorch has a native form that does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..calls import ADAM_RATE, DROPOUT, SLOPE
from ..inputs import Arrays
from ..shapes import Conv, Pool, Workload
from . import Side, networks
from .pytorch_networks import infer, train

aten = torch.ops.aten

# A timed function, and the tensors by name that it returned.
Prepared = tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]

FORMATS = {"torch NCHW": torch.contiguous_format, "torch channels-last": torch.channels_last}
_IMAGE_OPS = ("conv-", "max-pool-", "avg-pool-", "batch-norm-")


def version() -> str:
    """PyTorch's."""
    return torch.__version__


def set_threads(threads: int) -> None:
    """Threads of an operator."""
    torch.set_num_threads(threads)


def variants(workload: Workload) -> tuple[str, ...]:
    """Both memory formats where there are images."""
    if workload.op in networks.MODEL_OPS or workload.op.startswith(_IMAGE_OPS):
        return tuple(FORMATS)
    return ("torch",)


def prepare(workload: Workload, arrays: Arrays, variant: str, device: str = "cpu") -> Side:
    """See the package."""
    memory_format = FORMATS.get(variant, torch.contiguous_format)
    if workload.op == "train":
        return train(workload.shape, arrays, memory_format, device=device)
    if workload.op in networks.MODEL_OPS:
        return infer(workload.shape, arrays, memory_format, device=device)
    with torch.device(device):
        tensors = {name: _tensor(array, name, memory_format).to(device) for name, array in arrays.items()}
        operator, named = _OPERATORS[workload.op](tensors, workload.shape)

    def run() -> Any:
        with torch.inference_mode():
            return operator()

    return Side(run, lambda: {name: _array(tensor) for name, tensor in named(run()).items()})


def _tensor(array: np.ndarray, name: str, memory_format: torch.memory_format) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if array.ndim != 4:
        return tensor
    # Images are (N, H, W, C) and weights (kH, kW, C, F); PyTorch shows (N, C, H, W) and (F, C, kH, kW).
    tensor = tensor.permute((3, 2, 0, 1) if name == "weight" else (0, 3, 1, 2))
    return tensor.clone(memory_format=memory_format)


def _array(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.cpu().numpy()
    return np.array(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def _one(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda tensor: {name: tensor}


def _conv_forward(t: dict[str, Any], s: Conv) -> Prepared:
    def run() -> Any:
        return F.conv2d(t["x"], t["weight"], t["bias"], s.stride, s.padding, s.dilation, s.groups)

    return run, _one("y")


def _conv_backward(t: dict[str, Any], s: Conv, mask: list[bool]) -> Any:
    pairs = ([s.stride] * 2, [s.padding] * 2, [s.dilation] * 2)
    return aten.convolution_backward(
        t["dout"], t["x"], t["weight"], None, *pairs, False, [0, 0], s.groups, mask
    )


def _conv_input(t: dict[str, Any], s: Conv) -> Prepared:
    # Only its shape and format are looked at.
    x = torch.zeros(s.n, s.c, s.h, s.w).contiguous(memory_format=_format(t["dout"]))
    t = {**t, "x": x}
    return lambda: _conv_backward(t, s, [True, False, False]), lambda grads: {"dx": grads[0]}


def _conv_weight(t: dict[str, Any], s: Conv) -> Prepared:
    weight = torch.zeros(s.f, s.c // s.groups, s.kernel, s.kernel)
    t = {**t, "weight": weight.contiguous(memory_format=_format(t["x"]))}

    def named(grads: Any) -> dict[str, Any]:
        # `_array` takes every tensor of four axes for images and makes (kH, kW, C, F) of this.
        return {"dweight": grads[1].permute(2, 0, 3, 1)}

    return lambda: _conv_backward(t, s, [False, True, False]), named


def _format(tensor: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


def _empty_like(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in tensors)


def _max_pool_forward(t: dict[str, Any], s: Pool) -> Prepared:
    window = ([s.kernel] * 2, [s.stride] * 2, [s.padding] * 2, [1, 1], False)
    y, argmax = _empty_like(*aten.max_pool2d_with_indices(t["x"], *window))
    return lambda: aten.max_pool2d_with_indices.out(t["x"], *window, out=y, indices=argmax), lambda r: {
        "y": r[0]
    }


def _max_pool_backward(t: dict[str, Any], s: Pool) -> Prepared:
    window = ([s.kernel] * 2, [s.stride] * 2, [s.padding] * 2, [1, 1], False)
    _, argmax = aten.max_pool2d_with_indices(t["x"], *window)
    dx = torch.empty_like(t["x"])
    backward = aten.max_pool2d_with_indices_backward.grad_input
    return lambda: backward(t["dout"], t["x"], *window, argmax, grad_input=dx), _one("dx")


def _avg_pool_forward(t: dict[str, Any], s: Pool) -> Prepared:
    window = ([s.kernel] * 2, [s.stride] * 2, [s.padding] * 2)
    y = torch.empty_like(aten.avg_pool2d(t["x"], *window))
    return lambda: aten.avg_pool2d.out(t["x"], *window, out=y), _one("y")


def _avg_pool_backward(t: dict[str, Any], s: Pool) -> Prepared:
    window = ([s.kernel] * 2, [s.stride] * 2, [s.padding] * 2, False, True, None)
    x = torch.zeros(s.n, s.c, s.h, s.w).contiguous(memory_format=_format(t["dout"]))
    dx = torch.empty_like(x)
    return lambda: aten.avg_pool2d_backward.grad_input(t["dout"], x, *window, grad_input=dx), _one("dx")


def _batch_norm_forward(t: dict[str, Any], s: Any) -> Prepared:
    running = torch.zeros(s.c), torch.ones(s.c)

    def run() -> Any:
        return aten.native_batch_norm(t["x"], t["weight"], t["bias"], *running, True, 0.1, 1e-5)

    return run, lambda r: {"y": r[0], "mean": r[1], "inv_std": r[2]}


def _batch_norm_inference(t: dict[str, Any], s: Any) -> Prepared:
    def run() -> Any:
        return aten.native_batch_norm(t["x"], t["weight"], t["bias"], t["mean"], t["var"], False, 0.1, 1e-5)

    return run, lambda r: {"y": r[0]}


def _batch_norm_backward(t: dict[str, Any], s: Any) -> Prepared:
    _, mean, inv_std = aten.native_batch_norm(t["x"], t["weight"], None, None, None, True, 0.1, 1e-5)

    def run() -> Any:
        return aten.native_batch_norm_backward(
            t["dout"], t["x"], t["weight"], None, None, mean, inv_std, True, 1e-5, [True, True, True]
        )

    return run, lambda r: {"dx": r[0], "dweight": r[1], "dbias": r[2]}


def _relu_forward(t: dict[str, Any], s: Any) -> Prepared:
    (y,) = _empty_like(t["x"])
    return lambda: aten.relu.out(t["x"], out=y), _one("y")


def _relu_backward(t: dict[str, Any], s: Any) -> Prepared:
    (dx,) = _empty_like(t["x"])
    y = torch.relu(t["x"])
    return lambda: aten.threshold_backward.grad_input(t["dout"], y, 0, grad_input=dx), _one("dx")


def _leaky_relu_forward(t: dict[str, Any], s: Any) -> Prepared:
    (y,) = _empty_like(t["x"])
    return lambda: aten.leaky_relu.out(t["x"], SLOPE, out=y), _one("y")


def _leaky_relu_backward(t: dict[str, Any], s: Any) -> Prepared:
    (dx,) = _empty_like(t["x"])
    backward = aten.leaky_relu_backward.grad_input
    return lambda: backward(t["dout"], t["x"], SLOPE, False, grad_input=dx), _one("dx")


def _prelu_forward(t: dict[str, Any], s: Any) -> Prepared:
    return lambda: F.prelu(t["x"], t["slope"]), _one("y")


def _prelu_backward(t: dict[str, Any], s: Any) -> Prepared:
    slope = t["slope"].reshape(1, 1, 1, 1)

    def run() -> Any:
        # The sum over all elements belongs to it: PyTorch leaves it to a second operator.
        dx, dslope = aten._prelu_kernel_backward(t["dout"], t["x"], slope)
        return dx, dslope.sum().reshape(1)

    return run, lambda r: {"dx": r[0], "dweight": r[1]}


def _dropout_forward(t: dict[str, Any], s: Any) -> Prepared:
    def named(result: Any) -> dict[str, Any]:
        # Another generator drops other elements: only the factor of the others can be compared.
        y, x = result[0].flatten(), t["x"].flatten()
        largest = y.abs().argmax()
        return {"factor": y[largest] / x[largest]}

    return lambda: aten.native_dropout(t["x"], DROPOUT, True), named


def _im2col(t: dict[str, Any], s: Conv) -> Prepared:
    def named(cols: torch.Tensor) -> dict[str, Any]:
        # (N, C * kH * kW, Ho * Wo)
        cols = cols.reshape(s.n, s.c, s.kernel**2, -1).permute(0, 3, 2, 1)
        return {"cols": cols.reshape(-1, s.kernel**2 * s.c)}

    return lambda: F.unfold(t["x"], s.kernel, s.dilation, s.padding, s.stride), named


def _col2im(t: dict[str, Any], s: Conv) -> Prepared:
    cols = t["cols"].reshape(s.n, -1, s.kernel**2, s.c).permute(0, 3, 2, 1)
    cols = cols.reshape(s.n, s.c * s.kernel**2, -1).contiguous()
    return lambda: F.fold(cols, (s.h, s.w), s.kernel, s.dilation, s.padding, s.stride), _one("x")


def _linear_forward(t: dict[str, Any], s: Any) -> Prepared:
    y = torch.empty(s.n, s.outputs)
    # torch.nn.Linear keeps (out, in).
    weight = t["weight"].T.contiguous().T
    return lambda: torch.addmm(t["bias"], t["x"], weight, out=y), _one("y")


def _linear_input(t: dict[str, Any], s: Any) -> Prepared:
    dx = torch.empty(s.n, s.inputs)
    weight = t["weight"].T.contiguous()
    return lambda: torch.mm(t["dout"], weight, out=dx), _one("dx")


def _linear_weight(t: dict[str, Any], s: Any) -> Prepared:
    dweight = torch.empty(s.outputs, s.inputs)
    return lambda: torch.mm(t["dout"].T, t["x"], out=dweight), lambda r: {"dweight": r.T}


def _cross_entropy(t: dict[str, Any], s: Any) -> Prepared:
    one = torch.ones(())

    def run() -> Any:
        logs = aten._log_softmax(t["x"], 1, False)
        _, total = aten.nll_loss_forward(logs, t["target"], None, 1, -100)
        dlogs = aten.nll_loss_backward(one, logs, t["target"], None, 1, -100, total)
        return aten._log_softmax_backward_data(dlogs, logs, 1, torch.float32)

    return run, _one("dx")


def _adam(t: dict[str, Any], s: Any) -> Prepared:
    param = torch.nn.Parameter(t["param"].clone())
    param.grad = t["grad"]
    optimizer = torch.optim.Adam([param], lr=ADAM_RATE, fused=True)

    def named(_: Any) -> dict[str, Any]:
        state = optimizer.state[param]
        moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        return {"param": param.detach(), **moments}

    return optimizer.step, named


_OPERATORS: dict[str, Callable[[dict[str, Any], Any], Prepared]] = {
    "conv-forward": _conv_forward,
    "conv-input": _conv_input,
    "conv-weight": _conv_weight,
    "max-pool-forward": _max_pool_forward,
    "max-pool-backward": _max_pool_backward,
    "avg-pool-forward": _avg_pool_forward,
    "avg-pool-backward": _avg_pool_backward,
    "batch-norm-forward": _batch_norm_forward,
    "batch-norm-backward": _batch_norm_backward,
    "batch-norm-inference": _batch_norm_inference,
    "relu-forward": _relu_forward,
    "relu-backward": _relu_backward,
    "leaky-relu-forward": _leaky_relu_forward,
    "leaky-relu-backward": _leaky_relu_backward,
    "prelu-forward": _prelu_forward,
    "prelu-backward": _prelu_backward,
    "dropout-forward": _dropout_forward,
    "im2col": _im2col,
    "col2im": _col2im,
    "linear-forward": _linear_forward,
    "linear-input": _linear_input,
    "linear-weight": _linear_weight,
    "cross-entropy": _cross_entropy,
    "adam": _adam,
}
