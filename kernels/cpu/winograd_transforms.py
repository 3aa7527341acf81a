"""The transforms of Winograd's F(4x4, 3x3) as vector instructions, a vector of channels or filters at a time.

With the interpolation points 0, 1, -1, 2, -2 and infinity (Lavin & Gray, "Fast Algorithms for Convolutional
Neural Networks", 2015, section 4.3) a 4x4 tile of outputs is

    Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A

of the 6x6 window d of the image and the 3x3 filter g, * being elementwise. Nothing here is checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .tile import Emitter

# Sides of the window, of the tile of outputs and of the filter.
WINDOW = 6
TILE = 4
TAPS = 3

_I64 = ir.IntType(64)
# Numba gives its own flags to instructions that have none: LLVM would then reorder these sums.
_FLAGS = ("nsz",)


class _Transformer(Emitter):
    """The three transforms along one axis, on lists of vectors."""

    def constant(self, value):
        return ir.Constant(self.vector, [value] * self.lanes)

    def add(self, a, b):
        return self.builder.fadd(a, b, flags=_FLAGS)

    def subtract(self, a, b):
        return self.builder.fsub(a, b, flags=_FLAGS)

    def times(self, factor, a):
        return self.builder.fmul(self.constant(factor), a, flags=_FLAGS)

    def scaled(self, factor, a, b):
        """factor * a + b"""
        return self.multiply_add(self.constant(factor), a, b)

    def input(self, d):
        """B^T d"""
        odd, even = self.subtract(d[3], d[1]), self.subtract(d[4], d[2])
        far_odd, far_even = self.scaled(-4.0, d[1], d[3]), self.scaled(-4.0, d[2], d[4])
        return [
            self.scaled(4.0, self.subtract(d[0], d[2]), even),
            self.add(far_even, far_odd),
            self.subtract(far_even, far_odd),
            self.scaled(2.0, odd, even),
            self.scaled(-2.0, odd, even),
            self.scaled(-4.0, odd, self.subtract(d[5], d[3])),
        ]

    def weight(self, g):
        """G g"""
        outer = self.add(g[0], g[2])
        far = self.scaled(1 / 24, g[0], self.times(1 / 6, g[2]))
        return [
            self.times(1 / 4, g[0]),
            self.times(-1 / 6, self.add(outer, g[1])),
            self.times(-1 / 6, self.subtract(outer, g[1])),
            self.scaled(1 / 12, g[1], far),
            self.scaled(-1 / 12, g[1], far),
            g[2],
        ]

    def output(self, m):
        """A^T m"""
        near, near_odd = self.add(m[1], m[2]), self.subtract(m[1], m[2])
        far, far_odd = self.add(m[3], m[4]), self.subtract(m[3], m[4])
        return [
            self.add(self.add(m[0], near), far),
            self.scaled(2.0, far_odd, near_odd),
            self.scaled(4.0, far, near),
            self.add(self.scaled(8.0, far_odd, near_odd), m[5]),
        ]

    def output_gradient(self, y):
        """A y"""
        even, odd = self.add(y[0], y[2]), self.add(y[1], y[3])
        far_even, far_odd = self.scaled(4.0, y[2], y[0]), self.scaled(4.0, y[3], y[1])
        return [
            y[0],
            self.add(even, odd),
            self.subtract(even, odd),
            self.scaled(2.0, far_odd, far_even),
            self.scaled(-2.0, far_odd, far_even),
            y[3],
        ]

    def weight_gradient(self, m):
        """G^T m"""
        near, near_odd = self.add(m[1], m[2]), self.subtract(m[2], m[1])
        far, far_odd = self.add(m[3], m[4]), self.subtract(m[3], m[4])
        outer = self.times(-1 / 6, near)
        return [
            self.scaled(1 / 4, m[0], self.scaled(1 / 24, far, outer)),
            self.scaled(1 / 12, far_odd, self.times(1 / 6, near_odd)),
            self.add(self.scaled(1 / 6, far, outer), m[5]),
        ]

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
def input_columns(typing_context, x, rows, x0, step, count, zeros, t, t0):
    """B^T times `count` columns of a window: t[t0 + (column * 6 + i) * lanes].

    The six pixels of a column lie at x[x0 + rows[i]], and `step` further for each next column; a negative
    entry of `rows` stands for a row of zeros, and `zeros` is a vector of them.
    """
    signature = types.void(x, rows, x0, step, count, zeros, t, t0)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, x.dtype)
        image, table, nothing, target = (
            _array(context, builder, signature, arguments, position) for position in (0, 1, 5, 6)
        )
        x0, step, count, t0 = (arguments[i] for i in (2, 3, 4, 7))
        begins, steps = [], []
        for i in range(WINDOW):
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
        for i, value in enumerate(emit.input([emit.load(pixel) for pixel in pixels])):
            emit.store(value, emit.at(place, _number(i * emit.lanes)))
        following = builder.add(column, _number(1))
        phis = [
            (column, _number(0), following),
            (place, target, emit.at(place, _number(WINDOW * emit.lanes))),
            *((pixels[i], begins[i], emit.at(pixels[i], steps[i])) for i in range(WINDOW)),
        ]
        for phi, begin, next_value in phis:
            phi.add_incoming(begin, entry)
            phi.add_incoming(next_value, loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def input_tile(typing_context, t, t0, v, v0, step):
    """v[v0 + (6 i + j) * step] = (t B)[i, j] for six columns t that `input_columns` made."""
    signature = types.void(t, t0, v, v0, step)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, t.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        target = emit.at(_array(context, builder, signature, arguments, 2), arguments[3])
        places = emit.steps(target, arguments[4], WINDOW * WINDOW)
        for i in range(WINDOW):
            row = [emit.load(emit.at(source, _number((j * WINDOW + i) * emit.lanes))) for j in range(WINDOW)]
            for j, value in enumerate(emit.input(row)):
                emit.store(value, places[i * WINDOW + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def weight_vector(typing_context, weight, w0, tap, u, u0, step):
    """u[u0 + (6 i + j) * step] = (G g G^T)[i, j], the taps g[kh, kw] being weight[w0 + (3 kh + kw) * tap]."""
    signature = types.void(weight, w0, tap, u, u0, step)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, weight.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        target = emit.at(_array(context, builder, signature, arguments, 3), arguments[4])
        taps = [emit.load(pointer) for pointer in emit.steps(source, arguments[2], TAPS * TAPS)]
        places = emit.steps(target, arguments[5], WINDOW * WINDOW)
        columns = [emit.weight(taps[kw::TAPS]) for kw in range(TAPS)]
        for i in range(WINDOW):
            for j, value in enumerate(emit.weight([column[i] for column in columns])):
                emit.store(value, places[i * WINDOW + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def output_tile(typing_context, m, m0, step, bias, b0, y, y0, row, pixel, rows, columns):
    """y[y0 + i * row + j * pixel] = bias[b0] + (A^T M A)[i, j], for i below `rows` and j below `columns`.

    M[i, j] is m[m0 + (6 i + j) * step].
    """
    signature = types.void(m, m0, step, bias, b0, y, y0, row, pixel, rows, columns)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, m.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        start = emit.load(emit.at(_array(context, builder, signature, arguments, 3), arguments[4]))
        target = emit.at(_array(context, builder, signature, arguments, 5), arguments[6])
        row, pixel, rows, columns = arguments[7:]
        # Outputs beyond the image's edge go where nobody reads.
        nowhere = builder.bitcast(cgutils.alloca_once(builder, emit.vector), target.type)
        products = emit.steps(source, arguments[2], WINDOW * WINDOW)
        halves = [
            emit.output([emit.load(products[i * WINDOW + j]) for i in range(WINDOW)]) for j in range(WINDOW)
        ]
        in_columns = [builder.icmp_signed("<", _number(j), columns) for j in range(TILE)]
        for i, first in enumerate(emit.steps(target, row, TILE)):
            in_row = builder.icmp_signed("<", _number(i), rows)
            places = emit.steps(first, pixel, TILE)
            for j, value in enumerate(emit.output([half[i] for half in halves])):
                place = builder.select(builder.and_(in_row, in_columns[j]), places[j], nowhere)
                emit.store(emit.add(value, start), place)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def output_gradient_tile(typing_context, dout, d0, row, pixel, rows, columns, zeros, w, w0, step):
    """w[w0 + (6 i + j) * step] = (A dY A^T)[i, j], dY[i, j] being dout[d0 + i * row + j * pixel].

    It is zero for i from `rows` on and j from `columns` on; `zeros` is a vector of zeros.
    """
    signature = types.void(dout, d0, row, pixel, rows, columns, zeros, w, w0, step)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, dout.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        row, pixel, rows, columns = arguments[2:6]
        nothing = _array(context, builder, signature, arguments, 6)
        target = emit.at(_array(context, builder, signature, arguments, 7), arguments[8])
        in_rows = [builder.icmp_signed("<", _number(i), rows) for i in range(TILE)]
        lines = [emit.steps(line, pixel, TILE) for line in emit.steps(source, row, TILE)]
        halves = []
        for j in range(TILE):
            in_column = builder.icmp_signed("<", _number(j), columns)
            pixels = [
                builder.select(builder.and_(in_rows[i], in_column), lines[i][j], nothing) for i in range(TILE)
            ]
            halves.append(emit.output_gradient([emit.load(pixel) for pixel in pixels]))
        places = emit.steps(target, arguments[9], WINDOW * WINDOW)
        for i in range(WINDOW):
            for j, value in enumerate(emit.output_gradient([half[i] for half in halves])):
                emit.store(value, places[i * WINDOW + j])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def add_filter_gradient(typing_context, m, m0, step, dweight, d0, tap, shared):
    """dweight[d0 + (3 kh + kw) * tap] += (G^T M G)[kh, kw], M[i, j] being m[m0 + (6 i + j) * step].

    The first `shared` lanes, if it is positive, are left alone.
    """
    signature = types.void(m, m0, step, dweight, d0, tap, shared)

    def codegen(context, builder, signature, arguments):
        emit = _Transformer(context, builder, m.dtype)
        source = emit.at(_array(context, builder, signature, arguments, 0), arguments[1])
        target = emit.at(_array(context, builder, signature, arguments, 3), arguments[4])
        sums = emit.steps(source, arguments[2], WINDOW * WINDOW)
        places = emit.steps(target, arguments[5], TAPS * TAPS)
        mask = builder.not_(emit.mask(arguments[6], 0))
        halves = [
            emit.weight_gradient([emit.load(sums[i * WINDOW + j]) for i in range(WINDOW)])
            for j in range(WINDOW)
        ]
        for kh in range(TAPS):
            for kw, value in enumerate(emit.weight_gradient([half[kh] for half in halves])):
                place = places[kh * TAPS + kw]
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
