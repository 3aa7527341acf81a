"""The engine: one register tile with offset tables, and the panel loop around it.

Everything with a multiply-add in it is

    C[c0 + crow[m] + n] (+)= sum over k of A[a0 + row[m] + col[k]] * B[b0 + k * ldb + n]

for a panel of columns n. The tables `row`, `col` and `crow` say what the operation is; they are built once a
shape, in elements. The tile emits LLVM vector code for a literal number of rows and vectors, keeps
that piece of C in registers over the whole sum, and reads each element of A as a broadcast.

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

TILE_ROWS = simd.TILE_ROWS
# The taps of 3 x 3 fill these; with 2 vectors they are as much as 32 registers hold.
TALL_ROWS = 9 if TILE_ROWS == 8 else TILE_ROWS
TILE_VECTORS = simd.TILE_VECTORS
VECTOR_BITS = simd.VECTOR_BITS

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

    def broadcast(self, scalar):
        undefined = ir.Constant(self.vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), None)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, zeros)

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


def _products(emit, a_rows, col, depth, b, ldb, start, vectors):
    """The loop over k: the accumulators of all rows and vectors, begun at `start`."""
    builder = emit.builder
    rows = len(a_rows)
    entry = builder.block
    loop = builder.append_basic_block("tile.k")
    end = builder.append_basic_block("tile.end")
    some = builder.icmp_signed(">", depth, ir.Constant(_I64, 0))
    builder.cbranch(some, loop, end)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    row_of_b = builder.phi(b.type)
    sums = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    offset = builder.load(emit.at(col, k))
    panel = [emit.load(emit.at(row_of_b, ir.Constant(_I64, v * emit.lanes))) for v in range(vectors)]
    new = []
    for m in range(rows):
        element = emit.broadcast(builder.load(emit.at(a_rows[m], offset)))
        new.append([emit.multiply_add(element, panel[v], sums[m][v]) for v in range(vectors)])
    next_k = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(ir.Constant(_I64, 0), entry)
    k.add_incoming(next_k, loop)
    row_of_b.add_incoming(b, entry)
    row_of_b.add_incoming(emit.at(row_of_b, ldb), loop)
    for m in range(rows):
        for v in range(vectors):
            sums[m][v].add_incoming(start[v], entry)
            sums[m][v].add_incoming(new[m][v], loop)
    builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, end)

    builder.position_at_end(end)
    results = [[builder.phi(emit.vector) for _ in range(vectors)] for _ in range(rows)]
    for m in range(rows):
        for v in range(vectors):
            results[m][v].add_incoming(start[v], entry)
            results[m][v].add_incoming(new[m][v], loop)
    return results


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
def tile(
    typing_context,
    rows,
    vectors,
    ragged,
    add,
    a,
    a0,
    row,
    col,
    r0,
    depth,
    b,
    b0,
    ldb,
    start,
    s0,
    c,
    c0,
    crow,
    columns,
):
    """One tile of `rows` x `vectors` vectors of C; see the top of this file.

    The literals: `ragged` stores only the first `columns` columns; `add` adds the sum to C, else C is
    overwritten by start[s0 + n] + sum. `b` and `start` are read in whole vectors. Nothing is checked.
    """
    literals = (rows, vectors, ragged, add)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    tile_rows, tile_vectors, is_ragged, adds = (literal.literal_value for literal in literals)
    signature = types.void(*literals, a, a0, row, col, r0, depth, b, b0, ldb, start, s0, c, c0, crow, columns)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, a.dtype)

        def data(position):
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            return array.data

        a0, r0, depth, b0, ldb, s0, c0, columns = (arguments[i] for i in (5, 8, 9, 11, 12, 14, 16, 18))
        row, col, crow = data(6), data(7), data(17)
        panel = emit.at(data(10), b0)
        a_base, c_base = emit.at(data(4), a0), emit.at(data(15), c0)
        numbers = [ir.Constant(_I64, m) for m in range(tile_rows)]
        a_rows = [emit.at(a_base, builder.load(emit.at(row, r0, m))) for m in numbers]
        c_rows = [emit.at(c_base, builder.load(emit.at(crow, r0, m))) for m in numbers]
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(tile_vectors)]
        zero = ir.Constant(emit.vector, None)
        begin = [zero if adds else emit.load(emit.at(data(13), s0, lane)) for lane in lanes]
        sums = _products(emit, a_rows, col, depth, panel, ldb, begin, tile_vectors)

        # Only the last vector of a ragged panel is cut: the panel functions below see to it.
        masks = [None] * (tile_vectors - 1) + [emit.mask(columns, tile_vectors - 1) if is_ragged else None]
        places = [[emit.at(c_row, lane) for lane in lanes] for c_row in c_rows]
        _write(emit, sums, places, masks, adds)
        return context.get_dummy_value()

    return signature, codegen


@kernel
def overwrite_panel(a, a0, row, col, r0, r1, depth, b, b0, ldb, start, s0, c, c0, crow, columns):
    """C = start + A B for the rows r0 to r1 of the tables and one panel of at most 2 vectors of columns."""
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * a.itemsize)
    for r in range(r0, r1, TILE_ROWS):
        if columns == TILE_VECTORS * lanes:
            tile(TILE_ROWS, 2, 0, 0, a, a0, row, col, r, depth, b, b0, ldb, start, s0, c, c0, crow, columns)
        elif columns > lanes:
            tile(TILE_ROWS, 2, 1, 0, a, a0, row, col, r, depth, b, b0, ldb, start, s0, c, c0, crow, columns)
        else:
            tile(TILE_ROWS, 1, 1, 0, a, a0, row, col, r, depth, b, b0, ldb, start, s0, c, c0, crow, columns)


@kernel
def add_panel(a, a0, row, col, r0, r1, depth, b, b0, ldb, c, c0, crow, columns):
    """C += A B for the rows r0 to r1 of the tables and one panel of at most 2 vectors of columns.

    There are a multiple of `TILE_ROWS` of them, or of `TALL_ROWS`.
    """
    keep_out_of_line()
    lanes = VECTOR_BITS // (8 * a.itemsize)
    if (r1 - r0) % TILE_ROWS != 0:
        for r in range(r0, r1, TALL_ROWS):
            if columns == TILE_VECTORS * lanes:
                tile(TALL_ROWS, 2, 0, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)
            elif columns > lanes:
                tile(TALL_ROWS, 2, 1, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)
            else:
                tile(TALL_ROWS, 1, 1, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)
        return
    for r in range(r0, r1, TILE_ROWS):
        if columns == TILE_VECTORS * lanes:
            tile(TILE_ROWS, 2, 0, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)
        elif columns > lanes:
            tile(TILE_ROWS, 2, 1, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)
        else:
            tile(TILE_ROWS, 1, 1, 1, a, a0, row, col, r, depth, b, b0, ldb, b, 0, c, c0, crow, columns)


def add_rows(entries: int) -> int:
    """The tile's rows, `TILE_ROWS` or `TALL_ROWS`, with which `add_panel` repeats the fewest."""
    return min((TILE_ROWS, TALL_ROWS), key=lambda rows: -(-entries // rows) * rows)


def padded_rows(entries: np.ndarray, rows: int = TILE_ROWS) -> np.ndarray:
    """A row table filled up to a multiple of `rows` with its last entry."""
    missing = -len(entries) % rows
    return np.concatenate([entries, np.repeat(entries[-1:], missing)]).astype(np.intp)
