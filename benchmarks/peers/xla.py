"""JAX: every operation jitted on its own, images channels-last as XLA's CPU compiler likes them.

XLA's threads can't be set after its start: the first `set_threads` of a process decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..calls import ADAM_RATE, SLOPE
from ..inputs import Arrays
from ..shapes import Conv, Pool, Workload
from . import Side, networks
from .xla_networks import infer, train
from .xla_ops import adam_step, average_pool, convolve, max_pool

# A function of the arrays, the arrays that it reads, and the names of its results.
Prepared = tuple[Callable[..., Any], tuple[str, ...], tuple[str, ...]]


def version() -> str:
    """JAX's."""
    return jax.__version__


def set_threads(threads: int) -> None:
    """Threads of XLA's pool, if it has not started yet."""
    os.environ.setdefault("PJRT_NPROC", str(threads))
    os.environ.setdefault("NPROC", str(threads))


def variants(workload: Workload) -> tuple[str, ...]:
    """One way for all but dropout and columns."""
    return ("jax",) if workload.op in (*_FUNCTIONS, *networks.MODEL_OPS, "adam") else ()


def prepare(workload: Workload, arrays: Arrays, variant: str) -> Side:
    """See the package."""
    if workload.op == "train":
        return train(workload.shape, arrays)
    if workload.op in networks.MODEL_OPS:
        return infer(workload.shape, arrays)
    if workload.op == "adam":
        return _adam(arrays)
    function, reads, names = _FUNCTIONS[workload.op](workload.shape)
    jitted = jax.jit(function)
    operands = [jnp.asarray(arrays[name]) for name in reads]

    def run() -> Any:
        return jax.block_until_ready(jitted(*operands))

    def result() -> dict[str, np.ndarray]:
        results = run()
        several = results if isinstance(results, tuple) else (results,)
        return {name: np.array(array) for name, array in zip(names, several, strict=True)}

    return Side(run, result)


def _conv_forward(s: Conv) -> Prepared:
    return lambda x, weight, bias: convolve(x, weight, s) + bias, ("x", "weight", "bias"), ("y",)


def _conv_input(s: Conv) -> Prepared:
    def function(dout: Any, weight: Any) -> Any:
        x = jnp.zeros((s.n, s.h, s.w, s.c), jnp.float32)
        return jax.vjp(lambda x: convolve(x, weight, s), x)[1](dout)[0]

    return function, ("dout", "weight"), ("dx",)


def _conv_weight(s: Conv) -> Prepared:
    def function(dout: Any, x: Any) -> Any:
        weight = jnp.zeros((s.kernel, s.kernel, s.c // s.groups, s.f), jnp.float32)
        return jax.vjp(lambda weight: convolve(x, weight, s), weight)[1](dout)[0]

    return function, ("dout", "x"), ("dweight",)


def _max_pool_forward(s: Pool) -> Prepared:
    return lambda x: max_pool(x, *_window(s)), ("x",), ("y",)


def _max_pool_backward(s: Pool) -> Prepared:
    def function(x: Any, dout: Any) -> Any:
        return jax.vjp(lambda x: max_pool(x, *_window(s)), x)[1](dout)[0]

    return function, ("x", "dout"), ("dx",)


def _avg_pool_forward(s: Pool) -> Prepared:
    return lambda x: average_pool(x, *_window(s)), ("x",), ("y",)


def _avg_pool_backward(s: Pool) -> Prepared:
    def function(dout: Any) -> Any:
        x = jnp.zeros((s.n, s.h, s.w, s.c), jnp.float32)
        return jax.vjp(lambda x: average_pool(x, *_window(s)), x)[1](dout)[0]

    return function, ("dout",), ("dx",)


def _window(s: Pool) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return (s.kernel, s.kernel), (s.stride, s.stride), (s.padding, s.padding)


def _normalized(x: Any) -> Any:
    mean = x.mean((0, 1, 2))
    return (x - mean) * lax.rsqrt(x.var((0, 1, 2)) + 1e-5)


def _batch_norm_forward(s: Any) -> Prepared:
    return lambda x, weight, bias: _normalized(x) * weight + bias, ("x", "weight", "bias"), ("y",)


def _batch_norm_inference(s: Any) -> Prepared:
    def function(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        return (x - mean) * (lax.rsqrt(var + 1e-5) * weight) + bias

    return function, ("x", "weight", "bias", "mean", "var"), ("y",)


def _batch_norm_backward(s: Any) -> Prepared:
    def function(x: Any, dout: Any, weight: Any) -> Any:
        return jax.vjp(lambda x, weight: _normalized(x) * weight, x, weight)[1](dout)

    return function, ("x", "dout", "weight"), ("dx", "dweight")


def _activation(
    function: Callable[[Any], Any],
) -> tuple[Callable[[Any], Prepared], Callable[[Any], Prepared]]:
    """The forward and the backward pass of a function of one array."""

    def backward(x: Any, dout: Any) -> Any:
        return jax.vjp(function, x)[1](dout)[0]

    return lambda s: (function, ("x",), ("y",)), lambda s: (backward, ("x", "dout"), ("dx",))


def _prelu(x: Any, slope: Any) -> Any:
    return jnp.where(x > 0, x, slope * x)


def _prelu_forward(s: Any) -> Prepared:
    return _prelu, ("x", "slope"), ("y",)


def _prelu_backward(s: Any) -> Prepared:
    def function(x: Any, slope: Any, dout: Any) -> Any:
        return jax.vjp(_prelu, x, slope)[1](dout)

    return function, ("x", "slope", "dout"), ("dx", "dweight")


def _linear_forward(s: Any) -> Prepared:
    return lambda x, weight, bias: x @ weight + bias, ("x", "weight", "bias"), ("y",)


def _cross_entropy(s: Any) -> Prepared:
    def function(x: Any, target: Any) -> Any:
        def loss(x: Any) -> Any:
            return -jnp.take_along_axis(jax.nn.log_softmax(x), target[:, None], 1).mean()

        return jax.value_and_grad(loss)(x)

    return function, ("x", "target"), ("loss", "dx")


def _adam(arrays: Arrays) -> Side:
    """Steps that write over their own state."""
    jitted = jax.jit(
        lambda state, grad, step: adam_step(state[0], grad, *state[1:], step, ADAM_RATE), donate_argnums=0
    )
    grad, step = jnp.asarray(arrays["grad"]), jnp.float32(1)

    def start() -> Any:
        param = jnp.array(arrays["param"])
        return param, jnp.zeros_like(param), jnp.zeros_like(param)

    carried = [start()]

    def run() -> None:
        carried[0] = jax.block_until_ready(jitted(carried[0], grad, step))

    def result() -> dict[str, np.ndarray]:
        names = ("param", "exp_avg", "exp_avg_sq")
        return {name: np.array(array) for name, array in zip(names, jitted(start(), grad, step), strict=True)}

    return Side(run, result)


_relu_forward, _relu_backward = _activation(jax.nn.relu)
_leaky_relu_forward, _leaky_relu_backward = _activation(lambda x: jnp.where(x > 0, x, SLOPE * x))

_FUNCTIONS: dict[str, Callable[[Any], Prepared]] = {
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
    "linear-forward": _linear_forward,
    "linear-input": lambda s: (lambda dout, weight: dout @ weight.T, ("dout", "weight"), ("dx",)),
    "linear-weight": lambda s: (lambda dout, x: x.T @ dout, ("dout", "x"), ("dweight",)),
    "cross-entropy": _cross_entropy,
}
