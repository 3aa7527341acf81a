"""Classification metrics from a confusion matrix, which is all that an evaluation has to keep in memory.

Nothing here divides by zero: where a score has no samples to speak of, it is `zero_division`. Averages follow
scikit-learn's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

Average = Literal["macro", "micro", "weighted"]


def _class_indices(name: str, values: ArrayLike, num_classes: int) -> NDArray[np.int64]:
    indices = np.asarray(values)
    if indices.ndim != 1:
        raise ValueError(f"{name}: expected one class index a sample, got shape {indices.shape}")
    if indices.size == 0:
        return np.empty(0, np.int64)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer class indices, got dtype {indices.dtype}")
    for value in (int(indices.min()), int(indices.max())):
        if not 0 <= value < num_classes:
            raise ValueError(f"{name}: class {value} is not between 0 and {num_classes - 1}")
    return indices.astype(np.int64, copy=False)


class Confusion:
    """A confusion matrix that grows batch by batch.

    Parameters
    ----------
    num_classes : int
        Number K of classes.

    Attributes
    ----------
    matrix : (K, K) int64 array
        ``matrix[t, p]`` counts the samples of class t that were predicted as p.
    """

    def __init__(self, num_classes: int):
        if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)):
            raise TypeError(f"num_classes: expected an int, got {num_classes!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes: {num_classes} is below 1")
        self.num_classes = int(num_classes)
        self.matrix = np.zeros((self.num_classes, self.num_classes), np.int64)

    def update(self, true: ArrayLike, predicted: ArrayLike) -> None:
        """Count a batch.

        Parameters
        ----------
        true, predicted : (N,) integer arrays
            Class indices below K.

        Raises
        ------
        ValueError
            If the lengths differ or an index is out of range; the matrix stays as it was.
        """
        rows = _class_indices("true", true, self.num_classes)
        columns = _class_indices("predicted", predicted, self.num_classes)
        if rows.shape != columns.shape:
            raise ValueError(f"predicted: {columns.size} classes for {rows.size} true ones")
        counts = np.bincount(rows * self.num_classes + columns, minlength=self.matrix.size)
        self.matrix += counts.reshape(self.matrix.shape)

    @property
    def total(self) -> int:
        """Number of samples counted."""
        return int(self.matrix.sum())


def confusion_matrix(
    true: ArrayLike, predicted: ArrayLike, num_classes: int | None = None
) -> NDArray[np.int64]:
    """Count how often each class was predicted as each other.

    Parameters
    ----------
    true, predicted : (N,) integer arrays
        Class indices.
    num_classes : int, optional
        Number K of classes; by default one more than the largest index.

    Returns
    -------
    (K, K) int64 array
        Rows are true classes, columns are predicted ones.

    Raises
    ------
    ValueError
        If the lengths differ, an index is out of range, or there are no samples to tell K by.
    """
    if num_classes is None:
        arrays = [np.asarray(values) for values in (true, predicted)]
        if not all(array.size for array in arrays):
            raise ValueError("num_classes: must be given where there are no samples")
        num_classes = max(int(array.max()) for array in arrays) + 1
    confusion = Confusion(max(num_classes, 1))
    confusion.update(true, predicted)
    return confusion.matrix


def _checked(matrix: ArrayLike) -> NDArray:
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"matrix: expected shape (K, K), got {counts.shape}")
    if counts.dtype.kind not in "iu":
        raise TypeError(f"matrix: expected integer counts, got dtype {counts.dtype}")
    if counts.min() < 0:
        raise ValueError(f"matrix: a count of {counts.min()} is negative")
    return counts


def _ratio(part: NDArray, whole: NDArray, zero_division: float) -> NDArray[np.float64]:
    result = np.full(np.shape(part), float(zero_division))
    np.divide(part, whole, out=result, where=np.asarray(whole) != 0)
    return result


def accuracy(matrix: ArrayLike, zero_division: float = 0.0) -> float:
    """Share of samples on the diagonal of a (K, K) confusion matrix; `zero_division` without samples."""
    counts = _checked(matrix)
    return float(_ratio(np.trace(counts), counts.sum(), zero_division))


def _scores(
    matrix: ArrayLike, kind: Literal["precision", "recall", "f1"], average: str | None, zero_division: float
) -> Any:
    """The score of each class, or their average: hits / whole, where `kind` decides what the whole is."""
    counts = _checked(matrix)
    hits, support, predicted = np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)
    # The harmonic mean of precision and recall is 2 TP / (TP + FN + TP + FP).
    whole = {"precision": predicted, "recall": support, "f1": support + predicted}[kind]
    part = 2 * hits if kind == "f1" else hits
    if average == "micro":
        return float(_ratio(part.sum(), whole.sum(), zero_division))
    scores = _ratio(part, whole, zero_division)
    if average is None:
        return scores
    if average == "macro":
        weights = (support + predicted > 0).astype(np.int64)
    elif average == "weighted":
        weights = support
    else:
        raise ValueError(f"average: {average!r} is none of 'macro', 'micro', 'weighted', None")
    return float(_ratio((scores * weights).sum(), weights.sum(), zero_division))


@overload
def precision(matrix: ArrayLike, average: None = None, zero_division: float = 0.0) -> NDArray[np.float64]: ...
@overload
def precision(matrix: ArrayLike, average: Average, zero_division: float = 0.0) -> float: ...
def precision(matrix: ArrayLike, average: Average | None = None, zero_division: float = 0.0) -> Any:
    """Share of the samples predicted as a class that belong to it, TP / (TP + FP).

    Parameters
    ----------
    matrix : (K, K) integer array
        Confusion matrix, rows true and columns predicted.
    average : {None, "macro", "micro", "weighted"}
        None: one score a class. "macro": their mean over the classes that occur, as true or as predicted.
        "weighted": their mean weighted by each class's true samples. "micro": all classes in one count.
    zero_division : float
        The score of a class that was never predicted, and of any average over nothing.

    Returns
    -------
    (K,) float64 array, or float where an average is asked for
    """
    return _scores(matrix, "precision", average, zero_division)


@overload
def recall(matrix: ArrayLike, average: None = None, zero_division: float = 0.0) -> NDArray[np.float64]: ...
@overload
def recall(matrix: ArrayLike, average: Average, zero_division: float = 0.0) -> float: ...
def recall(matrix: ArrayLike, average: Average | None = None, zero_division: float = 0.0) -> Any:
    """Share of the samples of a class that were predicted as it, TP / (TP + FN).

    Parameters and result are those of `precision`; a class without samples scores `zero_division`.
    """
    return _scores(matrix, "recall", average, zero_division)


@overload
def f1(matrix: ArrayLike, average: None = None, zero_division: float = 0.0) -> NDArray[np.float64]: ...
@overload
def f1(matrix: ArrayLike, average: Average, zero_division: float = 0.0) -> float: ...
def f1(matrix: ArrayLike, average: Average | None = None, zero_division: float = 0.0) -> Any:
    """Harmonic mean of precision and recall, 2 TP / (2 TP + FP + FN).

    Parameters and result are those of `precision`; a class that neither occurs nor is predicted scores
    `zero_division`.
    """
    return _scores(matrix, "f1", average, zero_division)


class WeightedMean:
    """Mean of batch means, each weighted by its number of samples, so that a small last batch counts less."""

    def __init__(self) -> None:
        self.total = 0.0
        self.weight = 0

    def update(self, mean: float, samples: int) -> None:
        """Add the mean over `samples` samples; 0 samples change nothing, whatever their mean."""
        if samples:
            self.total += float(mean) * samples
            self.weight += samples

    @property
    def value(self) -> float:
        """The mean so far; 0.0 before the first sample."""
        return self.total / self.weight if self.weight else 0.0


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found out.

    Attributes
    ----------
    loss : float
        Mean loss of a sample.
    confusion : (K, K) int64 array
        Rows are true classes, columns are predicted ones.
    classes : tuple of str
        Names of the K classes.
    """

    loss: float
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Number of samples evaluated."""
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of samples predicted correctly."""
        return accuracy(self.confusion)

    @property
    def precision(self) -> float:
        """Macro-averaged precision."""
        return precision(self.confusion, "macro")

    @property
    def recall(self) -> float:
        """Macro-averaged recall."""
        return recall(self.confusion, "macro")

    @property
    def f1(self) -> float:
        """Macro-averaged F1."""
        return f1(self.confusion, "macro")

    def per_class(self) -> list[dict[str, Any]]:
        """One row a class: its name, precision, recall, f1 and support (number of true samples)."""
        columns: tuple[Sequence, ...] = (
            self.classes,
            precision(self.confusion).tolist(),
            recall(self.confusion).tolist(),
            f1(self.confusion).tolist(),
            self.confusion.sum(axis=1).tolist(),
        )
        names = ("class", "precision", "recall", "f1", "support")
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON."""
        scores = {name: getattr(self, name) for name in ("accuracy", "precision", "recall", "f1", "samples")}
        return {
            "loss": self.loss,
            **scores,
            "per_class": self.per_class(),
            "confusion": self.confusion.tolist(),
        }
