"""Trained networks and pictures, from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn import data, models
from fastcnn.data.folder import _read_image as read_image
from fastcnn.train import Checkpoint, CheckpointError, load_checkpoint

from .output import CommandError

_ARRAYS = (".npy", ".npz")


@dataclass(frozen=True)
class Network:
    """A trained network with what it needs to be used.

    Attributes
    ----------
    path : Path
        Of the checkpoint, without its endings.
    model : Module
        In evaluation mode.
    checkpoint : Checkpoint
    input_shape : (C, H, W)
    classes : tuple of str
    normalize : (mean, std) or None
        For `data.Loader`.
    """

    path: Path
    model: Any
    checkpoint: Checkpoint
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    normalize: tuple[Any, Any] | None

    def loader(self, dataset: data.Dataset, batch_size: int = 256) -> data.Loader:
        """The images of `dataset` in order, as the network takes them.

        Raises
        ------
        CommandError
            If they have another size than the network's, or other classes.
        """
        if dataset.input_shape != self.input_shape:
            raise CommandError(
                f"{dataset.name}: images of {_shape(dataset.input_shape)} are not the network's "
                f"{_shape(self.input_shape)} (channels x height x width)"
            )
        return data.Loader(dataset, batch_size, shuffle=False, normalize=self.normalize)


def load_network(path: Path) -> Network:
    """Read a run's folder (its best epoch, or else its last) or a checkpoint.

    Raises
    ------
    CheckpointError, CommandError
        If there is none, it is damaged, or it does not say which network it is of.
    """
    if path.is_dir():
        names = [name for name in ("best", "last") if (path / f"{name}.json").exists()]
        if not names:
            raise CommandError(f"{path}: holds no checkpoint (best.json or last.json)")
        path = path / names[0]
    checkpoint = load_checkpoint(path)
    config = checkpoint.model_config
    if config is None:
        raise CommandError(f"{path}: does not say which network it is of; load it from Python")
    try:
        model = models.create(**config, seed=0)
        channels, height, width = config["input_shape"]
        classes = checkpoint.classes or tuple(map(str, range(config["num_classes"])))
        normalize = checkpoint.normalize and (checkpoint.normalize["mean"], checkpoint.normalize["std"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its description of the network is damaged ({error})") from None
    if len(classes) != config["num_classes"]:
        raise CheckpointError(f"{path}: {len(classes)} classes, of {config['num_classes']} outputs")
    checkpoint.restore(model)
    return Network(path, model.eval(), checkpoint, (channels, height, width), classes, normalize)


@dataclass(frozen=True)
class Picture:
    """One image, (H, W, C) uint8, or float32 in [0, 1], and where it comes from."""

    source: str
    pixels: np.ndarray


def read_pictures(path: Path, input_shape: tuple[int, int, int], invert: bool = False) -> list[Picture]:
    """The image in a picture file, resized to the network's input, or all images in an .npy or .npz file.

    Parameters
    ----------
    path : Path
    input_shape : (C, H, W)
        Of the network; arrays must have this size.
    invert : bool
        Swap black and white.

    Raises
    ------
    ValueError, OSError
        If the file can't be read, or an array does not fit.
    """
    channels, height, width = input_shape
    if not path.is_file():
        raise CommandError(f"{path}: {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.suffix.lower() in _ARRAYS:
        images = _as_images(path, _read_array(path), input_shape)
        sources = [str(path)] if len(images) == 1 else [f"{path}[{i}]" for i in range(len(images))]
    elif channels not in (1, 3):
        raise CommandError(f"{path}: the network takes {channels} channels, pictures have 1 or 3")
    else:
        images = read_image(path, (height, width), "grey" if channels == 1 else "rgb")[np.newaxis]
        sources = [str(path)]
    if invert:
        images = (1 if images.dtype.kind == "f" else 255) - images
    return [Picture(source, image) for source, image in zip(sources, images, strict=True)]


def _read_array(path: Path) -> np.ndarray:
    try:
        content = np.load(path, allow_pickle=False)
    except Exception as error:
        # NumPy raises nearly anything on a damaged file.
        raise CommandError(f"{path}: is no readable {path.suffix} file ({error})") from None
    if isinstance(content, np.ndarray):
        return content
    with content:
        names = [name for name in ("x", "images", "x_test") if name in content.files]
        if not names and len(content.files) == 1:
            names = content.files
        if not names:
            found = ", ".join(content.files) or "nothing"
            raise CommandError(f"{path}: holds no array named x or images (it has {found})")
        try:
            return content[names[0]]
        except Exception as error:
            raise CommandError(f"{path}: {names[0]} can't be read ({error})") from None


def _as_images(path: Path, array: np.ndarray, input_shape: tuple[int, int, int]) -> np.ndarray:
    """(N, H, W, C) uint8, or float32 in [0, 1]."""
    channels, height, width = input_shape
    first, last = (channels, height, width), (height, width, channels)
    if array.shape[-3:] == first and array.ndim in (3, 4):
        images = np.moveaxis(array, -3, -1)
    elif array.shape[-3:] == last and array.ndim in (3, 4):
        images = array
    elif array.shape[-2:] == (height, width) and channels == 1 and array.ndim in (2, 3):
        images = array[..., np.newaxis]
    else:
        raise CommandError(
            f"{path}: an array of shape {array.shape} holds no images of the network's {_shape(input_shape)}"
        )
    images = images.reshape(-1, *last)
    if array.dtype.kind in "iub":
        if images.size and (images.min() < 0 or images.max() > 255):
            raise CommandError(f"{path}: integers from {images.min()} to {images.max()} are not in 0 to 255")
        return images.astype(np.uint8)
    if array.dtype.kind != "f":
        raise CommandError(f"{path}: an array of dtype {array.dtype} holds neither integers nor floats")
    images = images.astype(np.float32)
    # Written so that NaN fails too.
    if images.size and not (images.min() >= 0 and images.max() <= 1):
        raise CommandError(f"{path}: floats from {images.min()} to {images.max()} are not in [0, 1]")
    return images


def _shape(input_shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, input_shape))
