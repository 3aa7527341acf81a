"""Matrix products on the matrix unit: the linear layer and its two gradients, where there is one.

A task is a block of rows and panels of columns of C, whose sums stay in the second-level cache. Some terms at
a time, A's rows and then each panel of B are packed as `split` says, so short that they end in the first
cache: to write them to the second takes three times as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import get_num_threads, parallel, part_count, span
from . import matrix_unit
from .matrix_unit import (
    ALL,
    BLOCK,
    CONFIGURATION,
    LEADING,
    OTHERS,
    ROW_WORDS,
    TERMS,
    WORDS,
    multiply,
    write_sums,
)
from .split import SQUARES, pack_columns, pack_panel, pack_rows, pack_turned_panel, words_of_panel
from .vectors import pointer
from .workspace import scratch

# Terms that are packed at a time.
_BLOCK_K = 512
# The most rows of a task, and of its sums.
_BLOCK_ROWS = 256
_MOST_SUMS = 1 << 17
# Multiply-adds, in all and for each number that is packed or written, so that the unit repays it.
_LEAST_WORK = 1 << 23
_LEAST_GAIN = 36
_MULTIPLY_ADDS_PER_BYTE = 20


class Product(NamedTuple):
    """Sizes of C = A B and the element strides of A (rows, k) and of B (k, columns)."""

    rows: int
    depth: int
    columns: int
    a_row: int
    a_k: int
    b_k: int
    b_column: int
    block_rows: int  # rows of a task, and panels
    block_panels: int
    block_k: int
    step: int  # words from one register of terms of A's packed block to the next
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


@parallel
def _multiply(part, parts, a, b, bias, c, p, terms, configuration, lefts, rights, rooms, flags):
    keep_out_of_line()
    matrix_unit.start(pointer(configuration))
    packed, panel_of_b, room, finite = lefts[part], rights[part], rooms[part], flags[part]
    squares, sums = room[:SQUARES], pointer(room[SQUARES:])
    left, right, steps = pointer(packed), pointer(panel_of_b), pointer(terms)
    panels = (p.columns + BLOCK - 1) // BLOCK
    across = (panels + p.block_panels - 1) // p.block_panels
    lo, hi = span(part, parts, (p.rows + p.block_rows - 1) // p.block_rows * across)
    for task in range(lo, hi):
        block = task // across
        row = block * p.block_rows
        rows = min(p.rows - row, p.block_rows)
        # Those of a panel's sums.
        size_of_sums = (rows + BLOCK - 1) // BLOCK * BLOCK * BLOCK
        panel0 = (task - block * across) * p.block_panels
        panel1 = min(panel0 + p.block_panels, panels)
        for k0 in range(0, p.depth, p.block_k):
            depth = min(p.depth - k0, p.block_k)
            left_finite = _pack_left(a, p, row, k0, rows, depth, False, squares, packed, finite)
            for panel in range(panel0, panel1):
                column = panel * BLOCK
                columns = min(p.columns - column, BLOCK)
                size = rows, columns, (depth + TERMS - 1) // TERMS
                s0 = (panel - panel0) * size_of_sums
                right_finite = _pack_right(b, p, k0, depth, column, columns, False, squares, panel_of_b)
                _multiply_panel(left, steps, right, False, finite, right_finite, size, sums, s0, k0 > 0)
                if not (left_finite and right_finite):
                    _pack_left(a, p, row, k0, rows, depth, True, squares, packed, finite)
                    _pack_right(b, p, k0, depth, column, columns, True, squares, panel_of_b)
                    _multiply_panel(left, steps, right, True, finite, right_finite, size, sums, s0, True)
                    _pack_left(a, p, row, k0, rows, depth, False, squares, packed, finite)
        for panel in range(panel0, panel1):
            column = panel * BLOCK
            columns = min(p.columns - column, BLOCK)
            known = columns if bias.size > 0 else 0
            s0 = (panel - panel0) * size_of_sums
            c0 = row * p.columns + column
            adds = p.accumulate != 0
            write_sums(sums, s0, pointer(bias), column, known, pointer(c), c0, p.columns, rows, columns, adds)
    matrix_unit.end()


class _Plan(NamedTuple):
    sizes: Product
    terms: np.ndarray
    tasks: int
    sums: int  # elements of a task


@lru_cache(maxsize=512)
def _plan(
    rows: int,
    depth: int,
    columns: int,
    a_strides: tuple[int, int],
    b_strides: tuple[int, int],
    accumulate: bool,
    threads: int,
) -> _Plan:
    """Tasks for all threads: cut by what there is more of, so that less is packed by several of them."""
    panels, halves = -(-columns // BLOCK), -(-rows // BLOCK)
    down = -(-rows // _BLOCK_ROWS)
    block = -(-halves // down)
    across = -(-panels * block * BLOCK * BLOCK // _MOST_SUMS)
    while down * across < threads and (down < halves or across < panels):
        if across == panels or (down < halves and halves * across >= panels * down):
            down += 1
        else:
            across += 1
    block, block_panels = -(-halves // down), -(-panels // across)
    block_k = -(-depth // (-(-depth // _BLOCK_K) * TERMS)) * TERMS
    step = block * BLOCK * ROW_WORDS
    sizes = min(rows, block * BLOCK), block_panels, block_k, step, int(accumulate)
    tasks = -(-halves // block) * -(-panels // block_panels)
    return _Plan(
        Product(rows, depth, columns, *a_strides, *b_strides, *sizes),
        np.arange(block_k // TERMS) * step,
        tasks,
        block * BLOCK * block_panels * BLOCK,
    )


@lru_cache(maxsize=1024)
def suits(rows: int, depth: int, columns: int, b_column: int, dtype: np.dtype) -> bool:
    """Whether such a product is faster on the matrix unit; columns of B that are apart take longer."""
    work, turned = rows * depth * columns, b_column != 1
    moved = rows * depth + depth * columns + (2 if turned else 1) * rows * columns
    repays = dtype == np.float32 and work >= _LEAST_WORK and work >= _LEAST_GAIN * moved
    return repays and matrix_unit.is_there()


def product(
    a: np.ndarray,
    a_strides: tuple[int, int],
    b: np.ndarray,
    b_strides: tuple[int, int],
    depth: int,
    bias: np.ndarray,
    c: np.ndarray,
    accumulate: bool,
) -> None:
    """C (+)= bias + A B; the strides are in elements: of A's rows and k, of B's k and columns."""
    rows, columns = c.shape
    plan = _plan(rows, depth, columns, a_strides, b_strides, accumulate, get_num_threads())
    p, work = plan.sizes, rows * columns * depth / _MULTIPLY_ADDS_PER_BYTE
    parts = min(part_count(plan.tasks, work), get_num_threads())
    lefts = scratch("split rows", (parts, p.step * len(plan.terms)), np.int32)
    rights = scratch("split panel", (parts, words_of_panel(p.block_k)), np.int32)
    rooms = scratch("sums", (parts, SQUARES + plan.sums), np.float32)
    flags = scratch("finite", (parts, -(-p.block_rows // BLOCK)), np.bool_)
    _multiply(
        parts,
        a.ravel(),
        b.ravel(),
        bias,
        c.ravel(),
        p,
        plan.terms,
        CONFIGURATION,
        lefts,
        rights,
        rooms,
        flags,
    )
