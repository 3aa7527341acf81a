"""Sums in a fixed order: the same bits in every run, without atomics.

A block sums in shared memory. A sum of many rows is cut into pieces, whose number depends on the shape only;
each piece leaves its sums in a slab of float64, and `fold` adds the slabs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import cuda, float64

from .arrays import DeviceArray, empty
from .jit import device_function, kernel

# Threads that share a row, and rows of a block; of a block that folds slabs.
LANES, ROWS = 32, 4
_FOLD_ROWS = 8

# Blocks that fill a large GPU a few times over.
_BLOCKS = 1024
# Rows that a thread should sum before it is worth another slab.
_LEAST_ROWS = 8


@device_function
def row_sum(partial, value):
    """The sum over a row's lanes of `value`, in every lane; `partial` is ROWS x LANES shared numbers.

    All threads of the block must call it together. Every lane adds all lanes' values itself: two barriers,
    where a tree takes six.
    """
    row, lane = cuda.threadIdx.y, cuda.threadIdx.x
    partial[row, lane] = value
    cuda.syncthreads()
    total = partial[row, 0]
    for k in range(1, LANES):
        total += partial[row, k]
    cuda.syncthreads()
    return total


@device_function
def row_max(partial, value):
    """The largest `value` of a row's lanes, in every lane, like `row_sum`; where one is NaN, any of them."""
    row, lane = cuda.threadIdx.y, cuda.threadIdx.x
    partial[row, lane] = value
    cuda.syncthreads()
    largest = partial[row, 0]
    for k in range(1, LANES):
        if partial[row, k] > largest:
            largest = partial[row, k]
    cuda.syncthreads()
    return largest


class Slabs(NamedTuple):
    """How a channels-last array is summed to its channels.

    The array is taken as rows of `width` elements, a multiple of the channels, and the last row may be
    shorter. Column k belongs to channel k modulo the channels. Block (x, y) of `grid` sums columns x * LANES
    to x * LANES + LANES - 1 of piece y: rows y, y + pieces, and so on.
    """

    width: int
    pieces: int
    sums: DeviceArray  # (pieces, width) float64

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.width // LANES), self.pieces


def slabs(size: int, channels: int) -> Slabs:
    """The slabs for the sums of `size` elements to `channels`; both are positive."""
    width = channels * max(1, LANES // channels)
    rows = -(-size // width)
    columns = -(-width // LANES)
    pieces = max(1, min(-(-rows // _LEAST_ROWS), _BLOCKS // columns))
    return Slabs(width, pieces, empty((pieces, width), np.float64))


@kernel("float64[:, ::1], T[::1], int64")
def _fold(sums, out, accumulate):
    """out[c] (+)= sum over the pieces and the columns of channel c; a block for LANES columns."""
    partial = cuda.shared.array((_FOLD_ROWS, LANES), float64)
    lane, row = cuda.threadIdx.x, cuda.threadIdx.y
    column = cuda.blockIdx.x * LANES + lane
    total = 0.0
    if column < sums.shape[1]:
        for piece in range(row, sums.shape[0], _FOLD_ROWS):
            total += sums[piece, column]
    partial[row, lane] = total
    cuda.syncthreads()
    if row == 0 and column < out.size:
        total = 0.0
        # More than one column of a channel are all in the only block.
        for k in range(lane, sums.shape[1] if sums.shape[1] > out.size else lane + 1, out.size):
            for other in range(_FOLD_ROWS):
                total += partial[other, k]
        out[column] = out[column] + total if accumulate else total


def fold(plan: Slabs, out: DeviceArray, accumulate: bool) -> None:
    """Overwrite `out`, one number a channel, with the sums of the slabs, or add them to it."""
    _fold.launch(plan.grid[0], (LANES, _FOLD_ROWS), plan.sums, out, accumulate)
