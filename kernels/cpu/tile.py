"""The engine: one register tile with offset tables, and the panel loop around it.

Everything with a multiply-add in it is

    C[c0 + crow[m] + n] (+)= sum over k of A[a0 + row[m] + col[k]] * B[b0 + k * ldb + n]

for a panel of columns n. The tables `row`, `col` and `crow` say what the operation is; they are built once a
shape, in elements. A tile may leave out what is known to be zero: it sums over `runs` runs of `length`
consecutive k, the first run from k = `first` on, each `pitch` after the one before. The tile emits LLVM
vector code for a literal number of rows and vectors, keeps that piece of C in registers over the whole sum,
and reads each element of A as a broadcast.

Contract of the tables: `row` and `crow` are used in multiples of `TILE_ROWS` entries; the last valid entry is
repeated to fill up. Repeated rows compute and store the same value twice, which is why a tile that adds to C
reads all of its C before it writes any.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from . import simd
from .loops import sum_loop
from .vectors import lanes_of

TILE_ROWS = simd.TILE_ROWS
# The taps of 3 x 3 fill these; with 2 vectors they are as much as 32 registers hold.
TALL_ROWS = 9 if TILE_ROWS == 8 else TILE_ROWS
TILE_VECTORS = simd.TILE_VECTORS
VECTOR_BITS = simd.VECTOR_BITS
LINE_BYTES = 64  # of a cache
# Those of a panel's row.
PANEL_LINES = max(TILE_VECTORS * VECTOR_BITS // 8 // LINE_BYTES, 1)

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)


class Emitter:
    """Writes vector instructions for one element type."""

    def __init__(self, context, builder, element: types.Float):
        self.builder = builder
        self.element = context.get_data_type(element)
        self.lanes = VECTOR_BITS // element.bitwidth
        self.vector = ir.VectorType(self.element, self.lanes)
        self.suffix = f"v{self.lanes}f{element.bitwidth}"
        self.bytes = element.bitwidth // 8

    def call(self, name, returned, arguments):
        function = ir.FunctionType(returned, [argument.type for argument in arguments])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, function, name), arguments
        )

    def at(self, pointer, *offsets):
        for offset in offsets:
            pointer = self.builder.gep(pointer, [offset])
        return pointer

    def load(self, pointer, mask=None):
        """A vector; lanes outside of `mask` are zero and not read."""
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        if mask is not None:
            arguments = [pointer, ir.Constant(_I32, self.bytes), mask, ir.Constant(self.vector, None)]
            return self.call(f"llvm.masked.load.{self.suffix}.p0", self.vector, arguments)
        value = self.builder.load(pointer)
        value.align = self.bytes
        return value

    def store(self, value, pointer, mask=None):
        """Write a vector; lanes outside of `mask` are left alone."""
        pointer = self.builder.bitcast(pointer, self.vector.as_pointer())
        if mask is not None:
            arguments = [value, pointer, ir.Constant(_I32, self.bytes), mask]
            self.call(f"llvm.masked.store.{self.suffix}.p0", ir.VoidType(), arguments)
        else:
            self.builder.store(value, pointer).align = self.bytes

    def store_around(self, value, pointer):
        """Write a vector around the caches, to where a whole register begins."""
        written = self.builder.store(value, self.builder.bitcast(pointer, self.vector.as_pointer()))
        written.align = self.lanes * self.bytes
        written.set_metadata("nontemporal", self.builder.module.add_metadata([ir.Constant(_I32, 1)]))

    def prefetch(self, pointer, to_write):
        """Have a cache fetch a line, which need not exist: the first to write it, the second to read."""
        kinds = (1, 3, 1) if to_write else (0, 2, 1)  # to write or not, how near, data
        pointer = self.builder.bitcast(pointer, ir.IntType(8).as_pointer())
        switches = [ir.Constant(_I32, kind) for kind in kinds]
        self.call("llvm.prefetch.p0", ir.VoidType(), [pointer, *switches])

    def broadcast(self, scalar):
        undefined = ir.Constant(self.vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), None)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, zeros)

    def everywhere(self, bit):
        """A mask of all lanes or of none."""
        kind = ir.VectorType(bit.type, self.lanes)
        return self.builder.select(bit, ir.Constant(kind, [1] * self.lanes), ir.Constant(kind, None))

    def multiply_add(self, a, b, c):
        return self.call(f"llvm.fma.{self.suffix}", self.vector, [a, b, c])

    def mask(self, columns, vector):
        """Lanes of the panel's `vector`-th vector that are columns of C."""
        many = ir.VectorType(_I64, self.lanes)
        first = ir.Constant(many, [vector * self.lanes + lane for lane in range(self.lanes)])
        undefined = ir.Constant(many, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), None)
        limit = self.builder.insert_element(undefined, columns, ir.Constant(_I32, 0))
        limit = self.builder.shuffle_vector(limit, undefined, zeros)
        return self.builder.icmp_signed("<", first, limit)


def _products(emit, a_rows, col, terms, b, ldb, start, vectors, ahead, step, lines):
    """The sums over k of all rows and vectors, begun at `start`; `terms` are first, length, pitch and runs.

    At each k the cache is told to fetch so many `lines` of what lies `step` elements further on from `ahead`.
    """
    builder = emit.builder
    places = [ir.Constant(_I64, line * LINE_BYTES // emit.bytes) for line in range(lines)]
    first, length, pitch, runs = terms
    zero = ir.Constant(_I64, 0)

    def add_run(run, values):
        begin = builder.add(first, builder.mul(run, pitch))
        run_col = emit.at(col, begin)

        def add_term(k, values):
            row_of_b, fetch, *sums = values
            offset = builder.load(emit.at(run_col, k))
            panel = [emit.load(emit.at(row_of_b, ir.Constant(_I64, v * emit.lanes))) for v in range(vectors)]
            for place in places:
                emit.prefetch(emit.at(fetch, place), to_write=False)
            new = []
            for m, a_row in enumerate(a_rows):
                element = emit.broadcast(builder.load(emit.at(a_row, offset)))
                row_sums = sums[m * vectors : (m + 1) * vectors]
                new += [emit.multiply_add(element, b, c) for b, c in zip(panel, row_sums, strict=True)]
            return [emit.at(row_of_b, ldb), emit.at(fetch, step), *new]

        fetch, *sums = values
        row_of_b = emit.at(b, builder.mul(begin, ldb))
        return sum_loop(emit, zero, length, [row_of_b, fetch, *sums], add_term, unrolls=False)[1:]

    sums = sum_loop(emit, zero, runs, [ahead, *start * len(a_rows)], add_run, unrolls=False)[1:]
    return [sums[m * vectors : (m + 1) * vectors] for m in range(len(a_rows))]


def _write(emit, sums, places, masks, adds):
    """Store the accumulators to C, or add them to it: all of C is then read before any is written."""
    tiles = [
        (value, place, mask)
        for row, row_places in zip(sums, places, strict=True)
        for value, place, mask in zip(row, row_places, masks, strict=True)
    ]
    if adds:
        tiles = [
            (emit.builder.fadd(value, emit.load(place, mask), flags=("nsz",)), place, mask)
            for value, place, mask in tiles
        ]
    for value, place, mask in tiles:
        emit.store(value, place, mask)


@intrinsic(prefer_literal=True)
def _tile(typing_context, rows, vectors, ragged, add, streams, operands, r0, ahead, ahead0, step):
    """One tile of `rows` x `vectors` vectors of C, from entry `r0` of the tables on; see above.

    The literals: `ragged` stores only the first `columns` columns; `add` adds the sum to C, else C is
    overwritten by start[s0 + n] + sum. `b` and `start` are read in whole vectors. Meanwhile a cache fetches
    `step` elements of `ahead` for each k, from `ahead0` on: a line, or if it `streams` all of a panel's row.
    Nothing is checked.
    """
    literals = (rows, vectors, ragged, add, streams)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    tile_rows, tile_vectors, is_ragged, adds, many = (literal.literal_value for literal in literals)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, ahead.dtype)

        def data(array, value):
            return context.make_array(array)(context, builder, value).data

        values = [
            data(kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(operands.types, cgutils.unpack_tuple(builder, arguments[5]), strict=True)
        ]
        a, a0, row, col, terms, b, b0, ldb, start, s0, c, c0, crow, columns = values
        terms = cgutils.unpack_tuple(builder, terms)
        r0, ahead0, step = arguments[6], arguments[8], arguments[9]
        a_base, c_base = emit.at(a, a0), emit.at(c, c0)
        numbers = [ir.Constant(_I64, m) for m in range(tile_rows)]
        a_rows = [emit.at(a_base, builder.load(emit.at(row, r0, m))) for m in numbers]
        c_offsets = [builder.load(emit.at(crow, r0, m)) for m in numbers]
        c_rows = [emit.at(c_base, offset) for offset in c_offsets]
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(tile_vectors)]
        places = [[emit.at(c_row, lane) for lane in lanes] for c_row in c_rows]
        # Rows of C that are apart arrive while the sums are computed; what touches needs no such help.
        whole = ir.Constant(_I64, tile_vectors * emit.lanes)
        apart = builder.icmp_signed("!=", builder.sub(c_offsets[1], c_offsets[0]), whole)
        with builder.if_then(apart):
            for place in (place for row_places in places for place in row_places):
                emit.prefetch(place, to_write=True)
        zero = ir.Constant(emit.vector, None)
        begin = [zero if adds else emit.load(emit.at(start, s0, lane)) for lane in lanes]
        to_fetch = emit.at(data(ahead, arguments[7]), ahead0)
        lines = PANEL_LINES if many else 1
        place = emit.at(b, b0)
        sums = _products(emit, a_rows, col, terms, place, ldb, begin, tile_vectors, to_fetch, step, lines)
        # Only the last vector of a ragged panel is cut: the panel functions below see to it.
        masks = [None] * (tile_vectors - 1) + [emit.mask(columns, tile_vectors - 1) if is_ragged else None]
        _write(emit, sums, places, masks, adds)
        return context.get_dummy_value()

    return types.void(*literals, operands, r0, ahead, ahead0, step), codegen


@kernel
def _fetched(ahead, rows, tile_rows, depth, most):
    """Elements of `ahead` for each row of C, and for each k of a tile: of so many lines at most."""
    share = ahead.size // max(rows, 1)
    return share, min(-(-share * tile_rows // max(depth, 1)), most * LINE_BYTES // ahead.itemsize)


@kernel
def _terms(ranges, tile, depth):
    """What a tile sums over: all k, or those of its entry in `ranges`."""
    if ranges.size == 0:
        return 0, depth, 0, 1
    return ranges[4 * tile], ranges[4 * tile + 1], ranges[4 * tile + 2], ranges[4 * tile + 3]


@kernel
def overwrite_ranges(
    a, a0, row, col, r0, r1, depth, ranges, b, b0, ldb, start, s0, c, c0, crow, columns, ahead
):
    """`overwrite_panel`, each tile over its range of k alone; a cache fetches `ahead`: what is read next.

    `ranges` has first, length, pitch and runs for each tile from r0 on, or nothing if all sum over all k.
    """
    fetched = _fetched(ahead, r1 - r0, TILE_ROWS, depth, 1)
    overwrite_tiles(
        a, a0, row, col, r0, r1, depth, ranges, b, b0, ldb, start, s0, c, c0, crow, columns, ahead, fetched
    )


@kernel
def overwrite_tiles(
    a, a0, row, col, r0, r1, depth, ranges, b, b0, ldb, start, s0, c, c0, crow, columns, ahead, fetched
):
    """`overwrite_ranges`, while a cache fetches a line `share` a row of C, `step` a k behind `ahead[0]`."""
    keep_out_of_line()
    lanes = lanes_of(a)
    share, step = fetched
    for r in range(r0, r1, TILE_ROWS):
        terms = _terms(ranges, (r - r0) // TILE_ROWS, depth)
        operands = a, a0, row, col, terms, b, b0, ldb, start, s0, c, c0, crow, columns
        if columns == TILE_VECTORS * lanes:
            _tile(TILE_ROWS, 2, 0, 0, 0, operands, r, ahead, (r - r0) * share, step)
        elif columns > lanes:
            _tile(TILE_ROWS, 2, 1, 0, 0, operands, r, ahead, (r - r0) * share, step)
        else:
            _tile(TILE_ROWS, 1, 1, 0, 0, operands, r, ahead, (r - r0) * share, step)


@kernel
def overwrite_panel(a, a0, row, col, r0, r1, depth, b, b0, ldb, start, s0, c, c0, crow, columns):
    """C = start + A B for the rows r0 to r1 of the tables and one panel of at most 2 vectors of columns."""
    overwrite_ranges(
        a, a0, row, col, r0, r1, depth, col[:0], b, b0, ldb, start, s0, c, c0, crow, columns, b[:0]
    )


@kernel
def tile_rows(entries):
    """The rows of the tiles of a table of so many entries: see `add_rows`."""
    return TALL_ROWS if entries % TILE_ROWS != 0 else TILE_ROWS


@kernel
def add_ranges(a, a0, row, col, rows, depth, ranges, b, b0, ldb, c, c0, crow, columns, ahead):
    """`add_panel`, each tile over its range of k alone; see `overwrite_ranges`.

    `rows` are the first and the end of the tables' rows, and how many a tile has.
    """
    r0, r1, high = rows
    # A panel of one vector has no room for more than a line.
    share, step = _fetched(ahead, r1 - r0, high, depth, PANEL_LINES if columns > lanes_of(a) else 1)
    fetched = share, step, step * ahead.itemsize > LINE_BYTES
    add_tiles(a, a0, row, col, rows, depth, ranges, b, b0, ldb, c, c0, crow, columns, ahead, fetched)


@kernel
def add_tiles(a, a0, row, col, rows, depth, ranges, b, b0, ldb, c, c0, crow, columns, ahead, fetched):
    """`add_ranges`, while a cache fetches what lies `share` a row of C, and `step` a k, behind `ahead[0]`.

    `fetched` is these two, and whether that is a stream of as many lines as the panel's rows have.
    """
    keep_out_of_line()
    lanes = lanes_of(a)
    r0, r1, high = rows
    share, step, streams = fetched
    if high != TILE_ROWS:
        for r in range(r0, r1, TALL_ROWS):
            terms = _terms(ranges, (r - r0) // TALL_ROWS, depth)
            operands = a, a0, row, col, terms, b, b0, ldb, b, 0, c, c0, crow, columns
            if columns == TILE_VECTORS * lanes and streams:
                _tile(TALL_ROWS, 2, 0, 1, 1, operands, r, ahead, (r - r0) * share, step)
            elif columns == TILE_VECTORS * lanes:
                _tile(TALL_ROWS, 2, 0, 1, 0, operands, r, ahead, (r - r0) * share, step)
            elif columns > lanes:
                _tile(TALL_ROWS, 2, 1, 1, 1, operands, r, ahead, (r - r0) * share, step)
            else:
                _tile(TALL_ROWS, 1, 1, 1, 0, operands, r, ahead, (r - r0) * share, step)
        return
    for r in range(r0, r1, TILE_ROWS):
        terms = _terms(ranges, (r - r0) // TILE_ROWS, depth)
        operands = a, a0, row, col, terms, b, b0, ldb, b, 0, c, c0, crow, columns
        if columns == TILE_VECTORS * lanes and streams:
            _tile(TILE_ROWS, 2, 0, 1, 1, operands, r, ahead, (r - r0) * share, step)
        elif columns == TILE_VECTORS * lanes:
            _tile(TILE_ROWS, 2, 0, 1, 0, operands, r, ahead, (r - r0) * share, step)
        elif columns > lanes:
            _tile(TILE_ROWS, 2, 1, 1, 1, operands, r, ahead, (r - r0) * share, step)
        else:
            _tile(TILE_ROWS, 1, 1, 1, 0, operands, r, ahead, (r - r0) * share, step)


@kernel
def add_panel(a, a0, row, col, r0, r1, depth, b, b0, ldb, c, c0, crow, columns):
    """C += A B for the rows r0 to r1 of the tables and one panel of at most 2 vectors of columns.

    There are a multiple of `TILE_ROWS` of them, or of `TALL_ROWS`.
    """
    rows = r0, r1, tile_rows(r1 - r0)
    add_ranges(a, a0, row, col, rows, depth, col[:0], b, b0, ldb, c, c0, crow, columns, b[:0])


def add_rows(entries: int) -> int:
    """The tile's rows, `TILE_ROWS` or `TALL_ROWS`, with which `add_panel` repeats the fewest."""
    return min((TILE_ROWS, TALL_ROWS), key=lambda rows: -(-entries // rows) * rows)


def padded_rows(entries: np.ndarray, rows: int = TILE_ROWS) -> np.ndarray:
    """A row table filled up to a multiple of `rows` with its last entry."""
    missing = -len(entries) % rows
    return np.concatenate([entries, np.repeat(entries[-1:], missing)]).astype(np.intp)
