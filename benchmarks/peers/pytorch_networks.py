"""The named networks in PyTorch, with fastcnn's initial state."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..inputs import Arrays
from ..parity import GRADIENT
from ..shapes import Model
from . import Side, networks


class Residual(torch.nn.Module):
    """y = activation(body(x) + shortcut(x))."""

    def __init__(self, layer: Any):
        super().__init__()
        self.body = module(layer.body)
        self.shortcut = None if layer.shortcut is None else module(layer.shortcut)
        self.activation = None if layer.activation is None else module(layer.activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both ways."""
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.activation is None else self.activation(y)


_POOL = ("kernel_size", "stride", "padding")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Conv2d": (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ),
    "Linear": ("in_features", "out_features"),
    "BatchNorm2d": ("num_features", "eps", "momentum"),
    "MaxPool2d": _POOL,
    "AvgPool2d": _POOL,
    "AdaptiveAvgPool2d": ("output_size",),
    "ReLU": (),
    "LeakyReLU": ("negative_slope",),
    "PReLU": ("num_parameters",),
    "Dropout": ("p",),
    "Flatten": (),
}


def module(layer: Any) -> torch.nn.Module:
    """PyTorch's module for a layer of fastcnn's, without its state."""
    kind = type(layer).__name__
    if kind == "Sequential":
        return torch.nn.Sequential(*[module(child) for child in layer])
    if kind == "Residual":
        return Residual(layer)
    arguments = {name: getattr(layer, name) for name in _ARGUMENTS[kind]}
    if kind in ("Conv2d", "Linear"):
        arguments["bias"] = layer.bias is not None
    return getattr(torch.nn, kind)(**arguments)


def network(shape: Model) -> torch.nn.Module:
    """A named network with fastcnn's initial state."""
    ours = networks.build(shape)
    net = module(ours)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in ours.state_dict().items()})
    return net


def _copied(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().copy()


def _images(arrays: Arrays, memory_format: torch.memory_format) -> torch.Tensor:
    return torch.from_numpy(networks.images(arrays["x"])).clone(memory_format=memory_format)


def infer(
    shape: Model,
    arrays: Arrays,
    memory_format: torch.memory_format,
    compiled: bool = False,
    device: str = "cpu",
) -> Side:
    """A forward pass in evaluation mode."""
    net = network(shape).eval().to(device, memory_format=memory_format)
    forward = torch.compile(net) if compiled else net
    x = _images(arrays, memory_format).to(device)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return forward(x)

    return Side(run, lambda: {"logits": run().cpu().numpy().copy()})


def train(
    shape: Model,
    arrays: Arrays,
    memory_format: torch.memory_format,
    compiled: bool = False,
    device: str = "cpu",
) -> Side:
    """A training step with fused Adam."""
    net = network(shape).train().to(device, memory_format=memory_format)
    forward = torch.compile(net) if compiled else net
    optimizer = torch.optim.Adam(net.parameters(), lr=networks.LEARNING_RATE, fused=True)
    x, target = _images(arrays, memory_format).to(device), torch.from_numpy(arrays["target"]).to(device)

    def run() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(forward(x), target)
        loss.backward()
        optimizer.step()
        return loss

    def result() -> dict[str, np.ndarray]:
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        with networks.without_dropout(net):
            logits = net(x)
            loss = F.cross_entropy(logits, target)
            loss.backward()
        results = {"logits": _copied(logits.detach()), "loss": _copied(loss.detach())}
        for name, parameter in net.named_parameters():
            results[GRADIENT + name] = _copied(parameter.grad)
        net.load_state_dict(state)
        return results

    return Side(run, result)
