"""The tile of a matrix product: a block of threads computes rows x columns of C = A B, each thread its share.

A slice of `depth` rows of B and columns of A lies in shared memory, A's transposed, so that a thread reads
what it multiplies by vectors of four. While the block multiplies one slice, the next travels from memory to
registers, and from there to a second buffer: one barrier a slice.

What bounds it: a thread reads thread_rows + thread_columns numbers for thread_rows * thread_columns
multiply-adds, so with 8 x 8 a warp's four loads of 16 bytes (at most two cycles each, as lanes share
addresses) stand against 64 multiply-adds (16 cycles of a multiprocessor), and with 4 x 4 two loads against 4
cycles. Then the multipliers are the bound, less what else is issued: addresses and bounds of what a thread
reads of a slice. Of the compiled loops' instructions for compute capability 9.0 the multiply-adds are 76 to
81 % (128 x 128), 62 to 69 % (128 x 64) and 56 % (4 x 4 in a thread). From memory a block reads 4 (rows +
columns) bytes for rows * columns multiply-adds: 128 x 128 takes 8 bytes a cycle of each multiprocessor.

See Volkov and Demmel: Benchmarking GPUs to tune dense linear algebra, 2008, and Nath, Tomov and Dongarra: An
improved MAGMA GEMM for Fermi GPUs, 2010 (register blocking and the double buffer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from numba import cuda

from .jit import device_function
from .taps import narrow
from .vectors import ALIGNMENT, LANES, load4

# A warp's threads stand in 4 rows and 8 columns: the columns' vectors of B fill the banks once, and those of
# A are broadcast.
_WARP = 32
_WARP_COLUMNS = 8
# Sums that are written together: four rows and columns.
BLOCK = LANES * LANES


class Tile(NamedTuple):
    """Sizes of a product that one block computes."""

    rows: int
    columns: int
    depth: int  # of a slice
    thread_rows: int  # of C in one thread, in runs of four
    thread_columns: int

    @property
    def threads(self) -> int:
        return self.rows // self.thread_rows * (self.columns // self.thread_columns)

    @property
    def run(self) -> int:
        """Neighbouring numbers of A that a thread reads for a slice."""
        return self.rows * self.depth // self.threads

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor is to hold: 16 warps, which leaves each thread 128 registers.

        Where numbers are read one by one, float64 needs more, and so it is half as many.
        """
        return (512 if self.run > LANES else 256) // self.threads

    @property
    def across(self) -> int:
        """Threads that share a row."""
        return self.columns // self.thread_columns

    @property
    def down(self) -> int:
        return self.rows // self.thread_rows

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"


# In these a thread reads eight neighbouring numbers of A for a slice, by vectors. Few filters take narrow
# tiles, and few pixels the smallest.
TILES = (
    Tile(128, 128, 16, 8, 8),
    Tile(128, 64, 16, 8, 4),
    Tile(128, 32, 16, 4, 4),
    Tile(32, 32, 16, 4, 4),
)
# And in these four, one by one, where rows of memory are no whole vectors.
SCALAR_TILES = (Tile(128, 64, 8, 8, 4), Tile(32, 32, 8, 4, 4))


def place(tile: Tile) -> Callable:
    """A device function of a thread's number: the first row and the first column of its share of the tile."""
    across = tile.across // _WARP_COLUMNS
    warp_rows = _WARP // _WARP_COLUMNS

    @device_function
    def place(thread):
        warp, lane = thread // _WARP, thread % _WARP
        row = warp // across * warp_rows + lane // _WARP_COLUMNS
        column = warp % across * _WARP_COLUMNS + lane % _WARP_COLUMNS
        return row * LANES, column * LANES

    return place


def unrolled(make: Callable[[int], Callable], count: int) -> Callable:
    """A device function that calls make(0), make(1), ... one after the other.

    Loops that contain loops are not always unrolled by the compiler, and then what should be in registers,
    because each index is a constant, is not.
    """
    functions = [make(k) for k in range(count)]
    while len(functions) > 1:
        pairs = [_both(*functions[k : k + 2]) for k in range(0, len(functions) - 1, 2)]
        functions = pairs + functions[2 * len(pairs) :]
    return functions[0]


def _both(first: Callable, second: Callable) -> Callable:
    @device_function
    def both(*arguments):
        first(*arguments)
        second(*arguments)

    return both


def multiply(tile: Tile) -> Callable:
    """A device function that adds the product of one slice, from `at_a` and `at_b` on, to a thread's sums."""
    rows, columns = tile.thread_rows, tile.thread_columns
    row_runs, column_runs = rows // LANES, columns // LANES
    row_step, column_step = tile.down * LANES, tile.across * LANES
    width, pitch = tile.columns, tile.rows

    @device_function
    def multiply(a, at_a, b, at_b, left, right, sums):
        for run in range(row_runs):
            quad = load4(a, at_a + run * row_step)
            for lane in range(LANES):
                left[run * LANES + lane] = quad[lane]
        for run in range(column_runs):
            quad = load4(b, at_b + run * column_step)
            for lane in range(LANES):
                right[run * LANES + lane] = quad[lane]
        for i in range(rows):
            for j in range(columns):
                sums[i * columns + j] += left[i] * right[j]

    count = 1
    while count < tile.depth:
        multiply = _twice(multiply, count * pitch, count * width)
        count *= 2
    return multiply


def _twice(multiply: Callable, step_a: int, step_b: int) -> Callable:
    @device_function
    def twice(a, at_a, b, at_b, left, right, sums):
        multiply(a, at_a, b, at_b, left, right, sums)
        multiply(a, at_a + step_a, b, at_b + step_b, left, right, sums)

    return twice


def sum_slices(tile: Tile, fetch: Callable, put: Callable) -> Callable:
    """A device function that overwrites a thread's `sums` with its share of a product of so many slices.

    ``fetch(operands, state)`` returns what the thread reads of the next slice of A and of B, and the state
    from which it reads the slice after it. ``put(a, at_a, b, at_b, of_a, of_b)`` writes that to the buffers.
    """
    multiply_slice, place_of = multiply(tile), place(tile)
    rows, columns = tile.thread_rows, tile.thread_columns
    size_a, size_b, size_sums = tile.rows * tile.depth, tile.columns * tile.depth, rows * columns
    both_a, both_b = 2 * size_a, 2 * size_b

    @device_function
    def sum_slices(operands, state, slices, sums):
        a = cuda.shared.array(both_a, sums.dtype, ALIGNMENT)
        b = cuda.shared.array(both_b, sums.dtype, ALIGNMENT)
        left = cuda.local.array(rows, sums.dtype)
        right = cuda.local.array(columns, sums.dtype)
        down, across = place_of(cuda.threadIdx.x)
        for k in range(size_sums):
            sums[k] = 0
        for s in range(slices + 1):
            if s < slices:
                of_a, of_b, state = fetch(operands, state)
            if s > 0:
                old = narrow((s - 1) % 2)
                multiply_slice(a, old * size_a + down, b, old * size_b + across, left, right, sums)
            if s < slices:
                buffer = narrow(s % 2)
                put(a, buffer * size_a, b, buffer * size_b, of_a, of_b)
                cuda.syncthreads()

    return sum_slices


def in_blocks(tile: Tile, finish: Callable) -> Callable:
    """A device function that does `finish` for all blocks, of four rows and columns, of a thread's sums.

    It takes the sums, the first row and column of the thread, and what `finish` takes besides the block, its
    first row and column.
    """
    columns = tile.thread_columns
    across, down = columns // LANES, tile.thread_rows // LANES
    row_step, column_step = tile.down * LANES, tile.across * LANES

    def one(k: int) -> Callable:
        i, j = k // across, k % across
        first = i * LANES * columns + j * LANES

        @device_function
        def finish_block(sums, row, column, *arguments):
            block = cuda.local.array(BLOCK, sums.dtype)
            for r in range(LANES):
                for lane in range(LANES):
                    block[r * LANES + lane] = sums[first + r * columns + lane]
            finish(block, row + i * row_step, column + j * column_step, *arguments)

        return finish_block

    return unrolled(one, across * down)
