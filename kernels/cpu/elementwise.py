"""Functions of single elements, over arrays of any length: long vectors, one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from .pieces import blocks, span_elements
from .simd import VECTOR_BITS, lanes
from .vectors import (
    LONG,
    all_long_lanes,
    fence,
    first_long_lanes,
    keep_in_line,
    lanes_of,
    loads,
    pointer,
    pointers,
    prefetch_long,
    store,
    store_around,
)
from .workspace import scratch

# So many vectors ahead are fetched where neither inputs nor output are in a cache.
_AHEAD = 4
# Elements that channels are gone through one after the other should stay in the first-level cache, as should
# the channels' values.
_BLOCK = 2048
_LONGEST = 1024


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


def _name_after(function: Callable, part: Callable, name: str) -> None:
    """Name a kernel for the function that it is made from, as the cache of kernels needs it."""
    part.__module__, part.__qualname__ = function.__module__, f"{function.__qualname__}.{name}"


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

        _name_after(function, body, "body")
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


def row_length(channels: int, lanes: int) -> int:
    """Elements of a row that holds each channel equally often, in whole vectors if that isn't too long."""
    for many in (LONG * lanes, lanes):
        if math.lcm(channels, many) <= _LONGEST:
            return math.lcm(channels, many)
    return channels


class Channelwise:
    """A kernel ``y[..., c] = function(inputs[0][..., c], ..., values[0][c], ...)`` over channels-last arrays.

    `function(sources, at, mask, values)` returns a vector; `values` are vectors.
    """

    def __init__(self, function: Callable):
        step = kernel(function)

        def column(sources, target, tables, start, rows, width, k, mask, around):
            keep_in_line()
            values = loads(tables, k, mask)
            for row in range(rows):
                at = start + row * width + k
                if around:
                    for source in sources:
                        prefetch_long(source, at + _BLOCK)
                    store_around(step(sources, at, mask, values), target, at)
                else:
                    store(step(sources, at, mask, values), target, at, mask)

        _name_after(function, column, "column")
        column = kernel(column)

        def body(part, parts, y, tables, around, inputs):
            keep_out_of_line()
            sources, rows, target, length = pointers(inputs), pointers(tables), pointer(y), tables[0].size
            everything, width = all_long_lanes(target), LONG * lanes_of(target)
            block = max(1, _BLOCK // length) * length
            lo, hi = span(part, parts, (y.size + block - 1) // block)
            for start in range(lo * block, hi * block, block):
                size = min(block, y.size - start)
                count, rest = size // length, size % length
                whole = length // width * width
                for k in range(0, whole, width):
                    if around:
                        column(sources, target, rows, start, count, length, k, everything, True)
                    else:
                        column(sources, target, rows, start, count, length, k, everything, False)
                if whole < length:
                    some = first_long_lanes(target, length - whole)
                    column(sources, target, rows, start, count, length, whole, some, False)
                for k in range(0, rest, width):
                    some = first_long_lanes(target, rest - k)
                    column(sources, target, rows, start + count * length, 1, length, k, some, False)
            fence()

        _name_after(function, body, "body")
        self._run = parallel(body)
        self.__doc__ = function.__doc__

    def __call__(self, y: np.ndarray, values: Sequence[np.ndarray | float], *inputs: np.ndarray) -> None:
        """Overwrite y, which is not empty; all arrays are C-contiguous, and `inputs` of the shape of y."""
        channels, many = y.shape[-1], lanes(y.dtype)
        length = row_length(channels, many)
        tables = scratch("channels", len(values) * length, y.dtype).reshape(len(values), length)
        between_jobs(set_rows, tables.reshape(len(values), -1, channels), *values)
        around = length % many == 0 and passes_caches(y, 1 + len(inputs))
        parts = part_count(-(-y.size // max(_BLOCK, length)), y.size)
        flat = tuple(array.reshape(-1) for array in inputs)
        self._run(parts, y.reshape(-1), tuple(tables), int(around), flat)


def set_rows(tables: np.ndarray, *values: np.ndarray | float) -> None:
    """Repeat each value, or each row of values, throughout the table of its number."""
    for table, value in zip(tables, values, strict=True):
        table[...] = value


def channelwise(function: Callable) -> Channelwise:
    """Compile a function of elements and of values of their channels; see `Channelwise`."""
    return Channelwise(function)
