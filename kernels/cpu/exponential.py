"""The exponential function of vectors, and what softmax makes of it."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import kernel
from .vectors import (
    AS_WRITTEN,
    LONG,
    all_lanes,
    all_long_lanes,
    first_lanes,
    keep_in_line,
    lanes_of,
    largest,
    like,
    load,
    select,
    splat,
    store,
    total,
    wide,
    zeros,
)

# By bits of an element: the exponent's first bit and offset, arguments beyond which the result is 0 or
# infinite, terms of the series, and ln(2) in two parts, of which the first has so many zeros at its end that
# its product with an exponent is exact.
_FORMATS = {
    32: (23, 127, -104.0, 89.0, 8, 0.693359375, -2.1219444005469057e-4),
    64: (52, 1023, -746.0, 710.0, 14, 0.6931471803691238, 1.9082149292705877e-10),
}


@intrinsic
def exponential(typing_context, a):
    """exp of each lane, to about one unit in the last place; NaN stays NaN.

    exp(x) = 2**n exp(r) with n = round(x / ln(2)) and r = x - n ln(2), |r| < 0.35: the series of exp(r) needs
    few terms. 2**n is made from its bits, in two factors, because it may lie beyond the floats' exponents.
    """

    def codegen(context, builder, signature, values):
        bits = a.element.bitwidth
        first_bit, offset, lowest, highest, terms, coarse, fine = _FORMATS[bits]
        kind = values[0].type
        integers = ir.VectorType(ir.IntType(bits), a.lanes)

        def number(value, vector=kind):
            return ir.Constant(vector, [value] * a.lanes)

        def call(name, *arguments):
            function = ir.FunctionType(kind, [kind] * len(arguments))
            name = f"llvm.{name}.{a.shape}"
            return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)

        def bounded(value, symbol, bound):
            return builder.select(builder.fcmp_ordered(symbol, value, bound), bound, value)

        def power(exponent):
            biased = builder.add(exponent, number(offset, integers))
            return builder.bitcast(builder.shl(biased, number(first_bit, integers)), kind)

        x = bounded(bounded(values[0], "<", number(lowest)), ">", number(highest))
        # Added to a number, it leaves the number, rounded, in the last bits.
        shifter = number(1.5 * 2.0**first_bit)
        shifted = call("fma", x, number(1 / math.log(2)), shifter)
        n = builder.fsub(shifted, shifter, flags=AS_WRITTEN)
        r = call("fma", n, number(-coarse), x)
        r = call("fma", n, number(-fine), r)
        series = number(1 / math.factorial(terms - 1))
        for k in range(terms - 2, -1, -1):
            series = call("fma", series, r, number(1 / math.factorial(k)))
        exponent = builder.sub(builder.bitcast(shifted, integers), builder.bitcast(shifter, integers))
        half = builder.ashr(exponent, number(1, integers))
        result = builder.fmul(series, power(half), flags=AS_WRITTEN)
        return builder.fmul(result, power(builder.sub(exponent, half)), flags=AS_WRITTEN)

    if not isinstance(a.element, types.Float):
        return None
    return a(a), codegen


@kernel
def _larger(row, at, mask, best):
    """Lane by lane, the larger of row[at:] and `best`."""
    keep_in_line()
    value = load(row, at, mask)
    return select((value > best) & mask, value, best)


@kernel
def largest_of(row, first, count):
    """The largest of row[first : first + count], `row` being a pointer; NaN counts for nothing."""
    keep_in_line()
    many, every = all_long_lanes(row), all_lanes(row)
    lanes = lanes_of(row)
    width = LONG * lanes
    best = like(zeros(row), -np.inf)
    long, whole = count // width * width, count // lanes * lanes
    if long > 0:
        # One vector by itself would wait for each comparison.
        long_best = like(load(row, first, many), -np.inf)
        for k in range(0, long, width):
            long_best = _larger(row, first + k, many, long_best)
        best = like(best, largest(long_best))
    for k in range(long, whole, lanes):
        best = _larger(row, first + k, every, best)
    if whole < count:
        best = _larger(row, first + whole, first_lanes(row, count - whole), best)
    return largest(best)


@kernel
def _add_power(row, at, mask, shift, powers, to, keeps, sums):
    """exp(row[at:] - shift) added to `sums`, and written to powers[to:] if `keeps`."""
    keep_in_line()
    power = load(row, at, mask)
    power = exponential(power - like(power, shift))
    power = select(mask, power, like(power, 0))
    if keeps:
        store(power, powers, to, mask)
    return sums + wide(power)


@kernel
def sum_of_powers(row, first, count, shift, powers, to, keeps):
    """The sum, in float64, of exp(row[first : first + count] - shift); written to powers[to:] if `keeps`."""
    keep_in_line()
    many, every = all_long_lanes(row), all_lanes(row)
    lanes = lanes_of(row)
    width = LONG * lanes
    long_sums, sums = wide(splat(shift, many)), wide(zeros(row))
    long_sums = like(long_sums, 0)
    long, whole = count // width * width, count // lanes * lanes
    for k in range(0, long, width):
        long_sums = _add_power(row, first + k, many, shift, powers, to + k, keeps, long_sums)
    for k in range(long, whole, lanes):
        sums = _add_power(row, first + k, every, shift, powers, to + k, keeps, sums)
    if whole < count:
        some = first_lanes(row, count - whole)
        sums = _add_power(row, first + whole, some, shift, powers, to + whole, keeps, sums)
    return total(long_sums) + total(sums)
