"""The matrix unit of processors that have one (AMX): products of float32, each in six of bfloat16.

A bfloat16 has the exponent of a float32 and 8 bits of its 24, so that a float32 is the sum of three: its
leading part, its middle and the rest, see `split`. Of the nine products of two such numbers the six
largest are summed, each exact, in float32; the other three are less than a float32's rounding. The unit does
16 times as many in a cycle as vectors do: sums of products of float32, as accurate as those of vectors, in
less than half of the time that the vectors' peak allows.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, TDPBF16PS; Henry, Tang and Heinecke,
"Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", 2019.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from functools import cache

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import kernel
from . import simd
from .vectors import first_lanes, load, store

# Rows, and columns, of one of the unit's registers of sums; and terms of those of factors.
SIDE = 16
TERMS = 32
# A product is done by 2 x 2 registers of sums: so many rows, and columns.
BLOCK = 2 * SIDE
# The parts of a number, and the numbers of 32 bits that hold `TERMS` bfloat16 of one part, and of all.
PARTS = 3
WORDS = TERMS // 2
ROW_WORDS = PARTS * WORDS
# Those of `TERMS` terms of a block of columns: part by part, and half by half.
HALF_WORDS = SIDE * WORDS
PANEL_WORDS = PARTS * 2 * HALF_WORDS

_I8, _I64 = ir.IntType(8), ir.IntType(64)
# Linux lets a process use the unit's registers when it asks for them: arch_prctl and its arguments.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


@cache
def is_there() -> bool:
    """Whether the processor has the unit, and the system lets this process use it.

    ``FASTCNN_MATRIX_UNIT=0`` in the environment says no, and so does a width of vectors that is forced to
    less than the processor's.
    """
    forced = os.environ.get("FASTCNN_MATRIX_UNIT", "1")
    if forced not in ("0", "1"):
        raise ValueError(f"FASTCNN_MATRIX_UNIT: {forced!r} is neither 0 nor 1")
    features = llvm.get_host_cpu_features()
    if (
        forced == "0"
        or simd.VECTOR_BITS != 512
        or not (features.get("amx-tile") and features.get("amx-bf16"))
    ):
        return False
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0
    except (OSError, AttributeError):
        return False


def _configuration() -> np.ndarray:
    """What `start` hands to the unit: all eight registers have 16 rows of 64 bytes."""
    block = np.zeros(64, np.uint8)
    block[0] = 1
    block[16:32].view(np.uint16)[:] = 4 * WORDS
    block[48:56] = SIDE
    return block


CONFIGURATION = _configuration()


def _instruction(builder, name, values):
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), values)


def _number(register):
    return ir.Constant(_I8, register)


def _move(builder, name, register, base, place, pitch):
    """Load or store a register, whose rows are `pitch` elements apart."""
    place = builder.gep(base, [place])
    size = ir.Constant(_I64, 2 if place.type.pointee == ir.IntType(16) else 4)
    first = builder.bitcast(place, _I8.as_pointer())
    _instruction(builder, name, [_number(register), first, builder.mul(pitch, size)])


@intrinsic
def start(typing_context, configuration):
    """Make the unit ready for this thread, with a pointer to `CONFIGURATION`; `end` it afterwards."""

    def codegen(context, builder, signature, values):
        _instruction(builder, "ldtilecfg", [builder.bitcast(values[0], _I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(configuration), codegen


@intrinsic
def end(typing_context):
    """Free the unit's registers, which the system else saves whenever it puts the thread aside."""

    def codegen(context, builder, signature, values):
        _instruction(builder, "tilerelease", [])
        return context.get_dummy_value()

    return types.void(), codegen


# Its registers: four of sums, two of the left factor's rows and two of the right one's columns.
_LEFT, _RIGHT = 4, 6


@intrinsic
def _clear_sums(typing_context):
    def codegen(context, builder, signature, values):
        for register in range(4):
            _instruction(builder, "tilezero", [_number(register)])
        return context.get_dummy_value()

    return types.void(), codegen


def _move_sums(name):
    """A function that loads or stores the sums: `BLOCK` rows of as many columns at sums[place]."""

    def codegen(context, builder, signature, values):
        for register in range(4):
            i, j = divmod(register, 2)
            first = builder.add(values[1], ir.Constant(_I64, i * SIDE * BLOCK + j * SIDE))
            _move(builder, name, register, values[0], first, ir.Constant(_I64, BLOCK))
        return context.get_dummy_value()

    return codegen


@intrinsic
def _load_sums(typing_context, sums, place):
    return types.void(sums, types.intp), _move_sums("tileloadd64")


@intrinsic
def _store_sums(typing_context, sums, place):
    return types.void(sums, types.intp), _move_sums("tilestored64")


def _order(least, most):
    """Pairs of parts, left and right, whose numbers' sum is in a range; most share one with that before."""
    lefts = [(0, (2, 1, 0)), (2, (0,)), (1, (0, 1))]
    return [(left, right) for left, rights in lefts for right in rights if least <= left + right <= most]


@intrinsic(prefer_literal=True)
def _add_terms(typing_context, high, wide, first, last, a, a0, pitch, part, b, b0):
    """Add `TERMS` products of 1 or 2 registers of rows, the literal `high`, and as many, `wide`, of columns.

    Of the parts those are multiplied whose numbers' sum is from `first` to `last`, literals.
    """
    literals = (high, wide, first, last)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    rows, columns, least, most = (literal.literal_value for literal in literals)

    def codegen(context, builder, signature, values):
        _, _, _, _, a, a0, pitch, part, b, b0 = values
        loaded = None
        for left, right in _order(least, most):
            if loaded is None or left != loaded[0]:
                for i in range(rows):
                    place = builder.add(a0, builder.mul(part, ir.Constant(_I64, left)))
                    if i:
                        place = builder.add(place, builder.mul(pitch, ir.Constant(_I64, SIDE)))
                    _move(builder, "tileloadd64", _LEFT + i, a, place, pitch)
            if loaded is None or right != loaded[1]:
                for j in range(columns):
                    place = builder.add(b0, ir.Constant(_I64, (2 * right + j) * HALF_WORDS))
                    _move(builder, "tileloadd64", _RIGHT + j, b, place, ir.Constant(_I64, WORDS))
            loaded = left, right
            for i in range(rows):
                for j in range(columns):
                    registers = 2 * i + j, _LEFT + i, _RIGHT + j
                    _instruction(builder, "tdpbf16ps", [_number(register) for register in registers])
        return context.get_dummy_value()

    return types.void(*literals, a, types.intp, types.intp, types.intp, b, types.intp), codegen


# Which products of parts `multiply` sums, by the sum of their numbers: all that count; those of the leading
# parts alone; and all but those.
ALL, LEADING, OTHERS = 0, 1, 2


@kernel
def multiply(a, a0, pitch, part, terms, count, b, b0, rows, columns, which, sums, s0, adds):
    """sums = A B, or sums += A B, for at most `BLOCK` rows and columns.

    The arrays are pointers: to what `split` has made, and to float32. A's rows are `pitch` elements apart,
    the parts of a register's terms `part`, and its k-th terms are at terms[k] of each row; those of B are
    `PANEL_WORDS` apart.
    """
    if adds:
        _load_sums(sums, s0)
    else:
        _clear_sums()
    for k in range(count):
        at, b_at = a0 + terms[k], b0 + k * PANEL_WORDS
        if which == LEADING:
            _add_terms(2, 2, 0, 0, a, at, pitch, part, b, b_at)
        elif which == OTHERS:
            _add_terms(2, 2, 1, 2, a, at, pitch, part, b, b_at)
        elif rows > SIDE and columns > SIDE:
            _add_terms(2, 2, 0, 2, a, at, pitch, part, b, b_at)
        elif rows > SIDE:
            _add_terms(2, 1, 0, 2, a, at, pitch, part, b, b_at)
        elif columns > SIDE:
            _add_terms(1, 2, 0, 2, a, at, pitch, part, b, b_at)
        else:
            _add_terms(1, 1, 0, 2, a, at, pitch, part, b, b_at)
    _store_sums(sums, s0)


@kernel
def write_sums(sums, s0, bias, b0, biases, c, c0, pitch, rows, columns, adds):
    """C = bias + sums, or C += sums, for some rows and columns of what `multiply` wrote; pointers.

    Of the bias there are so many numbers; rows of C are `pitch` apart.
    """
    for n in range(0, columns, SIDE):
        some = first_lanes(sums, columns - n)
        begin = load(bias, b0 + n, first_lanes(sums, biases - n))
        for m in range(rows):
            place = c0 + m * pitch + n
            value = load(sums, s0 + m * BLOCK + n, some)
            store((load(c, place, some) if adds else begin) + value, c, place, some)
