"""Batches of a data set, shuffled, augmented and prepared ahead."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .augmentation import Augmentation, augmentation
from .dataset import Dataset, generator
from .prefetch import Prefetched

Batch = tuple[np.ndarray, np.ndarray]
Statistics = Sequence[float] | np.ndarray | float


class Loader:
    """Iterating goes once over the data set: every image in exactly one batch, the last one included.

    Each batch is (x, y): x a float32 view of shape (B, C, H, W) on channels-last memory, y int64 (B,). Pixels
    are scaled to [0, 1], then normalised as (pixel - mean) / std. An array that was handed out is never
    written again; its memory is used for a later batch once nobody holds it.

    All random numbers of an epoch are drawn from `rng` when its iteration starts, in the thread that starts
    it. So the batches don't depend on `prefetch` nor on how far an epoch was read, and a loader whose
    ``rng.bit_generator.state`` is restored goes on with the same epochs, bit for bit.

    Parameters
    ----------
    dataset : the images
    batch_size : images in a batch
    shuffle : a new order every epoch
    augment : an `Augmentation` or the name of a preset ("light", "digits", "none"). For training only: to
        evaluate, leave it out.
    rng : a generator, a seed, or None for `fastcnn.default_generator()`
    normalize : (mean, std) on the [0, 1] scale, each a number or one for each channel, as `Dataset.mean_std`
        gives them
    prefetch : make batches ahead in a thread
    drop_last : leave out a last batch that is not full; no more than ``batch_size - 1`` images of an epoch
    device : "cpu" or "cuda". All images are copied to a CUDA device once, and x is made there, without a
        thread; y is NumPy's in any case.

    Raises
    ------
    TypeError, ValueError
        If an argument is none of these, or no batch is left.
    ImportError, RuntimeError
        If fastcnn[cuda] is not installed, or no CUDA device can be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int = 64,
        shuffle: bool = True,
        augment: Augmentation | str | None = None,
        rng: np.random.Generator | int | None = None,
        normalize: tuple[Statistics, Statistics] | None = None,
        prefetch: bool = True,
        drop_last: bool = False,
        device: str = "cpu",
    ):
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset: expected a Dataset, got {type(dataset).__name__}")
        self.dataset = dataset
        self.batch_size = _positive("batch_size", batch_size)
        self.shuffle = bool(shuffle)
        self.augment = augmentation(augment)
        self.prefetch = bool(prefetch)
        self.drop_last = bool(drop_last)
        self.device = device
        # What was copied to the device, and the copies.
        self._copied: tuple[np.ndarray | None, tuple[Any, ...]] = (None, ())
        self._rng = None if rng is None else generator(rng)
        self._scale, self._shift = _scale_and_shift(dataset, normalize)
        if len(self) == 0:
            raise ValueError(
                f"batch_size: {batch_size} with drop_last leaves no batch of the {len(dataset)} images"
            )
        self._on_device()

    @property
    def rng(self) -> np.random.Generator:
        """The generator that shuffles and augments."""
        return generator(None) if self._rng is None else self._rng

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[Batch]:
        epoch = _Epoch(self)
        # One batch leaves nothing to prepare ahead, and a CUDA device works ahead by itself.
        if self.prefetch and len(self) > 1 and self.device == "cpu":
            return Prefetched(epoch.batch, len(self))
        return map(epoch.batch, range(len(self)))

    def _on_device(self) -> tuple[Any, ...]:
        """The images, and what takes their pixels to x, on the device."""
        images = self.dataset.images
        if self.device == "cpu":
            return images, self._scale, self._shift
        if self._copied[0] is not images:
            from .._device import device

            self._copied = images, tuple(map(device(self.device).array, (images, self._scale, self._shift)))
        return self._copied[1]


class _Epoch:
    """All that is random in one pass over the data, drawn at its start; it can make any batch by itself."""

    def __init__(self, loader: Loader):
        rng, count = loader.rng, len(loader.dataset)
        self._dataset, self._size = loader.dataset, loader.batch_size
        self._device, self._images = loader.device, loader._on_device()
        self._order = rng.permutation(count) if loader.shuffle else np.arange(count)
        self._params = None
        if loader.augment is not None:
            _, height, width = loader.dataset.input_shape
            self._params = loader.augment.draw(rng, count, height, width)
            self._seeds = rng.integers(0, 2**64, len(loader), np.uint64)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the epoch."""
        from .._device import device

        on = device(self._device)
        rows = slice(number * self._size, (number + 1) * self._size)
        index = self._order[rows]
        images, scale, shift = self._images
        out = on.empty((len(index), *images.shape[1:]), np.float32)
        if self._params is None:
            on.kernels.gather_batch(images, on.array(index), scale, shift, out=out)
        else:
            params, seed = on.array(self._params[rows]), int(self._seeds[number])
            on.kernels.augment_batch(images, on.array(index), scale, shift, params, seed, out=out)
        return out.transpose(0, 3, 1, 2), self._dataset.labels[index]


def _positive(name: str, value: Any) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name}: {value} is below 1")
    return number


def _scale_and_shift(
    dataset: Dataset, normalize: tuple[Statistics, Statistics] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Factor and summand of each channel, (C,) float32, that take raw pixels to (pixel - mean) / std."""
    channels = dataset.input_shape[0]
    mean, std = (0.0, 1.0) if normalize is None else _pair_of(normalize)
    mean, std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if not (std > 0).all():
        raise ValueError(f"normalize: std {std.tolist()} is not above 0")
    largest = 255.0 if dataset.images.dtype == np.uint8 else 1.0
    return (1 / (largest * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _pair_of(normalize: Any) -> tuple[Any, Any]:
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        raise TypeError(f"normalize: expected (mean, std) or None, got {normalize!r}")
    return normalize[0], normalize[1]


def _per_channel(name: str, value: Any, channels: int) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (1,), (channels,)):
        raise ValueError(
            f"normalize: {name} of shape {array.shape} is not one number for each of {channels} channels"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"normalize: {name} {array.tolist()} is not finite")
    return np.broadcast_to(array, (channels,))
