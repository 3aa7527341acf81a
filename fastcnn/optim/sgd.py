"""SGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._device import device_of
from .optimizer import Optimizer, _Segment, check_range


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's form.

    d = grad + weight_decay * param;  v = momentum * v + (1 - dampening) * d, at first v = d;
    param -= lr * (d + momentum * v if nesterov else v)

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013); the
    learning rate stands outside the velocity, as in PyTorch.

    Parameters
    ----------
    params : list of Parameter, or of dicts with 'params' and hyper-parameters of their own
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
        Needs momentum, and no dampening.
    maximize : bool
        Climb instead of descending.
    """

    _state_names = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
        )

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            check_range(name, group[name], 0.0)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov: True needs a momentum above 0 and a dampening of 0")

    def _needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._state_names if group["momentum"] else ()

    def _update(
        self, group: dict[str, Any], segment: _Segment, grad: np.ndarray, step: int, zero_grad: bool
    ) -> None:
        device_of(segment.data).kernels.sgd_update(
            segment.data,
            grad,
            segment.state.get("momentum_buffer"),
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            step == 1,
            zero_grad=zero_grad,
        )

    def _loaded_steps(self, entry: Mapping[str, Any]) -> int:
        return int(entry.get("momentum_buffer") is not None)
