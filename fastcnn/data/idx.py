"""IDX, the format of MNIST and its kin (http://yann.lecun.com/exdb/mnist, "The IDX file format")."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .binary import open_plain, read_exactly
from .dataset import Dataset
from .errors import FormatError, MissingDataError

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_AXES = 8
_FILE = re.compile(r"(?:^|[-_])(train|t10k|test)-(images|labels)[-.]idx([1-4])-ubyte(?:\.gz)?$")


def read_idx(path: str | Path) -> np.ndarray:
    """The array that an IDX file holds, gzipped or not, in native byte order.

    The header is two zero bytes, a type code, the number of axes and each axis as a big-endian uint32.

    Raises
    ------
    FormatError
        If the header is not one, or the file holds more or fewer bytes than the header says.
    """
    path = Path(path)
    with open_plain(path) as stream:
        head = read_exactly(path, stream, 4, "the IDX header").tobytes()
        zeros, code, axes = struct.unpack(">HBB", head)
        if zeros or code not in _DTYPES:
            raise FormatError(
                f"{path}: begins with {head.hex()}, which is no IDX header (0000, type code, axes)"
            )
        if not 1 <= axes <= _MAX_AXES:
            raise FormatError(f"{path}: {axes} axes in the header, IDX data have 1 to {_MAX_AXES}")
        sizes = read_exactly(path, stream, 4 * axes, "the IDX header").tobytes()
        shape = struct.unpack(f">{axes}I", sizes)
        dtype = np.dtype(_DTYPES[code])
        size = math.prod(shape) * dtype.itemsize
        content = read_exactly(path, stream, size, f"the shape {shape} of the header")
        if stream.read(1):
            raise FormatError(f"{path}: holds more than the {size} bytes of its shape {shape}")
    return content.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_idx_pair(
    images_path: str | Path,
    labels_path: str | Path,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Dataset:
    """Images and labels from two IDX files.

    Images are uint8 of shape (N, H, W), or (N, H, W, C) with 1 or 3 channels; labels are uint8 of shape (N,).
    Without `classes` they are named by their numbers.

    Raises
    ------
    FormatError
        If a file is damaged, or holds something else.
    DataError
        If the two don't fit together.
    """
    images = read_idx(images_path)
    labels = _read_labels(labels_path)
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[-1] in (1, 3))):
        raise FormatError(
            f"{images_path}: {images.dtype} {images.shape} are no images, "
            "which are uint8 (N, H, W) or (N, H, W, C)"
        )
    if len(images) != len(labels):
        raise FormatError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {Path(images_path).name}"
        )
    if classes is None:
        classes = [str(label) for label in range(int(labels.max(initial=0)) + 1)]
    images = images[..., None] if grey else images
    return Dataset(images, labels, tuple(classes), name or str(images_path))


def _read_labels(path: str | Path) -> np.ndarray:
    labels = read_idx(path)
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise FormatError(f"{path}: {labels.dtype} {labels.shape} are no labels, which are uint8 (N,)")
    return labels


def find_idx(folder: Path) -> dict[str, dict[str, Path]]:
    """The IDX files of a folder: {"train": {"images": path, "labels": path}, "test": ...}."""
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _FILE.search(path.name.lower())
        if match:
            split = "train" if match[1] == "train" else "test"
            found.setdefault(split, {})[match[2]] = path
    return found


def read_idx_folder(
    folder: str | Path, split: str, classes: Sequence[str] | None = None, name: str | None = None
) -> Dataset:
    """The "train" or "test" part of a folder of IDX files with their usual names.

    Without `classes` they are named by their numbers, up to the largest label of both parts.

    Raises
    ------
    MissingDataError
        If one of the two files is not there.
    """
    folder = Path(folder)
    parts = find_idx(folder)
    pair = parts.get(split, {})
    for kind in ("images", "labels"):
        if kind not in pair:
            raise MissingDataError(f"{folder}: holds no {split} {kind} in IDX format")
    if classes is None:
        largest = [
            int(_read_labels(part["labels"]).max(initial=0)) for part in parts.values() if "labels" in part
        ]
        classes = [str(label) for label in range(max(largest) + 1)]
    return read_idx_pair(pair["images"], pair["labels"], classes, name or folder.name)
