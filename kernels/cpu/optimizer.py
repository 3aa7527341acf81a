"""One step of SGD, Adam and AdamW on flat arrays, in place, by PyTorch's formulas: one pass over memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count
from .pieces import BLOCK, blocks, fill, span_elements
from .vectors import (
    LONG,
    all_long_lanes,
    first_long_lanes,
    keep_in_line,
    lanes_of,
    like,
    load,
    multiply_add,
    pointer,
    prefetch_vector,
    root,
    store,
)

# So many vectors ahead are fetched: processors foresee some streams, but not as many as there are.
_AHEAD = 8


class Sgd(NamedTuple):
    """The numbers of one step of SGD, the floats in the parameters' dtype, the switches 0 or 1."""

    lr: float
    momentum: float
    fresh: float  # the share of the gradient in the new velocity
    weight_decay: float
    nesterov: int
    zero_grad: int


class Adam(NamedTuple):
    """The numbers of one step of Adam, the floats in the parameters' dtype, the switches 0 or 1."""

    lr: float  # over the bias correction of exp_avg
    keep: float  # what decoupled weight decay leaves of a parameter
    weight_decay: float
    beta1: float
    fresh1: float  # 1 - beta1
    beta2: float
    fresh2: float
    correction: float  # of the root of exp_avg_sq
    eps: float
    decoupled: int
    zero_grad: int


def _state(name: str, array: np.ndarray, param: np.ndarray) -> np.ndarray:
    """An array to update in place: `param`'s twin, and C-contiguous and writable."""
    if array.dtype != param.dtype:
        raise TypeError(f"{name}: dtype {array.dtype} differs from {param.dtype}, the dtype of param")
    return checks.output(name, array, param.shape, param.dtype)


def _param_and_grad(param: np.ndarray, grad: np.ndarray, zero_grad: bool) -> tuple[np.ndarray, np.ndarray]:
    checks.floating("param", param, 1)
    _state("param", param, param)
    if zero_grad:
        return param, _state("grad", grad, param)
    return param, checks.same_shape("grad", checks.floating("grad", grad, 1, param.dtype), param.shape)


@parallel
def _sgd(part, parts, param, grad, velocity, s):
    keep_out_of_line()
    lo, hi = span_elements(part, parts, param.size)
    for start in range(lo, hi, BLOCK):
        end = min(start + BLOCK, hi)
        p, g = param[start:end], grad[start:end]
        if velocity.size:
            v = velocity[start:end]
            for i in range(p.size):
                step = g[i] + s.weight_decay * p[i]
                v[i] = s.momentum * v[i] + s.fresh * step
                step = step + s.momentum * v[i] if s.nesterov else v[i]
                p[i] -= s.lr * step
        else:
            for i in range(p.size):
                p[i] -= s.lr * (g[i] + s.weight_decay * p[i])
        if s.zero_grad:
            fill(g, 0)


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
    *,
    zero_grad: bool = False,
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
    param : (n,) float32 or float64
        Overwritten.
    grad : (n,)
    velocity : (n,), or None where `momentum` is 0
        Overwritten.
    lr, momentum, dampening, weight_decay : float
    nesterov : bool
    first : bool
        Whether `velocity` has no value yet.
    zero_grad : bool
        Overwrite `grad` with zeros on the way.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, an array to overwrite is not C-contiguous and writable, or `velocity`
        is None and `momentum` is not 0.

    References
    ----------
    Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum in deep learning, ICML
    2013, section 2, with the learning rate outside the velocity, as PyTorch has it.
    """
    param, grad = _param_and_grad(param, grad, zero_grad)
    number = param.dtype.type
    if momentum == 0:
        moving = np.empty(0, param.dtype)
    elif velocity is None:
        raise ValueError("velocity: needed where momentum is not 0")
    else:
        moving = _state("velocity", velocity, param)
    if first:
        between_jobs(moving.fill, 0)
        dampening = 0.0
    step = Sgd(
        number(lr),
        number(momentum),
        number(1 - dampening),
        number(weight_decay),
        int(bool(nesterov)),
        int(bool(zero_grad)),
    )
    _sgd(part_count(blocks(param.size), param.size), param, grad, moving, step)


@kernel
def _adam_vector(p, g, m, v, at, mask, s):
    """One vector of parameters and their state."""
    keep_in_line()
    param, gradient = load(p, at, mask), load(g, at, mask)
    if s.zero_grad:
        store(like(gradient, 0), g, at, mask)
    if not s.decoupled:
        gradient = multiply_add(like(param, s.weight_decay), param, gradient)
    first = multiply_add(like(param, s.beta1), load(m, at, mask), like(param, s.fresh1) * gradient)
    second = like(param, s.fresh2) * gradient * gradient
    second = multiply_add(like(param, s.beta2), load(v, at, mask), second)
    store(first, m, at, mask)
    store(second, v, at, mask)
    size = multiply_add(root(second), like(param, s.correction), like(param, s.eps))
    store(like(param, s.keep) * param - like(param, s.lr) * first / size, p, at, mask)


@parallel
def _adam(part, parts, param, grad, exp_avg, exp_avg_sq, s):
    keep_out_of_line()
    p, g, m, v = pointer(param), pointer(grad), pointer(exp_avg), pointer(exp_avg_sq)
    everything, width = all_long_lanes(p), LONG * lanes_of(p)
    lo, hi = span_elements(part, parts, param.size)
    whole = lo + (hi - lo) // width * width
    for at in range(lo, whole, width):
        for stream in (p, g, m, v):
            prefetch_vector(stream, at + _AHEAD * width, everything)
        _adam_vector(p, g, m, v, at, everything, s)
    if whole < hi:
        _adam_vector(p, g, m, v, whole, first_long_lanes(p, hi - whole), s)


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
    *,
    zero_grad: bool = False,
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
    param : (n,) float32 or float64
        Overwritten.
    grad : (n,)
    exp_avg, exp_avg_sq : (n,)
        Zeros before the first step. Overwritten.
    step : int
        1 in the first call.
    lr, beta1, beta2, eps, weight_decay : float
    decoupled : bool
        True is AdamW.
    zero_grad : bool
        Overwrite `grad` with zeros on the way.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, an array to overwrite is not C-contiguous and writable, `step` is below
        1, or a beta is not in [0, 1).

    References
    ----------
    Kingma and Ba, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
    """
    param, grad = _param_and_grad(param, grad, zero_grad)
    exp_avg = _state("exp_avg", exp_avg, param)
    exp_avg_sq = _state("exp_avg_sq", exp_avg_sq, param)
    step = checks.integer("step", step, 1)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: {beta} is not in [0, 1)")
    numbers = (
        lr / (1 - beta1**step),
        1 - lr * weight_decay if decoupled else 1,
        weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
    switches = int(bool(decoupled)), int(bool(zero_grad))
    settings = Adam._make((*map(param.dtype.type, numbers), *switches))
    _adam(part_count(blocks(param.size), param.size), param, grad, exp_avg, exp_avg_sq, settings)
