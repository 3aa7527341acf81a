"""Softmax, log-softmax, and cross-entropy from logits, with class labels or with target probabilities.

Everything runs over the last axis, with the row's maximum subtracted first. The losses are PyTorch's before
any reduction; dlosses, their upstream gradient, carries the reduction.
"""

from __future__ import annotations

import numpy as np

from .shapes import require_shape, wide


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(x: np.ndarray) -> np.ndarray:
    """``y[..., c] = exp(x[..., c]) / sum over k of exp(x[..., k])``.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (..., C)

    Returns
    -------
    ndarray, dtype and shape of `x`
        Sums to 1 over the last axis.
    """
    x64 = wide("x", x)
    exponentials = np.exp(x64 - x64.max(axis=-1, keepdims=True))
    return (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(x.dtype)


def softmax_backward(dout: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of `softmax` from its output: ``y * (dout - sum(dout * y))``, sums over the last axis.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (..., C)
    y : ndarray, shape of `dout`
        The forward call's output.

    Returns
    -------
    ndarray, dtype and shape of `dout`

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    require_shape("dout", dout, y.shape)
    dout64, y64 = wide("dout", dout), wide("y", y)
    return (y64 * (dout64 - (dout64 * y64).sum(axis=-1, keepdims=True))).astype(dout.dtype)


def log_softmax(x: np.ndarray) -> np.ndarray:
    """``y[..., c] = x[..., c] - log(sum over k of exp(x[..., k]))``.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (..., C)

    Returns
    -------
    ndarray, dtype and shape of `x`
    """
    return _log_softmax(wide("x", x)).astype(x.dtype)


def log_softmax_backward(dout: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of `log_softmax` from its output: ``dout - exp(y) * sum(dout)``, the sum over the last axis.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (..., C)
    y : ndarray, shape of `dout`
        The forward call's output.

    Returns
    -------
    ndarray, dtype and shape of `dout`

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    require_shape("dout", dout, y.shape)
    dout64 = wide("dout", dout)
    return (dout64 - np.exp(wide("y", y)) * dout64.sum(axis=-1, keepdims=True)).astype(dout.dtype)


def _class_weights(weight: np.ndarray | None, classes: int) -> np.ndarray:
    if weight is None:
        return np.ones(classes)
    require_shape("weight", weight, (classes,))
    return wide("weight", weight)


def _labels(x: np.ndarray, target: np.ndarray, ignore_index: int) -> tuple[np.ndarray, np.ndarray]:
    """Which rows count, and their labels (0 in the others)."""
    if x.ndim != 2:
        raise ValueError(f"x: expected (M, C), got shape {x.shape}")
    if not np.issubdtype(target.dtype, np.integer):
        raise TypeError(f"target: dtype {target.dtype} is no integer")
    require_shape("target", target, x.shape[:1])
    counts = target != ignore_index
    wrong = target[counts & ((target < 0) | (target >= x.shape[1]))]
    if wrong.size:
        raise ValueError(f"target: {wrong[0]} is no class, there are {x.shape[1]}")
    return counts, np.where(counts, target, 0)


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: {label_smoothing} is not in [0, 1]")


def softmax_cross_entropy(
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy of each row of logits with its label t.

    With s the smoothing and w the class weights::

        loss = (1 - s) * w[t] * -log_softmax(x)[t]  +  s / C * sum over c of w[c] * -log_softmax(x)[c]

    and 0 where t is `ignore_index`.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (M, C)
    target : ndarray of integers, shape (M,)
        Labels in [0, C), or `ignore_index`.
    weight : ndarray, shape (C,), optional
    ignore_index : int
    label_smoothing : float in [0, 1]

    Returns
    -------
    losses : ndarray, dtype of `x`, shape (M,)
    weights : ndarray, dtype of `x`, shape (M,)
        w[t], 0 where ignored: the mean loss is ``losses.sum() / weights.sum()``.

    Raises
    ------
    TypeError
        If `target` holds no integers.
    ValueError
        If a label is no class, or shapes disagree.

    References
    ----------
    Szegedy et al.: Rethinking the Inception Architecture, arXiv:1512.00567, section 7 (label smoothing).
    """
    _check_smoothing(label_smoothing)
    counts, labels = _labels(x, target, ignore_index)
    m, c = x.shape
    class_weights = _class_weights(weight, c)
    log_p = _log_softmax(wide("x", x))
    weights = np.where(counts, class_weights[labels], 0)
    losses = (1 - label_smoothing) * class_weights[labels] * -log_p[np.arange(m), labels]
    if label_smoothing > 0:
        losses += label_smoothing / c * (class_weights * -log_p).sum(axis=1)
    return np.where(counts, losses, 0).astype(x.dtype), weights.astype(x.dtype)


def softmax_cross_entropy_backward(
    dlosses: np.ndarray,
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> np.ndarray:
    """Gradient of `softmax_cross_entropy` to its logits.

    The loss is ``-sum over c of q[c] * log_softmax(x)[c]`` with
    ``q[c] = (1 - s) * w[t] * (c == t) + s / C * w[c]``, so
    ``dx = dlosses * (softmax(x) * sum(q) - q)``; 0 where ignored.

    Parameters
    ----------
    dlosses : ndarray, float32 or float64, shape (M,)
    x, target, weight, ignore_index, label_smoothing
        Those of the forward call.

    Returns
    -------
    ndarray, dtype of `x`, shape (M, C)

    Raises
    ------
    TypeError
        If `target` holds no integers.
    ValueError
        If a label is no class, or shapes disagree.
    """
    _check_smoothing(label_smoothing)
    counts, labels = _labels(x, target, ignore_index)
    m, c = x.shape
    require_shape("dlosses", dlosses, (m,))
    class_weights = _class_weights(weight, c)
    q = np.tile(label_smoothing / c * class_weights, (m, 1))
    q[np.arange(m), labels] += (1 - label_smoothing) * class_weights[labels]
    p = np.exp(_log_softmax(wide("x", x)))
    dx = wide("dlosses", dlosses)[:, None] * (p * q.sum(axis=1, keepdims=True) - q)
    return np.where(counts[:, None], dx, 0).astype(x.dtype)


def _smoothed(
    x: np.ndarray, target: np.ndarray, weight: np.ndarray | None, label_smoothing: float
) -> np.ndarray:
    """``q[m, c] = w[c] * ((1 - s) * target[m, c] + s / C)``."""
    _check_smoothing(label_smoothing)
    if x.ndim != 2:
        raise ValueError(f"x: expected (M, C), got shape {x.shape}")
    require_shape("target", target, x.shape)
    c = x.shape[1]
    probabilities = (1 - label_smoothing) * wide("target", target) + label_smoothing / c
    return _class_weights(weight, c) * probabilities


def soft_cross_entropy(
    x: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None, label_smoothing: float = 0.0
) -> np.ndarray:
    """Cross-entropy of each row of logits with target probabilities (one-hot labels among them).

    ``loss = -sum over c of w[c] * ((1 - s) * target[c] + s / C) * log_softmax(x)[c]``, s the smoothing and w
    the class weights.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (M, C)
    target : ndarray, float32 or float64, shape (M, C)
    weight : ndarray, shape (C,), optional
    label_smoothing : float in [0, 1]

    Returns
    -------
    ndarray, dtype of `x`, shape (M,)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    q = _smoothed(x, target, weight, label_smoothing)
    return -(q * _log_softmax(wide("x", x))).sum(axis=1).astype(x.dtype)


def soft_cross_entropy_backward(
    dlosses: np.ndarray,
    x: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None = None,
    label_smoothing: float = 0.0,
) -> np.ndarray:
    """Gradient of `soft_cross_entropy` to its logits: ``dlosses * (softmax(x) * sum(q) - q)``.

    ``q[c] = w[c] * ((1 - s) * target[c] + s / C)``; its sum is 1 only without class weights.

    Parameters
    ----------
    dlosses : ndarray, float32 or float64, shape (M,)
    x, target, weight, label_smoothing
        Those of the forward call.

    Returns
    -------
    ndarray, dtype of `x`, shape (M, C)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    q = _smoothed(x, target, weight, label_smoothing)
    require_shape("dlosses", dlosses, x.shape[:1])
    p = np.exp(_log_softmax(wide("x", x)))
    dx = wide("dlosses", dlosses)[:, None] * (p * q.sum(axis=1, keepdims=True) - q)
    return dx.astype(x.dtype)
