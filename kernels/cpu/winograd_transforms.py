"""The transforms of Winograd's algorithm as vector instructions, a vector of channels or filters at a time.

With n = r + 3 interpolation points (see `winograd_points`) a 4x4 tile of outputs of filters of r x r is

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A

of the n x n window d of the image and the filter g, * being elementwise. The number of points is that of a
tuple's entries: it is part of a type, so that one source compiles for each. Nothing here is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .winograd_points import FILTER, FILTER_GRADIENT, GRADIENT, INPUT, OUTPUT, TILE, Transformer

_I64 = ir.IntType(64)


class _Transformer(Transformer):
    """The transforms, and places in steps."""

    exact = True

    def steps(self, pointer, step, count):
        """`count` pointers, `step` elements apart."""
        pointers = [pointer]
        for _ in range(count - 1):
            pointers.append(self.at(pointers[-1], step))
        return pointers


def _array(context, builder, signature, arguments, position):
    return context.make_array(signature.args[position])(context, builder, arguments[position]).data


def _number(value):
    return ir.Constant(_I64, value)


@intrinsic
def input_columns(typing_context, form, x, rows, x0, step, count, zeros, t, t0):
    """B^T times `count` columns of a window: t[t0 + (column * n + i) * lanes], n being the entries of `form`.

    The n pixels of a column lie at x[x0 + rows[i]], and `step` further for each next column; a negative
    entry of `rows` stands for a row of zeros, and `zeros` is a vector of them.
    """
    signature = types.void(form, x, rows, x0, step, count, zeros, t, t0)
    points = form.count

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, x.dtype)
        image, table, nothing, target = (
            _array(context, builder, signature, arguments, position) for position in (1, 2, 6, 7)
        )
        x0, step, count, t0 = (arguments[i] for i in (3, 4, 5, 8))
        begins, steps = [], []
        for i in range(points):
            offset = builder.load(emit.at(table, _number(i)))
            outside = builder.icmp_signed("<", offset, _number(0))
            begins.append(builder.select(outside, nothing, emit.at(image, offset, x0)))
            steps.append(builder.select(outside, _number(0), step))
        target = emit.at(target, t0)

        entry = builder.block
        loop, end = (builder.append_basic_block(name) for name in ("columns", "columns.end"))
        builder.cbranch(builder.icmp_signed(">", count, _number(0)), loop, end)
        builder.position_at_end(loop)
        column, place = builder.phi(_I64), builder.phi(target.type)
        pixels = [builder.phi(begin.type) for begin in begins]
        for i, value in enumerate(emit.transformed(INPUT, points, [emit.load(pixel) for pixel in pixels])):
            emit.store(value, emit.at(place, _number(i * emit.lanes)))
        following = builder.add(column, _number(1))
        phis = [
            (column, _number(0), following),
            (place, target, emit.at(place, _number(points * emit.lanes))),
            *((pixels[i], begins[i], emit.at(pixels[i], steps[i])) for i in range(points)),
        ]
        for phi, begin, next_value in phis:
            phi.add_incoming(begin, entry)
            phi.add_incoming(next_value, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def input_tile(typing_context, form, t, t0, v, v0, step):
    """v[v0 + (n i + j) * step] = (t B)[i, j] for n columns t that `input_columns` made."""
    signature = types.void(form, t, t0, v, v0, step)
    points = form.count

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, t.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 1), arguments[2])
        target = emit.at(_array(context, builder, signature, arguments, 3), arguments[4])
        places = emit.steps(target, arguments[5], points * points)
        for i in range(points):
            row = [emit.load(emit.at(source, _number((j * points + i) * emit.lanes))) for j in range(points)]
            for j, value in enumerate(emit.transformed(INPUT, points, row)):
                emit.store(value, places[i * points + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def weight_vector(typing_context, form, weight, w0, tap, u, u0, step):
    """u[u0 + (n i + j) * step] = (G g G^T)[i, j], the taps g[kh, kw] being weight[w0 + (r kh + kw) * tap]."""
    signature = types.void(form, weight, w0, tap, u, u0, step)
    points, side = form.count, form.count + 1 - TILE

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, weight.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 1), arguments[2])
        target = emit.at(_array(context, builder, signature, arguments, 4), arguments[5])
        taps = [emit.load(pointer) for pointer in emit.steps(source, arguments[3], side * side)]
        places = emit.steps(target, arguments[6], points * points)
        columns = [emit.transformed(FILTER, points, taps[kw::side]) for kw in range(side)]
        for i in range(points):
            row = emit.transformed(FILTER, points, [column[i] for column in columns])
            for j, value in enumerate(row):
                emit.store(value, places[i * points + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def output_tile(typing_context, form, m, m0, step, bias, b0, y, y0, row, pixel, rows, columns):
    """y[y0 + i * row + j * pixel] = bias[b0] + (A^T M A)[i, j], for i below `rows` and j below `columns`.

    M[i, j] is m[m0 + (n i + j) * step].
    """
    signature = types.void(form, m, m0, step, bias, b0, y, y0, row, pixel, rows, columns)
    points = form.count

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, m.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 1), arguments[2])
        start = emit.load(emit.at(_array(context, builder, signature, arguments, 4), arguments[5]))
        target = emit.at(_array(context, builder, signature, arguments, 6), arguments[7])
        row, pixel, rows, columns = arguments[8:]
        # Outputs beyond the image's edge go where nobody reads.
        nowhere = builder.bitcast(cgutils.alloca_once(builder, emit.vector), target.type)
        products = emit.steps(source, arguments[3], points * points)
        halves = [
            emit.transformed(OUTPUT, points, [emit.load(place) for place in products[j::points]])
            for j in range(points)
        ]
        in_columns = [builder.icmp_signed("<", _number(j), columns) for j in range(TILE)]
        for i, first in enumerate(emit.steps(target, row, TILE)):
            in_row = builder.icmp_signed("<", _number(i), rows)
            places = emit.steps(first, pixel, TILE)
            for j, value in enumerate(emit.transformed(OUTPUT, points, [half[i] for half in halves])):
                place = builder.select(builder.and_(in_row, in_columns[j]), places[j], nowhere)
                emit.store(emit.add(value, start), place)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def output_gradient_tile(typing_context, form, dout, d0, row, pixel, rows, columns, zeros, w, w0, step):
    """w[w0 + (n i + j) * step] = (A dY A^T)[i, j], dY[i, j] being dout[d0 + i * row + j * pixel].

    It is zero for i from `rows` on and j from `columns` on; `zeros` is a vector of zeros.
    """
    signature = types.void(form, dout, d0, row, pixel, rows, columns, zeros, w, w0, step)
    points = form.count

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, dout.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 1), arguments[2])
        row, pixel, rows, columns = arguments[3:7]
        nothing = _array(context, builder, signature, arguments, 7)
        target = emit.at(_array(context, builder, signature, arguments, 8), arguments[9])
        in_rows = [builder.icmp_signed("<", _number(i), rows) for i in range(TILE)]
        lines = [emit.steps(line, pixel, TILE) for line in emit.steps(source, row, TILE)]
        halves = []
        for j in range(TILE):
            in_column = builder.icmp_signed("<", _number(j), columns)
            pixels = [
                builder.select(builder.and_(in_rows[i], in_column), lines[i][j], nothing) for i in range(TILE)
            ]
            halves.append(emit.transformed(GRADIENT, points, [emit.load(pixel) for pixel in pixels]))
        places = emit.steps(target, arguments[10], points * points)
        for i in range(points):
            row = emit.transformed(GRADIENT, points, [half[i] for half in halves])
            for j, value in enumerate(row):
                emit.store(value, places[i * points + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_filter_gradient(typing_context, form, m, m0, step, dweight, d0, tap, shared):
    """dweight[d0 + (r kh + kw) * tap] += (G^T M G)[kh, kw], M[i, j] being m[m0 + (n i + j) * step].

    The first `shared` lanes, if it is positive, are left alone.
    """
    signature = types.void(form, m, m0, step, dweight, d0, tap, shared)
    points, side = form.count, form.count + 1 - TILE

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, m.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 1), arguments[2])
        target = emit.at(_array(context, builder, signature, arguments, 4), arguments[5])
        sums = emit.steps(source, arguments[3], points * points)
        places = emit.steps(target, arguments[6], side * side)
        mask = builder.not_(emit.mask(arguments[7], 0))
        halves = [
            emit.transformed(FILTER_GRADIENT, points, [emit.load(place) for place in sums[j::points]])
            for j in range(points)
        ]
        for kh in range(side):
            row = emit.transformed(FILTER_GRADIENT, points, [half[kh] for half in halves])
            for kw, value in enumerate(row):
                place = places[kh * side + kw]
                emit.store(emit.add(emit.load(place, mask), value), place, mask)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def transpose_square(typing_context, source, s0, step, target, t0, target_step):
    """target[t0 + i * target_step + j] = source[s0 + j * step + i], a square of one vector's lanes a side."""
    signature = types.void(source, s0, step, target, t0, target_step)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, source.dtype)
        begin = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        target = emit.at(_array(context, builder, signature, arguments, 3), arguments[4])
        vectors = [emit.load(pointer) for pointer in emit.steps(begin, arguments[2], emit.lanes)]
        half = emit.lanes // 2
        # Each round interleaves the first half of the vectors with the second; after log2(lanes) rounds
        # the bits of the two indices have changed places.
        orders = [
            ir.Constant(
                ir.VectorType(ir.IntType(32), emit.lanes),
                [first + lane // 2 + lane % 2 * emit.lanes for lane in range(emit.lanes)],
            )
            for first in (0, half)
        ]
        for _ in range(emit.lanes.bit_length() - 1):
            vectors = [
                builder.shuffle_vector(vectors[i], vectors[i + half], order)
                for i in range(half)
                for order in orders
            ]
        for vector, place in zip(vectors, emit.steps(target, arguments[5], emit.lanes), strict=True):
            emit.store(vector, place)
        return context.get_dummy_value()

    return signature, codegen
