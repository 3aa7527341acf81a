"""CrossEntropyLoss."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from .._device import device_of, host, is_array
from ..kernels import checks
from . import settings
from ._arrays import channels_first, channels_last, contiguous, floats
from .module import Module
from .parameter import FLOATS


def _factors(name: str, value: Any) -> Any:
    """A factor for each class, in memory of its own."""
    on_device = is_array(value) and not isinstance(value, np.ndarray)
    return value if on_device else checks.floating(name, value, 1).copy()


class CrossEntropyLoss(Module):
    """-log softmax(x)[target], averaged: softmax and negative log-likelihood in one.

    Parameters
    ----------
    weight : (C,) float array, optional
        A factor for each class.
    ignore_index : int
        A label that counts for nothing; from 0 on it can't be set with probabilities as targets.
    reduction : 'mean', 'sum' or 'none'
        'mean' divides by the sum of the targets' weights; with probabilities as targets by their number.
    label_smoothing : float
        This share of every target is spread over all classes. Szegedy et al. (2016), section 7.

    Notes
    -----
    ``loss = loss_fn(input, target)`` is a float, or for 'none' an array of the targets' shape; ``backward()``
    then returns the gradient of `input`.
    """

    weight: np.ndarray | None
    reduction: str
    label_smoothing: float
    _setting_checks: ClassVar = {
        "weight": settings.optional(_factors),
        "ignore_index": settings.whole,
        "reduction": settings.choice("mean", "sum", "none"),
        "label_smoothing": settings.share,
    }

    def __init__(
        self,
        weight: Any = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing = label_smoothing

    def forward(self, input: np.ndarray, target: np.ndarray) -> Any:
        """The loss of scores `input` for `target`.

        Parameters
        ----------
        input : (N, C), (C,) or (N, C, d1, ...) float array
        target : array
            Class indices, ints of input's shape without C; or probabilities, or 0 and 1, of input's shape.

        Returns
        -------
        float, or an array of the targets' shape if reduction is 'none'

        Raises
        ------
        TypeError, ValueError
            If dtypes or shapes don't fit, a label is no class, there is nothing to average, or a label is to
            be ignored among probabilities.
        """
        x = floats("input", input)
        if x.ndim == 0:
            raise ValueError("input: expected (N, C), (C,) or (N, C, d1, ...), got a number")
        classes = x.shape[min(x.ndim - 1, 1)]
        if self.weight is not None and len(self.weight) != classes:
            raise ValueError(f"weight: {len(self.weight)} factors are not the input's {classes} classes")
        labels = host(target)
        of_labels = _without_classes(x.shape)
        indices = labels.shape == of_labels
        if not indices and labels.shape != x.shape:
            raise ValueError(
                f"target: shape {labels.shape} is neither {of_labels}, for class indices, nor {x.shape}, for "
                "probabilities"
            )
        if not indices and self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index: {self.ignore_index} is for class indices, but target has input's shape "
                f"{x.shape}, as probabilities have"
            )
        rows = _rows(x)
        if self.reduction == "mean" and len(rows) == 0:
            raise ValueError(f"input: the mean of no samples is undefined, got shape {x.shape}")
        labels = self._indices(labels, rows.shape[1]) if indices else _rows(_probabilities(labels, x.dtype))
        return self._run(rows, labels, indices, x.shape)

    def _indices(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """Class indices as the kernel takes them."""
        if labels.dtype.kind not in "iu":
            raise TypeError(f"target: class indices must be ints, got dtype {labels.dtype}")
        if labels.size and (labels.min() < 0 or labels.max() >= classes):
            wrong = labels[((labels < 0) | (labels >= classes)) & (labels != self.ignore_index)]
            if wrong.size:
                raise ValueError(f"target: label {wrong[0]} is not between 0 and {classes - 1}")
        return np.ascontiguousarray(labels, np.int64).reshape(-1)

    def _run(self, rows: np.ndarray, labels: np.ndarray, indices: bool, shape: tuple[int, ...]) -> Any:
        on = device_of(rows)
        weight = None if self.weight is None else on.array(host(self.weight).astype(rows.dtype, copy=False))
        # From the labels, so that a device need not be waited for.
        total = self._total(labels) if indices else float(len(rows))
        labels = on.array(labels)
        if indices:
            options: tuple = (weight, self.ignore_index, self.label_smoothing)
            losses, _ = on.kernels.softmax_cross_entropy(rows, labels, *options)
        else:
            options = (weight, self.label_smoothing)
            losses = on.kernels.soft_cross_entropy(rows, labels, *options)
        self._keep(rows, labels, indices, options, shape, total)
        if self.reduction == "none":
            return losses.reshape(_without_classes(shape))
        loss = float(host(losses).sum(dtype=np.float64))
        if self.reduction == "sum":
            return loss
        return loss / total if total else float("nan")

    def _total(self, labels: np.ndarray) -> float:
        """The sum of the weights of all labels that count."""
        counted = labels != self.ignore_index
        if self.weight is None:
            return float(np.count_nonzero(counted))
        return float(host(self.weight)[labels[counted]].sum(dtype=np.float64))

    def backward(self, dout: Any = 1.0, input_grad: bool = True) -> np.ndarray | None:
        """The gradient of `input`.

        Parameters
        ----------
        dout : float or array
            Factor of the loss in what is differentiated: one number, or for reduction 'none' an array of the
            losses' shape.
        """
        rows, labels, indices, options, shape, total = self._kept()
        dout = host(dout)
        losses_shape = _without_classes(shape) if self.reduction == "none" else ()
        if dout.shape not in ((), losses_shape):
            raise ValueError(f"dout: shape {dout.shape} is not the loss's {losses_shape}")
        if dout.dtype.kind not in "fiu":
            raise TypeError(f"dout: expected a number, got dtype {dout.dtype}")
        self._forget()
        if not input_grad:
            return None
        on = device_of(rows)
        if self.reduction == "mean":
            # All labels ignored: the loss is NaN, and no label pulls at any score.
            dout = dout * (1 / total if total else 0.0)
        dlosses = on.empty((len(rows),), rows.dtype)
        dlosses[...] = dout.reshape(dout.size) if dout.ndim else dout
        dx = on.empty(rows.shape, rows.dtype)
        kernels = on.kernels
        backward = kernels.softmax_cross_entropy_backward if indices else kernels.soft_cross_entropy_backward
        backward(dlosses, rows, labels, *options, out=dx)
        if len(shape) <= 2:
            return dx.reshape(shape)
        return channels_first(dx.reshape(shape[0], *shape[2:], shape[1]))

    def extra_repr(self) -> str:
        return ""


def _without_classes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def _rows(array: np.ndarray) -> np.ndarray:
    """(N, C, d1, ...) as (N * d1 * ..., C), (C,) as (1, C)."""
    if array.ndim == 1:
        return contiguous(array[np.newaxis])
    stored = channels_last(array)
    return stored.reshape(stored.size // max(stored.shape[-1], 1), stored.shape[-1])


def _probabilities(target: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if target.dtype.kind not in "fiub":
        raise TypeError(f"target: expected probabilities, got dtype {target.dtype}")
    return target if target.dtype == dtype and target.dtype in FLOATS else target.astype(dtype)
