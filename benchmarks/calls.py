"""How each operation calls the kernels: `fastcnn.kernels.cpu`, or others of the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .inputs import Arrays, aligned
from .shapes import Conv, Pool, Workload

Result = dict[str, np.ndarray]

DROPOUT = 0.25
SLOPE = 0.01
ADAM_RATE = 1e-3
_SEED = 7


class Call(NamedTuple):
    """A call of one kernel.

    `kernel` takes keyword arguments to write into, in the order of `buffers`, and returns an array, or
    several, in the order of `names`.
    """

    kernel: Callable[..., Any]
    names: tuple[str, ...]
    buffers: tuple[str, ...]

    def result(self) -> Result:
        """The results in new arrays."""
        return dict(zip(self.names, _several(self.kernel()), strict=True))

    def into_buffers(self) -> Callable[[], Any]:
        """The call that writes into the same buffers again and again."""
        results = (
            aligned(result) if isinstance(result, np.ndarray) else result
            for result in _several(self.kernel())
        )
        buffers = dict(zip(self.buffers, results, strict=False))
        kernel = self.kernel
        return lambda: kernel(**buffers)


def _several(result: Any) -> tuple[np.ndarray, ...]:
    return result if isinstance(result, tuple) else (result,)


def call(kernels: Any, workload: Workload, a: Arrays) -> Call:
    """`workload` on the arrays `a` by `kernels`."""
    return _CALLS[workload.op](kernels, a, workload.shape)


def _made(kernels: Any, *arrays: np.ndarray) -> tuple[Any, ...]:
    """`arrays` as `kernels` take them."""
    return tuple(map(getattr(kernels, "from_numpy", lambda array: array), arrays))


def _geometry(s: Conv) -> dict[str, int]:
    return {"stride": s.stride, "padding": s.padding, "dilation": s.dilation}


def _conv_forward(k: Any, a: Arrays, s: Conv) -> Call:
    def kernel(**out: Any) -> Any:
        return k.conv2d_forward(a["x"], a["weight"], a["bias"], **_geometry(s), groups=s.groups, **out)

    return Call(kernel, ("y",), ("out",))


def _conv_input(k: Any, a: Arrays, s: Conv) -> Call:
    x_shape = (s.n, s.h, s.w, s.c)

    def kernel(**out: Any) -> Any:
        return k.conv2d_backward_input(
            a["dout"], a["weight"], x_shape, **_geometry(s), groups=s.groups, **out
        )

    return Call(kernel, ("dx",), ("out",))


def _conv_weight(k: Any, a: Arrays, s: Conv) -> Call:
    def kernel(**out: Any) -> Any:
        return k.conv2d_backward_weight(a["dout"], a["x"], s.kernel, **_geometry(s), groups=s.groups, **out)

    return Call(kernel, ("dweight",), ("out",))


def _max_pool_forward(k: Any, a: Arrays, s: Pool) -> Call:
    def kernel(**out: Any) -> Any:
        return k.max_pool2d_forward(a["x"], s.kernel, s.stride, s.padding, **out)

    return Call(kernel, ("y", "argmax"), ("out", "out_argmax"))


def _max_pool_backward(k: Any, a: Arrays, s: Pool) -> Call:
    _, argmax = k.max_pool2d_forward(a["x"], s.kernel, s.stride, s.padding)
    x_shape = a["x"].shape

    def kernel(**out: Any) -> Any:
        return k.max_pool2d_backward(a["dout"], argmax, x_shape, s.kernel, s.stride, s.padding, **out)

    return Call(kernel, ("dx",), ("out",))


def _avg_pool_forward(k: Any, a: Arrays, s: Pool) -> Call:
    def kernel(**out: Any) -> Any:
        return k.avg_pool2d_forward(a["x"], s.kernel, s.stride, s.padding, **out)

    return Call(kernel, ("y",), ("out",))


def _avg_pool_backward(k: Any, a: Arrays, s: Pool) -> Call:
    x_shape = (s.n, s.h, s.w, s.c)

    def kernel(**out: Any) -> Any:
        return k.avg_pool2d_backward(a["dout"], x_shape, s.kernel, s.stride, s.padding, **out)

    return Call(kernel, ("dx",), ("out",))


_MOMENTS = ("out_mean", "out_inv_std")


def _batch_norm_forward(k: Any, a: Arrays, s: Any) -> Call:
    # The running statistics move at each call; their momentum keeps them finite.
    running = _made(k, np.zeros(s.c, np.float32), np.ones(s.c, np.float32))

    def kernel(**out: Any) -> Any:
        return k.batch_norm_forward(a["x"], a["weight"], a["bias"], *running, True, **out)

    return Call(kernel, ("y", "mean", "inv_std"), ("out", *_MOMENTS))


def _batch_norm_inference(k: Any, a: Arrays, s: Any) -> Call:
    def kernel(**out: Any) -> Any:
        return k.batch_norm_forward(a["x"], a["weight"], a["bias"], a["mean"], a["var"], False, **out)

    return Call(kernel, ("y", "mean", "inv_std"), ("out", *_MOMENTS))


def _batch_norm_backward(k: Any, a: Arrays, s: Any) -> Call:
    _, mean, inv_std = k.batch_norm_forward(a["x"], a["weight"], None, None, None, True)

    def kernel(**out: Any) -> Any:
        return k.batch_norm_backward(a["dout"], a["x"], a["weight"], mean, inv_std, True, **out)

    return Call(kernel, ("dx", "dweight", "dbias"), ("out", "out_dweight", "out_dbias"))


def _relu_forward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.relu_forward(a["x"], **out), ("y",), ("out",))


def _relu_backward(k: Any, a: Arrays, s: Any) -> Call:
    y = k.relu_forward(a["x"])
    return Call(lambda **out: k.relu_backward(a["dout"], y, **out), ("dx",), ("out",))


def _leaky_relu_forward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.leaky_relu_forward(a["x"], SLOPE, **out), ("y",), ("out",))


def _leaky_relu_backward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.leaky_relu_backward(a["dout"], a["x"], SLOPE, **out), ("dx",), ("out",))


def _prelu_forward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.prelu_forward(a["x"], a["slope"], **out), ("y",), ("out",))


def _prelu_backward(k: Any, a: Arrays, s: Any) -> Call:
    def kernel(**out: Any) -> Any:
        return k.prelu_backward(a["dout"], a["x"], a["slope"], **out)

    return Call(kernel, ("dx", "dweight"), ("out", "out_dweight"))


def _dropout_forward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.dropout_forward(a["x"], DROPOUT, _SEED, **out), ("y",), ("out",))


def _im2col(k: Any, a: Arrays, s: Conv) -> Call:
    def kernel(**out: Any) -> Any:
        return k.im2col(a["x"], s.kernel, **_geometry(s), **out)

    return Call(kernel, ("cols",), ("out",))


def _col2im(k: Any, a: Arrays, s: Conv) -> Call:
    x_shape = (s.n, s.h, s.w, s.c)

    def kernel(**out: Any) -> Any:
        return k.col2im(a["cols"], x_shape, s.kernel, **_geometry(s), **out)

    return Call(kernel, ("x",), ("out",))


def _linear_forward(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.linear_forward(a["x"], a["weight"], a["bias"], **out), ("y",), ("out",))


def _linear_input(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.linear_backward_input(a["dout"], a["weight"], **out), ("dx",), ("out",))


def _linear_weight(k: Any, a: Arrays, s: Any) -> Call:
    return Call(lambda **out: k.linear_backward_weight(a["dout"], a["x"], **out), ("dweight",), ("out",))


def _cross_entropy(k: Any, a: Arrays, s: Any) -> Call:
    """The mean loss' forward and backward pass."""
    (dlosses,) = _made(k, np.full(s.n, 1 / s.n, np.float32))

    def kernel(
        out: np.ndarray | None = None, out_weights: np.ndarray | None = None, dx: np.ndarray | None = None
    ) -> Any:
        forward = {} if out is None else {"out": out, "out_weights": out_weights}
        losses, weights = k.softmax_cross_entropy(a["x"], a["target"], **forward)
        backward = {} if dx is None else {"out": dx}
        dx = k.softmax_cross_entropy_backward(dlosses, a["x"], a["target"], **backward)
        return losses, weights, dx

    return Call(kernel, ("losses", "weights", "dx"), ("out", "out_weights", "dx"))


def _adam(k: Any, a: Arrays, s: Any) -> Call:
    """The first step from copies, then the second step again and again in place."""

    def kernel(
        param: np.ndarray | None = None,
        exp_avg: np.ndarray | None = None,
        exp_avg_sq: np.ndarray | None = None,
    ) -> Any:
        step = 2
        if param is None:
            param, step = a["param"].copy(), 1
            exp_avg, exp_avg_sq = _made(k, *np.zeros((2, s.size), np.float32))
        k.adam_update(param, a["grad"], exp_avg, exp_avg_sq, step, ADAM_RATE)
        return param, exp_avg, exp_avg_sq

    names = ("param", "exp_avg", "exp_avg_sq")
    return Call(kernel, names, names)


_CALLS: dict[str, Callable[[Any, Arrays, Any], Call]] = {
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
