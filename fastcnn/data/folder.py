"""Folders of images: one folder a class."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .dataset import Dataset, Skipped
from .errors import DataError, FormatError, MissingDataError

_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff")
)
_PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
MODES = ("grey", "rgb")


def find_parts(root: Path) -> dict[str, Path]:
    """The folders of `root` that hold its parts; empty if `root` holds the classes itself.

    A validation part without a test part counts as the test part.
    """
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    found = {}
    for split, names in _PART_NAMES.items():
        match = next((folders[name] for name in names if name in folders), None)
        if match is not None and class_folders(match):
            found[split] = match
    if "validation" in found and "test" not in found:
        found["test"] = found.pop("validation")
    return found if "train" in found else {}


def class_folders(root: Path) -> list[Path]:
    """The folders of `root` that have an image somewhere below them, in the order of their names."""
    folders = (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(
        (path for path in folders if any(_is_image(file) for file in _files(path))), key=lambda p: p.name
    )


def _files(folder: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def read_folder(
    root: str | Path,
    *,
    size: tuple[int, int] | None = None,
    mode: str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Dataset:
    """Images below `root`, whose folders name the classes, in sorted order.

    Files that are no images or are damaged are left out and listed in the data set's `skipped`.

    Parameters
    ----------
    size : (H, W) to resize to, with antialiasing; None where all images have one size already
    mode : "grey" (luma of ITU-R 601), "rgb", or None for grey unless an image has colour
    classes : the classes in the order of their labels; None for the folders that hold images

    Raises
    ------
    MissingDataError
        If `root` is no folder with folders of images, or lacks one of `classes`.
    FormatError
        If images have different sizes and `size` is None.
    DataError
        If no image could be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise MissingDataError(f"{root}: is no folder")
    check_mode(mode)
    folders = class_folders(root)
    if not folders:
        raise MissingDataError(f"{root}: holds no folders of images, one for each class")
    names = tuple(classes) if classes is not None else tuple(folder.name for folder in folders)
    unknown = [folder.name for folder in folders if folder.name not in names]
    if unknown:
        raise DataError(f"{root}: class {unknown[0]!r} is none of {', '.join(names)}")
    images: list[np.ndarray] = []
    labels: list[int] = []
    skipped: list[Skipped] = []
    for folder in folders:
        for path in _files(folder):
            try:
                image = _read_image(path, size, mode)
            # Pillow's decoders raise nearly anything on a damaged file.
            except Exception as error:
                skipped.append(Skipped(str(path), str(error)[:150] or type(error).__name__))
                continue
            if images and image.shape[:2] != images[0].shape[:2]:
                raise FormatError(
                    f"{path}: {_size(image)} pixels, the first image has {_size(images[0])}; "
                    "choose a size for all"
                )
            images.append(image)
            labels.append(names.index(folder.name))
    if not images:
        raise DataError(f"{root}: none of its {len(skipped)} files is a readable image ({skipped[0].reason})")
    return Dataset(_stack(images), np.array(labels), names, name or root.resolve().name, tuple(skipped))


def check_mode(mode: str | None) -> None:
    """Refuse a mode that is neither None nor one of `MODES`."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode: {mode!r} is none of {', '.join(MODES)}")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _read_image(path: Path, size: tuple[int, int] | None, mode: str | None) -> np.ndarray:
    """One image as uint8, (H, W, 1) or (H, W, 3)."""
    if not _is_image(path) or not path.is_file():
        raise ValueError(f"no image file by its suffix {path.suffix!r}")
    with warnings.catch_warnings():
        # What Pillow says of a damaged file, it says in the report; a decompression bomb is refused.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            return as_array(image, size, mode)


def as_array(image: Image.Image, size: tuple[int, int] | None, mode: str | None) -> np.ndarray:
    """A picture as uint8, (H, W, 1) or (H, W, 3), in the wanted mode and size."""
    if mode is None:
        mode = "grey" if image.mode in ("1", "L", "LA", "F") else "rgb"
    image = image.convert("L" if mode == "grey" else "RGB")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def _stack(images: list[np.ndarray]) -> np.ndarray:
    """(N, H, W, C); where one image has colour, the grey ones get three equal channels."""
    channels = max(image.shape[-1] for image in images)
    return np.stack([np.broadcast_to(image, (*image.shape[:2], channels)) for image in images])
