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
    from .kernels.cpu.winograd import get_winograd, set_winograd
    from .kernels.threads import get_num_threads, set_num_threads
    from .nn.fusion import get_fusion, set_fusion

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "data",
    "default_generator",
    "diagnostics",
    "get_fusion",
    "get_num_threads",
    "get_winograd",
    "is_grad_enabled",
    "kernels",
    "manual_seed",
    "models",
    "nn",
    "no_grad",
    "optim",
    "set_fusion",
    "set_num_threads",
    "set_winograd",
    "train",
]

_SUBMODULES = frozenset({"cli", "data", "diagnostics", "kernels", "models", "nn", "optim", "train"})
# Functions that live in submodules, and where.
_SWITCHES = {
    "get_num_threads": ".kernels.threads",
    "set_num_threads": ".kernels.threads",
    "get_fusion": ".nn.fusion",
    "set_fusion": ".nn.fusion",
    "get_winograd": ".kernels.cpu.winograd",
    "set_winograd": ".kernels.cpu.winograd",
}


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _SWITCHES:
        value = getattr(importlib.import_module(_SWITCHES[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
