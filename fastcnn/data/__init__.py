"""Data: readers, named data sets, conversion, batches and augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .augmentation import PRESETS, Augmentation
from .cifar import read_cifar
from .convert import Conversion, convert
from .dataset import Dataset, Skipped
from .errors import DataError, FormatError, MissingDataError, WriteError
from .fer2013 import read_fer2013
from .idx import read_idx, read_idx_folder, read_idx_pair
from .loader import Loader
from .named import Info, cache_directory, find, info, load, names
from .npz import read_npz

if TYPE_CHECKING:
    from .folder import read_folder

__all__ = [
    "PRESETS",
    "Augmentation",
    "Conversion",
    "DataError",
    "Dataset",
    "FormatError",
    "Info",
    "Loader",
    "MissingDataError",
    "Skipped",
    "WriteError",
    "cache_directory",
    "convert",
    "find",
    "info",
    "load",
    "names",
    "read_cifar",
    "read_fer2013",
    "read_folder",
    "read_idx",
    "read_idx_folder",
    "read_idx_pair",
    "read_npz",
]


def __getattr__(name: str) -> Any:
    # Pillow is imported only by those who read pictures.
    if name == "read_folder":
        from .folder import read_folder

        return read_folder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
