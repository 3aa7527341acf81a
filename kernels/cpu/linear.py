"""Matrix products on the register tile: the linear layer and its two gradients.

One driver computes C (+)= A B, of which either may lie transposed. A block of A's rows and a panel of B's
columns are packed, a block of k at a time, so that they stay in the cache, and in different sets of it.
Where the processor has a matrix unit, `split_linear` does large products.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, get_num_threads, parallel, part_count, span
from . import simd, split_linear
from .dots import dots
from .image_tiles import gather_images
from .pieces import PIECES, add_up
from .runs import add_runs
from .simd import TILE_ROWS, TILE_VECTORS
from .tile import LINE_BYTES, PANEL_LINES, add_panel, add_tiles, overwrite_panel, overwrite_tiles, padded_rows
from .vectors import all_lanes, first_lanes, keep_in_line, lanes_of, like, load, pointer, store
from .workspace import NOTHING, clear, copy, scratch, set_start

_BLOCK_K = 256
# The most rows of A in a block, by whether there are so many panels that all threads have some.
_MANY_PANELS = 8
_BLOCK_ROWS = {False: 176, True: 352}
# Rows that are contiguous are read where they lie, unless a tile's meet in few sets of the cache: if a power
# of two above this divides their distance in bytes.
_MOST_MEETING = 512
# Rows of B that are whole pages apart are not fetched beforehand: they meet in few sets of the second cache.
_PAGE_BYTES = 4096
# Added from one packed row of A to the next: a power of two would put all rows of a tile into one cache set.
_BETWEEN = 16
# Panels of B that are packed together, so that its rows are read in longer pieces.
_PANELS = 4
# With so few rows of A or, of a gradient to the input, of dout or results, a tile computes too many twice, or
# takes longer to prepare. So many elements of B are as 32 bits count.
_FEW_ROWS = 4
_FEW_GRADIENTS = 8
_FEW_DOTS = 1 << 11
_MOST_ELEMENTS = (1 << 31) - 1
# So much of the weight, of as many columns as one task has, meets each of few rows before the next is read;
# and at least so many terms are summed in registers.
_FEW_ROWS_SIZE = 1 << 14
_FEWEST_TERMS = 8
_CHUNK = 64
# With few rows, a weight of so many bytes, and rows to repay adding up the pieces' sums, is cut between its
# rows: each thread reads what is contiguous.
_FAR_BYTES = 1 << 20
_FAR_ROWS = 1 << 10
# With so many rows of A, or so many numbers from B's first row to that which is as many rows on, packing B
# costs more than reading it where it lies.
_UNPACKED_ROWS = 16
_UNPACKED = 12 * 1024
_MULTIPLY_ADDS_PER_BYTE = 10
# Parts for each thread where A lies along k, so that its rows are packed in short pieces: with more parts,
# each of which packs its own, evener work doesn't repay the packing.
_PARTS_A_THREAD = 2
# Multiply-adds of a product that takes less time than preparing a larger one does, and the most of k and of
# results.
_SMALL_PRODUCT = 1 << 19
_SMALL_DEPTH = 512
_SMALL_RESULT = 1 << 16


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
    packs: int  # 1: copy a block of A, whose rows are then `pitch` apart; 0: read it where it lies
    pitch: int  # or those of tiles, where A lies along k
    accumulate: int  # 1: add to C; 0: overwrite it with start + product


@kernel
def _pack_panels(b, p, k0, depth, first, many, width, packed):
    """Copy `depth` rows and `many` columns of B to panels of `width` columns, the last filled up with zeros.

    One of B's strides is 1. Rows are read in full, for all panels; columns that lie along k are transposed by
    squares.
    """
    source = k0 * p.b_k + first * p.b_column
    size = packed.size // _PANELS
    last = many // width * width
    lanes = lanes_of(b)
    if p.b_column == 1:
        values, places = pointer(b), pointer(packed)
        everything = all_lanes(values)
        for k in range(depth):
            row = source + k * p.b_k
            target = k * width
            for j in range(0, last, width):
                for c in range(0, width, lanes):
                    store(load(values, row + j + c, everything), places, target + c, everything)
                target += size
            # Lanes that are not loaded are zero.
            for c in range(0, width if last < many else 0, lanes):
                some = first_lanes(values, min(max(many - last - c, 0), lanes))
                store(load(values, row + last + c, some), places, target + c, everything)
        return
    # Squares that reach beyond the block of k end in the panel nevertheless.
    for j in range(0, many, lanes):
        target = j // width * size + j % width
        for k in range(0, depth, lanes):
            gather_images(b, source + k, p.b_column, j, many, depth - k, packed, target + k * width, width)


@kernel
def _pack_rows(a, p, a0, depth, rows, block):
    """Copy `rows` rows of A, and `depth` of each: row after row, or where A lies along k tile after tile.

    What a tile reads of A is then contiguous: for each k, one number of each of its rows.
    """
    if p.a_k == 1:
        for r in range(rows):
            copy(a, a0 + r * p.a_row, block, r * p.pitch, depth)
        return
    values, places, lanes = pointer(a), pointer(block), lanes_of(a)
    for k in range(depth):
        for r in range(0, rows, TILE_ROWS):
            source, target = a0 + k * p.a_k + r, r // TILE_ROWS * p.pitch + k * TILE_ROWS
            for m in range(0, TILE_ROWS, lanes):
                some = first_lanes(values, min(TILE_ROWS, rows - r) - m)
                store(load(values, source + m, some), places, target + m, some)


@kernel
def _multiply_panel(left, r0, r1, depth, right, start, result, adds, ahead, share, step):
    """Write or add to one panel of C; see `overwrite_tiles` for the last three."""
    a, a0, row, col = left
    b, b0, ldb = right
    c, c0, crow, columns = result
    everything = col[:0]
    if adds:
        rows, streamed = (r0, r1, TILE_ROWS), (share, step, False)
        add_tiles(a, a0, row, col, rows, depth, everything, b, b0, ldb, c, c0, crow, columns, ahead, streamed)
    else:
        into, fetched = (start, 0, c, c0, crow, columns), (share, step)
        overwrite_tiles(a, a0, row, col, r0, r1, depth, everything, b, b0, ldb, *into, ahead, fetched)


@parallel
def _multiply(part, parts, a, b, bias, c, p, row, crow, col, memory):
    keep_out_of_line()
    width, line = TILE_VECTORS * lanes_of(a), LINE_BYTES // a.itemsize
    depth_size = col.size * width
    packed, rest = memory[part, : _PANELS * depth_size], memory[part, _PANELS * depth_size :]
    start, rows_of_a = rest[:width], rest[width:]
    panels = (p.columns + width - 1) // width
    blocks = (p.rows + p.block_rows - 1) // p.block_rows
    in_place = p.b_column == 1 and (p.rows <= _UNPACKED_ROWS or p.rows * p.b_k <= _UNPACKED)
    item, end = span(part, parts, panels * blocks)
    while item < end:
        block = item // panels
        panel0 = item - block * panels
        panel1 = min(panel0 + end - item, panels)
        item += panel1 - panel0
        r0, r1 = (p.tail, row.size) if block == blocks - 1 else (0, p.tail)
        rows = min(p.rows - block * p.block_rows, p.block_rows)
        for k0 in range(0, max(p.depth, 1), col.size):
            depth = min(p.depth - k0, col.size)
            left, a0 = a, block * p.block_rows * p.a_row + k0 * p.a_k
            if p.packs:
                _pack_rows(a, p, a0, depth, rows, rows_of_a)
                left, a0 = rows_of_a, 0
            for panel in range(panel0, panel1):
                first = panel * width
                many = min(p.columns - first, width)
                c0 = block * p.block_rows * p.columns + first
                source, b0, ldb = b, k0 * p.b_k + first, p.b_k
                group = 0 if in_place else (panel - panel0) % _PANELS
                more = 1 if in_place else min(_PANELS, panel1 - panel)
                many_packed = min(more * width, p.columns - first)
                if not in_place or many < width:
                    if group == 0:
                        _pack_panels(b, p, k0, depth, first, many_packed, width, packed)
                    source, b0, ldb = packed, group * depth_size, width
                adds = k0 > 0 or p.accumulate != 0
                if not adds:
                    biases = many if bias.size > 0 else 0
                    copy(bias, first, start, 0, biases)
                    clear(start, biases, width - biases)
                lhs, rhs, result = (left, a0, row, col), (source, b0, ldb), (c, c0, crow, many)
                if p.b_column == 1:
                    # The first tiles fetch a line each of the panel's next rows of B, unless they meet in few
                    # sets of the cache.
                    fetches = k0 + depth < p.depth and p.b_k * b.itemsize % _PAGE_BYTES != 0
                    fetching = min(r0 + PANEL_LINES * TILE_ROWS, r1) if fetches else r0
                    ahead, share = b[(k0 + depth) * p.b_k + first :], line // TILE_ROWS
                    for begin, end_row, step in ((r0, fetching, p.b_k), (fetching, r1, 0)):
                        _multiply_panel(
                            lhs, begin, end_row, depth, rhs, start, result, adds, ahead, share, step
                        )
                else:
                    # All tiles fetch the panel that has this one's place among those packed next. It is
                    # contiguous, unless k is cut.
                    other = first + _PANELS * width
                    awaited = min(max(p.columns - other, 0), width) if depth == p.depth else 0
                    step = min((awaited * TILE_ROWS + r1 - r0 - 1) // (r1 - r0), line)
                    ahead, share = b[min(other, p.columns) * p.b_column :], step * depth // TILE_ROWS
                    _multiply_panel(lhs, r0, r1, depth, rhs, start, result, adds, ahead, share, step)


@parallel
def _multiply_few(part, parts, x, rows, weight, starts, bias, chunk, sums):
    """Add up x W for few rows of x: each is a sum of weighted rows of W, read where they lie.

    `sums` has the results of each piece of W's rows, whose first begins at the bias; see `_few_rows`.
    """
    keep_out_of_line()
    depth, lanes = starts.size, lanes_of(x)
    pieces, columns = len(sums), sums.shape[1] // rows
    # Whole vectors of the last rows would end behind the matrix.
    beyond = (columns + lanes - 1) // lanes * lanes - columns
    whole = max(depth - (beyond + columns - 1) // columns, 0)
    chunks = (columns + chunk - 1) // chunk
    lo, hi = span(part, parts, pieces * chunks)
    for item in range(lo, hi):
        piece = item // chunks
        first = (item - piece * chunks) * chunk
        many = min(columns - first, chunk)
        y = sums[piece]
        begin, end = span(piece, pieces, depth)
        for m in range(rows):
            biases = many if piece == 0 else 0
            copy(bias, first, y, m * columns + first, biases)
            clear(y, m * columns + first + biases, many - biases)
        step = max(_FEW_ROWS_SIZE // many, _FEWEST_TERMS)
        for k0 in range(begin, min(end, whole), step):
            count = min(min(end, whole) - k0, step)
            for m in range(rows):
                factors = x[m * depth : (m + 1) * depth]
                add_runs(factors, starts, k0, count, weight, first, y, m * columns + first, many)
        for k in range(max(begin, whole), end):
            row = weight[k * columns + first : k * columns + first + many]
            for m in range(rows):
                factor = x[m * depth + k]
                result = y[m * columns + first : m * columns + first + many]
                for j in range(many):
                    result[j] += factor * row[j]


@parallel
def _dot_rows(part, parts, dout, weight, dx):
    """dx = dout W^T for few rows of dout: the products of these with W's rows, read where they lie."""
    keep_out_of_line()
    (rows, columns), inputs = dout.shape, len(weight)
    gradients, weights, results = pointer(dout), pointer(weight), pointer(dx)
    lanes = lanes_of(dout)
    lo, hi = span(part, parts, (inputs + lanes - 1) // lanes)
    for k in range(lo * lanes, min(hi * lanes, inputs), lanes):
        many = min(inputs - k, lanes)
        for m in range(rows):
            products = dots(weights, k * columns, columns, many, gradients, m * columns, columns)
            store(products, results, m * inputs + k, first_lanes(results, many))


@kernel
def _add_scaled(factor, row, c, accumulate, results, target, mask):
    """One vector of a row of the outer product."""
    keep_in_line()
    values = load(row, c, mask)
    values = values * like(values, factor)
    if accumulate:
        values = load(results, target + c, mask) + values
    store(values, results, target + c, mask)


@parallel
def _multiply_outer(part, parts, x, dout, accumulate, dweight):
    """dweight (+)= x^T dout, both of a single row: what is written takes longer than what is multiplied."""
    keep_out_of_line()
    columns = dout.size
    factors, gradients, results = pointer(x), pointer(dout), pointer(dweight)
    lanes = lanes_of(dout)
    whole = columns // lanes * lanes
    everything, some = all_lanes(results), first_lanes(results, columns - whole)
    lo, hi = span(part, parts, x.size)
    for k in range(lo, hi):
        for c in range(0, whole, lanes):
            _add_scaled(factors[k], gradients, c, accumulate, results, k * columns, everything)
        if whole < columns:
            _add_scaled(factors[k], gradients, whole, accumulate, results, k * columns, some)


@parallel
def _multiply_small(part, parts, a, b, b_k, b_column, bias, c, tables, rows, accumulate, memory):
    """C (+)= bias + A B of few numbers, in one part: A is read where it lies, B packed at once.

    The tables are those of A's rows and of C's, `rows` each, and of k: looking at an array takes as long as
    some tiles do.
    """
    row, crow, col = tables[:rows], tables[rows : 2 * rows], tables[2 * rows :]
    depth, columns = col.size, c.shape[1]
    lanes = lanes_of(a)
    width = TILE_VECTORS * lanes
    padded = (columns + width - 1) // width * width
    start, packed = memory[:padded], memory[padded:]
    factors, results, flat = a.reshape(a.size), c.reshape(c.size), b.reshape(b.size)
    values, places = pointer(b), pointer(packed)
    set_start(bias, start)
    for first in range(0, columns, lanes):
        panel = first // width * width
        target = panel * depth + first - panel
        if b_column == 1:
            some = first_lanes(values, columns - first)
            for k in range(depth):
                store(load(values, k * b_k + first, some), places, target + k * width, all_lanes(values))
        else:
            # Squares that reach beyond the panel are written before the next one is.
            for k in range(0, depth, lanes):
                gather_images(flat, k, b_column, first, columns, depth - k, packed, target + k * width, width)
    for first in range(0, columns, width):
        b0, many = first * depth, min(columns - first, width)
        if accumulate:
            add_panel(factors, 0, row, col, 0, row.size, depth, packed, b0, width, results, first, crow, many)
        else:
            overwrite_panel(
                factors,
                0,
                row,
                col,
                0,
                row.size,
                depth,
                packed,
                b0,
                width,
                start,
                first,
                results,
                first,
                crow,
                many,
            )


@lru_cache(maxsize=512)
def _row_starts(depth: int, columns: int) -> np.ndarray:
    return np.arange(0, depth * columns, columns, dtype=np.int32)


def _few_rows(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, y: np.ndarray) -> None:
    """y = bias + x W, cut by columns, or by the rows of a weight that no near cache holds."""
    rows, columns = y.shape
    if bias is None:
        bias = scratch("start", columns, y.dtype)
        between_jobs(bias.fill, 0)
    far = weight.nbytes >= _FAR_BYTES and len(weight) >= _FAR_ROWS
    pieces, chunk = (PIECES, columns) if far else (1, _CHUNK)
    sums = scratch("pieces", (pieces, y.size), y.dtype) if far else y.reshape(1, -1)
    parts = part_count(pieces * -(-columns // chunk), rows * weight.size / _MULTIPLY_ADDS_PER_BYTE * 4)
    starts = _row_starts(*weight.shape)
    _multiply_few(parts, x.reshape(-1), rows, weight.reshape(-1), starts, bias, chunk, sums)
    if far:
        add_up(1, sums, y.reshape(-1), 0)


class _Plan(NamedTuple):
    """What large products that differ in numbers only have in common."""

    sizes: Product
    tables: tuple[np.ndarray, np.ndarray, np.ndarray]  # of A's rows, C's rows and k
    tasks: int
    work: float
    memory: int  # elements of scratch for each part


@lru_cache(maxsize=512)
def _plan(
    rows: int,
    depth: int,
    columns: int,
    a_strides: tuple[int, int],
    b_strides: tuple[int, int],
    accumulate: bool,
    dtype: np.dtype,
) -> _Plan:
    """See `_Plan`. A packed block holds row after row, or else tile after tile: see `_pack_rows`."""
    width, along_k = simd.panel_width(dtype), a_strides[1] == 1
    panels, distance = -(-columns // width), a_strides[0] * dtype.itemsize
    packs = not along_k or (distance & -distance) > _MOST_MEETING
    # As long as each other, in whole tiles: each is as much work, of which threads have equal shares.
    blocks = -(-rows // _BLOCK_ROWS[panels >= _MANY_PANELS])
    block = min(rows, -(-rows // (blocks * TILE_ROWS)) * TILE_ROWS)
    # In whole vectors, as which columns along k are packed.
    lanes = simd.lanes(dtype)
    block_k = max(-(-depth // (max(-(-depth // _BLOCK_K), 1) * lanes)), 1) * lanes
    lengths = block, rows - (blocks - 1) * block
    if along_k:
        pitch, a_k = block_k + _BETWEEN, 1
        row = [padded_rows(np.arange(many) * (pitch if packs else a_strides[0])) for many in lengths]
        packed = block * pitch if packs else 0
    else:
        pitch, a_k = TILE_ROWS * block_k + _BETWEEN, TILE_ROWS
        tiles = [np.divmod(np.arange(many), TILE_ROWS) for many in lengths]
        row = [padded_rows(tile * pitch + place) for tile, place in tiles]
        packed = -(-block // TILE_ROWS) * pitch
    crow = [padded_rows(np.arange(many) * columns) for many in lengths]
    sizes = block, len(row[0]), int(packs), pitch, int(accumulate)
    return _Plan(
        Product(rows, depth, columns, *a_strides, *b_strides, *sizes),
        (np.concatenate(row), np.concatenate(crow), np.arange(block_k) * a_k),
        panels * blocks,
        rows * columns * depth / _MULTIPLY_ADDS_PER_BYTE,
        _PANELS * block_k * width + width + packed,
    )


@lru_cache(maxsize=512)
def _small_tables(
    rows: int, depth: int, columns: int, a_row: int, a_k: int, dtype: np.dtype
) -> tuple[int, np.ndarray, int]:
    """Elements of scratch that a small product takes, its tables, and the size of the first two of them."""
    row, crow = (padded_rows(np.arange(rows) * step) for step in (a_row, columns))
    width = simd.panel_width(dtype)
    size = -(-columns // width) * width * (depth + 1) + width * simd.lanes(dtype)
    return size, np.concatenate([row, crow, np.arange(depth) * a_k]), row.size


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
    (rows, columns), dtype = c.shape, c.dtype
    results = rows * columns
    if not results:
        return
    biases = NOTHING[dtype] if bias is None else bias
    if results * depth <= _SMALL_PRODUCT and depth <= _SMALL_DEPTH and results <= _SMALL_RESULT:
        size, tables, padded = _small_tables(rows, depth, columns, *a_strides, dtype)
        memory = scratch("weights", size, dtype)
        _multiply_small(1, a, b, *b_strides, biases, c, tables, padded, accumulate, memory)
        return
    if split_linear.suits(rows, depth, columns, a_strides[1], b_strides[1], dtype):
        split_linear.product(a, a_strides, b, b_strides, depth, biases, c, accumulate)
        return
    plan = _plan(rows, depth, columns, a_strides, b_strides, accumulate, dtype)
    parts = part_count(plan.tasks, plan.work)
    # Panels in one part share the packed rows of A, which each part packs anew.
    if parts == plan.tasks:
        parts = min(parts, get_num_threads())
    elif a_strides[1] == 1:
        parts = min(parts, _PARTS_A_THREAD * get_num_threads())
    memory = scratch("product", (parts, plan.memory), dtype)
    _multiply(parts, a.ravel(), b.ravel(), biases, c.ravel(), plan.sizes, *plan.tables, memory)


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
    if 0 < rows <= _FEW_ROWS and 0 < weight.size <= _MOST_ELEMENTS:
        _few_rows(x, weight, bias, y)
        return y
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
    if 0 < rows <= _FEW_GRADIENTS or 0 < rows * inputs <= _FEW_DOTS:
        _dot_rows(part_count(inputs, rows * weight.nbytes), dout, weight, dx)
        return dx
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
    adds = bool(accumulate and out is not None)
    if rows == 1 and dweight.size:
        _multiply_outer(part_count(inputs, dweight.nbytes), x, dout, adds, dweight)
    else:
        _product(x, (1, inputs), dout, (filters, 1), rows, None, dweight, adds)
    return dweight
