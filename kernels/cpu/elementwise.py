"""Functions of one element each, over arrays of any length: long vectors, one pass over memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count
from .pieces import blocks, span_elements
from .simd import VECTOR_BITS
from .vectors import (
    LONG,
    all_long_lanes,
    fence,
    first_long_lanes,
    lanes_of,
    pointer,
    pointers,
    prefetch_long,
    store,
    store_around,
)

# So many vectors ahead are fetched where neither inputs nor output are in a cache.
_AHEAD = 4


@cache
def _last_level_bytes() -> int:
    """Size of the processor's last cache, 32 MiB where the system doesn't tell."""
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 << 20


def passes_caches(out: np.ndarray, arrays: int) -> bool:
    """Whether `out` should be written around the caches, one of so many `arrays` of its size in work.

    Where they don't fit the last cache together, a result that is read from its beginning would be gone by
    then anyway.
    """
    return arrays * out.nbytes > 3 * _last_level_bytes() // 4 and out.ctypes.data % (VECTOR_BITS // 8) == 0


class Elementwise:
    """A kernel ``y[i] = function(inputs[0][i], ..., number)``.

    `function(sources, at, mask, number)` returns a vector; `sources` are pointers to the inputs.
    """

    def __init__(self, function: Callable):
        step = kernel(function)

        def body(part, parts, y, number, around, inputs):
            keep_out_of_line()
            sources, target = pointers(inputs), pointer(y)
            width = LONG * lanes_of(target)
            lo, hi = span_elements(part, parts, y.size)
            whole = lo + (hi - lo) // width * width
            everything = all_long_lanes(target)
            if around:
                for at in range(lo, whole, width):
                    for source in sources:
                        prefetch_long(source, at + _AHEAD * width)
                    store_around(step(sources, at, everything, number), target, at)
                fence()
            else:
                for at in range(lo, whole, width):
                    store(step(sources, at, everything, number), target, at, everything)
            if whole < hi:
                some = first_long_lanes(target, hi - whole)
                store(step(sources, whole, some, number), target, whole, some)

        body.__module__, body.__qualname__ = function.__module__, f"{function.__qualname__}.body"
        self._run = parallel(body)
        self.__doc__ = function.__doc__

    def __call__(self, y: np.ndarray, number: Any, *inputs: np.ndarray) -> None:
        """Overwrite y; all arrays are C-contiguous and of one size."""
        parts = part_count(blocks(y.size), y.size)
        flat = tuple(array.reshape(-1) for array in inputs)
        self._run(parts, y.reshape(-1), number, int(passes_caches(y, 1 + len(inputs))), flat)


def elementwise(function: Callable) -> Elementwise:
    """Compile a function of elements; see `Elementwise`."""
    return Elementwise(function)
