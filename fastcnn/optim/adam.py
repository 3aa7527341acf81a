"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._device import device_of
from .optimizer import Optimizer, _Flat, _Segment, check_range


class Adam(Optimizer):
    """Adam: Kingma & Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1, in PyTorch's form.

    g = grad + weight_decay * param;  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2;
    param -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Parameters
    ----------
    params : list of Parameter, or of dicts with 'params' and hyper-parameters of their own
    lr : float
    betas : (float, float)
    eps, weight_decay : float
    maximize : bool
        Climb instead of descending.

    Notes
    -----
    PyTorch's `amsgrad` does not exist here.
    """

    _state_names = ("exp_avg", "exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize},
        )

    def _check(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_range(name, group[name], 0.0)
        if len(group["betas"]) != 2:
            raise ValueError(f"betas: expected two numbers, got {group['betas']!r}")
        for i, beta in enumerate(group["betas"]):
            check_range(f"betas[{i}]", beta, 0.0, 1.0)

    def _update(
        self, group: dict[str, Any], segment: _Segment, grad: np.ndarray, step: int, zero_grad: bool
    ) -> None:
        device_of(segment.data).kernels.adam_update(
            segment.data,
            grad,
            segment.state["exp_avg"],
            segment.state["exp_avg_sq"],
            step,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self._decoupled,
            zero_grad=zero_grad,
        )

    def _saved_state(self, flat_group: _Flat, i: int, group: dict[str, Any]) -> dict[str, Any]:
        # PyTorch keeps the count as a float32 tensor.
        step = np.array(flat_group.steps[i], np.float32)
        return {"step": step, **super()._saved_state(flat_group, i, group)}


class AdamW(Adam):
    """Adam with decoupled weight decay: Loshchilov & Hutter (2019), algorithm 2, in PyTorch's form.

    param *= 1 - lr * weight_decay before Adam's update, whose gradient takes no decay. Parameters are Adam's,
    with a weight decay of 0.01 as default.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
