"""What a CUDA kernel shares with its CPU twin besides the name: the signature and the words about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)

_ARRAY = re.compile(r"\b(?<!device )array\b")


def twin_of(function: Callable) -> Callable[[F], F]:
    """Document a function with the docstring of its CPU twin, whose arrays are the device's here.

    The decorated function's own docstring, if any, follows it and says where the two differ.
    """

    def document(ours: F) -> F:
        assert ours.__name__ == function.__name__
        words = _ARRAY.sub("device array", function.__doc__ or "")
        ours.__doc__ = words if ours.__doc__ is None else f"{words}\n    {ours.__doc__}\n    "
        return ours

    return document
