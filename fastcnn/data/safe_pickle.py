"""Reading the pickles of CIFAR's Python version without trusting them.

A pickle is a program. This reader admits the opcodes that arrays, bytes, strings, lists, dicts, tuples and
ints need, and the few names that NumPy writes to rebuild an array. Each name stands for a function of this
file, never for the real one, so that nothing a pickle says is called. Arrays are made from checked bytes.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import FormatError

_OPCODES = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
        *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
        *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("SHORT_BINUNICODE", "BINUNICODE", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
        *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    }
)
# CIFAR's files need about 20. A tuple of a million tuples would overflow the C stack where it is hashed.
_MAX_TUPLES = 1000
_NUMBERS = frozenset({"b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4", "f8"})


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, spec: Any, align: Any = False, copy: Any = False):
        spec = spec.decode("latin1") if isinstance(spec, bytes) else spec
        if not isinstance(spec, str) or spec not in _NUMBERS:
            raise FormatError(f"an array of dtype {str(spec)[:20]!r}, numbers are expected")
        self._spec = spec
        self._order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("|", "<", ">", "="):
            raise FormatError(f"a byte order of {str(order)[:20]!r}")
        self._order = order

    def dtype(self) -> np.dtype:
        return np.dtype(self._order + self._spec)


class _Array:
    """Stands for an array that numpy's _reconstruct begins and its state completes."""

    def __init__(self, subtype: Any, shape: Any, code: Any):
        if subtype is not _NDARRAY:
            raise FormatError("an array of a class of its own")
        self.value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise FormatError("an array without a proper state")
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise FormatError("an array that is not made of numbers")
        if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
            raise FormatError(f"an array of shape {str(shape)[:60]}")
        kind = dtype.dtype()
        if math.prod(shape) * kind.itemsize != len(content):
            raise FormatError(f"an array of shape {str(shape)[:60]} and dtype {kind} in {len(content)} bytes")
        flat = np.frombuffer(content, kind)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _encode(text: Any, encoding: Any) -> bytes:
    """Stands for _codecs.encode, which Python 3 writes for bytes in old protocols."""
    if not isinstance(text, str) or encoding != "latin1":
        raise FormatError("bytes that are not in latin1")
    return text.encode("latin1")


class _Name:
    """What a name in a pickle stands for: it can be called, and nothing about it can be changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise FormatError("a change to a name")


def _ndarray(*args: Any) -> None:
    raise FormatError("an array that NumPy would not have written like this")


_NDARRAY = _Name(_ndarray)
_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Name(_Dtype),
    ("_codecs", "encode"): _Name(_encode),
    ("numpy.core.multiarray", "_reconstruct"): _Name(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Name(_Array),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise FormatError(f"the name {module}.{name}, which is refused") from None


def _check_opcodes(content: bytes) -> None:
    tuples = 0
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in _OPCODES:
            raise FormatError(f"the instruction {opcode.name}, which is refused")
        tuples += opcode.name.startswith("TUPLE")
        if tuples > _MAX_TUPLES:
            raise FormatError(f"more than {_MAX_TUPLES} tuples")
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(content):
            raise FormatError(f"a memo of {argument} places")


def read_pickle(path: str | Path, content: bytes) -> dict[str, Any]:
    """The dict in a pickle of CIFAR, its keys as strings and its arrays as arrays.

    Only the dict's own keys and values are looked at: bytes keys become str, arrays become arrays, and lists
    are passed on as they are.

    Raises
    ------
    FormatError
        If the pickle holds anything but arrays of numbers, bytes, strings, ints, lists, tuples and dicts, or
        is damaged. Nothing that it names has been called then.
    """
    try:
        _check_opcodes(content)
        loaded = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except FormatError as error:
        raise FormatError(f"{path}: the pickle holds {error}") from None
    # A damaged pickle raises almost any error, by design of the format.
    except Exception as error:
        raise FormatError(
            f"{path}: is no readable pickle ({type(error).__name__}: {str(error)[:200]})"
        ) from None
    if not isinstance(loaded, dict):
        raise FormatError(f"{path}: the pickle holds a {type(loaded).__name__} instead of a dict")
    return {
        _text(path, key): value.value if isinstance(value, _Array) else value for key, value in loaded.items()
    }


def _text(path: str | Path, key: Any) -> str:
    if isinstance(key, bytes):
        return key.decode("latin1")
    if isinstance(key, str):
        return key
    raise FormatError(f"{path}: the pickle's dict has a key of type {type(key).__name__}")
