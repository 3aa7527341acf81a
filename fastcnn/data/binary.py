"""Reading binary files that may be compressed, truncated or hostile."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from .errors import FormatError, MissingDataError

# What one file may unfold to; the largest set that fastcnn names needs 0.2 GB.
LIMIT_BYTES = 1 << 32
_PIECE = 1 << 20


def is_gzip(path: Path) -> bool:
    """Whether the file begins as gzip does, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """The content of a file, unzipped if it is gzip.

    Raises
    ------
    MissingDataError
        If there is no such file.
    FormatError
        If it can't be opened, or, then or while it is read, turns out damaged or cut off.
    """
    try:
        opener: Any = gzip.open if is_gzip(path) else open
        with opener(path, "rb") as stream:
            yield stream
    except FileNotFoundError:
        raise MissingDataError(f"{path}: does not exist") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FormatError(f"{path}: is damaged or cut off ({error})") from None
    except OSError as error:
        raise FormatError(f"{path}: can't be read ({error.strerror or error})") from None


def read_exactly(path: Path, stream: IO[bytes], size: int, what: str) -> np.ndarray:
    """The next `size` bytes as a uint8 array. No memory is touched for bytes that are not there.

    Raises
    ------
    FormatError
        If there are fewer, or if `size` is above `LIMIT_BYTES`.
    """
    check_size(path, size, what)
    content = np.empty(size, np.uint8)
    view = content.data
    done = 0
    while done < size:
        got = stream.readinto(view[done : done + _PIECE])  # type: ignore[attr-defined]
        if not got:
            raise FormatError(f"{path}: {what} needs {size} bytes, the file ends after {done} of them")
        done += got
    return content


def check_size(path: Path, size: int, what: str) -> None:
    """Refuse what would not fit."""
    if size > LIMIT_BYTES:
        raise FormatError(f"{path}: {what} needs {size} bytes, more than the limit of {LIMIT_BYTES}")


class Limited(io.RawIOBase):
    """A stream that refuses to give more than `limit` bytes, so that a bomb can't fill the memory."""

    def __init__(self, path: Path, stream: IO[bytes], limit: int):
        self._path, self._stream, self._left, self._limit = path, stream, limit, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        got = self._stream.readinto(buffer)  # type: ignore[attr-defined]
        self._left -= got
        if self._left < 0:
            raise FormatError(f"{self._path}: unfolds to more than the limit of {self._limit} bytes")
        return got
