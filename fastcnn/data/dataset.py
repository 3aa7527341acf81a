"""Labelled images in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError

_CHUNK_BYTES = 1 << 24


class Skipped(NamedTuple):
    """A file that a reader left out, and why."""

    path: str
    reason: str


def generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    """`rng` itself, one seeded by an int, or fastcnn's default generator."""
    if rng is None:
        from .._random import default_generator

        return default_generator()
    return np.random.default_rng(rng)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images with a class each.

    Attributes
    ----------
    images : (N, H, W, C) uint8, or float32 in [0, 1]; C-contiguous
    labels : (N,) int64 in [0, len(classes))
    classes : names of the classes
    name : what the data set is called in messages
    skipped : files that its reader left out

    Raises
    ------
    TypeError
        If a dtype is another one.
    DataError
        If there is no image, a shape does not fit, the numbers of images and labels differ, a label is out of
        range, or float images leave [0, 1] or hold NaN.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str = "data"
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "images", _checked_images(self.name, self.images))
        set_field(self, "classes", tuple(str(name) for name in self.classes))
        set_field(self, "labels", _checked_labels(self.name, self.labels, len(self.images), self.classes))
        set_field(self, "skipped", tuple(self.skipped))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        n, h, w, c = self.images.shape
        return (
            f"<Dataset {self.name}: {n} images {h}x{w}x{c} {self.images.dtype}, {self.num_classes} classes>"
        )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W), as models take it."""
        _, h, w, c = self.images.shape
        return c, h, w

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def class_counts(self) -> np.ndarray:
        """Number of images of each class, (num_classes,) int64."""
        return np.bincount(self.labels, minlength=self.num_classes)

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """The images at `indices`, in that order.

        Raises
        ------
        DataError
            If `indices` is empty or leaves [0, N).
        TypeError
            If they are no ints.
        """
        index = np.asarray(indices)
        if index.ndim != 1 or index.size == 0:
            raise DataError(
                f"indices: shape {index.shape} of an empty subset"
                if index.size == 0
                else f"indices: expected one axis, got shape {index.shape}"
            )
        if index.dtype.kind not in "iu":
            raise TypeError(f"indices: dtype {index.dtype} is no integer type")
        outside = (index < 0) | (index >= len(self))
        if outside.any():
            raise DataError(
                f"indices: {index[outside][0]} is not in [0, {len(self)}), the images of {self.name}"
            )
        return Dataset(self.images[index], self.labels[index], self.classes, self.name, self.skipped)

    def balanced(self, per_class: int, rng: np.random.Generator | int | None = None) -> Dataset:
        """`per_class` images of every class, drawn without replacement, in the order that they have here.

        Raises
        ------
        DataError
            If `per_class` is below 1 or a class has fewer images.
        """
        counts = self.class_counts()
        if per_class < 1:
            raise DataError(f"per_class: {per_class} is below 1")
        if counts.min() < per_class:
            smallest = int(counts.argmin())
            raise DataError(
                f"per_class: {per_class} is more than the {counts[smallest]} images of class "
                f"{self.classes[smallest]!r} in {self.name}"
            )
        rng = generator(rng)
        chosen = [
            rng.choice(np.flatnonzero(self.labels == label), per_class, replace=False, shuffle=False)
            for label in range(self.num_classes)
        ]
        return self.subset(np.sort(np.concatenate(chosen)))

    def split(self, fraction: float, rng: np.random.Generator | int | None = None) -> tuple[Dataset, Dataset]:
        """Two data sets: `fraction` of the images and the rest, with every class shared in proportion.

        The first gets round(fraction * N) images, but neither is empty; where classes do not divide evenly,
        those with the largest remainders give it one more. Both keep the order that the images have here.

        Raises
        ------
        DataError
            If `fraction` is not between 0 and 1, or there is one image only.
        """
        if not 0.0 < fraction < 1.0:
            raise DataError(f"fraction: {fraction} is not between 0 and 1")
        if len(self) < 2:
            raise DataError(f"{self.name}: its one image can't be split")
        counts = self.class_counts()
        share = counts * fraction
        first_counts = np.floor(share).astype(np.int64)
        wanted = min(max(round(len(self) * fraction), 1), len(self) - 1)
        missing = wanted - int(first_counts.sum())
        first_counts[np.argsort(first_counts - share, kind="stable")[:missing]] += 1
        rng = generator(rng)
        in_first = np.zeros(len(self), bool)
        for label, count in enumerate(first_counts):
            in_first[rng.permutation(np.flatnonzero(self.labels == label))[:count]] = True
        return self.subset(np.flatnonzero(in_first)), self.subset(np.flatnonzero(~in_first))

    def mean_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel on the scale where pixels lie in [0, 1].

        Both (C,) float64, computed in chunks. A constant channel has a deviation of 0; it is given as 1 so
        that it can be divided by.
        """
        n, h, w, c = self.images.shape
        step = max(1, _CHUNK_BYTES // (8 * h * w * c))
        # Summed over the images first: long rows add up fast where rows of C values would not.
        chunks = [self.images[start : start + step].reshape(-1, h * w * c) for start in range(0, n, step)]
        total = np.sum([chunk.sum(axis=0, dtype=np.float64) for chunk in chunks], axis=0)
        mean = total.reshape(-1, c).mean(axis=0) / n
        centre = np.tile(mean, h * w)
        squares = np.sum([np.square(chunk - centre).sum(axis=0) for chunk in chunks], axis=0)
        std = np.sqrt(squares.reshape(-1, c).mean(axis=0) / n)
        scale = 255.0 if self.images.dtype == np.uint8 else 1.0
        # Rounding leaves a constant channel a deviation of about 1e-16.
        std = np.where(std > 1e-7 * scale, std / scale, 1.0)
        return mean / scale, std

    def summary(self) -> dict[str, Any]:
        """What there is to tell about the data, ready for JSON."""
        mean, std = self.mean_std()
        counts = self.class_counts()
        return {
            "name": self.name,
            "images": len(self),
            "input_shape": list(self.input_shape),
            "dtype": str(self.images.dtype),
            "classes": {name: int(count) for name, count in zip(self.classes, counts, strict=True)},
            "mean": mean.tolist(),
            "std": std.tolist(),
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
        }


def _checked_images(name: str, images: Any) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype not in (np.uint8, np.float32):
        raise TypeError(f"{name}: images of dtype {images.dtype} are neither uint8 nor float32")
    if images.ndim != 4:
        raise DataError(f"{name}: images of shape {images.shape} are not (N, H, W, C)")
    if images.size == 0:
        raise DataError(f"{name}: holds no image (shape {images.shape})")
    if images.dtype == np.float32:
        low, high = images.min(), images.max()
        # Written so that NaN fails too.
        if not (low >= 0.0 and high <= 1.0):
            raise DataError(f"{name}: float images must lie in [0, 1], got {low} to {high}")
    return np.ascontiguousarray(images)


def _checked_labels(name: str, labels: Any, count: int, classes: tuple[str, ...]) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"{name}: labels of dtype {labels.dtype} are no integers")
    if labels.ndim != 1:
        raise DataError(f"{name}: labels of shape {labels.shape} are not (N,)")
    if len(labels) != count:
        raise DataError(f"{name}: {count} images but {len(labels)} labels")
    if len(set(classes)) != len(classes):
        raise DataError(f"{name}: classes {classes} are not all different")
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
        first = int(np.flatnonzero(outside)[0])
        raise DataError(f"{name}: label {labels[first]} of image {first} is not in [0, {len(classes)})")
    return np.ascontiguousarray(labels, np.int64)
