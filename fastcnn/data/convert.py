"""Conversion of any readable data to a compressed NPZ file."""

from __future__ import annotations

import contextlib
import operator
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from .dataset import Dataset, Skipped
from .errors import DataError, WriteError
from .named import Progress, info, load, locate, names
from .sources import check_split, load_source, open_source

# ITU-R 601, the weights of Pillow's conversion to grey.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote and what it left out."""

    destination: str
    images: dict[str, int]
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    file_bytes: int

    def summary(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            "destination": self.destination,
            "images": self.images,
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "skipped": [{"path": path, "reason": reason} for path, reason in self.skipped],
            "file_bytes": self.file_bytes,
        }


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    mode: str | None = None,
    split: str = "all",
    overwrite: bool = False,
    root: str | Path | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write data as a compressed NPZ file with x, y and classes.

    x is (N, 1, H, W) for grey and (N, 3, H, W) for colour, float32 in [0, 1]; y is (N,) int64. Where the
    source tells its parts apart, x and y are the train part, and x_test and y_test (and x_validation and
    y_validation) the others.

    Parameters
    ----------
    source : a path or a name, as `load` takes it
    destination : path of the .npz file
    size : pixels a side, or (H, W), to resize to; None leaves the size as it is, which then is one for all
    mode : "grey", "rgb", or None for what the source has
    split : "all", or "train", "validation" or "test" to write one part only, as x and y
    overwrite : whether to replace a file that is there
    root, progress : as for `load`

    Raises
    ------
    DataError
        If the source can't be used, or `destination` exists and `overwrite` is False.
    WriteError
        If the file can't be written. Nothing is left half-written, and an older file stays as it was.
    """
    destination = Path(destination).expanduser()
    height_width = _size(size)
    check_split(split)
    if mode not in (None, "grey", "rgb"):
        raise ValueError(f"mode: {mode!r} is none of grey, rgb")
    if destination.suffix != ".npz":
        raise ValueError(f"destination: {destination} does not end in .npz")
    if destination.exists() and not overwrite:
        raise DataError(f"{destination}: exists already and is not overwritten unless that is asked for")
    arrays: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    skipped: list[Skipped] = []
    for part, data in _parts(source, split, height_width, mode, root, progress):
        data = _as_wanted(data, height_width, mode)
        x, y = (f"x_{part}", f"y_{part}") if arrays else ("x", "y")
        arrays[x], arrays[y], arrays["classes"] = _planes(data.images), data.labels, np.array(data.classes)
        counts[part] = len(data)
        skipped += data.skipped
    write_npz(destination, arrays, overwrite)
    return Conversion(
        str(destination),
        counts,
        data.input_shape,
        data.classes,
        tuple(skipped),
        destination.stat().st_size,
    )


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if np.ndim(size) == 0 else tuple(size)
    try:
        height, width = (operator.index(side) for side in pair)
    except (TypeError, ValueError):
        raise TypeError(f"size: expected a number of pixels or two, got {size!r}") from None
    if not (1 <= height <= 4096 and 1 <= width <= 4096):
        raise ValueError(f"size: {size!r} is not between 1 and 4096 pixels")
    return height, width


def _parts(
    source: str | Path,
    split: str,
    size: tuple[int, int] | None,
    mode: str | None,
    root: str | Path | None,
    progress: Progress | None,
) -> Iterator[tuple[str, Dataset]]:
    """The parts to write, by name."""
    text = os.fspath(source)
    if text in names() and info(text).kind != "fer2013":
        for part in ("train", "test") if split == "all" else (split,):
            yield part, load(source, part, root, progress)
        return
    opened = open_source(source if text not in names() else locate(text, root, progress))
    if split != "all" and split not in opened.splits:
        yield split, load_source(opened, split)
        return
    for part in (opened.splits or ("all",)) if split == "all" else (split,):
        yield part, opened.read(part, size=size, mode=mode)


def _as_wanted(data: Dataset, size: tuple[int, int] | None, mode: str | None) -> Dataset:
    """`data` in another size and mode."""
    channels, height, width = data.input_shape
    wanted = {None: 3 if channels == 4 else channels, "grey": 1, "rgb": 3}[mode]
    if wanted == channels and size in (None, (height, width)):
        return data
    if data.images.dtype == np.uint8:
        from PIL import Image

        from .folder import as_array

        mode = mode or ("grey" if channels == 1 else "rgb")
        pictures = (Image.fromarray(image[..., 0] if channels == 1 else image) for image in data.images)
        images = np.stack([as_array(picture, size, mode) for picture in pictures])
    else:
        images = _resized_floats(_mixed_floats(data.images, wanted), size)
    return Dataset(images, data.labels, data.classes, data.name, data.skipped)


def _mixed_floats(images: np.ndarray, channels: int) -> np.ndarray:
    """Float images with 1 or 3 channels."""
    images = images[..., :3]
    if channels == images.shape[-1]:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.clip(images @ _LUMA, 0, 1)[..., None]


def _resized_floats(images: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Float images resized channel by channel."""
    if size is None or images.shape[1:3] == size:
        return images
    from PIL import Image

    out = np.empty((len(images), *size, images.shape[-1]), np.float32)
    for image, target in zip(images, out, strict=True):
        for channel in range(images.shape[-1]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            target[..., channel] = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    # A bicubic filter overshoots at edges.
    return out.clip(0, 1, out=out)


def _planes(images: np.ndarray) -> np.ndarray:
    """(N, C, H, W) float32 in [0, 1], C-contiguous."""
    planes = images.transpose(0, 3, 1, 2)
    if images.dtype == np.float32:
        return np.ascontiguousarray(planes)
    out = np.empty(planes.shape, np.float32)
    return np.divide(planes, np.float32(255), out=out, dtype=np.float32)


def write_npz(destination: Path, arrays: dict[str, np.ndarray], overwrite: bool) -> None:
    """Write a compressed NPZ file under another name and rename it when it is complete.

    Raises
    ------
    DataError
        If the file exists and `overwrite` is False.
    WriteError
        If it can't be written.
    """
    temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.part")
    try:
        try:
            with temporary.open("xb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                _flush(file)
            if not overwrite and destination.exists():
                raise DataError(f"{destination}: came into being meanwhile and is not overwritten")
            os.replace(temporary, destination)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
    except OSError as error:
        raise WriteError(
            f"{destination}: could not be written ({error.strerror or error}); nothing was left behind"
        ) from None


def _flush(file: IO[bytes]) -> None:
    """Have the content on the disk before the name points to it."""
    file.flush()
    os.fsync(file.fileno())
