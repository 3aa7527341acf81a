"""How a product is cut into blocks of threads: tiles that fill the device, or parts of the sum as well.

Parts are added up by a second kernel in the order of the parts, so that results never depend on which block
is done first.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda

from .arrays import DeviceArray, blocks, empty
from .jit import SIMULATED, THREADS, kernel
from .tile import TILES, Tile

# Slices of a part, at least: what it takes to start a block, and to write its sums for them to be added up,
# should be little beside them. The smallest tile is there for when little is to be done, and that at once.
_FEWEST_SLICES = 16
_FEWEST_OF_SMALLEST = 4
_MOST_PARTS = 64


class Grid(NamedTuple):
    """The blocks of a launch: tiles, times groups or phases, times parts of the sum, each of `span` terms."""

    tile: Tile
    tiles: int
    parts: int
    span: int


@cache
def multiprocessors() -> int:
    """Of the device."""
    return 1 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def _tiles(tile: Tile, rows: int, columns: int) -> int:
    return -(-rows // tile.rows) * -(-columns // tile.columns)


def _most_parts(tile: Tile, terms: int, is_smallest: bool) -> int:
    """Parts that the sum can be cut into."""
    slices = -(-terms // tile.depth)
    if slices < _FEWEST_SLICES:
        # Adding up takes a launch more.
        return 1
    return min(slices // (_FEWEST_OF_SMALLEST if is_smallest else _FEWEST_SLICES), _MOST_PARTS)


def grid(
    rows: int, columns: int, products: int, terms: int, tiles: tuple[Tile, ...] = TILES, splits: bool = True
) -> Grid:
    """How to compute so many products of (rows, terms) with (terms, columns).

    On the widest tile that the columns fill, to four fifths at least, and that makes a block for every
    multiprocessor, in parts of the sum if need be and `splits`; else on the last.
    """
    for tile in tiles:
        is_last = tile is tiles[-1]
        count = _tiles(tile, rows, columns)
        most = _most_parts(tile, terms, is_last) if splits else 1
        fits = tile.columns * 4 <= columns * 5 and count * products * most >= multiprocessors()
        if fits or is_last:
            break
    parts = max(1, min(tile.blocks * multiprocessors() // (count * products), most))
    span = max(1, -(-terms // (parts * tile.depth))) * tile.depth
    return Grid(tile, count, max(1, -(-terms // span)), span)


@kernel("T[::1], T[::1], T[::1], int32, int32, int32")
def _add_parts(y, parts, bias, count, biased, accumulate):
    """y (+)= bias + the sum of `count` arrays of y's size."""
    for i in range(cuda.grid(1), y.size, cuda.gridsize(1)):
        total = y[i] if accumulate else y.dtype.type(0)
        if biased:
            total += bias[i % bias.size]
        for part in range(count):
            total += parts[part * y.size + i]
        y[i] = total


def scratch(parts: int, y: DeviceArray) -> DeviceArray:
    """Memory for so many results like y."""
    return empty(parts * y.size, y.dtype)


def add_parts(y: DeviceArray, parts: DeviceArray, bias: DeviceArray | None, accumulate: bool = False) -> None:
    """Write the sum of `parts`, and of the bias if there is one, to y, or add it to y."""
    biased = bias is not None
    flat = y.ravel()
    _add_parts[blocks(y.size), THREADS](
        flat, parts, bias if biased else flat, parts.size // y.size, int(biased), int(accumulate)
    )


@cache
def nothing(dtype: np.dtype) -> DeviceArray:
    """An array for a parameter that a launch doesn't use."""
    return empty(1, dtype)
