"""Matrix products on the matrix unit: the linear layer and its two gradients, where there is one.

A task is a block of rows and panels of columns of C, whose sums stay in the second-level cache. Some terms at
a time, A's rows and then each panel of B are packed as `split` says, so short that they end in the first
cache: to write them to the second takes three times as long.

Where there are few rows, what is large passes by once: a weight's gradient is written row by row; the
gradient to the input is computed as its transpose, so that it and the few rows are turned, and not the
weight; many terms are cut into pieces, by the sizes alone, whose sums are added up afterwards.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import get_num_threads, parallel, part_count, span
from . import matrix_unit
from .epilogue import NO_EPILOGUE, Epilogue, finish, pass_positive
from .image_tiles import scatter_images
from .matrix_unit import (
    ALL,
    BLOCK,
    CONFIGURATION,
    LEADING,
    OTHERS,
    ROW_WORDS,
    SIDE,
    TERMS,
    WORDS,
    multiply,
    write_sums,
)
from .split import SQUARES, pack_columns, pack_panel, pack_rows, pack_turned_panel, words_of_panel
from .vectors import pointer
from .workspace import NOTHING, NOWHERE, scratch

# Terms that are packed at a time, and if what is packed stays.
_BLOCK_K = 512
_MOST_STAYING_K = 768
# The most rows of a task, and of its sums.
_BLOCK_ROWS = 256
_MOST_SUMS = 1 << 17
# Many terms of so few blocks of results are cut into pieces of at least so many, and into so many at most.
_FEW_BLOCKS = 2
_PIECE_K = 1024
_MOST_PIECES = 16
# Words of B's panels that stay from one block of rows to the next.
_MOST_STAYING = 1 << 18
# Multiply-adds, in all and for each number that is packed, so that the unit repays it. To pack one of the
# right factor, often read from memory, takes longer, and to write a result less long.
_LEAST_WORK = 1 << 23
_LEAST_GAIN = 31
_PACKING_RIGHT, _WRITING = 1.3, 0.25
_MULTIPLY_ADDS_PER_BYTE = 20


class Product(NamedTuple):
    """Sizes of C = A B and the element strides of A (rows, k), B (k, columns) and C."""

    rows: int
    depth: int
    columns: int
    a_row: int
    a_k: int
    b_k: int
    b_column: int
    c_row: int
    c_column: int
    block_rows: int  # rows of a task, and panels
    block_panels: int
    block_k: int
    pieces: int  # of the terms, whose sums are written apart if there are several,
    piece_k: int  # and those of one
    step: int  # words from one register of terms of A's packed block to the next
    right_step: int  # those from one packed panel of B to the next, if they stay for the next block; or 0
    accumulate: int  # 1: add to C; 0: overwrite it with bias + product


@kernel
def _pack_left(a, p, row, k0, rows, depth, tame, squares, packed, finite):
    """A block of A; whether all of it is finite, and unless it is tame, each `BLOCK` rows, too."""
    everything = True
    for r in range(0, rows, BLOCK):
        a0, many, place = (row + r) * p.a_row + k0 * p.a_k, min(rows - r, BLOCK), r * ROW_WORDS
        if p.a_k == 1:
            words = pointer(packed)
            wild = not pack_rows(pointer(a), a0, p.a_row, many, depth, tame, words, place, ROW_WORDS, p.step)
        else:
            wild = not pack_columns(
                a, a0, p.a_k, many, depth, tame, squares, packed, place, ROW_WORDS, p.step
            )
        everything &= not wild
        if not tame:
            finite[r // BLOCK] = not wild
    return everything


@kernel
def _pack_right(b, p, k0, depth, column, columns, tame, squares, packed):
    """A panel of B; whether all of it is finite."""
    b0 = k0 * p.b_k + column * p.b_column
    if p.b_column == 1:
        return pack_panel(pointer(b), b0, p.b_k, depth, columns, tame, pointer(packed), 0)
    return pack_turned_panel(b, b0, p.b_column, depth, columns, tame, squares, packed, 0)


@kernel
def _multiply_panel(left, terms, right, tame, finite, right_finite, size, sums, s0, adds):
    """All rows of a block of A by one panel of B; if both are tame, what those that aren't finite still miss.

    What is infinite or NaN meets its factors first, in the leading parts, and all other parts meet theirs
    then. `size` is the number of rows, of columns and of registers of terms.
    """
    rows, columns, count = size
    adds |= tame
    for m in range(0, rows, BLOCK):
        both = finite[m // BLOCK] and right_finite
        if not (both and tame):
            which = ALL
            if not both:
                which = OTHERS if tame else LEADING
            a0, place, many = m * ROW_WORDS, s0 + m * BLOCK, min(rows - m, BLOCK)
            rows_of_a = left, a0, ROW_WORDS, WORDS, terms, count
            multiply(*rows_of_a, right, 0, many, columns, which, sums, place, adds)


@kernel
def _write(sums, size_of_sums, bias, c, c0, p, panel0, panel1, rows):
    """Write a block's sums to C, or add them to it, from c0 on."""
    values, results, biases = pointer(sums), pointer(c), pointer(bias)
    if p.c_column == 1:
        # Row by row, not panel by panel, so that whole lines of the cache follow each other.
        for row in range(rows):
            for panel in range(panel0, panel1):
                column = panel * BLOCK
                columns = min(p.columns - column, BLOCK)
                known = columns if bias.size > 0 else 0
                s0, place = (panel - panel0) * size_of_sums + row * BLOCK, c0 + row * p.c_row + column
                write_sums(
                    values, s0, biases, column, known, results, place, p.c_row, 1, columns, p.accumulate != 0
                )
        return
    for panel in range(panel0, panel1):
        for column in range(panel * BLOCK, min(p.columns, (panel + 1) * BLOCK), SIDE):
            for row in range(0, rows, SIDE):
                s0 = (panel - panel0) * size_of_sums + row * BLOCK + column - panel * BLOCK
                place = c0 + column * p.c_column + row
                scatter_images(c, place, p.c_column, 0, p.columns - column, rows - row, sums, s0, BLOCK)


@parallel
def _multiply(
    part,
    parts,
    a,
    b,
    bias,
    c,
    p,
    terms,
    configuration,
    lefts,
    rights,
    rooms,
    left_flags,
    right_flags,
    e,
    argmax,
):
    keep_out_of_line()
    matrix_unit.start(pointer(configuration))
    packed, room, finite, panels_finite = lefts[part], rooms[part], left_flags[part], right_flags[part]
    squares, sums = room[:SQUARES], room[SQUARES:]
    left, values, steps = pointer(packed), pointer(sums), pointer(terms)
    panels = (p.columns + BLOCK - 1) // BLOCK
    across = (panels + p.block_panels - 1) // p.block_panels
    down = (p.rows + p.block_rows - 1) // p.block_rows
    packed_k, packed_panel = -1, -1
    lo, hi = span(part, parts, p.pieces * down * across)
    for task in range(lo, hi):
        piece = task // (down * across)
        block = task // across - piece * down
        row = block * p.block_rows
        rows = min(p.rows - row, p.block_rows)
        # Those of a panel's sums.
        size_of_sums = (rows + BLOCK - 1) // BLOCK * BLOCK * BLOCK
        panel0 = task % across * p.block_panels
        panel1 = min(panel0 + p.block_panels, panels)
        end = min((piece + 1) * p.piece_k, p.depth)
        for k0 in range(piece * p.piece_k, end, p.block_k):
            depth = min(end - k0, p.block_k)
            left_finite = _pack_left(a, p, row, k0, rows, depth, False, squares, packed, finite)
            stay = p.right_step > 0 and packed_k == k0 and packed_panel == panel0
            packed_k, packed_panel = k0, panel0
            for panel in range(panel0, panel1):
                column, n = panel * BLOCK, panel - panel0
                columns = min(p.columns - column, BLOCK)
                size = rows, columns, (depth + TERMS - 1) // TERMS
                s0 = n * size_of_sums
                right = rights[part, n * p.right_step :]
                words = pointer(right)
                if not (stay and panels_finite[n]):
                    panels_finite[n] = _pack_right(b, p, k0, depth, column, columns, False, squares, right)
                again = k0 > piece * p.piece_k
                _multiply_panel(left, steps, words, False, finite, panels_finite[n], size, values, s0, again)
                if not (left_finite and panels_finite[n]):
                    _pack_left(a, p, row, k0, rows, depth, True, squares, packed, finite)
                    _pack_right(b, p, k0, depth, column, columns, True, squares, right)
                    _multiply_panel(
                        left, steps, words, True, finite, panels_finite[n], size, values, s0, True
                    )
                    _pack_left(a, p, row, k0, rows, depth, False, squares, packed, finite)
        c0 = piece * p.rows * p.columns + row * p.c_row
        _write(sums, size_of_sums, bias, c, c0, p, panel0, panel1, rows)
        if e.relu:
            first, last = panel0 * BLOCK, min(panel1 * BLOCK, p.columns)
            place = c0 + first
            pass_positive(c[place:], p.c_row, rows, e, c, place, argmax, last - first)
    matrix_unit.end()


@parallel
def _add_pieces(part, parts, sums, pieces, bias, c, p):
    """C = bias + the sum of all pieces, or C += it, row by row."""
    keep_out_of_line()
    everything = p.rows * p.columns
    begin, end = span(part, parts, p.rows)
    for row in range(begin, end):
        start = row * p.columns
        results = c[start : start + p.columns]
        if p.accumulate == 0:
            for i in range(results.size):
                results[i] = bias[i] if bias.size > 0 else 0
        for piece in range(pieces):
            place = piece * everything + start
            values = sums[place : place + p.columns]
            for i in range(results.size):
                results[i] += values[i]


class _Plan(NamedTuple):
    sizes: Product
    terms: np.ndarray
    tasks: int
    sums: int  # elements of a task


def _stays(depth: int, panels: int) -> bool:
    """Whether all panels of the right factor, packed at once, stay for the next block of rows."""
    return depth <= _MOST_STAYING_K and panels * words_of_panel(depth) <= _MOST_STAYING


def _longest_share(halves: int, times: int, threads: int, block: int) -> int:
    """Half blocks of the thread with most of them, of tasks of `block` of them each."""
    return -(-times * -(-halves // block) // threads) * block


@lru_cache(maxsize=512)
def _plan(
    rows: int,
    depth: int,
    columns: int,
    a_strides: tuple[int, int],
    b_strides: tuple[int, int],
    c_strides: tuple[int, int],
    accumulate: bool,
    threads: int,
) -> _Plan:
    """Tasks for all threads: cut by what there is more of, so that less is packed by several of them.

    How long the sums of terms are, one after another, depends on the sizes alone.
    """
    panels, halves = -(-columns // BLOCK), -(-rows // BLOCK)
    down = -(-rows // _BLOCK_ROWS)
    block = -(-halves // down)
    across = -(-panels * block * BLOCK * BLOCK // _MOST_SUMS)
    pieces = 1
    if down * across <= _FEW_BLOCKS and c_strides[1] == 1:
        # A power of two, so that threads have as many each.
        pieces = min(1 << max((depth // _PIECE_K).bit_length() - 1, 0), _MOST_PIECES)
    piece_k = -(-depth // (pieces * TERMS)) * TERMS
    pieces = -(-depth // piece_k)
    while pieces * down * across < threads and (down < halves or across < panels):
        if across == panels or (down < halves and halves * across >= panels * down):
            down += 1
        else:
            across += 1
    block, block_panels = -(-halves // down), -(-panels // across)
    # Somewhat shorter ones, if all threads then have as much to do as each other.
    block = min(range(block, block // 2, -1), key=partial(_longest_share, halves, pieces * across, threads))
    stays = _stays(piece_k, panels)
    longest = _MOST_STAYING_K if stays else _BLOCK_K
    block_k = -(-piece_k // (-(-piece_k // longest) * TERMS)) * TERMS
    step = block * BLOCK * ROW_WORDS
    sizes = min(rows, block * BLOCK), block_panels, block_k, pieces, piece_k, step
    return _Plan(
        Product(
            rows,
            depth,
            columns,
            *a_strides,
            *b_strides,
            *c_strides,
            *sizes,
            words_of_panel(block_k) if stays and block_panels == panels else 0,
            int(accumulate),
        ),
        np.arange(block_k // TERMS) * step,
        pieces * -(-halves // block) * -(-panels // block_panels),
        block * BLOCK * block_panels * BLOCK,
    )


def _exchanges(rows: int, depth: int, columns: int, a_k: int, b_column: int) -> bool:
    """Whether C's transpose is faster, the product of B's and A's: A is turned over, and C, but B is not.

    That takes as long as packing does. The right factor is packed for each block of rows.
    """
    if a_k != 1 or b_column == 1:
        return False
    left, right, results = rows * depth, depth * columns, rows * columns
    blocks, others = -(-rows // _BLOCK_ROWS), -(-columns // _BLOCK_ROWS)
    if _stays(depth, -(-rows // BLOCK)):
        others = 1
    return 2 * left * others + right + results < left + 2 * right * blocks


@lru_cache(maxsize=1024)
def suits(rows: int, depth: int, columns: int, a_k: int, b_column: int, dtype: np.dtype) -> bool:
    """Whether such a product is faster on the matrix unit, given strides of its factors."""
    work = rows * depth * columns
    if dtype != np.float32 or work < _LEAST_WORK:
        return False
    if _exchanges(rows, depth, columns, a_k, b_column):
        rows, columns = columns, rows
    left = rows * -(-depth // TERMS) * TERMS
    moved = left + _PACKING_RIGHT * depth * columns + _WRITING * rows * columns
    return work >= _LEAST_GAIN * moved and matrix_unit.is_there()


def product(
    a: np.ndarray,
    a_strides: tuple[int, int],
    b: np.ndarray,
    b_strides: tuple[int, int],
    depth: int,
    bias: np.ndarray,
    c: np.ndarray,
    accumulate: bool,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """C (+)= bias + A B; the strides are in elements: of A's rows and k, of B's k and columns.

    What `e` may end it in is ReLU alone, and of a C that is overwritten, B's columns lying side by side.
    """
    rows, columns = c.shape
    c_strides = columns, 1
    if not accumulate and not bias.size and _exchanges(rows, depth, columns, a_strides[1], b_strides[1]):
        rows, columns, c_strides = columns, rows, c_strides[::-1]
        a, a_strides, b, b_strides = b, b_strides[::-1], a, a_strides[::-1]
    threads = get_num_threads()
    plan = _plan(rows, depth, columns, a_strides, b_strides, c_strides, accumulate, threads)
    p, work = plan.sizes, rows * columns * depth / _MULTIPLY_ADDS_PER_BYTE
    parts = min(part_count(plan.tasks, work), threads)
    flat = c.ravel()
    start, sizes, target, end = bias, p, flat, e
    if p.pieces > 1:
        target = scratch("pieces", p.pieces * c.size, np.float32)
        start, sizes, end = NOTHING[bias.dtype], p._replace(accumulate=0), NO_EPILOGUE
    lefts = scratch("split rows", (parts, p.step * len(plan.terms)), np.int32)
    right = p.right_step * p.block_panels or words_of_panel(p.block_k)
    rights = scratch("split panel", (parts, right), np.int32)
    rooms = scratch("sums", (parts, SQUARES + plan.sums), np.float32)
    left_flags = scratch("finite", (parts, -(-p.block_rows // BLOCK)), np.bool_)
    right_flags = scratch("panels are finite", (parts, p.block_panels), np.bool_)
    _multiply(
        parts,
        a.ravel(),
        b.ravel(),
        start,
        target,
        sizes,
        plan.terms,
        CONFIGURATION,
        lefts,
        rights,
        rooms,
        left_flags,
        right_flags,
        end,
        argmax.reshape(-1),
    )
    if p.pieces > 1:
        _add_pieces(part_count(rows, target.nbytes), target, p.pieces, bias, flat, p)
        if e.relu:
            image = c.reshape(-1, e.out_h, e.out_w, columns)
            finish(image, image, e, argmax)
