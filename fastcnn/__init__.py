"""Convolutional networks on NumPy arrays, trained and run by kernels written in Python and compiled by Numba.

Submodules are imported when they are first used: ``import fastcnn`` alone takes milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._grad_mode import is_grad_enabled, no_grad
from ._random import default_generator, manual_seed

if TYPE_CHECKING:
    from . import data, diagnostics, kernels, models, nn, optim, train
    from .kernels.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "data",
    "default_generator",
    "diagnostics",
    "get_num_threads",
    "is_grad_enabled",
    "kernels",
    "manual_seed",
    "models",
    "nn",
    "no_grad",
    "optim",
    "set_num_threads",
    "train",
]

_SUBMODULES = frozenset({"cli", "data", "diagnostics", "kernels", "models", "nn", "optim", "train"})
_THREADS = frozenset({"get_num_threads", "set_num_threads"})


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _THREADS:
        value = getattr(importlib.import_module(".kernels.threads", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
