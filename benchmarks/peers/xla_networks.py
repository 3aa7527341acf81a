"""The named networks in JAX, with fastcnn's initial state; a step is one jitted function."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..inputs import Arrays
from ..parity import GRADIENT
from ..shapes import Model
from . import Side, networks
from .xla_ops import adam_step, average_pool, correlate, max_pool

Parameters = dict[str, Any]


class _Pass:
    """A forward pass: it collects what BatchNorm's running statistics become, and splits the random key."""

    def __init__(self, state: Parameters, training: bool, key: Any):
        self.state = dict(state)
        self.training = training
        self.key = key

    def run(self, layer: Any, name: str, x: Any) -> Any:
        """The output of fastcnn's `layer`, its parameters under `name`, for channels-last x."""
        kind = type(layer).__name__
        if kind == "Sequential":
            for i, child in enumerate(layer):
                x = self.run(child, f"{name}{i}.", x)
            return x
        if kind == "Residual":
            skip = x if layer.shortcut is None else self.run(layer.shortcut, f"{name}shortcut.", x)
            y = self.run(layer.body, f"{name}body.", x) + skip
            return y if layer.activation is None else self.run(layer.activation, f"{name}activation.", y)
        return getattr(self, f"_{kind.lower()}")(layer, name, x)

    def _conv2d(self, layer: Any, name: str, x: Any) -> Any:
        pads: Any = (
            [(p, p) for p in layer.padding] if isinstance(layer.padding, tuple) else layer.padding.upper()
        )
        weight = self.state[f"{name}weight"]
        y = correlate(x, weight, layer.stride, pads, layer.dilation, layer.groups)
        return y if layer.bias is None else y + self.state[f"{name}bias"]

    def _linear(self, layer: Any, name: str, x: Any) -> Any:
        return x @ self.state[f"{name}weight"] + self.state[f"{name}bias"]

    def _batchnorm2d(self, layer: Any, name: str, x: Any) -> Any:
        mean, var = self.state[f"{name}running_mean"], self.state[f"{name}running_var"]
        if self.training:
            count = x.size // x.shape[-1]
            old, m = (mean, var), layer.momentum
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.state[f"{name}running_mean"] = (1 - m) * old[0] + m * mean
            self.state[f"{name}running_var"] = (1 - m) * old[1] + m * var * (count / (count - 1))
        scale = lax.rsqrt(var + layer.eps) * self.state[f"{name}weight"]
        return (x - mean) * scale + self.state[f"{name}bias"]

    def _relu(self, layer: Any, name: str, x: Any) -> Any:
        return jax.nn.relu(x)

    def _leakyrelu(self, layer: Any, name: str, x: Any) -> Any:
        return jnp.where(x > 0, x, layer.negative_slope * x)

    def _prelu(self, layer: Any, name: str, x: Any) -> Any:
        return jnp.where(x > 0, x, self.state[f"{name}weight"] * x)

    def _maxpool2d(self, layer: Any, name: str, x: Any) -> Any:
        return max_pool(x, layer.kernel_size, layer.stride, layer.padding)

    def _avgpool2d(self, layer: Any, name: str, x: Any) -> Any:
        return average_pool(x, layer.kernel_size, layer.stride, layer.padding)

    def _adaptiveavgpool2d(self, layer: Any, name: str, x: Any) -> Any:
        # To one pixel, as the networks have it: the comparison of the results would notice another.
        return x.mean((1, 2), keepdims=True)

    def _flatten(self, layer: Any, name: str, x: Any) -> Any:
        # PyTorch's order: channels first.
        return x.transpose(0, 3, 1, 2).reshape(len(x), -1)

    def _dropout(self, layer: Any, name: str, x: Any) -> Any:
        if not self.training or layer.p == 0:
            return x
        self.key, key = jax.random.split(self.key)
        kept = jax.random.bernoulli(key, 1 - layer.p, x.shape)
        return jnp.where(kept, x / (1 - layer.p), 0)


_BUFFERS = ("running_mean", "running_var")


def _state(net: Any) -> tuple[Parameters, Parameters]:
    """Parameters and buffers in XLA's layouts: weights (kH, kW, C, F) and (in, out)."""
    arrays = {}
    for name, array in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
            arrays[name] = jnp.array(array if axes is None else array.transpose(axes))
    buffers = {name: array for name, array in arrays.items() if name.endswith(_BUFFERS)}
    return {name: array for name, array in arrays.items() if name not in buffers}, buffers


def infer(shape: Model, arrays: Arrays) -> Side:
    """A forward pass in evaluation mode."""
    net = networks.build(shape)
    parameters, buffers = _state(net)
    state = {**parameters, **buffers}
    x = jnp.asarray(arrays["x"])
    forward = jax.jit(lambda state, x: _Pass(state, False, None).run(net, "", x))

    def run() -> Any:
        return jax.block_until_ready(forward(state, x))

    return Side(run, lambda: {"logits": np.array(run())})


def _loss(net: Any, parameters: Parameters, buffers: Parameters, key: Any, x: Any, target: Any) -> Any:
    forward = _Pass({**parameters, **buffers}, True, key)
    logits = forward.run(net, "", x)
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1).mean()
    return loss, (logits, {name: forward.state[name] for name in buffers})


def train(shape: Model, arrays: Arrays) -> Side:
    """A training step with Adam."""
    net = networks.build(shape)
    parameters, buffers = _state(net)
    x, target = jnp.asarray(arrays["x"]), jnp.asarray(arrays["target"])

    def gradients(parameters: Parameters, buffers: Parameters, key: Any) -> Any:
        graded = jax.value_and_grad(lambda p: _loss(net, p, buffers, key, x, target), has_aux=True)
        return graded(parameters)

    def step(carried: Any) -> Any:
        parameters, buffers, means, squares, key, count = carried
        key, used = jax.random.split(key)
        (loss, (_, buffers)), grads = gradients(parameters, buffers, used)
        updated = {
            name: adam_step(value, grads[name], means[name], squares[name], count, networks.LEARNING_RATE)
            for name, value in parameters.items()
        }
        new = [{name: entry[i] for name, entry in updated.items()} for i in range(3)]
        return (new[0], buffers, new[1], new[2], key, count + 1), loss

    jitted = jax.jit(step, donate_argnums=0)
    zeros = [{name: jnp.zeros_like(value) for name, value in parameters.items()} for _ in range(2)]
    copies = [{name: jnp.array(value) for name, value in group.items()} for group in (parameters, buffers)]
    carried = [(*copies, *zeros, jax.random.key(0), jnp.float32(1))]

    def run() -> Any:
        carried[0], loss = jitted(carried[0])
        return jax.block_until_ready(loss)

    def result() -> dict[str, np.ndarray]:
        with networks.without_dropout(net):
            (loss, (logits, _)), grads = jax.jit(gradients)(parameters, buffers, jax.random.key(0))
        results = {"logits": np.array(logits), "loss": np.array(loss)}
        for name, grad in grads.items():
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(grad.ndim, tuple(range(grad.ndim)))
            results[GRADIENT + name] = np.array(grad).transpose(axes)
        return results

    return Side(run, result)
