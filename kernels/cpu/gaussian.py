"""Normal numbers by counting: Box and Muller (1958), from a pair of uniform numbers each, by vectors."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import kernel
from .dropout import RANDOM_BITS, random_bits
from .simd import lanes
from .vectors import (
    all_lanes,
    first_lanes,
    keep_in_line,
    like,
    load,
    multiply_add,
    pointer,
    root,
    select,
    store,
)

# Uniform numbers are made for so many elements at a time.
BLOCK = 256

_LANES = lanes(np.float32)
_UNIT = np.float32(2.0**-RANDOM_BITS)

# log(1 + x) / x**3 - 1 / x**2 + 1 / (2 x), from x = sqrt(1/2) - 1 to sqrt(2) - 1: logf of Moshier's Cephes
# library, whose ln(2) in two parts these are too.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_LN2_COARSE, _LN2_FINE = 0.693359375, -2.12194440e-4
_ROOT_OF_HALF = 0x3F3504F3

# The series of sin(2 pi u) / u in u**2, which is exact to float32 for |u| up to 1/4.
_SINE = tuple((-1) ** k * (2 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(7))


@intrinsic
def _binary_parts(typing_context, a):
    """Of a float32 vector above 0: m from sqrt(1/2) to sqrt(2), and the floats n of ``a = m * 2**n``."""

    def codegen(context, builder, signature, values):
        kind = values[0].type
        integers = ir.VectorType(ir.IntType(32), a.lanes)

        def number(value):
            return ir.Constant(integers, [value] * a.lanes)

        bits = builder.bitcast(values[0], integers)
        exponent = builder.ashr(builder.sub(bits, number(_ROOT_OF_HALF)), number(23))
        mantissa = builder.bitcast(builder.sub(bits, builder.shl(exponent, number(23))), kind)
        parts = [mantissa, builder.sitofp(exponent, kind)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(a, 2)(a), codegen  # type: ignore[attr-defined]


@kernel
def _logarithm(a):
    """log of a float32 vector of positive numbers."""
    keep_in_line()
    mantissa, exponent = _binary_parts(a)
    x = mantissa - like(a, 1)
    square = x * x
    series = like(a, _LOG[0])
    for k in range(1, 9):
        series = multiply_add(series, x, like(a, _LOG[k]))
    rest = multiply_add(exponent, like(a, _LN2_FINE), series * x * square)
    rest = multiply_add(square, like(a, -0.5), rest)
    return multiply_add(exponent, like(a, _LN2_COARSE), x + rest)


@kernel
def _cosine_of_turns(a):
    """cos(2 pi a) of a float32 vector in [0, 1)."""
    keep_in_line()
    quarter = like(a, 0.25)
    # sin(2 pi u) of the distance u from the nearer quarter or three quarters.
    u = select(a > like(a, 0.5), a - like(a, 0.75), quarter - a)
    square = u * u
    series = like(a, _SINE[6])
    for k in range(5, -1, -1):
        series = multiply_add(series, square, like(a, _SINE[k]))
    return series * u


@kernel
def _add_vector(values, at, noise, radii, angles, k, mask):
    keep_in_line()
    value, radius = load(values, at + k, mask), load(radii, k, mask)
    # Lanes that don't count must not be zero either.
    radius = select(mask, radius, like(radius, 1))
    normal = root(like(radius, -2) * _logarithm(radius)) * _cosine_of_turns(load(angles, k, mask))
    store(multiply_add(like(value, noise), normal, value), values, at + k, mask)


@kernel
def add_noise(values, noise, first, seed, uniform):
    """values[k] += noise * g[first + k]; `uniform` is room for 2 x BLOCK float32."""
    places, radii, angles = pointer(values), pointer(uniform[0]), pointer(uniform[1])
    radius, angle = uniform[0], uniform[1]
    everything = all_lanes(places)
    for start in range(0, values.size, BLOCK):
        size = min(BLOCK, values.size - start)
        counter = seed + np.uint64(2) * np.uint64(first + start)
        for k in range(size):
            number = counter + np.uint64(2) * np.uint64(k)
            radius[k] = np.float32(1) - np.float32(np.int64(random_bits(number))) * _UNIT
            angle[k] = np.float32(np.int64(random_bits(number + np.uint64(1)))) * _UNIT
        whole = size // _LANES * _LANES
        for k in range(0, whole, _LANES):
            _add_vector(places, start, noise, radii, angles, k, everything)
        if whole < size:
            _add_vector(places, start, noise, radii, angles, whole, first_lanes(places, size - whole))
