"""Softmax, log-softmax, and cross-entropy from logits, with class labels or with target probabilities.

Everything runs over the last axis, with the row's maximum subtracted first. The losses are PyTorch's before
any reduction; dlosses, their upstream gradient, carries the reduction.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import Any

import numpy as np

from .. import checks
from ..jit import entry, keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from .exponential import largest_of, sum_of_powers
from .pieces import fill
from .vectors import pointer

# An exponential takes about as long as this many of the operations that part_count counts.
_EXP = 2


@parallel
def _softmax(part, parts, x, y, log):
    keep_out_of_line()
    source, target = pointer(x), pointer(y)
    classes = x.shape[1]
    lo, hi = span(part, parts, x.shape[0])
    for m in range(lo, hi):
        first = m * classes
        largest = largest_of(source, first, classes)
        total = sum_of_powers(source, first, classes, largest, target, first, not log)
        row, result = x[m], y[m]
        if log:
            logarithm = x.dtype.type(math.log(total))
            for k in range(classes):
                result[k] = row[k] - largest
            # In a loop of its own: regrouped, a huge `largest` would swallow the logarithm.
            for k in range(classes):
                result[k] -= logarithm
        else:
            share = x.dtype.type(1 / total)
            for k in range(classes):
                result[k] *= share


def _rows(name: str, x: np.ndarray) -> np.ndarray:
    """`x` as a matrix with its last axis as rows."""
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: expected (..., C) with C of 1 or more, got shape {x.shape}")
    return x.reshape(x.size // x.shape[-1], x.shape[-1])


def _run_softmax(x: np.ndarray, log: int, out: np.ndarray | None) -> np.ndarray:
    x = checks.floating("x", x)
    rows = _rows("x", x)
    y = checks.output("out", out, x.shape, x.dtype)
    _softmax(part_count(len(rows), _EXP * x.size), rows, y.reshape(rows.shape), log)
    return y


def softmax(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """``y[..., c] = exp(x[..., c]) / sum over k of exp(x[..., k])``.

    Parameters
    ----------
    x : (..., C) float32 or float64
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape
        Sums to 1 over the last axis.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    return _run_softmax(x, 0, out)


def log_softmax(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """``y[..., c] = x[..., c] - log(sum over k of exp(x[..., k]))``.

    Parameters
    ----------
    x : (..., C) float32 or float64
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    return _run_softmax(x, 1, out)


@parallel
def _softmax_backward(part, parts, dout, y, dx, log):
    keep_out_of_line()
    zero = y.dtype.type(0)
    lo, hi = span(part, parts, y.shape[0])
    for m in range(lo, hi):
        gradient, source, target = dout[m], y[m], dx[m]
        total = 0.0
        if log:
            for k in range(source.size):
                total += gradient[k]
            first = m * source.size
            sum_of_powers(pointer(y), first, source.size, zero, pointer(dx), first, True)
            for k in range(source.size):
                target[k] = gradient[k] - target[k] * total
        else:
            for k in range(source.size):
                total += gradient[k] * source[k]
            for k in range(source.size):
                target[k] = source[k] * (gradient[k] - total)


def _run_softmax_backward(dout: np.ndarray, y: np.ndarray, log: int, out: np.ndarray | None) -> np.ndarray:
    y = checks.floating("y", y)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, y.dtype), y.shape)
    rows = _rows("y", y)
    dx = checks.output("out", out, y.shape, y.dtype)
    parts = part_count(len(rows), _EXP * y.size if log else y.size)
    _softmax_backward(parts, dout.reshape(rows.shape), rows, dx.reshape(rows.shape), log)
    return dx


def softmax_backward(dout: np.ndarray, y: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `softmax` from its output: ``y * (dout - sum(dout * y))``, sums over the last axis.

    Parameters
    ----------
    dout : (..., C) float32 or float64
    y : array of dout's shape
        The forward call's output.
    out : array of dout's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of dout's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    return _run_softmax_backward(dout, y, 0, out)


def log_softmax_backward(dout: np.ndarray, y: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `log_softmax` from its output: ``dout - exp(y) * sum(dout)``, the sum over the last axis.

    Parameters
    ----------
    dout : (..., C) float32 or float64
    y : array of dout's shape
        The forward call's output.
    out : array of dout's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of dout's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    return _run_softmax_backward(dout, y, 1, out)


@lru_cache(maxsize=64)
def _ones(classes: int, dtype: np.dtype) -> np.ndarray:
    return np.ones(classes, dtype)


def _logits(x: Any, weight: Any, label_smoothing: float) -> tuple[np.ndarray, np.ndarray]:
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


@entry
def _first_wrong(target, classes, ignore_index):
    for m in range(target.size):
        if (target[m] < 0 or target[m] >= classes) and target[m] != ignore_index:
            return m
    return -1


def _labels(target: Any, x: np.ndarray, ignore_index: int) -> tuple[np.ndarray, int]:
    target = np.asarray(target)
    if not np.issubdtype(target.dtype, np.integer):
        raise TypeError(f"target: dtype {target.dtype} is no integer")
    checks.same_shape("target", target, x.shape[:1])
    target = checks.contiguous(target.astype(np.int64, copy=False))
    ignore_index = operator.index(ignore_index)
    wrong = _first_wrong(target, x.shape[1], ignore_index)
    if wrong >= 0:
        raise ValueError(
            f"target: {target[wrong]} at {wrong} is no class: there are {x.shape[1]}, from 0 on"
            f" (and {ignore_index} is ignored)"
        )
    return target, ignore_index


@kernel
def _minus(a, b):
    """a - b, out of the compiler's sight.

    Free to regroup ``log(sum) - (x - largest)``, it might add the logarithm to a huge `largest` and lose it.
    """
    keep_out_of_line()
    return a - b


@parallel
def _cross_entropy(part, parts, x, target, weight, ignore_index, smoothing, losses, weights):
    keep_out_of_line()
    scores = pointer(x)
    classes = weight.size
    whole = 0.0
    for k in range(classes):
        whole += weight[k]
    lo, hi = span(part, parts, x.shape[0])
    for m in range(lo, hi):
        label = target[m]
        if label == ignore_index:
            losses[m] = 0
            weights[m] = 0
            continue
        row = x[m]
        largest = largest_of(scores, m * classes, classes)
        logarithm = math.log(sum_of_powers(scores, m * classes, classes, largest, scores, 0, False))
        loss = (1 - smoothing) * weight[label] * _minus(logarithm, row[label] - largest)
        if smoothing > 0:
            below = 0.0
            for k in range(classes):
                below += weight[k] * (row[k] - largest)
            loss += smoothing / classes * (logarithm * whole - below)
        losses[m] = loss
        weights[m] = weight[label]


def softmax_cross_entropy(
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    out: np.ndarray | None = None,
    out_weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each row of logits with its label t.

    With s the smoothing and w the class weights::

        loss = (1 - s) * w[t] * -log_softmax(x)[t]  +  s / C * sum over c of w[c] * -log_softmax(x)[c]

    and 0 where t is `ignore_index`.

    Parameters
    ----------
    x : (M, C) float32 or float64
    target : (M,) integers
        Labels in [0, C), or `ignore_index`.
    weight : (C,), optional
    ignore_index : int
    label_smoothing : float in [0, 1]
    out, out_weights : (M,), optional
        Overwritten with losses and weights.

    Returns
    -------
    losses : (M,) array of x's dtype
    weights : (M,) array of x's dtype
        w[t], 0 where ignored: the mean loss is ``losses.sum() / weights.sum()``.

    Raises
    ------
    TypeError
        If `target` holds no integers, or dtypes don't fit.
    ValueError
        If a label is no class, or shapes don't fit.

    References
    ----------
    Szegedy et al.: Rethinking the Inception Architecture, arXiv:1512.00567, section 7 (label smoothing).
    """
    x, weight = _logits(x, weight, label_smoothing)
    target, ignored = _labels(target, x, ignore_index)
    losses = checks.output("out", out, target.shape, x.dtype)
    weights = checks.output("out_weights", out_weights, target.shape, x.dtype)
    parts = part_count(len(x), _EXP * x.size)
    _cross_entropy(parts, x, target, weight, ignored, float(label_smoothing), losses, weights)
    return losses, weights


@parallel
def _cross_entropy_backward(part, parts, dlosses, x, target, weight, ignore_index, smoothing, dx):
    keep_out_of_line()
    scores, powers = pointer(x), pointer(dx)
    classes = weight.size
    whole = 0.0
    for k in range(classes):
        whole += weight[k]
    lo, hi = span(part, parts, x.shape[0])
    for m in range(lo, hi):
        label = target[m]
        gradient = dx[m]
        if label == ignore_index:
            fill(gradient, 0)
            continue
        largest = largest_of(scores, m * classes, classes)
        total = sum_of_powers(scores, m * classes, classes, largest, powers, m * classes, True)
        of_label = (1 - smoothing) * weight[label]
        of_all = smoothing / classes
        scale = (of_label + of_all * whole) / total
        upstream = dlosses[m]
        of_power = gradient[label] * scale - (of_all * weight[label] + of_label)
        factor, shift = x.dtype.type(upstream * scale), x.dtype.type(upstream * of_all)
        for k in range(classes):
            gradient[k] = gradient[k] * factor - weight[k] * shift
        gradient[label] = upstream * of_power


def softmax_cross_entropy_backward(
    dlosses: np.ndarray,
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `softmax_cross_entropy` to its logits.

    The loss is ``-sum over c of q[c] * log_softmax(x)[c]`` with
    ``q[c] = (1 - s) * w[t] * (c == t) + s / C * w[c]``, so
    ``dx = dlosses * (softmax(x) * sum(q) - q)``; 0 where ignored.

    Parameters
    ----------
    dlosses : (M,) float32 or float64
    x, target, weight, ignore_index, label_smoothing
        Those of the forward call.
    out : (M, C), optional
        Overwritten with the result.

    Returns
    -------
    (M, C) array of x's dtype

    Raises
    ------
    TypeError
        If `target` holds no integers, or dtypes don't fit.
    ValueError
        If a label is no class, or shapes don't fit.
    """
    x, weight = _logits(x, weight, label_smoothing)
    target, ignored = _labels(target, x, ignore_index)
    dlosses = checks.floating("dlosses", dlosses, 1, x.dtype)
    checks.same_shape("dlosses", dlosses, target.shape)
    dx = checks.output("out", out, x.shape, x.dtype)
    parts = part_count(len(x), _EXP * x.size)
    _cross_entropy_backward(parts, dlosses, x, target, weight, ignored, float(label_smoothing), dx)
    return dx


@parallel
def _soft_cross_entropy(part, parts, x, target, weight, smoothing, losses):
    keep_out_of_line()
    scores = pointer(x)
    lo, hi = span(part, parts, x.shape[0])
    for m in range(lo, hi):
        row, probability = x[m], target[m]
        largest = largest_of(scores, m * row.size, row.size)
        logarithm = math.log(sum_of_powers(scores, m * row.size, row.size, largest, scores, 0, False))
        whole = below = 0.0
        for k in range(row.size):
            q = weight[k] * ((1 - smoothing) * probability[k] + smoothing / row.size)
            whole += q
            below += q * (row[k] - largest)
        losses[m] = logarithm * whole - below


def _probabilities(target: np.ndarray, x: np.ndarray) -> np.ndarray:
    return checks.same_shape("target", checks.floating("target", target, 2, x.dtype), x.shape)


def soft_cross_entropy(
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Cross-entropy of each row of logits with target probabilities (one-hot labels among them).

    ``loss = -sum over c of w[c] * ((1 - s) * target[c] + s / C) * log_softmax(x)[c]``, s the smoothing and w
    the class weights.

    Parameters
    ----------
    x : (M, C) float32 or float64
    target : (M, C), of x's dtype
    weight : (C,), optional
    label_smoothing : float in [0, 1]
    out : (M,), optional
        Overwritten with the result.

    Returns
    -------
    (M,) array of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    x, weight = _logits(x, weight, label_smoothing)
    target = _probabilities(target, x)
    losses = checks.output("out", out, x.shape[:1], x.dtype)
    parts = part_count(len(x), _EXP * x.size)
    _soft_cross_entropy(parts, x, target, weight, float(label_smoothing), losses)
    return losses


@parallel
def _soft_cross_entropy_backward(part, parts, dlosses, x, target, weight, smoothing, dx):
    keep_out_of_line()
    scores, powers = pointer(x), pointer(dx)
    classes = weight.size
    lo, hi = span(part, parts, x.shape[0])
    for m in range(lo, hi):
        gradient, probability = dx[m], target[m]
        largest = largest_of(scores, m * classes, classes)
        total = sum_of_powers(scores, m * classes, classes, largest, powers, m * classes, True)
        whole = 0.0
        for k in range(classes):
            whole += weight[k] * ((1 - smoothing) * probability[k] + smoothing / classes)
        for k in range(classes):
            q = weight[k] * ((1 - smoothing) * probability[k] + smoothing / classes)
            gradient[k] = dlosses[m] * (gradient[k] * (whole / total) - q)


def soft_cross_entropy_backward(
    dlosses: np.ndarray,
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    label_smoothing: float = 0.0,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Gradient of `soft_cross_entropy` to its logits: ``dlosses * (softmax(x) * sum(q) - q)``.

    ``q[c] = w[c] * ((1 - s) * target[c] + s / C)``; its sum is 1 only without class weights.

    Parameters
    ----------
    dlosses : (M,) float32 or float64
    x, target, weight, label_smoothing
        Those of the forward call.
    out : (M, C), optional
        Overwritten with the result.

    Returns
    -------
    (M, C) array of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    x, weight = _logits(x, weight, label_smoothing)
    target = _probabilities(target, x)
    dlosses = checks.floating("dlosses", dlosses, 1, x.dtype)
    checks.same_shape("dlosses", dlosses, x.shape[:1])
    dx = checks.output("out", out, x.shape, x.dtype)
    parts = part_count(len(x), _EXP * x.size)
    _soft_cross_entropy_backward(parts, dlosses, x, target, weight, float(label_smoothing), dx)
    return dx
