"""Data sets by name: the digits that come with fastcnn, and others found on the machine or downloaded."""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cifar import CIFAR10_CLASSES, find_cifar, read_cifar
from .dataset import Dataset
from .errors import MissingDataError
from .fer2013 import EMOTIONS
from .idx import find_idx, read_idx_folder
from .npz import read_npz
from .sources import check_split, concatenate, load_source, open_source

# Called while downloading with the file's name, the bytes so far and the bytes in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Info:
    """What there is to know of a named data set before loading it.

    `augmentation` is the preset that suits it, `files` are the names to download with their SHA-256,
    `manual` says what to do where nothing can be downloaded, and `what` it brings.
    """

    name: str
    title: str
    kind: str
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train: int
    test: int
    licence: str
    homepage: str
    augmentation: str
    url: str = ""
    files: tuple[tuple[str, str], ...] = ()
    system_folders: tuple[str, ...] = ()
    manual: str = ""
    what: str = ""


_NUMERALS = tuple("0123456789")
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_MNIST_SHA256 = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_FASHION_SHA256 = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)

_ALL = (
    Info(
        "digits",
        "5,000 MNIST digits that come with fastcnn",
        "embedded",
        (1, 28, 28),
        _NUMERALS,
        4_000,
        1_000,
        "CC BY-SA 3.0",
        "http://yann.lecun.com/exdb/mnist",
        "digits",
    ),
    Info(
        "fashion-mnist",
        "Zalando's articles of clothing",
        "idx",
        (1, 28, 28),
        (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        60_000,
        10_000,
        "MIT",
        "https://github.com/zalandoresearch/fashion-mnist",
        "digits",
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files=tuple(zip(_IDX_FILES, _FASHION_SHA256, strict=True)),
        system_folders=("/usr/share/datasets/fashion-mnist",),
        manual="on Debian and Ubuntu, apt-get install dataset-fashion-mnist brings it",
    ),
    Info(
        "mnist",
        "Handwritten digits, the whole set",
        "idx",
        (1, 28, 28),
        _NUMERALS,
        60_000,
        10_000,
        "CC BY-SA 3.0",
        "http://yann.lecun.com/exdb/mnist",
        "digits",
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files=tuple(zip(_IDX_FILES, _MNIST_SHA256, strict=True)),
        system_folders=("/usr/share/datasets/mnist",),
    ),
    Info(
        "cifar10",
        "Small colour photographs in 10 classes",
        "cifar",
        (3, 32, 32),
        CIFAR10_CLASSES,
        50_000,
        10_000,
        "none stated; its authors ask to be cited",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "light",
        url="https://www.cs.toronto.edu/~kriz/",
        files=(
            ("cifar-10-binary.tar.gz", "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        ),
    ),
    Info(
        "cifar100",
        "Small colour photographs in 100 classes",
        "cifar",
        (3, 32, 32),
        (),
        50_000,
        10_000,
        "none stated; its authors ask to be cited",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "light",
        url="https://www.cs.toronto.edu/~kriz/",
        files=(
            ("cifar-100-binary.tar.gz", "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
        ),
    ),
    Info(
        "fer2013",
        "Faces with seven emotions",
        "fer2013",
        (1, 48, 48),
        EMOTIONS,
        28_709,
        3_589,
        "that of the Kaggle challenge, for research",
        "https://www.kaggle.com/c/challenges-in-representation-learning-"
        "facial-expression-recognition-challenge",
        "light",
        manual="download it from its page by hand, which needs an account there",
        what="fer2013.csv, icml_face_data.csv or the folders train and test",
    ),
)
_BY_NAME = {entry.name: entry for entry in _ALL}


def names() -> tuple[str, ...]:
    """The names that `load` knows, the default first."""
    return tuple(_BY_NAME)


def info(name: str) -> Info:
    """What there is to know of a named data set.

    Raises
    ------
    MissingDataError
        If there is none of this name.
    """
    if name not in _BY_NAME:
        raise MissingDataError(f"{name!r} is no data set's name: they are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def cache_directory() -> Path:
    """Where downloads go: ``datasets`` in ``$FASTCNN_CACHE_DIR``, else in the user's cache directory."""
    import pooch

    root = os.environ.get("FASTCNN_CACHE_DIR") or pooch.os_cache("fastcnn")
    return Path(root) / "datasets"


def find(name: str, root: str | Path | None = None) -> Path | None:
    """Where a named data set is on this machine; None if it would have to be downloaded."""
    entry = info(name)
    if entry.kind == "embedded":
        return Path(str(importlib.resources.files("fastcnn.data") / "digits"))
    return next(
        (folder for folder in _places(entry, root) if folder.is_dir() and _holds(entry, folder)), None
    )


def locate(name: str, root: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Where a named data set is on this machine, after downloading it if need be; see `load`."""
    return find(name, root) or _download(info(name), root, progress)


def load(
    name_or_path: str | Path = "digits",
    split: str = "train",
    root: str | Path | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """A data set by its name, or from a path.

    Parameters
    ----------
    name_or_path : one of `names()`, or the path of a folder of images by class, of IDX files or CIFAR files,
        of a CIFAR archive, of an .npz or of a FER2013 .csv; "./digits" is a path where "digits" is a name
    split : "train", "test" or "all", and "validation" for those that have such a part. Data at a path that
        tell no parts apart are split 4 to 1 by a fixed seed.
    root : folder in which a named data set is looked for and to which it is downloaded, in place of the usual
        ones
    progress : called while downloading with the file's name, the bytes so far and the bytes in all

    Raises
    ------
    MissingDataError
        If there is no such data set, or it could not be downloaded.
    FormatError
        If a file is damaged.
    """
    check_split(split)
    text = os.fspath(name_or_path)
    if text not in _BY_NAME:
        if not Path(text).expanduser().exists():
            close = difflib.get_close_matches(text, _BY_NAME, 1)
            hint = f"did you mean {close[0]}?" if close else f"the names are {', '.join(_BY_NAME)}"
            raise MissingDataError(f"{text!r} is neither a data set's name nor an existing path; {hint}")
        return load_source(open_source(text), split)
    entry = _BY_NAME[text]
    if split == "validation" and entry.kind != "fer2013":
        raise MissingDataError(f"{text}: holds no validation part, only train and test")
    if split == "all" and entry.kind != "fer2013":
        return concatenate([load(text, part, root, progress) for part in ("train", "test")])
    if entry.kind == "embedded":
        with importlib.resources.as_file(
            importlib.resources.files("fastcnn.data") / "digits/digits.npz"
        ) as path:
            return read_npz(path, split, entry.name)
    folder = locate(text, root, progress)
    if entry.kind == "idx":
        return read_idx_folder(folder, split, entry.classes, entry.name)
    if entry.kind == "cifar":
        return read_cifar(folder, split, int(entry.name.removeprefix("cifar")), entry.name)
    return load_source(open_source(folder), split)


def _places(entry: Info, root: str | Path | None) -> Iterator[Path]:
    """Folders to look in, one by one: to name the last one, pooch has to be imported."""
    if root is not None:
        yield Path(root).expanduser() / entry.name
        yield Path(root).expanduser()
    else:
        yield from map(Path, entry.system_folders)
        yield cache_directory() / entry.name


def _holds(entry: Info, folder: Path) -> bool:
    """Whether the whole data set is in `folder`."""
    if entry.kind == "idx":
        return {split: sorted(pair) for split, pair in find_idx(folder).items()} == {
            split: ["images", "labels"] for split in ("train", "test")
        }
    if entry.kind == "cifar":
        return find_cifar(folder, int(entry.name.removeprefix("cifar"))) is not None
    try:
        return {"train", "test"} <= set(open_source(folder).splits)
    except MissingDataError:
        return False


class _ProgressBar:
    """What pooch wants of a progress bar, for a plain function."""

    def __init__(self, name: str, report: Progress):
        self.total = 0
        self._name, self._report, self._done = name, report, 0

    def update(self, size: int) -> None:
        self._done = min(self._done + size, self.total)
        self._report(self._name, self._done, self.total)

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        pass


def _download(entry: Info, root: str | Path | None, progress: Progress | None) -> Path:
    """Fetch the files of `entry` that are not there yet, and check what came."""
    folder = (cache_directory() if root is None else Path(root).expanduser()) / entry.name
    if not entry.files:
        raise MissingDataError(
            f"{entry.name}: is not on this machine; {entry.manual} ({entry.homepage}), "
            f"and put {entry.what} into {folder}"
        )
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    for file, sha256 in entry.files:
        downloader = pooch.HTTPDownloader(
            progressbar=_ProgressBar(file, progress) if progress else False, chunk_size=1 << 16
        )
        try:
            pooch.retrieve(entry.url + file, f"sha256:{sha256}", file, folder, downloader=downloader)
        except (OSError, ValueError) as error:
            raise MissingDataError(_advice(entry, file, folder, error)) from None
    return folder


def _advice(entry: Info, file: str, folder: Path, error: Exception) -> str:
    """One sentence: what failed, and what to do."""
    files: Sequence[str] = [name for name, _ in entry.files]
    otherwise = f"{entry.manual}; or " if entry.manual else ""
    return (
        f"{entry.name}: is not on this machine, and {entry.url}{file} could not be fetched "
        f"({_reason(error)}); try again with a connection, or {otherwise}put {', '.join(files)} into {folder}"
    )


def _reason(error: Any) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server says {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.RequestException):
        return "no connection"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "what came has another SHA-256 than it should"
