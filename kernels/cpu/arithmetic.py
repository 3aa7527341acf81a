"""What networks need beside the operations of the kernels' interface, where NumPy's has one thread."""

from __future__ import annotations

import numpy as np

from .elementwise import elementwise
from .vectors import load


@elementwise
def _add(sources, at, mask, zero):
    return load(sources[0], at, mask) + load(sources[1], at, mask)


def add(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """Overwrite `out` with a + b; all are C-contiguous, and of one shape and dtype."""
    _add(out, out.dtype.type(0), a, b)
