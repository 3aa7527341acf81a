"""How layers' settings are checked: functions of a setting's name and a value that return what is stored.

What is stored never changes by itself: numbers and lists that a caller could change in place are copied.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import checks

_LEAST = int(np.iinfo(np.int64).min)


def flag(name: str, value: Any) -> bool:
    """Whether `value` is true."""
    return bool(value)


def whole(name: str, value: Any) -> int:
    """An int of either sign."""
    return checks.integer(name, value, _LEAST)


def count(name: str, value: Any) -> int:
    """An int of 1 or more."""
    return checks.integer(name, value, 1)


def size(name: str, value: Any) -> tuple[int, int]:
    """An int of 1 or more, or two, as (height, width)."""
    return checks.pair(name, value, 1)


def number(name: str, value: Any) -> float:
    """A real number; Python's ints stay what they are."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return value if type(value) is int else float(value)


def share(name: str, value: Any) -> float:
    """A number between 0 and 1."""
    result = float(number(name, value))
    if not 0 <= result <= 1:
        raise ValueError(f"{name}: {value} is not between 0 and 1")
    return result


def choice(*choices: str) -> Callable[[str, Any], str]:
    """One of some strings."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(map(repr, choices))}")
        return value

    return check


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """None, or what `check` makes of a value."""
    return lambda name, value: None if value is None else check(name, value)
