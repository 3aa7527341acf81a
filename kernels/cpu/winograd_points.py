"""Winograd's transforms for any number of interpolation points, as vector instructions.

A tile of 4 outputs in a row of filters of r taps is

    y = A^T [ (G g) * (B^T d) ]

of n = r + 3 inputs d and the filter g, * being elementwise, by the construction of Toom and Cook: the
products are values of a product of polynomials at n - 1 points and at infinity (Winograd, "Arithmetic
Complexity of Computations", 1980; Lavin & Gray, 2015, section 4). Vectors hold images; see `winograd_lanes`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .loops import memory, sum_loop
from .simd import TILE_ROWS
from .tile import Emitter

# Outputs of a tile along each axis.
TILE = 4
# Points by their number, which counts infinity. Small powers of two, lest numbers of very different size be
# added; and 1 second, see `tile_products`.
_ALL = tuple(Fraction(point) for point in ("0", "1", "-1", "2", "-2", "1/2", "-1/2"))
_WITH_ONE = {size: _ALL[: size - 1] for size in (6, 7, 8)}
# Besides 0 and infinity, the two pairs of opposite points with the least error for six points, a half of that
# of 1 and 2: found by trying sixteenths (Barabasz et al., "Error Analysis and Improving the Accuracy of
# Winograd Convolution for Deep Neural Networks", 2020, look for points likewise). More points gain nothing.
NEAR, FAR = Fraction(5, 8), Fraction(3, 2)
_EXACT = {**_WITH_ONE, 6: (Fraction(0), NEAR, -NEAR, FAR, -FAR)}
# The transforms: of inputs, B^T; of products, A^T; of gradients of outputs, A; of filters, G; and of the
# gradients of products, G^T.
INPUT, OUTPUT, GRADIENT, FILTER, FILTER_GRADIENT = range(5)
# Filters of whose products registers hold a column, and in how many tiles of 6, 7 and 8 points. Where both
# are two, all that is multiplied is read once for two products.
FILTERS = 1 if TILE_ROWS < 8 else 2
TOGETHER = (1, 1, 1) if TILE_ROWS < 8 else (2, 2, 1)
# The point 1, at which a polynomial's value is the sum of its coefficients.
ONE = 1

_I64 = ir.IntType(64)
# Numba gives its own flags to instructions that have none: LLVM would then reorder these sums.
_FLAGS = ("nsz",)


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients of the product of x - root, from that of 1 on."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [a - root * b for a, b in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients


@lru_cache(maxsize=16)
def matrices(size: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B^T (size, size), A^T (4, size) and G (size, size - 3), float64; the last row is that of infinity.

    For the points with the least error if `exact`, else for those that include 1.
    """
    points = (_EXACT if exact else _WITH_ONE)[size]
    taps = size + 1 - TILE
    b, a, g = (np.zeros(shape) for shape in ((size, size), (TILE, size), (size, taps)))
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        b[j, : size - 1] = [float(coefficient) for coefficient in _polynomial(others)]
        a[:, j] = [float(point**i) for i in range(TILE)]
        scale = math.prod(point - other for other in others)
        g[j] = [float(point**i / scale) for i in range(taps)]
    b[-1] = [float(coefficient) for coefficient in _polynomial(list(points))]
    a[-1, -1] = g[-1, -1] = 1
    return b, a, g


class Transformer(Emitter):
    """Products of the matrices with lists of vectors."""

    exact = False

    def sum(self, factors, values):
        """The sum of factors times values, or None if all factors are zero."""
        total = None
        # A factor of one takes no multiplication, if it comes first.
        terms = sorted(zip(factors, values, strict=True), key=lambda term: term[0] != 1)
        for factor, value in terms:
            if factor == 0:
                continue
            constant = ir.Constant(self.vector, [factor] * self.lanes)
            if total is None:
                total = value if factor == 1 else self.builder.fmul(constant, value, flags=_FLAGS)
            elif factor == 1:
                total = self.add(total, value)
            elif factor == -1:
                total = self.builder.fsub(total, value, flags=_FLAGS)
            else:
                total = self.multiply_add(constant, value, total)
        return total

    def add(self, a, b):
        return self.builder.fadd(a, b, flags=_FLAGS)

    def subtract(self, a, b):
        return self.builder.fsub(a, b, flags=_FLAGS)

    def rows(self, matrix, values, opposites):
        """matrix @ values, rows of opposite points sharing what they have in common."""
        results: list = [None] * len(matrix)
        for j, k in opposites:
            same, other = (matrix[j] + matrix[k]) / 2, (matrix[j] - matrix[k]) / 2
            # The factor of all of what differs is multiplied as it is added.
            factor = other[np.flatnonzero(other)[-1]]
            same, other = self.sum(same, values), self.sum(other / factor, values)
            for row, sign in ((j, 1), (k, -1)):
                results[row] = self.sum((1, sign * factor), (same, other))
        return [
            self.sum(row, values) if result is None else result
            for row, result in zip(matrix, results, strict=True)
        ]

    def columns(self, matrix, values, opposites):
        """matrix @ values, values of opposite points being added and subtracted first."""
        values, matrix = list(values), matrix.copy()
        for j, k in opposites:
            same, other = (matrix[:, j] + matrix[:, k]) / 2, (matrix[:, j] - matrix[:, k]) / 2
            matrix[:, j], matrix[:, k] = same, other
            values[j], values[k] = self.add(values[j], values[k]), self.subtract(values[j], values[k])
        return [self.sum(row, values) for row in matrix]

    def transformed(self, kind, size, values):
        points = (_EXACT if self.exact else _WITH_ONE)[size]
        opposites = [(j, points.index(-p)) for j, p in enumerate(points) if p > 0 and -p in points]
        b, a, g = matrices(size, self.exact)
        if kind in (OUTPUT, FILTER_GRADIENT):
            return self.columns(a if kind == OUTPUT else g.T, values, opposites)
        return self.rows({INPUT: b, GRADIENT: a.T, FILTER: g}[kind], values, opposites)


def _literals(*values):
    return all(isinstance(value, types.IntegerLiteral) for value in values)


@intrinsic(prefer_literal=True)
def transform(typing_context, size, kind, source, s0, source_step, target, t0, target_step):
    """target[t0 + i * target_step] = (matrix @ source[s0 + k * source_step])[i], of vectors.

    The literals are the number of points and which matrix.
    """
    if not _literals(size, kind):
        return None
    points, which = size.literal_value, kind.literal_value
    signature = types.void(size, kind, source, s0, source_step, target, t0, target_step)

    def codegen(context, builder, signature, arguments):
        emit = Transformer(context, builder, source.dtype)
        begin = emit.at(memory(context, builder, source, arguments[2]), arguments[3])
        end = emit.at(memory(context, builder, target, arguments[5]), arguments[6])
        count = {GRADIENT: TILE, FILTER: points + 1 - TILE}.get(which, points)
        places = [emit.at(begin, builder.mul(arguments[4], ir.Constant(_I64, k))) for k in range(count)]
        results = emit.transformed(which, points, [emit.load(place) for place in places])
        for i, result in enumerate(results):
            emit.store(result, emit.at(end, builder.mul(arguments[7], ir.Constant(_I64, i))))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def tile_products(typing_context, size, tiles, v0, u0, s0, t0, operands):
    """A^T times columns of products: sums[t0 + t * beyond + (f * 4 + m) * size], of vectors.

    Element i of the column of tile t and filter f is the sum over k < depth of values[v0 + t * apart +
    taps[k] + i] * weights[u0 + (k * size + i) * FILTERS + f], with start[s0 + f] added at the point 1: what
    is added there for the point 1 of the other axis too, is added to all outputs of the tile. The literals
    are the numbers of points and of tiles; `operands` are values, apart, taps, depth, weights, start, sums
    and beyond, all arrays being pointers.
    """
    if not _literals(size, tiles):
        return None
    points, many = size.literal_value, tiles.literal_value

    def codegen(context, builder, signature, arguments):
        emit = Transformer(context, builder, operands.types[0].dtype)
        v0, u0, s0, t0, packed = arguments[2:]
        values, apart, taps, depth, weights, start, sums, beyond = cgutils.unpack_tuple(builder, packed)
        weights, start = emit.at(weights, u0), emit.at(start, s0)
        numbers = [ir.Constant(_I64, t) for t in range(many)]
        windows = [emit.at(values, v0, builder.mul(apart, t)) for t in numbers]
        targets = [emit.at(sums, t0, builder.mul(beyond, t)) for t in numbers]
        column = points * FILTERS

        def step(k, totals):
            tap = builder.load(emit.at(taps, k))
            places = [emit.at(window, tap) for window in windows]
            row = emit.at(weights, builder.mul(k, ir.Constant(_I64, column)))
            new: list = []
            for i in range(points):
                inputs = [emit.load(emit.at(place, ir.Constant(_I64, i * emit.lanes))) for place in places]
                for f in range(FILTERS):
                    weight = emit.broadcast(builder.load(emit.at(row, ir.Constant(_I64, i * FILTERS + f))))
                    before = totals[len(new) : len(new) + many]
                    new += [emit.multiply_add(weight, *pair) for pair in zip(inputs, before, strict=True)]
            return new

        totals = [ir.Constant(emit.vector, None)] * (column * many)
        for f in range(FILTERS):
            bias = emit.broadcast(builder.load(emit.at(start, ir.Constant(_I64, f))))
            first = (ONE * FILTERS + f) * many
            totals[first : first + many] = [bias] * many
        totals = sum_loop(emit, ir.Constant(_I64, 0), depth, totals, step, unrolls=many == 1)
        for f in range(FILTERS):
            for t, target in enumerate(targets):
                products = totals[f * many + t :: FILTERS * many]
                for m, value in enumerate(emit.transformed(OUTPUT, points, products)):
                    offset = (f * TILE + m) * points * emit.lanes
                    emit.store(value, emit.at(target, ir.Constant(_I64, offset)))
        return context.get_dummy_value()

    return types.void(size, tiles, v0, u0, s0, t0, operands), codegen
