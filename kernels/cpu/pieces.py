"""How arrays are cut among threads, so that no result depends on their number."""

from __future__ import annotations

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span

# Parts are whole blocks of elements: a boundary between them never falls inside a vector, so that every
# element is computed by the same instruction however many threads there are.
BLOCK = 1024

# Sums are cut into at most this many pieces, each with its own slab; more threads than that would idle.
PIECES = 16

# Channels-last rows shorter than this are taken several at a time, so that inner loops are long.
WIDTH = 256


@kernel
def fill(row, value):
    """Overwrite a 1-D array; compiles in a tenth of the time that ``row[:] = value`` takes."""
    for k in range(row.size):
        row[k] = value


@kernel
def repeat(values, table):
    """Overwrite a 1-D table with a row of values, again and again."""
    done = min(values.size, table.size)
    for k in range(done):
        table[k] = values[k]
    # What is there is doubled: long loops, however few the values.
    while 0 < done < table.size:
        more = table[done : 2 * done]
        for k in range(more.size):
            more[k] = table[k]
        done += more.size


@kernel
def span_elements(part, parts, size):
    """First and last + 1 of the `size` elements that `part` of `parts` does, in whole blocks."""
    first, last = span(part, parts, (size + BLOCK - 1) // BLOCK)
    return first * BLOCK, min(last * BLOCK, size)


def blocks(size: int) -> int:
    """Number of tasks that `span_elements` cuts `size` elements into."""
    return -(-size // BLOCK)


def row_width(channels: int) -> int:
    """The smallest multiple of `channels` that makes a long inner loop."""
    return channels * -(-WIDTH // channels)


def piece_count(size: int) -> int:
    """Number of pieces in which `size` elements are summed: it depends on nothing else."""
    return max(1, min(PIECES, size // (16 * BLOCK)))


@kernel
def piece_bounds(piece, pieces, size, width):
    """First and last + 1 of the elements of a piece, which starts at a whole row of `width`."""
    first, last = span(piece, pieces, (size + width - 1) // width)
    return min(first * width, size), min(last * width, size)


@kernel
def fold(slabs, out, accumulate):
    """Write to ``out[c]`` (or add to it) the sum of all ``slabs[:, c::out.size]``, in a fixed order.

    The first slab is overwritten.
    """
    pieces, width = slabs.shape
    # Slab by slab: those of one channel may all fall into one set of the cache.
    sums = slabs[0]
    for piece in range(1, pieces):
        slab = slabs[piece]
        for k in range(width):
            sums[k] += slab[k]
    for c in range(out.size):
        total = 0.0
        for k in range(c, width, out.size):
            total += sums[k]
        out[c] = out[c] + total if accumulate else total


@parallel
def add_up(part, parts, slabs, out, accumulate):
    """`fold`, a job in one part."""
    fold(slabs, out, accumulate)


@parallel
def _clear(part, parts, values):
    """Overwrite a 1-D array with zeros."""
    keep_out_of_line()
    first, last = span_elements(part, parts, values.size)
    fill(values[first:last], 0)


def clear_all(array: np.ndarray) -> None:
    """Overwrite a C-contiguous array with zeros, on all threads: a large one takes as long as a kernel."""
    parts = part_count(blocks(array.size), array.nbytes)
    if parts == 1:
        # NumPy does so at once; to call a kernel takes longer.
        between_jobs(array.fill, 0)
        return
    _clear(parts, array.reshape(-1))
