"""Functions of single elements, over arrays of any length: long vectors, one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count
from .pieces import BLOCK, blocks, repeat, span_elements
from .simd import VECTOR_BITS, cache_bytes, lanes
from .vectors import (
    LONG,
    all_long_lanes,
    fence,
    first_long_lanes,
    lanes_of,
    loads,
    pointer,
    pointers,
    prefetch_vector,
    store,
    store_around,
)
from .workspace import scratch

# So many vectors ahead are fetched where neither inputs nor output are in a cache.
_AHEAD = 4
# A contiguous array in one row.
flat = np.ndarray.ravel
# So many elements are done in one part.
FEW = 8 * BLOCK
# Bytes that any processor's caches hold, so that there is nothing to ask.
_FITS = 1 << 19
# The values of channels should stay in the first-level cache.
_LONGEST = 1024


def passes_caches(out: np.ndarray, arrays: int) -> bool:
    """Whether `out` should be written around the caches, one of so many `arrays` of its size in work.

    Where they don't fit the last cache together, a result that is read from its beginning would be gone by
    then anyway.
    """
    size = arrays * out.nbytes
    if size <= _FITS or size <= cache_bytes(3):
        return False
    return out.ctypes.data % (VECTOR_BITS // 8) == 0


def name_after(function: Callable, part: Callable, name: str) -> None:
    """Name a kernel for the function that it is made from, as the cache of kernels needs it."""
    part.__module__, part.__qualname__ = function.__module__, f"{function.__qualname__}.{name}"


def _parts_and_way(y: np.ndarray, arrays: int) -> tuple[int, int]:
    """In how many parts to overwrite y, and whether around the caches; see `passes_caches`."""
    # The answers for a few blocks take a third of their time to find.
    if y.size <= FEW:
        return 1, 0
    return part_count(blocks(y.size), y.size), int(passes_caches(y, arrays))


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
                        prefetch_vector(source, at + _AHEAD * width, everything)
                    store_around(step(sources, at, everything, number), target, at)
                fence()
            else:
                for at in range(lo, whole, width):
                    store(step(sources, at, everything, number), target, at, everything)
            if whole < hi:
                some = first_long_lanes(target, hi - whole)
                store(step(sources, whole, some, number), target, whole, some)

        name_after(function, body, "body")
        self._run = parallel(body)
        self.__doc__ = function.__doc__

    def __call__(self, y: np.ndarray, number: Any, *inputs: np.ndarray) -> None:
        """Overwrite y; all arrays are C-contiguous and of one size."""
        parts, around = _parts_and_way(y, 1 + len(inputs))
        self._run(parts, y.ravel(), number, around, tuple(map(flat, inputs)))


def elementwise(function: Callable) -> Elementwise:
    """Compile a function of elements; see `Elementwise`."""
    return Elementwise(function)


@lru_cache(maxsize=512)
def table_sizes(channels: int, dtype: np.dtype) -> tuple[int, int]:
    """Elements after which channels, and if that isn't too long vectors, repeat; and elements of a table."""
    many = lanes(dtype)
    common = math.lcm(channels, many)
    period = common if common <= _LONGEST else channels
    # A long vector may begin anywhere in a period and then reach beyond its end.
    width = LONG * many
    return period, period if period % width == 0 else -(-(period + width) // period) * period


class Channelwise:
    """A kernel ``y[..., c] = function(inputs[0][..., c], ..., values[0][c], ...)`` over channels-last arrays.

    `function(sources, at, mask, values)` returns a vector; `values` are vectors. Memory is gone through from
    one end to the other, whatever the number of channels: each part repeats the values in tables of its own,
    from which a vector is loaded at any channel.
    """

    def __init__(self, function: Callable, many: int):
        step = kernel(function)

        def body(part, parts, y, values, tables, period, around, inputs):
            keep_out_of_line()
            table = tables[part]
            length = table.size // many
            for i in range(many):
                repeat(values[i], table[i * length : (i + 1) * length])
            sources, rows, target = pointers(inputs), pointer(table), pointer(y)
            width, everything = LONG * lanes_of(target), all_long_lanes(target)
            lo, hi = span_elements(part, parts, y.size)
            whole = lo + (hi - lo) // width * width
            k, stride = lo % period, width % period
            for at in range(lo, whole, width):
                now = loads(many, rows, k, length, everything)
                if around:
                    for source in sources:
                        prefetch_vector(source, at + _AHEAD * width, everything)
                    store_around(step(sources, at, everything, now), target, at)
                else:
                    store(step(sources, at, everything, now), target, at, everything)
                k += stride
                if k >= period:
                    k -= period
            if whole < hi:
                some = first_long_lanes(target, hi - whole)
                now = loads(many, rows, k, length, some)
                store(step(sources, whole, some, now), target, whole, some)
            fence()

        name_after(function, body, "body")
        self._run = parallel(body)
        self.body = self._run.body
        self.__doc__ = function.__doc__

    def __call__(self, y: np.ndarray, values: np.ndarray, *inputs: np.ndarray) -> None:
        """Overwrite y, which is not empty; all arrays are C-contiguous, `inputs` of the size of y.

        A row of `values` has one for each channel, or one for all.
        """
        dtype = y.dtype
        period, length = table_sizes(values.shape[1], dtype)
        parts, around = _parts_and_way(y, 1 + len(inputs))
        tables = scratch("channels", (parts, len(values) * length), dtype)
        self._run(parts, y.ravel(), values, tables, period, around, tuple(map(flat, inputs)))


def channelwise(many: int) -> Callable[[Callable], Channelwise]:
    """Compile a function of elements and of so `many` values of their channels; see `Channelwise`."""
    return lambda function: Channelwise(function, many)
