"""Softmax, log-softmax, and cross-entropy from logits, with class labels or with target probabilities.

Everything runs over the last axis, with the row's maximum subtracted first; a warp goes through a row. The
losses are PyTorch's before any reduction; dlosses, their upstream gradient, carries the reduction.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from ..cpu import loss as cpu
from . import checks
from .arrays import DeviceArray, empty
from .jit import Kernel, device_function, kernel
from .twin import twin_of

# Threads that share a row, and rows of a block.
_LANES, _ROWS = 32, 4


def _run(rows: Kernel, count: int, *arguments: Any) -> None:
    """Launch a kernel with a warp for each of `count` rows."""
    rows.launch(-(-count // _ROWS), (_LANES, _ROWS), *arguments)


@device_function
def _row(count):
    """The row of this thread. The last block's threads beyond the end repeat the last row: all must meet."""
    return min(cuda.blockIdx.x * _ROWS + cuda.threadIdx.y, count - 1)


@device_function
def _repeats(count):
    """Whether this thread only repeats the last row: it must not write what others may still read."""
    return cuda.blockIdx.x * _ROWS + cuda.threadIdx.y >= count


@device_function
def _row_sum(partial, value):
    """The sum over a row's lanes of `value`, in every lane; `partial` is _ROWS x _LANES shared numbers.

    All threads of the block must call it together. Every lane adds all lanes' values itself: two barriers,
    where a tree takes six.
    """
    row, lane = cuda.threadIdx.y, cuda.threadIdx.x
    partial[row, lane] = value
    cuda.syncthreads()
    total = partial[row, 0]
    for k in range(1, _LANES):
        total += partial[row, k]
    cuda.syncthreads()
    return total


@device_function
def _row_max(partial, value):
    """The largest `value` of a row's lanes, in every lane, like `_row_sum`; where one is NaN, any of them."""
    row, lane = cuda.threadIdx.y, cuda.threadIdx.x
    partial[row, lane] = value
    cuda.syncthreads()
    largest = partial[row, 0]
    for k in range(1, _LANES):
        if partial[row, k] > largest:
            largest = partial[row, k]
    cuda.syncthreads()
    return largest


@device_function
def _largest(partial, x, m):
    """The largest element of row m; NaN spreads by the exponentials."""
    largest = x[m, 0]
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        if x[m, k] > largest:
            largest = x[m, k]
    return _row_max(partial, largest)


@device_function
def _sum_of_powers(partial, x, m, largest, zero):
    """Sum of exp(x - largest) over row m."""
    total = zero
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        total += math.exp(x[m, k] - largest)
    return _row_sum(partial, total)


@device_function
def _sum(partial, values, zero):
    """Sum of an array of one axis."""
    total = zero
    for k in range(cuda.threadIdx.x, values.size, _LANES):
        total += values[k]
    return _row_sum(partial, total)


# ------------------------------------------------------------------ softmax


@kernel("T[:, ::1], T[:, ::1], T, int64")
def _softmax(x, y, zero, log):
    partial = cuda.shared.array((_ROWS, _LANES), x.dtype)
    m = _row(x.shape[0])
    largest = _largest(partial, x, m)
    total = _sum_of_powers(partial, x, m, largest, zero)
    logarithm = math.log(total)
    if _repeats(x.shape[0]):
        return
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        below = x[m, k] - largest
        y[m, k] = below - logarithm if log else math.exp(below) / total


def _rows(name: str, x: DeviceArray) -> DeviceArray:
    """`x` as a matrix with its last axis as rows."""
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: expected (..., C) with C of 1 or more, got shape {x.shape}")
    return x.reshape(x.size // x.shape[-1], x.shape[-1])


def _run_softmax(x: Any, log: int, out: Any) -> DeviceArray:
    x = checks.floating("x", x)
    rows = _rows("x", x)
    y = checks.output("out", out, x.shape, x.dtype)
    _run(_softmax, len(rows), rows, y.reshape(rows.shape), 0, log)
    return y


@twin_of(cpu.softmax)
def softmax(x: Any, *, out: Any = None) -> DeviceArray:
    return _run_softmax(x, 0, out)


@twin_of(cpu.log_softmax)
def log_softmax(x: Any, *, out: Any = None) -> DeviceArray:
    return _run_softmax(x, 1, out)


@kernel("T[:, ::1], T[:, ::1], T[:, ::1], T, int64")
def _softmax_backward(dout, y, dx, zero, log):
    partial = cuda.shared.array((_ROWS, _LANES), y.dtype)
    m = _row(y.shape[0])
    total = zero
    for k in range(cuda.threadIdx.x, y.shape[1], _LANES):
        total += dout[m, k] if log else dout[m, k] * y[m, k]
    total = _row_sum(partial, total)
    if _repeats(y.shape[0]):
        return
    for k in range(cuda.threadIdx.x, y.shape[1], _LANES):
        if log:
            dx[m, k] = dout[m, k] - math.exp(y[m, k]) * total
        else:
            dx[m, k] = y[m, k] * (dout[m, k] - total)


def _run_softmax_backward(dout: Any, y: Any, log: int, out: Any) -> DeviceArray:
    y = checks.floating("y", y)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, y.dtype), y.shape)
    rows = _rows("y", y)
    dx = checks.output("out", out, y.shape, y.dtype)
    _run(_softmax_backward, len(rows), dout.reshape(rows.shape), rows, dx.reshape(rows.shape), 0, log)
    return dx


@twin_of(cpu.softmax_backward)
def softmax_backward(dout: Any, y: Any, *, out: Any = None) -> DeviceArray:
    return _run_softmax_backward(dout, y, 0, out)


@twin_of(cpu.log_softmax_backward)
def log_softmax_backward(dout: Any, y: Any, *, out: Any = None) -> DeviceArray:
    return _run_softmax_backward(dout, y, 1, out)


# ------------------------------------------------------------------ cross-entropy with labels


@lru_cache(maxsize=64)
def _ones(classes: int, dtype: np.dtype) -> DeviceArray:
    result = empty(classes, dtype)
    result.fill(1)
    return result


def _logits(x: Any, weight: Any, label_smoothing: float) -> tuple[DeviceArray, DeviceArray]:
    """The logits, and a weight for each class."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1]")
    x = checks.floating("x", x, 2)
    classes = x.shape[1]
    if not classes:
        raise ValueError(f"x: expected (M, C) with C of 1 or more, got shape {x.shape}")
    if weight is None:
        return x, _ones(classes, x.dtype)
    return x, checks.same_shape("weight", checks.floating("weight", weight, 1, x.dtype), (classes,))


def _labels(target: Any, x: DeviceArray) -> DeviceArray:
    return checks.same_shape("target", checks.integers("target", target), x.shape[:1])


@kernel("T[:, ::1], int64[::1], T[::1], int64, T, T, T, T[::1], T[::1]")
def _cross_entropy(x, target, weight, ignore_index, of_label, of_all, zero, losses, weights):
    partial = cuda.shared.array((_ROWS, _LANES), x.dtype)
    m = _row(x.shape[0])
    label = target[m]
    largest = _largest(partial, x, m)
    logarithm = math.log(_sum_of_powers(partial, x, m, largest, zero))
    below = zero
    if of_all > 0:
        for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
            # The share first: the sum without it could overflow where the loss doesn't.
            below += of_all * weight[k] * (x[m, k] - largest)
    below = _row_sum(partial, below)
    whole = _sum(partial, weight, zero)
    if cuda.threadIdx.x == 0 and not _repeats(x.shape[0]):
        if label == ignore_index:
            losses[m] = 0
            weights[m] = 0
        elif label < 0 or label >= x.shape[1]:
            losses[m] = math.nan
            weights[m] = math.nan
        else:
            loss = of_label * weight[label] * (logarithm - (x[m, label] - largest))
            if of_all > 0:
                loss += of_all * whole * logarithm - below
            losses[m] = loss
            weights[m] = weight[label]


@twin_of(cpu.softmax_cross_entropy)
def softmax_cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    out: Any = None,
    out_weights: Any = None,
) -> tuple[DeviceArray, DeviceArray]:
    """A label that is no class raises nothing here: the row's loss and weight are NaN."""
    x, weight = _logits(x, weight, label_smoothing)
    target = _labels(target, x)
    losses = checks.output("out", out, target.shape, x.dtype)
    weights = checks.output("out_weights", out_weights, target.shape, x.dtype)
    numbers = 1 - label_smoothing, label_smoothing / x.shape[1], 0
    _run(_cross_entropy, len(x), x, target, weight, operator.index(ignore_index), *numbers, losses, weights)
    return losses, weights


@kernel("T[::1], T[:, ::1], int64[::1], T[::1], int64, T, T, T, T[:, ::1]")
def _cross_entropy_backward(dlosses, x, target, weight, ignore_index, of_label, of_all, zero, dx):
    partial = cuda.shared.array((_ROWS, _LANES), x.dtype)
    m = _row(x.shape[0])
    label, upstream = target[m], dlosses[m]
    largest = _largest(partial, x, m)
    total = _sum_of_powers(partial, x, m, largest, zero)
    whole = _sum(partial, weight, zero)
    is_class = label >= 0 and label < x.shape[1] and label != ignore_index
    of_label *= weight[label] if is_class else zero
    scale = (of_label + of_all * whole) / total
    if _repeats(x.shape[0]):
        return
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        share = of_all * weight[k]
        if k == label:
            share += of_label
        if is_class:
            dx[m, k] = upstream * (math.exp(x[m, k] - largest) * scale - share)
        else:
            dx[m, k] = 0 if label == ignore_index else math.nan


@twin_of(cpu.softmax_cross_entropy_backward)
def softmax_cross_entropy_backward(
    dlosses: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    out: Any = None,
) -> DeviceArray:
    """A label that is no class raises nothing here: the row's gradient is NaN."""
    x, weight = _logits(x, weight, label_smoothing)
    target = _labels(target, x)
    dlosses = checks.floating("dlosses", dlosses, 1, x.dtype)
    checks.same_shape("dlosses", dlosses, target.shape)
    dx = checks.output("out", out, x.shape, x.dtype)
    numbers = 1 - label_smoothing, label_smoothing / x.shape[1], 0
    _run(
        _cross_entropy_backward,
        len(x), dlosses, x, target, weight, operator.index(ignore_index), *numbers, dx,
    )  # fmt: skip
    return dx


# ------------------------------------------------------------------ cross-entropy with probabilities


@device_function
def _probability(weight, target, m, k, of_target, of_all):
    return weight[k] * (of_target * target[m, k] + of_all)


@kernel("T[:, ::1], T[:, ::1], T[::1], T, T, T, T[::1]")
def _soft_cross_entropy(x, target, weight, of_target, of_all, zero, losses):
    partial = cuda.shared.array((_ROWS, _LANES), x.dtype)
    m = _row(x.shape[0])
    largest = _largest(partial, x, m)
    logarithm = math.log(_sum_of_powers(partial, x, m, largest, zero))
    whole, below = zero, zero
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        q = _probability(weight, target, m, k, of_target, of_all)
        whole += q
        below += q * (x[m, k] - largest)
    whole = _row_sum(partial, whole)
    below = _row_sum(partial, below)
    if cuda.threadIdx.x == 0 and not _repeats(x.shape[0]):
        losses[m] = logarithm * whole - below


def _probabilities(target: Any, x: DeviceArray) -> DeviceArray:
    return checks.same_shape("target", checks.floating("target", target, 2, x.dtype), x.shape)


@twin_of(cpu.soft_cross_entropy)
def soft_cross_entropy(
    x: Any, target: Any, weight: Any = None, label_smoothing: float = 0.0, *, out: Any = None
) -> DeviceArray:
    x, weight = _logits(x, weight, label_smoothing)
    target = _probabilities(target, x)
    losses = checks.output("out", out, x.shape[:1], x.dtype)
    numbers = 1 - label_smoothing, label_smoothing / x.shape[1], 0
    _run(_soft_cross_entropy, len(x), x, target, weight, *numbers, losses)
    return losses


@kernel("T[::1], T[:, ::1], T[:, ::1], T[::1], T, T, T, T[:, ::1]")
def _soft_cross_entropy_backward(dlosses, x, target, weight, of_target, of_all, zero, dx):
    partial = cuda.shared.array((_ROWS, _LANES), x.dtype)
    m = _row(x.shape[0])
    largest = _largest(partial, x, m)
    total = _sum_of_powers(partial, x, m, largest, zero)
    whole = zero
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        whole += _probability(weight, target, m, k, of_target, of_all)
    scale = _row_sum(partial, whole) / total
    if _repeats(x.shape[0]):
        return
    for k in range(cuda.threadIdx.x, x.shape[1], _LANES):
        q = _probability(weight, target, m, k, of_target, of_all)
        dx[m, k] = dlosses[m] * (math.exp(x[m, k] - largest) * scale - q)


@twin_of(cpu.soft_cross_entropy_backward)
def soft_cross_entropy_backward(
    dlosses: Any,
    x: Any,
    target: Any,
    weight: Any = None,
    label_smoothing: float = 0.0,
    *,
    out: Any = None,
) -> DeviceArray:
    x, weight = _logits(x, weight, label_smoothing)
    target = _probabilities(target, x)
    dlosses = checks.floating("dlosses", dlosses, 1, x.dtype)
    checks.same_shape("dlosses", dlosses, x.shape[:1])
    dx = checks.output("out", out, x.shape, x.dtype)
    numbers = 1 - label_smoothing, label_smoothing / x.shape[1], 0
    _run(_soft_cross_entropy_backward, len(x), dlosses, x, target, weight, *numbers, dx)
    return dx
