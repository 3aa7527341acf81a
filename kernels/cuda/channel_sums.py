"""Sums over the rows of (rows, channels) arrays: how a grid stands on them, how its threads' results meet.

A block's threads stand in `lanes` rows of `columns` channels, so that neighbours read neighbouring addresses
and each thread has one channel. Everything depends on the shape only, and results meet in a fixed order: the
same input gives the same bits on every device.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numba import cuda

from .arrays import THREADS, DeviceArray, zeros
from .jit import device_function

# Rows that a thread should find worth its while, and blocks that fill a large device.
_ROWS_OF_A_THREAD = 8
_MOST_BLOCKS = 512


class Layout(NamedTuple):
    """A grid on the rows of a (rows, channels) array: `blocks` along the rows, `tiles` along the channels."""

    blocks: int
    tiles: int
    columns: int
    lanes: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.blocks, self.tiles

    @property
    def threads(self) -> int:
        return self.columns * self.lanes


def layout(rows: int, channels: int, each: int | None = None) -> Layout:
    """The grid for an array that has rows and channels.

    Without `each` there are as many blocks as are worth it, and threads step through the rows; with it,
    enough for threads that take `each` rows.
    """
    tiles = -(-channels // THREADS)
    columns = -(-channels // tiles)
    lanes = max(1, min(THREADS // columns, rows))
    if each is not None:
        return Layout(-(-rows // (lanes * each)), tiles, columns, lanes)
    blocks = -(-rows // (lanes * _ROWS_OF_A_THREAD))
    return Layout(min(blocks, max(1, _MOST_BLOCKS // tiles)), tiles, columns, lanes)


@cache
def counters(tiles: int) -> DeviceArray:
    """How many blocks of each tile have come to `is_last`: zeros before and after each launch."""
    return zeros(tiles, np.uint32)


@device_function
def place(columns):
    """A thread's lane and channel."""
    lane = cuda.threadIdx.x // columns
    return lane, cuda.blockIdx.y * columns + cuda.threadIdx.x - lane * columns


@device_function
def fold(sums, columns, lanes):
    """Add to each column of the lane 0 those of the other lanes; all of a block's threads must call it."""
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    while lanes > 1:
        half = (lanes + 1) // 2
        if thread < (lanes - half) * columns:
            sums[thread] += sums[thread + half * columns]
        lanes = half
        cuda.syncthreads()


@device_function
def is_last(counters, shared):
    """Whether this is the last block of its tile to come here; it sees all that the others wrote before.

    All threads must call it, with one shared uint32. Counters go back to zero by themselves.
    """
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        shared[0] = cuda.atomic.inc(counters, cuda.blockIdx.y, cuda.gridDim.x - 1)
    cuda.syncthreads()
    # Later reads must not be met by what the first-level cache held before.
    cuda.threadfence()
    return shared[0] == cuda.gridDim.x - 1


@device_function
def add_up(two, partial, arrived, sums, columns, lanes):
    """Overwrite `sums`, (2, channels) float64, with those of all threads' `two` numbers in each channel.

    All threads must call it. `partial` is scratch, (blocks, 2, channels) float64; `arrived` are `counters`.
    """
    firsts = cuda.shared.array(THREADS, np.float64)
    seconds = cuda.shared.array(THREADS, np.float64)
    ticket = cuda.shared.array(1, np.uint32)
    thread, channels = cuda.threadIdx.x, sums.shape[1]
    lane, channel = place(columns)
    firsts[thread], seconds[thread] = two
    fold(firsts, columns, lanes)
    fold(seconds, columns, lanes)
    if lane == 0 and channel < channels:
        partial[cuda.blockIdx.x, 0, channel], partial[cuda.blockIdx.x, 1, channel] = (
            firsts[thread],
            seconds[thread],
        )
    if not is_last(arrived, ticket):
        return
    first, second = 0.0, 0.0
    if channel < channels:
        for block in range(lane, cuda.gridDim.x, lanes):
            first += partial[block, 0, channel]
            second += partial[block, 1, channel]
    firsts[thread], seconds[thread] = first, second
    fold(firsts, columns, lanes)
    fold(seconds, columns, lanes)
    if lane == 0 and channel < channels:
        sums[0, channel], sums[1, channel] = firsts[thread], seconds[thread]
