"""fastcnn: its kernels with buffers made beforehand, and its networks, on the CPU or on a CUDA device."""

from __future__ import annotations

from typing import Any

import numpy as np

import fastcnn
from fastcnn import nn, optim
from fastcnn._device import device as device_named
from fastcnn._device import host

from ..calls import call
from ..inputs import Arrays
from ..parity import GRADIENT
from ..shapes import Model, Workload
from . import Side, networks


def version() -> str:
    """fastcnn's."""
    return fastcnn.__version__


def set_threads(threads: int) -> None:
    """Threads of all kernels."""
    fastcnn.set_num_threads(threads)


def variants(workload: Workload) -> tuple[str, ...]:
    """There is one way."""
    return ("fastcnn",)


def prepare(workload: Workload, arrays: Arrays, variant: str, device: str = "cpu") -> Side:
    """See the package."""
    if workload.op == "train":
        return _train(workload.shape, arrays, device)
    if workload.op in networks.MODEL_OPS:
        return _infer(workload.shape, arrays, device)
    on = device_named(device)
    kernel = call(on.kernels, workload, {name: on.array(array) for name, array in arrays.items()})

    def result() -> dict[str, np.ndarray]:
        found = {name: host(array) for name, array in kernel.result().items()}
        return _with_factor(found, arrays["x"]) if workload.op == "dropout-forward" else found

    return Side(kernel.into_buffers(), result)


def _with_factor(result: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """What other libraries' dropout can be compared with: they drop other elements."""
    largest = np.abs(result["y"]).argmax()
    return {**result, "factor": result["y"].flat[largest] / x.flat[largest]}


def _infer(shape: Model, arrays: Arrays, device: str) -> Side:
    net = networks.build(shape).to(device)
    net.eval()
    x = networks.images(device_named(device).array(arrays["x"]))

    def run() -> np.ndarray:
        with fastcnn.no_grad():
            return net(x)

    return Side(run, lambda: {"logits": np.array(host(run()))})


def _train(shape: Model, arrays: Arrays, device: str) -> Side:
    net = networks.build(shape).to(device)
    net.train()
    optimizer = optim.Adam(net.parameters(), lr=networks.LEARNING_RATE)
    loss_fn = nn.CrossEntropyLoss()
    x, target = networks.images(device_named(device).array(arrays["x"])), arrays["target"]

    def backward() -> tuple[Any, float]:
        logits = net(x)
        loss = loss_fn(logits, target)
        net.backward(loss_fn.backward(), input_grad=False)
        return logits, loss

    def run() -> float:
        _, loss = backward()
        optimizer.step(zero_grad=True)
        return loss

    def result() -> dict[str, np.ndarray]:
        state = net.state_dict()
        with networks.without_dropout(net):
            optimizer.zero_grad()
            logits, loss = backward()
        results = {"logits": np.array(host(logits)), "loss": np.array(loss)}
        for name, parameter in net.named_parameters():
            results[GRADIENT + name] = np.array(host(parameter.grad))
        net.load_state_dict(state)
        return results

    return Side(run, result)
