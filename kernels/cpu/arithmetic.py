"""What networks need beside the operations of the kernels' interface, where NumPy's has one thread."""

from __future__ import annotations

import numpy as np

from .elementwise import elementwise
from .vectors import like, load, select


@elementwise
def _add(sources, at, mask, least):
    total = load(sources[0], at, mask) + load(sources[1], at, mask)
    return select(total <= like(total, least), like(total, least), total)


def add(a: np.ndarray, b: np.ndarray, out: np.ndarray, least: float = -np.inf) -> None:
    """Overwrite `out` with max(a + b, least); all are C-contiguous, and of one shape and dtype.

    NaN stays NaN.
    """
    _add(out, out.dtype.type(least), a, b)
