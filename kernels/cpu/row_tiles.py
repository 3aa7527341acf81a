"""Tiles of Winograd's algorithm along rows, as vector instructions; see `winograd_rows`."""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .epilogue import DEAD
from .loops import sum_loop
from .simd import TILE_ROWS
from .winograd_points import GRADIENT, ONE, OUTPUT, TILE, Transformer

# Points of the transforms.
SIZE = 6
# Tiles whose products are summed together: as many as fit the registers, and even, for windows of two rows.
TILES = 4 if TILE_ROWS == 8 else 2
# Taps whose gradients are summed together.
TAPS = 3 if TILE_ROWS == 8 else 1
# What is done with outputs: they are stored; go through ReLU, or a pooling of 1 x 1; or are pooled, 2 x 2.
STORED, RELU, POOLED = range(3)

_I64 = ir.IntType(64)
_I8 = ir.IntType(8)


def _sums(emit, tiles, plane, taps, depth, weights, first):
    """Of each point, and each tile, the sum of the products; `first` is added to all of a tile's outputs."""
    builder = emit.builder
    planes = [builder.mul(plane, ir.Constant(_I64, i)) for i in range(SIZE)]

    def step(k, values):
        row, *totals = values
        offset = builder.load(emit.at(taps, k))
        windows = [emit.at(tile, offset) for tile in tiles]
        new: list = []
        for i in range(SIZE):
            weight = emit.load(emit.at(row, ir.Constant(_I64, i * emit.lanes)))
            for window in windows:
                element = emit.broadcast(builder.load(emit.at(window, planes[i])))
                new.append(emit.multiply_add(element, weight, totals[len(new)]))
        return [emit.at(row, ir.Constant(_I64, SIZE * emit.lanes)), *new]

    zero = ir.Constant(emit.vector, None)
    start = [first if i == ONE else zero for i in range(SIZE) for _ in tiles]
    return sum_loop(emit, ir.Constant(_I64, 0), depth, [weights, *start], step, unrolls=False)[1:]


def _largest(emit, values, relu, keeps, argmax):
    """The largest value, behind ReLU or not; which it is goes to `argmax`, as `epilogue.pool_vector` says."""
    builder = emit.builder
    best, takes = values[0], []
    for value in values[1:]:
        # NaN wins, and the last of several.
        larger = builder.fcmp_ordered(">", value, best)
        takes.append(builder.or_(larger, builder.fcmp_unordered("uno", value, value)))
        best = builder.select(takes[-1], value, best)
    zero = ir.Constant(emit.vector, None)
    below = builder.and_(builder.fcmp_ordered("<=", best, zero), relu)
    with builder.if_then(keeps):
        places = ir.VectorType(_I8, emit.lanes)
        where = ir.Constant(places, None)
        for tap, taken in enumerate(takes, 1):
            where = builder.select(taken, ir.Constant(places, [tap] * emit.lanes), where)
        # NaN is not above zero either.
        dead = builder.and_(builder.fcmp_unordered("<=", best, zero), relu)
        where = builder.select(dead, ir.Constant(places, [DEAD] * emit.lanes), where)
        builder.store(where, builder.bitcast(argmax, places.as_pointer())).align = 1
    return builder.select(below, zero, best)


def _write(emit, results, y, around):
    """Store pairs of a vector and its place; around the caches, or into them."""
    with emit.builder.if_else(around) as (past, through):
        with past:
            for value, place in results:
                emit.store_around(value, emit.at(y, place))
        with through:
            for value, place in results:
                emit.store(value, emit.at(y, place))


def _fetch(emit, y, places, around):
    """Have a cache fetch what will be overwritten, if it goes through the cache."""
    with emit.builder.if_then(emit.builder.not_(around)):
        for place in places:
            emit.prefetch(emit.at(y, place), to_write=True)


@intrinsic(prefer_literal=True)
def tile_products(typing_context, finish, t0, operands):
    """`TILES` tiles of the result, of one vector of filters, from entry `t0` of the tables on.

    Element i of the products of tile t is the sum over k < depth of spectrum[sources[t] + taps[k] + i *
    plane] times the vector weights[w0 + (k * SIZE + i) * lanes]; its outputs, plus start[s0], go to y[y0 +
    targets[t] + m * pixel]. The literal says by which of the ways above; two tiles that are pooled have the
    target of the first. All arrays are pointers.
    """
    if not isinstance(finish, types.IntegerLiteral):
        return None
    way = finish.literal_value

    def codegen(context, builder, signature, arguments):
        _, t0, packed = arguments
        sources, targets, taps, depth, spectrum, plane, weights, w0, start, s0, *rest = cgutils.unpack_tuple(
            builder, packed
        )
        y, argmax, y0, pixel, *flags = rest
        emit = Transformer(context, builder, operands.types[4].dtype)
        around, relu, keeps = (builder.icmp_signed("!=", flag, ir.Constant(flag.type, 0)) for flag in flags)
        entries = [builder.add(t0, ir.Constant(_I64, t)) for t in range(TILES)]
        steps = [builder.mul(pixel, ir.Constant(_I64, m)) for m in range(TILE)]
        first = [builder.add(y0, builder.load(emit.at(targets, entry))) for entry in entries]
        places = [[builder.add(place, step) for step in steps] for place in first]
        if way != POOLED:
            _fetch(emit, y, [place for tile in places for place in tile], around)
        tiles = [emit.at(spectrum, builder.load(emit.at(sources, entry))) for entry in entries]
        bias = emit.load(emit.at(start, s0))
        sums = _sums(emit, tiles, plane, taps, depth, emit.at(weights, w0), bias)
        relu = emit.everywhere(relu)
        rows = 2 if way == POOLED else 1
        for t in range(0, TILES, rows):
            outputs = [emit.transformed(OUTPUT, SIZE, sums[t + row :: TILES]) for row in range(rows)]
            results = []
            for m, place in zip(range(0, TILE, rows), places[t], strict=False):
                values = [value for row in outputs for value in row[m : m + rows]]
                if way != STORED:
                    values = [_largest(emit, values, relu, keeps, emit.at(argmax, place))]
                results.append((values[0], place))
            _write(emit, results, y, around)
        return context.get_dummy_value()

    return types.void(finish, t0, operands), codegen


def _unpooled(emit, side, dout, argmax):
    """`side` rows of gradients, from those of pixels that are pooled from so many rows and columns; and which
    of these are in them."""
    builder = emit.builder
    rows: list[list] = [[] for _ in range(side)]
    passed = []
    codes = ir.VectorType(_I8, emit.lanes)
    zero = ir.Constant(emit.vector, None)

    def constant(code):
        return ir.Constant(codes, [code] * emit.lanes)

    for place, code in zip(dout, argmax, strict=True):
        gradient = emit.load(place)
        where = builder.load(builder.bitcast(code, codes.as_pointer()))
        where.align = 1
        for offset in range(side * side):
            taken = builder.icmp_signed("==", where, constant(offset))
            rows[offset // side].append(builder.select(taken, gradient, zero))
        inside = builder.icmp_unsigned("<", where, constant(side * side))
        passed.append(builder.select(inside, gradient, zero))
    return rows, passed


def _with_products(emit, totals, gradients, windows, planes):
    """The sums of all taps and points, plus a tile's row of gradients times what the taps meet."""
    transformed = emit.transformed(GRADIENT, SIZE, gradients)
    new: list = []
    for window in windows:
        for gradient, plane in zip(transformed, planes, strict=False):
            element = emit.broadcast(emit.builder.load(emit.at(window, plane)))
            new.append(emit.multiply_add(element, gradient, totals[len(new)]))
    return new


@intrinsic(prefer_literal=True)
def add_gradients(
    typing_context, finish, t0, t1, tables, k0, image, gradients, d0, pixel, ahead, sums, s0, b0
):
    """Add tiles t0 to t1 of dout, times what `TAPS` taps meet of the image, to the sums of these.

    Element i of the sum of tap k, a vector of filters at sums[s0 + (k * SIZE + i) * lanes], takes that of the
    transform of dout[d0 + targets[t] + m * pixel] times spectrum[sources[t] + taps[k0 + k] + i * plane], for
    each tile t. Meanwhile a cache fetches dout `ahead` elements further on. Arrays are pointers: `tables` has
    sources, targets and taps, `image` spectrum and plane, `gradients` dout and argmax.

    The literal `finish` is the forward pass's. If that pools, the gradients of a tile, two rows if by 2 x 2,
    are those of the pooled pixels in dout, and their sum is added to sums[b0] if k0 is 0.
    """
    if not isinstance(finish, types.IntegerLiteral):
        return None
    way = finish.literal_value
    rows = 2 if way == POOLED else 1
    signature = types.void(finish, t0, t1, tables, k0, image, gradients, d0, pixel, ahead, sums, s0, b0)

    def codegen(context, builder, signature, arguments):
        _, t0, t1, tables, k0, image, gradients, d0, pixel, ahead, sums, s0, b0 = arguments
        sources, targets, taps = cgutils.unpack_tuple(builder, tables)
        spectrum, plane = cgutils.unpack_tuple(builder, image)
        dout, argmax = cgutils.unpack_tuple(builder, gradients)
        emit = Transformer(context, builder, signature.args[10].dtype)
        planes = [builder.mul(plane, ir.Constant(_I64, i)) for i in range(SIZE * rows)]
        steps = [builder.mul(pixel, ir.Constant(_I64, m)) for m in range(TILE // rows)]
        offsets = [builder.load(emit.at(taps, k0, ir.Constant(_I64, k))) for k in range(TAPS)]
        images = [emit.at(spectrum, offset) for offset in offsets]

        def step(t, totals):
            target = builder.load(emit.at(targets, t))
            sides = (dout,) if way == STORED else (dout, argmax)
            places = [[emit.at(values, d0, target, distance) for distance in steps] for values in sides]
            for place in (place for of_values in places for place in of_values):
                emit.prefetch(emit.at(place, ahead), to_write=False)
            if way == STORED:
                values, passed = [[emit.load(place) for place in places[0]]], []
            else:
                values, passed = _unpooled(emit, rows, *places)
            source = builder.load(emit.at(sources, t))
            windows = [emit.at(image, source) for image in images]
            totals, bias = totals[: TAPS * SIZE], totals[TAPS * SIZE :]
            for row, of_row in enumerate(values):
                totals = _with_products(emit, totals, of_row, windows, planes[row * SIZE :])
            for gradient in passed:
                bias = [emit.add(bias[0], gradient)]
            return [*totals, *bias]

        zeros = [ir.Constant(emit.vector, None)] * (TAPS * SIZE + (way != STORED))
        totals = sum_loop(emit, t0, t1, zeros, step, unrolls=False)
        results = [emit.at(sums, s0, ir.Constant(_I64, i * emit.lanes)) for i in range(TAPS * SIZE)]
        for total, place in zip(totals, results, strict=False):
            emit.store(emit.add(emit.load(place), total), place)
        with builder.if_then(builder.icmp_signed("==", k0, ir.Constant(k0.type, 0))):
            for total in totals[TAPS * SIZE :]:
                emit.store(emit.add(emit.load(emit.at(sums, b0)), total), emit.at(sums, b0))
        return context.get_dummy_value()

    return signature, codegen
