"""A checkpoint's two files, ``NAME.safetensors`` and ``NAME.json``, of which a whole pair always exists.

The JSON file carries the SHA-256 of its tensors file, and is renamed into place last. Between the two renames
the old tensors are kept as ``NAME.previous.safetensors``: whichever file has the digest that the JSON file
asks for is the right one, so a crash at any point leaves either the old pair or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy
from numpy.typing import NDArray

_MOST_JSON_BYTES = 256 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that can't be read, or that belongs to something else."""


def base_path(path: str | os.PathLike[str]) -> Path:
    """`path` without the ending of either file, which may be given or left out."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path


def pair(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The tensors file and the JSON file of a checkpoint."""
    base = base_path(path)
    return base.with_name(base.name + ".safetensors"), base.with_name(base.name + ".json")


def _previous(path: str | os.PathLike[str]) -> Path:
    base = base_path(path)
    return base.with_name(base.name + ".previous.safetensors")


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether either file of the checkpoint is there."""
    return any(file.exists() for file in pair(path))


def remove(path: str | os.PathLike[str]) -> None:
    """Delete the files of a checkpoint, where there are any."""
    for file in (*reversed(pair(path)), _previous(path)):
        file.unlink(missing_ok=True)


def _stage(content: bytes, folder: Path) -> Path:
    """Write a temporary file that has reached the disk."""
    # Unlike tempfile's, such a file has the permissions that any new file of this user has.
    staged = folder / f".checkpoint-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        with open(staged, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return staged


def _sync_folder(folder: Path) -> None:
    """Make renames last. Where a folder can't be opened, this only costs the guarantee after a power cut."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write(path: str | os.PathLike[str], header: dict[str, Any], arrays: dict[str, NDArray]) -> None:
    """Write a checkpoint's pair of files in place of an older one.

    Parameters
    ----------
    path : path
        ``NAME``, with or without an ending. Its folder is made if need be.
    header : dict
        JSON values; the entry "tensors" (size and digest of the tensors file) is added.
    arrays : dict of C-contiguous arrays

    Raises
    ------
    OSError
        If the files can't be written, as on a full disk. The older checkpoint is whole.
    """
    json_file = pair(path)[1]
    try:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        tensors = safetensors.numpy.save(arrays)
        header = {**header, "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}}
        text = json.dumps(header, allow_nan=False, indent=1)
        _replace_pair(path, tensors, text.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"can't save a checkpoint: {reason}; an older one of this name is whole",
            str(json_file),
        ) from error


def _replace_pair(path: str | os.PathLike[str], tensors: bytes, text: bytes) -> None:
    tensors_file, json_file = pair(path)
    previous = _previous(path)
    if previous.exists():
        _finish_crashed_write(path)
    staged: list[Path] = []
    try:
        staged += [_stage(tensors, json_file.parent)]
        staged += [_stage(text, json_file.parent)]
        if tensors_file.exists():
            os.replace(tensors_file, previous)
        os.replace(staged[0], tensors_file)
        os.replace(staged[1], json_file)
    except BaseException:
        for file in staged:
            file.unlink(missing_ok=True)
        raise
    _sync_folder(json_file.parent)
    with contextlib.suppress(OSError):
        previous.unlink(missing_ok=True)


def _finish_crashed_write(path: str | os.PathLike[str]) -> None:
    """Put the tensors that the JSON file asks for in their place, before a new pair needs the spare name."""
    tensors_file, json_file = pair(path)
    previous = _previous(path)
    with contextlib.suppress(CheckpointError):
        if _matching(path, _read_header(json_file))[0] == previous:
            os.replace(previous, tensors_file)


def _read_header(json_file: Path) -> dict[str, Any]:
    try:
        with open(json_file, "rb") as file:
            text = file.read(_MOST_JSON_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{json_file}: there is no such checkpoint file") from None
    except OSError as error:
        raise CheckpointError(f"{json_file}: can't be read ({error.strerror})") from error
    if len(text) > _MOST_JSON_BYTES:
        raise CheckpointError(f"{json_file}: is larger than any checkpoint's JSON ({_MOST_JSON_BYTES} bytes)")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{json_file}: is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{json_file}: is not a checkpoint (expected a JSON object)")
    return header


def _matching(path: str | os.PathLike[str], header: dict[str, Any]) -> tuple[Path, bytes]:
    """The tensors file that a header belongs to, with its content."""
    tensors_file, json_file = pair(path)
    expected = header.get("tensors")
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= set(expected):
        raise CheckpointError(f"{json_file}: is not a checkpoint (it names no tensors)")
    found = []
    for file in (tensors_file, _previous(path)):
        try:
            size = file.stat().st_size
            content = file.read_bytes() if size == expected["bytes"] else b""
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{file}: can't be read ({error.strerror})") from error
        if size == expected["bytes"] and hashlib.sha256(content).hexdigest() == expected["sha256"]:
            return file, content
        found.append(f"{file.name} has {size} bytes")
    if not found:
        raise CheckpointError(f"{tensors_file}: there is no such file, though {json_file.name} is there")
    raise CheckpointError(
        f"{tensors_file}: is damaged or of another checkpoint ({'; '.join(found)}; {json_file.name} asks for "
        f"{expected['bytes']} bytes of digest {str(expected['sha256'])[:12]})"
    )


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Read a checkpoint's header and arrays.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, damaged or not of a checkpoint.
    """
    header = _read_header(pair(path)[1])
    file, content = _matching(path, header)
    try:
        return header, safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: is not a safetensors file that NumPy can hold ({error})") from error
