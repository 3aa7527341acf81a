"""Matrices of float32 in three parts of bfloat16, as `matrix_unit` multiplies them.

The leading part of x has the first 8 bits of it, the middle the next 8, rounded, and the rest what is left,
which fits another 8: their sum is x. Where x is infinite or NaN, so is at least one of its parts, and what
the others are says nothing. Those who pack are told, and pack once more, `tame`: with 0 in its place. Parts
below the smallest normal float32 count as 0.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from .image_tiles import gather_images
from .matrix_unit import HALF_WORDS, PANEL_WORDS, PARTS, SIDE, TERMS, WORDS
from .vectors import all_lanes, first_lanes, keep_in_line, like, load, pointer, select, store, total, zeros

_LEADING_BITS = 0xFFFF0000
_HALF_OF_LAST_BIT = 0x8000

# Numbers of an array in which `pack_columns` turns rows to columns.
SQUARES = SIDE * TERMS


@intrinsic
def _parts(typing_context, a):
    """The three parts of a float32 vector, as such vectors; the lower 16 bits of each lane don't count."""

    def codegen(context, builder, signature, values):
        kind = values[0].type
        integers = ir.VectorType(ir.IntType(32), a.lanes)

        def number(value):
            return ir.Constant(integers, [value] * a.lanes)

        def upper(bits):
            return builder.bitcast(builder.and_(bits, number(_LEADING_BITS)), kind)

        x = values[0]
        leading = upper(builder.bitcast(x, integers))
        behind = builder.fsub(x, leading, flags=("nsz",))
        middle = upper(builder.add(builder.bitcast(behind, integers), number(_HALF_OF_LAST_BIT)))
        rest = builder.fsub(behind, middle, flags=("nsz",))
        return context.make_tuple(builder, signature.return_type, [leading, middle, rest])

    return types.UniTuple(a, PARTS)(a), codegen  # type: ignore[attr-defined]


@intrinsic
def _neighbours(typing_context, a, b):
    """The bfloat16 of the lanes of `a`, and then those of `b`."""
    words = a.of(types.int32)

    def codegen(context, builder, signature, values):
        halves = ir.VectorType(ir.IntType(16), 2 * a.lanes)
        upper = ir.Constant(ir.VectorType(ir.IntType(32), 2 * a.lanes), list(range(1, 4 * a.lanes, 2)))
        both = builder.shuffle_vector(*(builder.bitcast(value, halves) for value in values), upper)
        return builder.bitcast(both, context.get_value_type(words))

    return words(a, a), codegen


@intrinsic
def _store_halves(typing_context, words, target, place):
    """Write a vector of words to where a pointer to numbers of 16 bits says."""

    def codegen(context, builder, signature, values):
        kind = values[0].type.as_pointer()
        builder.store(values[0], builder.bitcast(builder.gep(values[1], [values[2]]), kind)).align = 2
        return context.get_dummy_value()

    return types.void(words, target, types.intp), codegen


@intrinsic
def _pairs(typing_context, a, b):
    """Lane by lane, the bfloat16 of `a` and then that of `b`."""
    words = a.of(types.int32)

    def codegen(context, builder, signature, values):
        integers = context.get_value_type(words)
        low, high = (builder.bitcast(value, integers) for value in values)
        low = builder.lshr(low, ir.Constant(integers, [16] * a.lanes))
        return builder.or_(low, builder.and_(high, ir.Constant(integers, [_LEADING_BITS] * a.lanes)))

    return words(a, a), codegen


@kernel
def _read(values, place, mask, tame):
    """A vector of numbers, or zeros where these are not finite and not wanted."""
    keep_in_line()
    x = load(values, place, mask)
    if tame:
        nothing = zeros(values)
        x = select(x - x == nothing, x, nothing)
    return x


@kernel
def _read_signs(values, place, mask, tame):
    """A vector of numbers, or 1 or -1 where these are infinite and not wanted.

    Sums that have the infinity already stay what they are, if the other factor is infinite, too.
    """
    keep_in_line()
    x = load(values, place, mask)
    if tame:
        nothing = zeros(values)
        one = like(x, 1.0)
        x = select(x - x == nothing, x, select(x > nothing, one, nothing - one))
    return x


@kernel
def _pack_neighbours(values, place, some, more, words, target, tame):
    """`TERMS` numbers next to each other; the masks are of the first and the second half."""
    keep_in_line()
    u = _parts(_read(values, place, some, tame))
    v = _parts(_read(values, place + SIDE, more, tame))
    everything = all_lanes(words)
    store(_neighbours(u[0], v[0]), words, target, everything)
    store(_neighbours(u[1], v[1]), words, target + WORDS, everything)
    store(_neighbours(u[2], v[2]), words, target + 2 * WORDS, everything)
    return u[2] + v[2]


@kernel
def pack_rows(a, a0, a_row, rows, depth, tame, packed, place, pitch, step):
    """Rows of `depth` numbers each to packed[place], `pitch` words apart; whether all are finite.

    The arrays are pointers. A row's registers of terms are `step` words apart; what fills up the last is
    zero.
    """
    everything = all_lanes(a)
    rests = zeros(a)
    whole = depth // TERMS * TERMS
    some, more = first_lanes(a, depth - whole), first_lanes(a, depth - whole - SIDE)
    for r in range(rows):
        source, target = a0 + r * a_row, place + r * pitch
        for k in range(0, whole, TERMS):
            rests = rests + _pack_neighbours(a, source + k, everything, everything, packed, target, tame)
            target += step
        if whole < depth:
            rests = rests + _pack_neighbours(a, source + whole, some, more, packed, target, tame)
    return total(rests - rests) == 0


@kernel
def pack_columns(a, a0, a_k, rows, depth, tame, squares, packed, place, pitch, step):
    """`pack_rows` of a matrix whose terms are `a_k` apart and whose rows touch; arrays, `squares` is room."""
    keep_out_of_line()
    source, words = pointer(squares), pointer(packed)
    finite = True
    for r in range(0, rows, SIDE):
        many = min(rows - r, SIDE)
        for k in range(0, depth, TERMS):
            count = min(depth - k, TERMS)
            for first in range(0, count, SIDE):
                gather_images(a, a0 + k * a_k + r, a_k, first, count, many, squares, first, TERMS)
            target = place + r * pitch + k // TERMS * step
            finite &= pack_rows(source, 0, TERMS, many, count, tame, words, target, pitch, step)
    return finite


@kernel
def _pack_pair(values, place, next_place, some, more, words, target, tame):
    """Two rows of a register of columns: of a term, and of the next one."""
    keep_in_line()
    u = _parts(_read(values, place, some, tame))
    v = _parts(_read(values, next_place, more, tame))
    everything = all_lanes(words)
    store(_pairs(u[0], v[0]), words, target, everything)
    store(_pairs(u[1], v[1]), words, target + 2 * HALF_WORDS, everything)
    store(_pairs(u[2], v[2]), words, target + 4 * HALF_WORDS, everything)
    return u[2] + v[2]


@kernel
def pack_panel(b, b0, b_k, depth, columns, tame, packed, place):
    """A panel of at most `BLOCK` columns, `depth` terms of each, to packed[place]; whether all are finite.

    The arrays are pointers; of B the rows are `b_k` apart. What fills up registers that are read is zero.
    """
    rests = zeros(b)
    none = first_lanes(b, 0)
    for c in range(0, columns, SIDE):
        some = first_lanes(b, columns - c)
        source, target = b0 + c, place + c // SIDE * HALF_WORDS
        for k in range(0, depth - 1, 2):
            at = target + k // TERMS * PANEL_WORDS + k % TERMS // 2 * SIDE
            row = source + k * b_k
            rests = rests + _pack_pair(b, row, row + b_k, some, some, packed, at, tame)
        for k in range(depth // 2 * 2, (depth + TERMS - 1) // TERMS * TERMS, 2):
            at = target + k // TERMS * PANEL_WORDS + k % TERMS // 2 * SIDE
            last = some if k < depth else none
            row = source + min(k, depth - 1) * b_k
            rests = rests + _pack_pair(b, row, row, last, none, packed, at, tame)
    return total(rests - rests) == 0


@kernel
def pack_turned_panel(b, b0, b_column, depth, columns, tame, squares, packed, place):
    """`pack_panel` of a matrix whose columns are `b_column` apart and whose terms touch; arrays."""
    keep_out_of_line()
    source, words = pointer(squares), pointer(packed)
    finite = True
    for c in range(0, columns, SIDE):
        many = min(columns - c, SIDE)
        for k in range(0, depth, TERMS):
            count = min(depth - k, TERMS)
            for first in range(0, count, SIDE):
                gather_images(
                    b,
                    b0 + c * b_column + k + first,
                    b_column,
                    0,
                    many,
                    count - first,
                    squares,
                    first * SIDE,
                    SIDE,
                )
            target = place + k // TERMS * PANEL_WORDS + c // SIDE * HALF_WORDS
            finite &= pack_panel(source, 0, SIDE, count, many, tame, words, target)
    return finite


@kernel
def pack_pixels(b, b0, pixel, places, pixels, columns, tame, packed, place):
    """`pack_panel` of the pixels at `places`, of `pixel` elements, from b0; zeros where a place is negative.

    Of the places there are whole registers of terms, of which the first `pixels` count; pointers.
    """
    rests, none = zeros(b), first_lanes(b, 0)
    for c in range(0, columns, SIDE):
        some = first_lanes(b, columns - c)
        for k in range(0, (pixels + TERMS - 1) // TERMS * TERMS, 2):
            u = places[k] if k < pixels else -1
            v = places[k + 1] if k + 1 < pixels else -1
            row, following = b0 + max(u, 0) * pixel + c, b0 + max(v, 0) * pixel + c
            first, second = some if u >= 0 else none, some if v >= 0 else none
            target = place + k // TERMS * PANEL_WORDS + c // SIDE * HALF_WORDS + k % TERMS // 2 * SIDE
            rests = rests + _pack_pair(b, row, following, first, second, packed, target, tame)
    return total(rests - rests) == 0


@kernel
def pack_channels(x, x0, pixel, pixels, channels, tame, squares, packed, place, pitch, part):
    """`TERMS` pixels of at most `SIDE` channels to rows of channels, from packed[place] on; whether finite.

    Of the pixels the first `pixels` are there, `pixel` elements apart; the others are zero. `packed` has
    numbers of 16 bits: rows `pitch` apart, and parts of one `part`.
    """
    source, halves = pointer(squares), pointer(packed)
    everything = all_lanes(source)
    rests = zeros(source)
    if pixels <= 0:
        nothing = _neighbours(rests, rests)
        for c in range(channels):
            for p in range(PARTS):
                _store_halves(nothing, halves, place + c * pitch + p * part)
        return True
    for first in range(0, TERMS, SIDE):
        if first < pixels:
            gather_images(x, x0, pixel, first, pixels, channels, squares, first, TERMS)
        else:
            for c in range(channels):
                store(zeros(source), source, c * TERMS + first, everything)
    for c in range(channels):
        u = _parts(_read_signs(source, c * TERMS, everything, tame))
        v = _parts(_read_signs(source, c * TERMS + SIDE, everything, tame))
        target = place + c * pitch
        _store_halves(_neighbours(u[0], v[0]), halves, target)
        _store_halves(_neighbours(u[1], v[1]), halves, target + part)
        _store_halves(_neighbours(u[2], v[2]), halves, target + 2 * part)
        rests = rests + u[2] + v[2]
    return total(rests - rests) == 0


def words_of_panel(depth: int) -> int:
    """Words of a panel of `depth` terms."""
    return -(-depth // TERMS) * PANEL_WORDS
