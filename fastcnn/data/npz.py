"""NPZ: arrays x and y, or x_train, y_train, x_test, y_test, in NumPy's zip of .npy files."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from .binary import check_size
from .dataset import Dataset
from .errors import DataError, FormatError, MissingDataError

# (images, labels) of the whole file, and of a part where {} is its name.
_WHOLE = (("x", "y"), ("X", "y"), ("images", "labels"))
_PARTS = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))
_CHANNELS = (1, 3, 4)
# Deflate can't shrink a file to less than 1/1032; what claims more is a lie.
_MOST_DEFLATION = 1032


def npz_splits(path: Path) -> tuple[str, ...]:
    """The parts that the file tells apart: none if it holds just x and y."""
    with _opened(path) as archive:
        keys = _keys(archive)
    return tuple(split for split in ("train", "validation", "test") if _pair(keys, split))


def read_npz(path: str | Path, split: str = "all", name: str | None = None) -> Dataset:
    """Labelled images from an NPZ file.

    Images may be (N, H, W), (N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels (where both fit, the former
    counts), in integers from 0 to 255 or floats from 0 to 1. Labels are ints of shape (N,) or (N, 1). An
    array of strings named classes gives the names; without it they are numbers. Nothing is unpickled.

    Parameters
    ----------
    split : "train", "validation" or "test" for x_train and y_train, and so on; "all" for x and y, which also
        serve as "train" in a file with a test part

    Raises
    ------
    MissingDataError
        If there is no such file or part.
    FormatError
        If the file is damaged, holds objects, or lies about its sizes.
    """
    path = Path(path)
    with _opened(path) as archive:
        keys = _keys(archive)
        pair = _pair(keys, split)
        if pair is None:
            found = ", ".join(sorted(keys))[:150] or "nothing"
            raise MissingDataError(f"{path}: holds no images and labels of the {split} part (it has {found})")
        x = _read_array(path, archive, pair[0])
        y = _read_array(path, archive, pair[1])
        classes = _read_array(path, archive, "classes") if "classes" in keys else None
        # A part may lack the last class; without names its number still counts.
        others = [] if "classes" in keys else [_read_array(path, archive, key) for key in _label_keys(keys)]
    try:
        images, labels = _images(x), _labels(y)
        names = _names(classes, np.concatenate([labels, *map(_labels, others)]))
        return Dataset(images, labels, names, name or path.stem)
    except DataError as error:
        raise FormatError(f"{path}: {error}") from None


def _pair(keys: set[str], split: str) -> tuple[str, str] | None:
    """The names of the images and labels of a part."""
    candidates = [(x.format(split), y.format(split)) for x, y in _PARTS]
    has_test = any(x.format("test") in keys for x, _ in _PARTS)
    if split == "all" or (split == "train" and has_test):
        candidates += _WHOLE
    return next(((x, y) for x, y in candidates if x in keys and y in keys), None)


def _label_keys(keys: set[str]) -> set[str]:
    """The names of the labels of all parts."""
    pairs = (_pair(keys, split) for split in ("train", "validation", "test"))
    return {pair[1] for pair in pairs if pair is not None}


class _Opened:
    """A zip archive whose errors are told as ours."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> zipfile.ZipFile:
        try:
            self._archive = zipfile.ZipFile(self._path)
        except FileNotFoundError:
            raise MissingDataError(f"{self._path}: does not exist") from None
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise FormatError(f"{self._path}: is no readable NPZ file ({str(error)[:150]})") from None
        return self._archive

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._archive.close()


def _opened(path: Path) -> _Opened:
    return _Opened(path)


def _keys(archive: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}


def _read_array(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """One array, its header checked against the size of the member before any memory is taken."""
    info = archive.getinfo(f"{key}.npy")
    check_size(path, info.file_size, f"the array {key}")
    if info.file_size > _MOST_DEFLATION * info.compress_size + 1024:
        raise FormatError(
            f"{path}: {key} claims {info.file_size} bytes from {info.compress_size} compressed ones"
        )
    try:
        with archive.open(info) as member:
            shape, dtype = _read_header(member)
            size = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or member.tell() + size != info.file_size:
                raise FormatError(
                    f"{path}: {key} has {info.file_size - member.tell()} bytes, "
                    f"its header says {dtype} of shape {str(shape)[:80]}"
                )
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)
    except FormatError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise FormatError(f"{path}: {key} can't be read ({str(error)[:150]})") from None


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"version {version} of the .npy format")
    if any(size < 0 for size in shape):
        raise ValueError(f"a shape of {shape}")
    return shape, dtype


def _images(x: np.ndarray) -> np.ndarray:
    """`x` as (N, H, W, C), uint8 or float32."""
    if x.ndim == 3:
        x = x[..., None]
    elif x.ndim == 4 and x.shape[1] in _CHANNELS:
        x = x.transpose(0, 2, 3, 1)
    elif x.ndim != 4 or x.shape[-1] not in _CHANNELS:
        raise DataError(f"images of shape {x.shape} are none of (N, H, W), (N, C, H, W), (N, H, W, C)")
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind in "iub":
        if x.size and (x.min() < 0 or x.max() > 255):
            raise DataError(f"images of {x.dtype} from {x.min()} to {x.max()}, integers must lie in 0 to 255")
        return x.astype(np.uint8)
    if x.dtype.kind == "f":
        return x.astype(np.float32)
    raise DataError(f"images of dtype {x.dtype} are neither integers nor floats")


def _labels(y: np.ndarray) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise DataError(f"labels of {y.dtype} {y.shape} are no ints of shape (N,)")
    if y.size and int(y.max()) >= 1 << 31:
        raise DataError(f"label {y.max()} is not below {1 << 31}")
    return y.astype(np.int64)


def _names(classes: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
    if classes is None:
        count = int(labels.max(initial=0)) + 1
        if count > max(1000, len(labels)):
            raise DataError(f"label {count - 1} among {len(labels)} labels, and no array named classes")
        return tuple(str(label) for label in range(count))
    if classes.ndim != 1 or classes.dtype.kind not in "US":
        raise DataError(f"classes of {classes.dtype} {classes.shape} are no strings of shape (K,)")
    return tuple(
        entry.decode("utf-8", "replace") if isinstance(entry, bytes) else str(entry) for entry in classes
    )
