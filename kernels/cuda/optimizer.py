"""One step of SGD, Adam and AdamW on flat arrays, in place, by PyTorch's formulas: one pass over memory."""

from __future__ import annotations

import math
from typing import Any

from numba import cuda

from ..cpu import optimizer as cpu
from . import checks
from .arrays import DeviceArray
from .elementwise import CHUNK, chunks
from .jit import THREADS, device_function, kernel
from .twin import twin_of


def _param_and_grad(param: Any, grad: Any, zero_grad: bool) -> tuple[DeviceArray, DeviceArray]:
    checks.floating("param", param, 1)
    param = checks.output("param", param, param.shape, param.dtype)
    if zero_grad:
        return param, checks.updated("grad", grad, param.shape, param.dtype, "param")
    return param, checks.same_shape("grad", checks.floating("grad", grad, 1, param.dtype), param.shape)


@kernel("T[::1], T[::1], T, T, int64")
def _descend(param, grad, lr, weight_decay, zero_grad):
    start = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
    for i in range(start, min(start + CHUNK, param.size), THREADS):
        param[i] -= lr * (grad[i] + weight_decay * param[i])
        if zero_grad:
            grad[i] = 0


@kernel("T[::1], T[::1], T[::1], T, T, T, T, int64, int64, int64")
def _sgd(param, grad, velocity, lr, momentum, fresh, weight_decay, nesterov, first, zero_grad):
    start = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
    for i in range(start, min(start + CHUNK, param.size), THREADS):
        step = grad[i] + weight_decay * param[i]
        moved = step if first else momentum * velocity[i] + fresh * step
        velocity[i] = moved
        param[i] -= lr * (step + momentum * moved if nesterov else moved)
        if zero_grad:
            grad[i] = 0


@twin_of(cpu.sgd_update)
def sgd_update(
    param: Any,
    grad: Any,
    velocity: Any,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    *,
    zero_grad: bool = False,
) -> None:
    param, grad = _param_and_grad(param, grad, zero_grad)
    if momentum != 0:
        if velocity is None:
            raise ValueError("velocity: needed where momentum is not 0")
        velocity = checks.updated("velocity", velocity, param.shape, param.dtype, "param")
    if not param.size:
        return
    grid = chunks(param.size)
    if momentum == 0:
        _descend.launch(grid, THREADS, param, grad, lr, weight_decay, bool(zero_grad))
    else:
        numbers = lr, momentum, 1 - dampening, weight_decay
        switches = bool(nesterov), bool(first), bool(zero_grad)
        _sgd.launch(grid, THREADS, param, grad, velocity, *numbers, *switches)


@device_function
def _adam_step(p, g, m, v, lr, keep, weight_decay, beta1, fresh1, beta2, fresh2, correction, eps, decoupled):
    """The new parameter and its new state."""
    if not decoupled:
        g = g + weight_decay * p
    first = beta1 * m + fresh1 * g
    second = beta2 * v + fresh2 * g * g
    return keep * p - lr * first / (math.sqrt(second) * correction + eps), first, second


@kernel("T[::1], T[::1], T[::1], T[::1], T, T, T, T, T, T, T, T, T, int64, int64")
def _adam(
    param, grad, exp_avg, exp_avg_sq,
    lr, keep, weight_decay, beta1, fresh1, beta2, fresh2, correction, eps, decoupled, zero_grad,
):  # fmt: skip
    start = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
    for i in range(start, min(start + CHUNK, param.size), THREADS):
        p, m, v = _adam_step(
            param[i], grad[i], exp_avg[i], exp_avg_sq[i],
            lr, keep, weight_decay, beta1, fresh1, beta2, fresh2, correction, eps, decoupled,
        )  # fmt: skip
        param[i], exp_avg[i], exp_avg_sq[i] = p, m, v
        if zero_grad:
            grad[i] = 0


@twin_of(cpu.adam_update)
def adam_update(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
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
    param, grad = _param_and_grad(param, grad, zero_grad)
    exp_avg = checks.updated("exp_avg", exp_avg, param.shape, param.dtype, "param")
    exp_avg_sq = checks.updated("exp_avg_sq", exp_avg_sq, param.shape, param.dtype, "param")
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
    switches = bool(decoupled), bool(zero_grad)
    if param.size:
        _adam.launch(chunks(param.size), THREADS, param, grad, exp_avg, exp_avg_sq, *numbers, *switches)
