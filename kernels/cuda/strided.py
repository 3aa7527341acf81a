"""Copies between arrays of any strides: in tiles where a matrix is transposed, else element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import cuda

from .jit import THREADS, kernel

if TYPE_CHECKING:
    from .arrays import DeviceArray

# Axes that arrays may have, after neighbours that lie in one line are joined.
_MAX_AXES = 6

# A tile of a transposed matrix: both sides are read and written by whole lines of 32 words.
_TILE, _TILE_ROWS = 32, 8
# One column more than it needs puts neighbours of a column into different banks of shared memory.
_PADDED_TILE = _TILE + 1
# A matrix with fewer rows or columns would leave most of a tile idle.
_LEAST_SIDE = 8
# A grid's second and third axis go no further.
_MOST_BLOCKS = 65535


@kernel(
    *(
        f"{word}[::1], {word}[::1], UniTuple(int64, {_MAX_AXES}), UniTuple(int64, {_MAX_AXES}), "
        f"UniTuple(int64, {_MAX_AXES}), int64, int64, int64"
        for word in ("uint8", "uint16", "uint32", "uint64")
    )
)
def _copy_words(target, source, shape, to, by, first_to, first_by, size):
    """target[first_to + i . to] = source[first_by + i . by] for every index i below `shape`, in C order."""
    step = cuda.gridsize(1)
    for flat in range(cuda.grid(1), size, step):
        rest = flat
        t, s = first_to, first_by
        for axis in range(_MAX_AXES - 1, -1, -1):
            at = rest % shape[axis]
            rest //= shape[axis]
            t += at * to[axis]
            s += at * by[axis]
        target[t] = source[s]


def blocks(size: int, threads: int = THREADS) -> int:
    """Blocks of a grid whose threads go through `size` elements, each in steps of the whole grid."""
    return min(-(-size // threads), 4096)


@kernel(*(f"{word}[::1], {word}[::1], int64, int64, int64" for word in ("uint32", "uint64")))
def _transpose_words(target, source, batch, rows, columns):
    """target[b, i, j] = source[b, j, i] for i below `rows` and j below `columns`, over flat arrays."""
    tile = cuda.shared.array((_TILE, _PADDED_TILE), source.dtype)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    i0, j0 = cuda.blockIdx.x * _TILE, cuda.blockIdx.y * _TILE
    for b in range(cuda.blockIdx.z, batch, cuda.gridDim.z):
        start = b * rows * columns
        for k in range(y, _TILE, _TILE_ROWS):
            if i0 + x < rows and j0 + k < columns:
                tile[k, x] = source[start + (j0 + k) * rows + i0 + x]
        cuda.syncthreads()
        for k in range(y, _TILE, _TILE_ROWS):
            if i0 + k < rows and j0 + x < columns:
                target[start + (i0 + k) * columns + j0 + x] = tile[x, k]
        cuda.syncthreads()


@kernel(*(f"{word}[::1], {word}" for word in ("uint8", "uint16", "uint32", "uint64")))
def _fill_words(target, value):
    for i in range(cuda.grid(1), target.size, cuda.gridsize(1)):
        target[i] = value


class _Span(NamedTuple):
    """The memory between an array's first and last byte, as words, and where in it the first element lies."""

    words: DeviceArray
    first: int


def _words(array: DeviceArray, offset: int, length: int, word: np.dtype) -> DeviceArray:
    """`length` words from `offset` bytes after the first element on."""
    return type(array)(array.pointer + offset, array.owner, (length,), word)


def _span(array: DeviceArray, word: np.dtype) -> _Span:
    reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
    below = -sum(r for r in reach if r < 0)
    length = (below + sum(r for r in reach if r > 0)) // word.itemsize + 1
    return _Span(_words(array, -below, length, word), below // word.itemsize)


def _joined(shape: Sequence[int], *strides: Sequence[int]) -> list[tuple[int, ...]]:
    """(size, stride, ...) of each axis; those of length 1 left out, and neighbours in one line joined."""
    axes: list[tuple[int, ...]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(outer == step * size for outer, step in zip(axes[-1][1:], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, *steps)
        else:
            axes.append((size, *steps))
    return axes


def _matrices(axes: Sequence[tuple[int, ...]]) -> tuple[int, int, int] | None:
    """(batch, rows, columns) if a C-contiguous array takes transposed matrices of another, else None.

    `axes` are (size, stride of the target, stride of the source), in elements.
    """
    if len(axes) not in (2, 3):
        return None
    (rows, to_row, by_row), (columns, to_column, by_column) = axes[-2:]
    batch, to_matrix, by_matrix = axes[0] if len(axes) == 3 else (1, rows * columns, rows * columns)
    fits = (to_row, to_column, by_row, by_column) == (columns, 1, 1, rows)
    follow = to_matrix == by_matrix == rows * columns
    large = min(rows, columns) >= _LEAST_SIDE and columns <= _TILE * _MOST_BLOCKS
    return (batch, rows, columns) if fits and follow and large else None


def overlap(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether the memory between the first and the last byte of two arrays has a part in common."""
    ends = []
    for array in (a, b):
        reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
        low = array.pointer + sum(r for r in reach if r < 0)
        ends.append((low, array.pointer + sum(r for r in reach if r > 0) + array.itemsize))
    return bool(a.size and b.size) and ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]


def fill(target: DeviceArray, number: np.ndarray) -> None:
    """Overwrite the C-contiguous `target` with an array without axes, of its dtype."""
    word = np.dtype(f"u{target.itemsize}")
    value = int(number.view(word))
    _fill_words.launch(blocks(target.size), THREADS, _words(target, 0, target.size, word), value)


def copy(target: DeviceArray, source: DeviceArray) -> None:
    """Overwrite `target` with `source`, of the same shape and dtype, any strides and other memory.

    Raises
    ------
    ValueError
        If a stride is no multiple of the element's size, or there are too many axes.
    """
    if not target.size:
        return
    itemsize, size = target.itemsize, target.size
    word = np.dtype(f"u{itemsize}")
    joined = _joined(target.shape, target.strides, source.strides)
    if any(step % itemsize for _, *steps in joined for step in steps):
        raise ValueError(f"strides of {itemsize}-byte elements must be multiples of {itemsize}")
    axes = [(count, to // itemsize, by // itemsize) for count, to, by in joined]
    matrices = _matrices(axes) if itemsize in (4, 8) else None
    if matrices:
        batch, rows, columns = matrices
        grid = -(-rows // _TILE), -(-columns // _TILE), min(batch, _MOST_BLOCKS)
        flat = _words(target, 0, size, word), _words(source, 0, size, word)
        _transpose_words.launch(grid, (_TILE, _TILE_ROWS), *flat, *matrices)
        return
    if len(axes) > _MAX_AXES:
        raise ValueError(f"an array of shape {target.shape} has too many axes to be copied")
    shape, to, by = zip(*[(1, 0, 0)] * (_MAX_AXES - len(axes)), *axes, strict=True)
    into, out_of = _span(target, word), _span(source, word)
    arguments = into.words, out_of.words, shape, to, by, into.first, out_of.first, size
    _copy_words.launch(blocks(size), THREADS, *arguments)
