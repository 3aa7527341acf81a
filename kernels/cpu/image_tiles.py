"""Tiles over vectors of images: what `image_lanes` computes with, as LLVM instructions.

A block holds some vectors of images, L images in all. An array of vectors of images has the images of a
block next to each other, element after element.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .loops import memory, sum_loop
from .simd import TILE_ROWS
from .tile import Emitter

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)

# Vectors of images of a block, and filters of a tile: their sums, the images and a weight fill the registers.
# 32 are there for all vectors but AVX2's.
VECTORS = 2
_FEW_REGISTERS = TILE_ROWS < 8
FILTERS = (2, 3, 4, 6) if _FEW_REGISTERS else (4, 6, 8, 10)
# Taps and filters of a tile of the gradient to the weights, whose blocks are one vector of images.
TAPS = 3 if _FEW_REGISTERS else 5
# How many vectors ahead each image is fetched, or made ready to be written: too many streams for
# the processor to see.
_AHEAD = 2
TAP_FILTERS = (1, 2, 3) if _FEW_REGISTERS else (3, 4, 5)


def exchanges(lanes, size):
    """The two shuffles of a pair of vectors that exchange their blocks of `size` lanes."""
    low = [lane if not lane & size else lane - size + lanes for lane in range(lanes)]
    high = [lane + size if not lane & size else lane + lanes for lane in range(lanes)]
    return [ir.Constant(ir.VectorType(_I32, lanes), order) for order in (low, high)]


def _butterfly(emit, rows):
    """Transpose as many vectors as a vector has lanes, in log2(lanes) rounds of exchanged blocks."""
    lanes = emit.lanes
    rows = list(rows)
    size = 1
    while size < lanes:
        masks = exchanges(lanes, size)
        for i in range(lanes):
            if not i & size:
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (emit.builder.shuffle_vector(*pair, mask) for mask in masks)
        size *= 2
    return rows


def _images(emit, begin, image, first, images, lane_mask):
    """For each lane of images: where that image begins, and `lane_mask`.

    For one that is not there, where the first begins, and no lane. An address behind the array won't do: it
    takes processors hundreds of cycles to find out that no lane needs the memory that is missing there.
    """
    builder = emit.builder
    none = ir.Constant(lane_mask.type, None)
    for i in range(emit.lanes):
        number = builder.add(first, ir.Constant(_I64, i))
        exists = builder.icmp_signed("<", number, images)
        number = builder.select(exists, number, first)
        yield emit.at(begin, builder.mul(number, image)), builder.select(exists, lane_mask, none)


def _is_whole(emit, first, images, count):
    """Whether all lanes of images, and of elements, are there."""
    lanes = ir.Constant(_I64, emit.lanes)
    builder = emit.builder
    exist = builder.icmp_signed("<=", builder.add(first, lanes), images)
    return builder.and_(exist, builder.icmp_signed(">=", count, lanes))


def _prefetch(emit, pointer):
    place = emit.builder.bitcast(pointer, ir.IntType(8).as_pointer())
    # To read, to the first level, data.
    switches = [ir.Constant(_I32, number) for number in (0, 3, 1)]
    emit.call("llvm.prefetch.p0", ir.VoidType(), [place, *switches])


@intrinsic
def gather_images(typing_context, x, x0, image, first, images, count, window, w0, block):
    """window[w0 + k * block + i] = x[x0 + (first + i) * image + k] for a vector of images i.

    `block` is the number of a block's images. Elements from `count` on and images from `images` on are zero.
    As many rows of the window are written as a vector has lanes.
    """

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        x0, image, first, images, count, w0, block = (arguments[i] for i in (1, 2, 3, 4, 5, 7, 8))
        begin = emit.at(memory(context, builder, x, arguments[0]), x0)
        target = emit.at(memory(context, builder, window, arguments[6]), w0)
        places = [
            emit.at(begin, builder.mul(builder.add(first, ir.Constant(_I64, i)), image))
            for i in range(emit.lanes)
        ]
        for place in places:
            _prefetch(emit, emit.at(place, ir.Constant(_I64, _AHEAD * emit.lanes)))
        whole, part = (builder.append_basic_block(name) for name in ("gather.whole", "gather.part"))
        end = builder.append_basic_block("gather.end")
        builder.cbranch(_is_whole(emit, first, images, count), whole, part)
        builder.position_at_end(whole)
        every = [emit.load(place) for place in places]
        builder.branch(end)
        builder.position_at_end(part)
        some = [
            emit.load(place, mask)
            for place, mask in _images(emit, begin, image, first, images, emit.mask(count, 0))
        ]
        builder.branch(end)
        builder.position_at_end(end)
        rows = [builder.phi(emit.vector) for _ in places]
        for row, *values in zip(rows, every, some, strict=True):
            for value, source in zip(values, (whole, part), strict=True):
                row.add_incoming(value, source)
        for k, row in enumerate(_butterfly(emit, rows)):
            emit.store(row, emit.at(target, builder.mul(block, ir.Constant(_I64, k))))
        return context.get_dummy_value()

    return types.void(x, x0, image, first, images, count, window, w0, block), codegen


def _store(emit, value, bits, place, mask=None):
    """Write a vector, as integers of `bits` if that is not 0; lanes outside of `mask` are left alone."""
    if not bits:
        emit.store(value, place, mask)
        return
    vector = ir.VectorType(ir.IntType(bits), emit.lanes)
    whole = emit.builder.trunc(emit.builder.fptosi(value, ir.VectorType(_I32, emit.lanes)), vector)
    place = emit.builder.bitcast(place, vector.as_pointer())
    if mask is None:
        emit.builder.store(whole, place).align = bits // 8
    else:
        arguments = [whole, place, ir.Constant(_I32, bits // 8), mask]
        emit.call(f"llvm.masked.store.v{emit.lanes}i{bits}.p0", ir.VoidType(), arguments)


@intrinsic
def scatter_images(typing_context, y, y0, image, first, images, count, result, r0, block):
    """y[y0 + (first + i) * image + k] = result[r0 + k * block + i] for a vector of images i.

    `block` is the number of a block's images. Elements from `count` on and images from `images` on are left
    alone. If y is of integers, the numbers in `result` are whole and not negative.
    """

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, result.dtype)
        y0, image, first, images, count, r0, block = (arguments[i] for i in (1, 2, 3, 4, 5, 7, 8))
        begin = emit.at(memory(context, builder, y, arguments[0]), y0)
        source = emit.at(memory(context, builder, result, arguments[6]), r0)
        offsets = [builder.mul(block, ir.Constant(_I64, k)) for k in range(emit.lanes)]
        rows = _butterfly(emit, [emit.load(emit.at(source, offset)) for offset in offsets])
        numbers = [builder.add(first, ir.Constant(_I64, i)) for i in range(emit.lanes)]
        places = [emit.at(begin, builder.mul(number, image)) for number in numbers]
        for place in places:
            emit.prefetch(emit.at(place, ir.Constant(_I64, _AHEAD * emit.lanes)), to_write=True)
        whole, part = (builder.append_basic_block(name) for name in ("scatter.whole", "scatter.part"))
        end = builder.append_basic_block("scatter.end")
        bits = context.get_data_type(y.dtype).width if isinstance(y.dtype, types.Integer) else 0
        builder.cbranch(_is_whole(emit, first, images, count), whole, part)
        builder.position_at_end(whole)
        for row, place in zip(rows, places, strict=True):
            _store(emit, row, bits, place)
        builder.branch(end)
        builder.position_at_end(part)
        there = _images(emit, begin, image, first, images, emit.mask(count, 0))
        for row, (place, mask) in zip(rows, there, strict=True):
            _store(emit, row, bits, place, mask)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(y, y0, image, first, images, count, result, r0, block), codegen


@intrinsic(prefer_literal=True)
def filters_tile(typing_context, filters, window, w0, taps, weights, v0, start, s0, result, r0):
    """result[r0 + f * L] = start[s0 + f] + sum of window[w0 + tap] * weights[v0 + k * filters + f].

    The literal is the number of `filters`; window and result are vectors of a block's L images.
    """
    if not isinstance(filters, types.IntegerLiteral):
        return None
    many = filters.literal_value
    signature = types.void(filters, window, w0, taps, weights, v0, start, s0, result, r0)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, window.dtype)
        images, table, factors, begin, target = (
            memory(context, builder, signature.args[i], arguments[i]) for i in (1, 3, 4, 6, 8)
        )
        images = emit.at(images, arguments[2])
        factors, begin = emit.at(factors, arguments[5]), emit.at(begin, arguments[7])
        target = emit.at(target, arguments[9])
        depth = context.make_array(taps)(context, builder, arguments[3]).nitems
        numbers = [ir.Constant(_I64, f) for f in range(many)]
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(VECTORS)]

        def step(k, sums):
            place = emit.at(images, builder.load(emit.at(table, k)))
            values = [emit.load(emit.at(place, lane)) for lane in lanes]
            row = emit.at(factors, builder.mul(k, ir.Constant(_I64, many)))
            new: list = []
            for f in numbers:
                weight = emit.broadcast(builder.load(emit.at(row, f)))
                new += [
                    emit.multiply_add(weight, value, sums[len(new) + v]) for v, value in enumerate(values)
                ]
            return new

        sums = []
        for f in numbers:
            sums += [emit.broadcast(builder.load(emit.at(begin, f)))] * VECTORS
        sums = sum_loop(emit, ir.Constant(_I64, 0), depth, sums, step)
        for i, value in enumerate(sums):
            offset = i // VECTORS * VECTORS * emit.lanes + i % VECTORS * emit.lanes
            emit.store(value, emit.at(target, ir.Constant(_I64, offset)))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def taps_tile(typing_context, high, filters, window, w0, pixels, taps, k0, dout, d0, step, sums, s0):
    """sums[s0 + k, f] += sum over pixels p of window[w0 + pixel + tap k] * dout[d0 + p * step + f].

    All of them are vectors of images. The literals are the numbers of taps, from k0 on, and of `filters`; the
    last tap stands for all beyond it.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (high, filters)):
        return None
    tall, many = high.literal_value, filters.literal_value
    signature = types.void(high, filters, window, w0, pixels, taps, k0, dout, d0, step, sums, s0)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, window.dtype)
        images, pixel_table, tap_table, gradient, target = (
            memory(context, builder, signature.args[i], arguments[i]) for i in (2, 4, 5, 7, 10)
        )
        w0, k0, d0, step, s0 = (arguments[i] for i in (3, 6, 8, 9, 11))
        count = context.make_array(pixels)(context, builder, arguments[4]).nitems
        last = builder.sub(
            context.make_array(taps)(context, builder, arguments[5]).nitems, ir.Constant(_I64, 1)
        )
        ks = [builder.add(k0, ir.Constant(_I64, t)) for t in range(tall)]
        ks = [builder.select(builder.icmp_signed("<", k, last), k, last) for k in ks]
        inputs = [emit.at(images, w0, builder.load(emit.at(tap_table, k))) for k in ks]

        offsets = [ir.Constant(_I64, f * emit.lanes) for f in range(many)]

        def add_pixel(p, totals):
            pixel = builder.load(emit.at(pixel_table, p))
            row = emit.at(gradient, d0, builder.mul(p, step))
            factors = [emit.load(emit.at(row, offset)) for offset in offsets]
            values = [emit.load(emit.at(pointer, pixel)) for pointer in inputs]
            products = [(value, factor) for value in values for factor in factors]
            return [emit.multiply_add(*pair, total) for pair, total in zip(products, totals, strict=True)]

        zero = ir.Constant(emit.vector, None)
        totals = sum_loop(emit, ir.Constant(_I64, 0), count, [zero] * (tall * many), add_pixel)
        for i, total in enumerate(totals):
            place = emit.at(target, s0, ir.Constant(_I64, i * emit.lanes))
            emit.store(builder.fadd(emit.load(place), total, flags=("nsz",)), place)
        return context.get_dummy_value()

    return signature, codegen
