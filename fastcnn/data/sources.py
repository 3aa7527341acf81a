"""What lies at a path: which of the readable formats, and which parts it tells apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cifar import find_cifar, read_cifar
from .dataset import Dataset
from .errors import DataError, MissingDataError
from .fer2013 import csv_splits, read_fer2013
from .idx import find_idx, read_idx_folder
from .npz import npz_splits, read_npz

SPLITS = ("train", "validation", "test", "all")
_READABLE = (
    "a folder of images by class, of IDX files or of CIFAR's files, a CIFAR archive (.tar.gz), "
    "an .npz or a FER2013 .csv"
)
_CSV_NAMES = ("fer2013.csv", "icml_face_data.csv")
# Data that name no parts are divided by this rule, the same each time.
_TRAIN_SHARE, _SPLIT_SEED = 0.8, 0


@dataclass(frozen=True)
class Source:
    """Readable data at a path; `splits` are the parts that they tell apart themselves."""

    path: Path
    kind: str
    splits: tuple[str, ...]

    def read(
        self,
        split: str,
        *,
        size: tuple[int, int] | None = None,
        mode: str | None = None,
    ) -> Dataset:
        """One of `splits`, or "all" where there are none; `size` and `mode` are for folders of images."""
        if self.kind == "idx":
            return read_idx_folder(self.path, split)
        if self.kind == "cifar":
            return read_cifar(self.path, split)
        if self.kind == "csv":
            return read_fer2013(self.path, split)
        if self.kind == "npz":
            return read_npz(self.path, split)
        from .folder import class_folders, find_parts, read_folder

        name = self.path.resolve().name
        if split == "all":
            return read_folder(self.path, size=size, mode=mode, name=name)
        parts = find_parts(self.path)
        # A part may lack a class; its labels mean the same as those of the train part nevertheless.
        classes = [folder.name for folder in class_folders(parts["train"])]
        return read_folder(parts[split], size=size, mode=mode, classes=classes, name=name)


def open_source(path: str | Path) -> Source:
    """Find out what lies at `path`.

    Raises
    ------
    MissingDataError
        If there is nothing, or nothing that can be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise MissingDataError(f"{path}: does not exist")
    source = _folder_source(path) if path.is_dir() else _file_source(path)
    if source is None:
        raise MissingDataError(f"{path}: holds no data that can be read, which are {_READABLE}")
    return source


def _file_source(path: Path) -> Source | None:
    name = path.name.lower()
    if name.endswith(".npz"):
        return Source(path, "npz", npz_splits(path))
    if name.endswith((".csv", ".csv.gz")):
        return Source(path, "csv", csv_splits(path))
    if find_cifar(path):
        return Source(path, "cifar", ("train", "test"))
    return None


def _folder_source(path: Path) -> Source | None:
    for folder in (path, path / "raw"):
        found = find_idx(folder) if folder.is_dir() else {}
        if found:
            return Source(folder, "idx", tuple(split for split in ("train", "test") if split in found))
    if find_cifar(path):
        return Source(path, "cifar", ("train", "test"))
    for name in _CSV_NAMES:
        if (path / name).is_file():
            return Source(path / name, "csv", csv_splits(path / name))
    from .folder import class_folders, find_parts

    parts = tuple(find_parts(path))
    return Source(path, "folder", parts) if parts or class_folders(path) else None


def load_source(source: Source, split: str) -> Dataset:
    """The "train", "validation", "test" or "all" of a source.

    Where it tells no parts apart, "train" and "test" are four fifths and one fifth of every class, drawn by a
    fixed seed.

    Raises
    ------
    MissingDataError
        If it has parts, but not this one.
    """
    check_split(split)
    if split in source.splits:
        return source.read(split)
    if not source.splits:
        whole = source.read("all")
        return whole if split == "all" else whole.split(_TRAIN_SHARE, _SPLIT_SEED)[split == "test"]
    if split == "all" and source.kind == "csv":
        return source.read("all")
    if split == "all":
        return concatenate([source.read(part) for part in source.splits])
    raise MissingDataError(f"{source.path}: holds no {split} part, only {', '.join(source.splits)}")


def check_split(split: str) -> None:
    """Refuse what is none of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")


def concatenate(parts: Sequence[Dataset]) -> Dataset:
    """One data set of several with the same classes, dtype and size."""
    first = parts[0]
    for part in parts[1:]:
        if part.classes != first.classes or part.input_shape != first.input_shape:
            raise DataError(
                f"{first.name}: its parts differ: {first.input_shape} and {part.input_shape}, "
                f"{first.num_classes} and {part.num_classes} classes"
            )
    return Dataset(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        first.classes,
        first.name,
        tuple(entry for part in parts for entry in part.skipped),
    )
