"""SciPy: a single image, channel and filter.

`signal.correlate2d`, `signal.correlate` and `ndimage.correlate` all run on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
from scipy import ndimage, signal

from ..inputs import Arrays
from ..shapes import Workload
from . import Side


def version() -> str:
    """SciPy's."""
    return scipy.__version__


def set_threads(threads: int) -> None:
    """SciPy's convolutions know no threads."""


def _inner(y: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The part of an output of the image's size where the whole kernel lies within the image."""
    top, left = (size // 2 for size in kernel.shape)
    return y[top : len(y) - top, left : y.shape[1] - left]


_FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "scipy correlate2d": lambda x, kernel: signal.correlate2d(x, kernel, mode="valid"),
    "scipy correlate": lambda x, kernel: signal.correlate(x, kernel, mode="valid"),
    "scipy ndimage": lambda x, kernel: _inner(ndimage.correlate(x, kernel, mode="constant"), kernel),
}


def variants(workload: Workload) -> tuple[str, ...]:
    """Three, for a plain convolution of one image and one channel with one filter."""
    if workload.op != "conv-forward":
        return ()
    s = workload.shape
    plain = s.n == s.c == s.f == s.stride == s.dilation == 1 and s.padding == 0
    return tuple(_FUNCTIONS) if plain else ()


def prepare(workload: Workload, arrays: Arrays, variant: str) -> Side:
    """See the package."""
    x, kernel = arrays["x"][0, :, :, 0], arrays["weight"][:, :, 0, 0]
    bias = arrays["bias"][0]
    function = _FUNCTIONS[variant]

    def run() -> Any:
        y = function(x, kernel)
        y += bias
        return y

    return Side(run, lambda: {"y": np.array(run())[np.newaxis, :, :, np.newaxis]})
