"""Matrix products on the register tile: the linear layer and its two gradients.

One driver computes C (+)= A B, of which either may lie transposed. A block of A's rows and a panel of B's
columns are packed, a block of k at a time, so that they stay in the cache, and in different sets of it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd
from .tile import add_panel, overwrite_panel, padded_rows
from .workspace import clear, copy, scratch

_BLOCK_K = 256
_BLOCK_ROWS = 96
# From one packed row of A to the next: a power of two would put all rows of a tile into one cache set.
_PITCH = _BLOCK_K + 16
# With so few rows of A, reading B where it lies costs less than packing it.
_FEW_ROWS = 16
_MULTIPLY_ADDS_PER_BYTE = 10


class Product(NamedTuple):
    """Sizes of C = A B and the element strides of A (rows, k) and of B (k, columns)."""

    rows: int
    depth: int
    columns: int
    a_row: int
    a_k: int
    b_k: int
    b_column: int
    block_rows: int  # rows of A in one task
    tail: int  # where the tables of the last block of rows begin
    accumulate: int  # 1: add to C; 0: overwrite it with start + product


@kernel
def _pack_panel(b, p, k0, depth, first, many, width, panel):
    """Copy `depth` rows and `many` columns of B to `panel`, with zeros up to `width` columns.

    One of B's strides is 1: the inner loop reads along it.
    """
    source = k0 * p.b_k + first * p.b_column
    if p.b_column == 1:
        for k in range(depth):
            copy(b, source + k * p.b_k, panel, k * width, many)
            clear(panel, k * width + many, width - many)
    else:
        if many < width:
            clear(panel, 0, depth * width)
        for j in range(many):
            column = b[source + j * p.b_column : source + j * p.b_column + depth]
            places = panel[j : j + depth * width : width]
            for k in range(column.size):
                places[k] = column[k]


@kernel
def _pack_rows(a, p, a0, depth, rows, block):
    """Copy `rows` rows of A, and `depth` of each, along the axis on which A's stride is 1; see `_tables`."""
    if p.a_k == 1:
        for r in range(rows):
            copy(a, a0 + r * p.a_row, block, r * _PITCH, depth)
    else:
        for k in range(depth):
            copy(a, a0 + k * p.a_k, block, k * p.block_rows, rows)


@parallel
def _multiply(part, parts, a, b, start, c, p, row, crow, col, panels_of_b, blocks_of_a):
    keep_out_of_line()
    panel = panels_of_b[part]
    rows_of_a = blocks_of_a[part]
    width = panel.size // col.size
    panels = (p.columns + width - 1) // width
    blocks = (p.rows + p.block_rows - 1) // p.block_rows
    lo, hi = span(part, parts, panels * blocks)
    for task in range(lo, hi):
        block = task // panels
        first = (task - block * panels) * width
        many = min(p.columns - first, width)
        r0, r1 = (p.tail, row.size) if block == blocks - 1 else (0, p.tail)
        rows = min(p.rows - block * p.block_rows, p.block_rows)
        c0 = block * p.block_rows * p.columns + first
        for k0 in range(0, max(p.depth, 1), col.size):
            depth = min(p.depth - k0, col.size)
            source, b0, ldb = b, k0 * p.b_k + first, p.b_k
            if p.b_column != 1 or many < width or p.rows > _FEW_ROWS:
                _pack_panel(b, p, k0, depth, first, many, width, panel)
                source, b0, ldb = panel, 0, width
            _pack_rows(a, p, block * p.block_rows * p.a_row + k0 * p.a_k, depth, rows, rows_of_a)
            if k0 == 0 and p.accumulate == 0:
                overwrite_panel(
                    rows_of_a, 0, row, col, r0, r1, depth, source, b0, ldb, start, first, c, c0, crow, many
                )
            else:
                add_panel(rows_of_a, 0, row, col, r0, r1, depth, source, b0, ldb, c, c0, crow, many)


@lru_cache(maxsize=512)
def _tables(rows: int, columns: int, along_k: bool) -> tuple[int, int, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a block, where the last block's tables begin, and the tables of A's rows, C's rows and k.

    A packed block holds row after row, each `_PITCH` long, or else k after k, each as long as the block.
    """
    block = min(rows, _BLOCK_ROWS)
    last = rows - (-(-rows // block) - 1) * block
    a_row, a_k = (_PITCH, 1) if along_k else (1, block)
    row, crow = ([padded_rows(np.arange(many) * step) for many in (block, last)] for step in (a_row, columns))
    col = np.arange(_BLOCK_K) * a_k
    return block, len(row[0]), np.concatenate(row), np.concatenate(crow), col


def _product(
    a: np.ndarray,
    a_strides: tuple[int, int],
    b: np.ndarray,
    b_strides: tuple[int, int],
    depth: int,
    bias: np.ndarray | None,
    c: np.ndarray,
    accumulate: bool,
) -> None:
    """C (+)= bias + A B; the strides are in elements: of A's rows and k, of B's k and columns."""
    rows, columns = c.shape
    if not c.size:
        return
    width = simd.panel_width(c.dtype)
    block, tail, row, crow, col = _tables(rows, columns, a_strides[1] == 1)
    product = Product(
        rows,
        depth,
        columns,
        a_row=a_strides[0],
        a_k=a_strides[1],
        b_k=b_strides[0],
        b_column=b_strides[1],
        block_rows=block,
        tail=tail,
        accumulate=int(accumulate),
    )
    start = scratch("start", -(-columns // width) * width, c.dtype)
    start[:] = 0
    if bias is not None:
        start[:columns] = bias
    tasks = -(-columns // width) * -(-rows // block)
    parts = part_count(tasks, rows * columns * depth / _MULTIPLY_ADDS_PER_BYTE)
    panels = scratch("weights", parts * _BLOCK_K * width, c.dtype).reshape(parts, -1)
    blocks = scratch("windows", parts * _BLOCK_ROWS * _PITCH, c.dtype).reshape(parts, -1)
    flat = (a.reshape(-1), b.reshape(-1), start, c.reshape(-1))
    _multiply(parts, *flat, product, row, crow, col, panels, blocks)


def linear_forward(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Linear map of each row: y = x @ weight + bias.

    Parameters
    ----------
    x : (M, K) float32 or float64
    weight : (K, F), of x's dtype
    bias : (F,) or None
    out : (M, F), optional
        Overwritten with the result.

    Returns
    -------
    (M, F) array

    Raises
    ------
    TypeError, ValueError
        If dtypes, ranks or sizes don't fit.
    """
    x = checks.floating("x", x, 2)
    weight = checks.floating("weight", weight, 2, x.dtype)
    (rows, depth), (inputs, filters) = x.shape, weight.shape
    if depth != inputs:
        raise ValueError(f"weight: {weight.shape} takes {inputs} features, but x has {depth}: {x.shape}")
    if bias is not None:
        bias = checks.same_shape("bias", checks.floating("bias", bias, 1, x.dtype), (filters,))
    y = checks.output("out", out, (rows, filters), x.dtype)
    _product(x, (depth, 1), weight, (filters, 1), depth, bias, y, False)
    return y


def linear_backward_input(
    dout: np.ndarray, weight: np.ndarray, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of `linear_forward` with respect to x: dout @ weight.T.

    Parameters
    ----------
    dout : (M, F) float32 or float64
    weight : (K, F)
    out : (M, K), optional
        Overwritten with the result.

    Returns
    -------
    (M, K) array
    """
    dout = checks.floating("dout", dout, 2)
    weight = checks.floating("weight", weight, 2, dout.dtype)
    (rows, filters), (inputs, columns) = dout.shape, weight.shape
    if filters != columns:
        raise ValueError(
            f"dout: {dout.shape} has {filters} columns, but weight {weight.shape} makes {columns}"
        )
    dx = checks.output("out", out, (rows, inputs), dout.dtype)
    _product(dout, (filters, 1), weight, (1, filters), filters, None, dx, False)
    return dx


def linear_backward_weight(
    dout: np.ndarray, x: np.ndarray, *, out: np.ndarray | None = None, accumulate: bool = False
) -> np.ndarray:
    """Gradient of `linear_forward` with respect to the weight: x.T @ dout.

    Parameters
    ----------
    dout : (M, F) float32 or float64
    x : (M, K)
    out : (K, F), optional
        Overwritten with the result, or added to if `accumulate` is true.

    Returns
    -------
    (K, F) array
    """
    dout = checks.floating("dout", dout, 2)
    x = checks.floating("x", x, 2, dout.dtype)
    (rows, filters), (many, inputs) = dout.shape, x.shape
    if rows != many:
        raise ValueError(f"dout: {dout.shape} has {rows} rows, but x has {many}: {x.shape}")
    dweight = checks.output("out", out, (inputs, filters), dout.dtype)
    _product(x, (1, inputs), dout, (filters, 1), rows, None, dweight, accumulate and out is not None)
    return dweight
