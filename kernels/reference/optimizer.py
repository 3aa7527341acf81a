"""One step of SGD, Adam and AdamW on flat arrays, in place, by PyTorch's formulas."""

from __future__ import annotations

import numpy as np

from .shapes import require_shape, wide


def sgd_update(
    param: np.ndarray,
    grad: np.ndarray,
    velocity: np.ndarray | None,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
) -> None:
    """Move `param` and `velocity`, in place, by one step of gradient descent.

    ::

        g = grad + weight_decay * param
        velocity = momentum * velocity + (1 - dampening) * g      (on the first step: g)
        step = velocity                                           (Nesterov: g + momentum * velocity)
        param = param - lr * step

    Without momentum the step is g.

    Parameters
    ----------
    param : ndarray, float32 or float64, shape (n,)
        Overwritten.
    grad : ndarray, shape (n,)
    velocity : ndarray, shape (n,), or None where `momentum` is 0
        Overwritten.
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
    first : bool
        Whether `velocity` has no value yet.

    Raises
    ------
    ValueError
        If shapes disagree, or `velocity` is None and `momentum` is not 0.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML
    2013, section 2, with the learning rate outside the velocity, as PyTorch has it.
    """
    require_shape("grad", grad, param.shape)
    param64 = wide("param", param)
    step = wide("grad", grad) + weight_decay * param64
    if momentum != 0:
        if velocity is None:
            raise ValueError("velocity: needed where momentum is not 0")
        require_shape("velocity", velocity, param.shape)
        new = step if first else momentum * wide("velocity", velocity) + (1 - dampening) * step
        velocity[...] = new
        step = step + momentum * new if nesterov else new
    param[...] = param64 - lr * step


def adam_update(
    param: np.ndarray,
    grad: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """Move `param`, `exp_avg` and `exp_avg_sq`, in place, by one step of Adam or AdamW.

    ::

        g = grad + weight_decay * param                           (AdamW: grad)
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g**2
        m = exp_avg / (1 - beta1**step)
        v = exp_avg_sq / (1 - beta2**step)
        param = param - lr * m / (sqrt(v) + eps)                  (AdamW: and - lr * weight_decay * param)

    Parameters
    ----------
    param : ndarray, float32 or float64, shape (n,)
        Overwritten.
    grad : ndarray, shape (n,)
    exp_avg, exp_avg_sq : ndarray, shape (n,)
        Zeros before the first step. Overwritten.
    step : int
        1 in the first call.
    lr, beta1, beta2, eps, weight_decay : float
    decoupled : bool
        True is AdamW.

    Raises
    ------
    ValueError
        If shapes disagree or `step` is below 1.

    References
    ----------
    Kingma and Ba, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    """
    for name, array in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require_shape(name, array, param.shape)
    if step < 1:
        raise ValueError(f"step: {step} is below 1")
    param64, g = wide("param", param), wide("grad", grad)
    if decoupled:
        param64 = param64 - lr * weight_decay * param64
    else:
        g = g + weight_decay * param64
    mean = beta1 * wide("exp_avg", exp_avg) + (1 - beta1) * g
    mean_sq = beta2 * wide("exp_avg_sq", exp_avg_sq) + (1 - beta2) * g**2
    unbiased_mean = mean / (1 - beta1**step)
    unbiased_mean_sq = mean_sq / (1 - beta2**step)
    exp_avg[...] = mean
    exp_avg_sq[...] = mean_sq
    param[...] = param64 - lr * unbiased_mean / (np.sqrt(unbiased_mean_sq) + eps)
