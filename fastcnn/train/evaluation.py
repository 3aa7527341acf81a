"""Running a model over data without learning from it, a batch at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._device import Device, device, device_of, host
from .._grad_mode import no_grad
from .metrics import Confusion, Metrics, WeightedMean
from .nonfinite import NonFiniteLossError, find_culprit


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every part of the model gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def batch_device(parameters: Sequence[Any]) -> Device:
    """Where a model's parameters are, and its batches must go."""
    return device_of(parameters[0].memory) if parameters else device("cpu")


def check_count(name: str, value: Any) -> int:
    """`value` as an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: {value} is below 1")
    return int(value)


def batches(data: Any, batch_size: int) -> Iterable[tuple[NDArray, NDArray]]:
    """The batches of a loader, or of a pair ``(x, y)`` of arrays cut into slices of `batch_size`."""
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, np.ndarray) for part in data):
        x, y = data
        if len(x) != len(y):
            raise ValueError(f"y: {len(y)} labels for {len(x)} images")
        size = check_count("batch_size", batch_size)
        return ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))
    if isinstance(data, np.ndarray) or not isinstance(data, Iterable):
        raise TypeError(f"data: expected a loader or a pair (x, y) of arrays, got {type(data).__name__}")
    return data


def class_labels(y: NDArray, num_classes: int, ignore_index: int | None) -> tuple[NDArray, NDArray | None]:
    """The class of each sample, and which samples count (None: all).

    Parameters
    ----------
    y : (N,) integers or (N, K) probabilities
    num_classes : int
        Number K of logits.
    ignore_index : int or None
        Label of samples that don't count.

    Raises
    ------
    ValueError
        If a label is not below K, or `y` has another shape.
    TypeError
        If `y` is neither integers nor probabilities.
    """
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == num_classes and y.dtype.kind == "f":
        return y.argmax(axis=1), None
    if y.ndim != 1:
        raise ValueError(f"labels: expected shape (N,) or (N, {num_classes}), got {y.shape}")
    if y.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got dtype {y.dtype}")
    outside = (y < 0) | (y >= num_classes)
    if not outside.any():
        return y, None
    counted = y != ignore_index
    wrong = y[outside & counted]
    if wrong.size:
        raise ValueError(f"labels: {wrong[0]} is not between 0 and {num_classes - 1} ({num_classes} classes)")
    return y, counted


def class_logits(logits: NDArray, samples: int) -> NDArray:
    """`logits`, checked to be (N, K).

    Raises
    ------
    ValueError
        If the model gives anything else.
    """
    if logits.ndim != 2 or logits.shape[0] != samples or logits.shape[1] == 0:
        raise ValueError(f"model: expected logits of shape ({samples}, classes), got {logits.shape}")
    return logits


def class_names(classes: Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """`classes`, or their numbers.

    Raises
    ------
    ValueError
        If there are more or fewer than `num_classes`.
    """
    if classes is None:
        return tuple(str(number) for number in range(num_classes))
    if len(classes) != num_classes:
        raise ValueError(f"classes: {len(classes)} names, but the model gives {num_classes} logits")
    return tuple(classes)


def evaluate(
    model: Any, loss_fn: Any, data: Any, classes: Sequence[str] | None = None, batch_size: int = 256
) -> Metrics:
    """Loss and confusion matrix over data, in the memory of one batch.

    Parameters
    ----------
    model : Module
        Run in evaluation mode; its own mode is put back.
    loss_fn : callable
        Mean loss of a batch.
    data : loader, or pair of arrays
        Batches ``(x, y)``, or x (N, C, H, W) and y (N,).
    classes : sequence of str, optional
    batch_size : int
        Size of the slices of a pair of arrays.

    Raises
    ------
    ValueError
        If there are no samples, a label is out of range, or `classes` doesn't fit the model.
    NonFiniteLossError
        If the loss of a batch is NaN or infinite.
    """
    ignore_index = getattr(loss_fn, "ignore_index", None)
    loss, confusion, on = WeightedMean(), None, batch_device(model.parameters())
    with evaluating(model):
        for number, (x, y) in enumerate(batches(data, batch_size), start=1):
            if len(x) == 0:
                continue
            x = on.array(x)
            logits = class_logits(model(x), len(x))
            labels, counted = class_labels(y, logits.shape[1], ignore_index)
            if counted is not None and not counted.any():
                continue
            batch_loss = float(loss_fn(logits, y))
            if not math.isfinite(batch_loss):
                culprit = find_culprit(model, loss_fn, x, y, backward=False)
                raise NonFiniteLossError(batch_loss, 0, 0, number, culprit)
            every = slice(None) if counted is None else counted
            confusion = confusion or Confusion(logits.shape[1])
            confusion.update(labels[every], host(logits).argmax(axis=1)[every])
            loss.update(batch_loss, len(labels[every]))
    if confusion is None:
        raise ValueError("data: there are no labelled samples to evaluate")
    return Metrics(loss.value, confusion.matrix, class_names(classes, confusion.num_classes))


def predict(model: Any, x: NDArray, batch_size: int = 256) -> NDArray:
    """Logits of images, computed `batch_size` at a time in evaluation mode.

    Parameters
    ----------
    model : Module
        Its own mode is put back.
    x : (N, C, H, W) array
        As the model takes it.

    Returns
    -------
    (N, K) array
    """
    size = check_count("batch_size", batch_size)
    x = host(x)
    if x.ndim == 0:
        raise ValueError("x: expected shape (N, C, H, W), got ()")
    on = batch_device(model.parameters())
    with evaluating(model):
        first = host(model(on.array(x[:size])))
        logits = np.empty((len(x), *first.shape[1:]), first.dtype)
        logits[:size] = first
        for start in range(size, len(x), size):
            logits[start : start + size] = host(model(on.array(x[start : start + size])))
    return logits
