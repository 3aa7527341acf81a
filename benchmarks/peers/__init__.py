"""The sides of a comparison: fastcnn itself, its reference, and other libraries where they are installed.

Each library is one module of this package with

- ``version()``, a string;
- ``set_threads(threads)``;
- ``variants(workload)``, the names of its ways to compute a workload, none if it can't;
- ``prepare(workload, arrays, variant)``, a `Side`.

Everything that a user would do once is done by `prepare`, outside of all timing: arrays are converted to the
layout that the library likes best, models built, functions compiled, buffers made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

OURS = "fastcnn"

_MODULES = {
    OURS: "ours",
    "torch": "pytorch",
    "torch-compile": "torch_compile",
    "jax": "xla",
    "onnxruntime": "onnx_runtime",
    "scipy": "scipy_signal",
}

NAMES = tuple(name for name in _MODULES if name != OURS)
# Compiling with torch.compile takes minutes.
DEFAULT = tuple(name for name in NAMES if name != "torch-compile")


class Side(NamedTuple):
    """One way to compute a workload.

    `run` is what is timed. `result` computes what is compared with the other sides, in fastcnn's layouts; it
    is called before `run`, and leaves no trace in it.
    """

    run: Callable[[], Any]
    result: Callable[[], dict[str, np.ndarray]]


def load(name: str) -> ModuleType | None:
    """The module of a library, or None if the library is not installed."""
    try:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] in ("benchmarks", "fastcnn"):
            raise
        return None
