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

# A part has so many slices at least: what it takes to start and to write a block should be little beside
# them.
_FEWEST_SLICES = 4
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


def _tile(tiles: tuple[Tile, ...], rows: int, columns: int, products: int) -> Tile:
    """The widest tile that the columns fill, if it makes enough blocks; else the last."""
    for tile in tiles[:-1]:
        # At most a fifth of the columns may be beside the result.
        if tile.columns * 4 <= columns * 5 and _tiles(tile, rows, columns) * products >= multiprocessors():
            return tile
    return tiles[-1]


def grid(
    rows: int, columns: int, products: int, terms: int, tiles: tuple[Tile, ...] = TILES, splits: bool = True
) -> Grid:
    """How to compute so many products of (rows, terms) with (terms, columns)."""
    tile = _tile(tiles, rows, columns, products)
    count = _tiles(tile, rows, columns)
    slices = -(-terms // tile.depth)
    wanted = tile.blocks * multiprocessors()
    parts = min(wanted // (count * products), slices // _FEWEST_SLICES, _MOST_PARTS) if splits else 1
    span = -(-slices // max(parts, 1)) * tile.depth
    return Grid(tile, count, max(-(-terms // max(span, 1)), 1), max(span, 1))


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
