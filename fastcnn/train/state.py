"""Nested state (dicts, lists, numbers, arrays) as a JSON value plus a table of named arrays, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A dict with one of these keys alone stands for what JSON can't say.
_TENSOR, _TUPLE, _ITEMS, _FLOAT = "$tensor", "$tuple", "$items", "$float"
_STORED_KINDS = "biuf"


def pack(value: Any, name: str, arrays: dict[str, NDArray]) -> Any:
    """Turn `value` into something JSON can hold, moving its arrays into `arrays`.

    Parameters
    ----------
    value : nested dict, list, tuple, array, number, str or None
        Dict keys may be anything that `pack` takes, such as a parameter's number.
    name : str
        Name of `value`; arrays inside it get ``name.key.index`` as theirs.
    arrays : dict
        Gets a C-contiguous, little-endian copy or view of each array.

    Raises
    ------
    TypeError
        If `value` holds anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, np.ndarray):
        return {_TENSOR: _store(value, name, arrays)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: pack(item, f"{name}.{key}", arrays) for key, item in value.items()}
        items = [
            [pack(key, name, arrays), pack(item, f"{name}.{key}", arrays)] for key, item in value.items()
        ]
        return {_ITEMS: items}
    if isinstance(value, (list, tuple)):
        items = [pack(item, f"{name}.{index}", arrays) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    raise TypeError(f"{name}: a checkpoint can't hold a {type(value).__name__}")


def _store(array: NDArray, name: str, arrays: dict[str, NDArray]) -> str:
    if array.dtype.kind not in _STORED_KINDS:
        raise TypeError(f"{name}: a checkpoint can't hold an array of dtype {array.dtype}")
    while name in arrays:
        name += "_"
    # safetensors writes the memory as it lies, whatever the strides and the byte order say.
    arrays[name] = np.array(array, dtype=array.dtype.newbyteorder("<"), order="C", copy=None)
    return name


def unpack(value: Any, arrays: Mapping[str, NDArray]) -> Any:
    """The inverse of `pack`.

    Raises
    ------
    ValueError
        If `value` names an array that `arrays` lacks, or is not what `pack` gives.
    """
    if isinstance(value, list):
        return [unpack(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    marks = [key for key in value if key.startswith("$")]
    if not marks:
        return {key: unpack(item, arrays) for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"state: {marks[0]!r} stands beside other keys")
    return _unmark(marks[0], value[marks[0]], arrays)


def _unmark(mark: str, content: Any, arrays: Mapping[str, NDArray]) -> Any:
    if mark == _TENSOR:
        if not isinstance(content, str) or content not in arrays:
            raise ValueError(f"state: there is no tensor {content!r}")
        return arrays[content]
    if mark == _FLOAT:
        if content not in ("inf", "-inf", "nan"):
            raise ValueError(f"state: {content!r} is no float")
        return float(content)
    if not isinstance(content, list):
        raise ValueError(f"state: {mark!r} must hold a list, got {content!r}")
    if mark == _TUPLE:
        return tuple(unpack(item, arrays) for item in content)
    if mark == _ITEMS:
        if not all(isinstance(item, list) and len(item) == 2 for item in content):
            raise ValueError(f"state: {mark!r} must hold pairs of a key and a value")
        pairs = [(unpack(key, arrays), unpack(item, arrays)) for key, item in content]
        if not all(isinstance(key, (str, int, float, tuple, type(None))) for key, _ in pairs):
            raise ValueError(f"state: a key in {mark!r} is neither a number nor a string")
        return dict(pairs)
    raise ValueError(f"state: {mark!r} is unknown")


def same(first: Any, second: Any) -> bool:
    """Whether two states are equal, bit for bit in their arrays."""
    ones: dict[str, NDArray] = {}
    others: dict[str, NDArray] = {}
    if pack(first, "state", ones) != pack(second, "state", others):
        return False
    pairs = ((one, others[name]) for name, one in ones.items())
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)
