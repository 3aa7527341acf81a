"""CIFAR-10 and CIFAR-100, binary and Python versions, as archive or extracted
(https://www.cs.toronto.edu/~kriz/cifar.html, which describes both layouts)."""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from .binary import Limited, check_size, open_plain
from .dataset import Dataset
from .errors import FormatError, MissingDataError
from .safe_pickle import read_pickle

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# Both versions unfold to about 180 MB.
_ARCHIVE_LIMIT = 1 << 30
_MAX_MEMBERS = 1000

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _Layout(NamedTuple):
    """How one version names its files: those of each part, and one that must stand beside them."""

    python: bool
    num_classes: int
    parts: dict[str, list[str]]
    beside: str = ""


_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]
_LAYOUTS = (
    _Layout(False, 10, {"train": [f"{name}.bin" for name in _BATCHES], "test": ["test_batch.bin"]}),
    _Layout(True, 10, {"train": _BATCHES, "test": ["test_batch"]}),
    _Layout(False, 100, {"train": ["train.bin"], "test": ["test.bin"]}),
    _Layout(True, 100, {"train": ["train"], "test": ["test"]}, beside="meta"),
)


def _layout_of(names: Sequence[str], num_classes: int | None) -> _Layout | None:
    """Which layout has these file names."""
    for layout in _LAYOUTS:
        files = [name for part in layout.parts.values() for name in part]
        beside = not layout.beside or layout.beside in names
        if num_classes in (None, layout.num_classes) and beside and any(name in names for name in files):
            return layout
    return None


def find_cifar(path: Path, num_classes: int | None = None) -> Path | None:
    """The folder with CIFAR's files that `path` is or holds, else the archive, else None."""
    if path.is_file():
        return path if path.name.endswith((".tar.gz", ".tgz", ".tar")) else None
    stem = f"cifar-{num_classes}-" if num_classes else "cifar-10"
    for folder in [path, *sorted(p for p in path.glob(f"{stem}*") if p.is_dir())]:
        if _layout_of([p.name for p in folder.iterdir() if p.is_file()], num_classes):
            return folder
    return next(iter(sorted(path.glob(f"{stem}*.tar.gz"))), None)


def read_cifar(
    path: str | Path, split: str, num_classes: int | None = None, name: str | None = None
) -> Dataset:
    """The "train" or "test" part of CIFAR-10 or CIFAR-100 (fine labels).

    Parameters
    ----------
    path : an archive (cifar-10-binary.tar.gz, cifar-10-python.tar.gz, the same of cifar-100), or a folder
        that holds one, or its content
    num_classes : 10 or 100 where `path` may hold both

    Raises
    ------
    MissingDataError
        If there is no such file, or no such part in it.
    FormatError
        If a file is damaged or hostile. The Python version's pickles are never executed.
    """
    path = Path(path)
    if split not in ("train", "test"):
        raise ValueError(f"split: {split!r} is neither train nor test")
    if not path.exists():
        raise MissingDataError(f"{path}: does not exist")
    place = find_cifar(path, num_classes)
    if place is None:
        raise MissingDataError(f"{path}: holds neither CIFAR's files nor its archive")
    content = _read_folder(place, split) if place.is_dir() else _read_archive(place, split)
    layout = _layout_of(list(content), num_classes)
    if layout is None:
        raise MissingDataError(f"{place}: holds no {split} part of CIFAR")
    read_batch = _python_batch if layout.python else _binary_batch
    batches = [
        read_batch(place / file, content[file], layout.num_classes)
        for file in layout.parts[split]
        if file in content
    ]
    images = np.concatenate([batch for batch, _ in batches])
    labels = np.concatenate([batch for _, batch in batches])
    classes = _class_names(place, content, layout.python, layout.num_classes)
    return Dataset(images, labels, classes, name or f"cifar{layout.num_classes}")


def _wanted(split: str) -> set[str]:
    files = {file for layout in _LAYOUTS for file in layout.parts[split]}
    return files | {"batches.meta", "batches.meta.txt", "meta", "fine_label_names.txt"}


def _read_folder(folder: Path, split: str) -> dict[str, bytes]:
    content = {}
    for path in sorted(folder.iterdir()):
        if path.name in _wanted(split) and path.is_file():
            check_size(path, path.stat().st_size, "the file")
            try:
                content[path.name] = path.read_bytes()
            except OSError as error:
                raise FormatError(f"{path}: can't be read ({error.strerror})") from None
    return content


def _read_archive(path: Path, split: str) -> dict[str, bytes]:
    """The wanted files of a tar archive, read in one pass; nothing is written to the disk."""
    content: dict[str, bytes] = {}
    wanted = _wanted(split)
    try:
        with (
            open_plain(path) as stream,
            tarfile.open(fileobj=Limited(path, stream, _ARCHIVE_LIMIT), mode="r|") as archive,
        ):
            for count, member in enumerate(archive):
                if count >= _MAX_MEMBERS:
                    raise FormatError(f"{path}: holds more than {_MAX_MEMBERS} files")
                name = PurePosixPath(member.name).name
                if name in wanted and member.isfile():
                    file = archive.extractfile(member)
                    content[name] = file.read() if file else b""
    except FormatError:
        raise
    # Hostile headers get past tarfile's own errors in these ways.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        raise FormatError(f"{path}: is no readable tar archive ({str(error)[:150]})") from None
    return content


def _binary_batch(path: Path, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of one label byte (CIFAR-100: coarse, then fine) and 3072 pixels, plane by plane."""
    prefix = 1 if classes == 10 else 2
    record = prefix + _PIXELS
    if not content or len(content) % record:
        raise FormatError(f"{path}: {len(content)} bytes are not a whole number of records of {record}")
    records = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _checked(path, records[:, prefix:], records[:, prefix - 1].astype(np.int64), classes)


def _python_batch(path: Path, content: bytes, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict with `data`, (N, 3072) uint8, and `labels` or `fine_labels`, a list of ints."""
    batch = read_pickle(path, content)
    key = "labels" if classes == 10 else "fine_labels"
    data, labels = batch.get("data"), batch.get(key)
    if (
        not isinstance(data, np.ndarray)
        or data.dtype != np.uint8
        or data.ndim != 2
        or data.shape[1] != _PIXELS
    ):
        raise FormatError(f"{path}: its 'data' is no uint8 array of (N, {_PIXELS})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise FormatError(f"{path}: its {key!r} is no list of ints")
    if len(labels) != len(data):
        raise FormatError(f"{path}: {len(labels)} labels for {len(data)} images")
    return _checked(path, data, labels, classes)


def _checked(path: Path, planes: np.ndarray, labels: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    outside = next((label for label in labels if not 0 <= label < classes), None)
    if outside is not None:
        raise FormatError(f"{path}: label {outside} is not in [0, {classes})")
    images = planes.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


def _class_names(place: Path, content: Mapping[str, bytes], python: bool, classes: int) -> tuple[str, ...]:
    """The names in the files, or those that everybody knows, or numbers."""
    names: list[str] = []
    if python:
        file, key = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
        if file in content:
            listed = read_pickle(place / file, content[file]).get(key)
            if isinstance(listed, list):
                names = [
                    entry.decode("latin1") if isinstance(entry, bytes) else str(entry) for entry in listed
                ]
    else:
        file = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        names = content.get(file, b"").decode("latin1").split()
    if not names:
        return CIFAR10_CLASSES if classes == 10 else tuple(str(label) for label in range(100))
    if len(names) != classes:
        raise FormatError(f"{place / file}: names {len(names)} classes, CIFAR-{classes} has {classes}")
    return tuple(names)
