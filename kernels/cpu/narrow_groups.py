"""Grouped convolution of few channels a group: a vector of results reaches over several groups.

Each lane takes its own group's channels: one load brings those of all groups that a vector of results sees,
and a permutation gives every lane the i-th channel of its group, which is multiplied with a vector of
weights; or, for their gradient, with one of the results' gradients. The direct way does a group at a time,
whose few filters leave most lanes empty.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import simd
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer, read_block
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .geometry import Correlation
from .loops import sum_loop
from .pieces import add_up, clear_all
from .simd import TILE_ROWS, VECTOR_BITS
from .tile import Emitter
from .vectors import lanes_of, pointer
from .workspace import NOTHING, NOWHERE, clear, scratch, set_start

_I64 = ir.IntType(64)
# What permutes a vector by another of integers, by the bits of a vector and of an element.
_PERMUTATIONS = {
    (512, 32): "llvm.x86.avx512.permvar.sf.512",
    (512, 64): "llvm.x86.avx512.permvar.df.512",
    (256, 32): "llvm.x86.avx2.permps",
}
# Cycles of a permutation and a multiply-add, to those of a multiply-add the direct way.
_CYCLES = 1.4
# Pieces of a batch whose gradients of the weights are summed apart, whatever the number of threads.
_PIECES = 16


class Lanes(NamedTuple):
    """What each vector of results sees."""

    first: np.ndarray  # channel that its source begins with
    sizes: np.ndarray  # channels of its source
    indices: np.ndarray  # (vectors, inner, lanes): of the source, to be multiplied for each lane
    inner: int  # channels of a group that are summed
    results: int  # of a pixel
    each: int  # results of a vector


class _Permuter(Emitter):
    """Permutes vectors, too."""

    def index(self, pointer):
        """A vector of places in a vector."""
        kind = ir.VectorType(ir.IntType(8 * self.bytes), self.lanes)
        value = self.builder.load(self.builder.bitcast(pointer, kind.as_pointer()))
        value.align = self.bytes
        return value

    def permuted(self, value, index):
        """Lane by lane, that of `value` whose number is in `index`."""
        return self.call(_PERMUTATIONS[VECTOR_BITS, 8 * self.bytes], self.vector, [value, index])


@intrinsic
def _tile(typing_context, operands, r, columns, seen):
    """c[c0 + spread[r + m] + lane] = start[lane] + a sum over taps t and i < inner, for each m < `TILE_ROWS`.

    What is summed is x[x0 + pixels[r + m] + taps[t * inner] + indices[i * lanes + lane]], one of the next
    `seen` elements, times weights[w0 + (t * inner + i) * results + lane]. The first `columns` lanes are
    stored. `operands` are pointers and numbers, as the code takes them apart.
    """
    element = operands.types[0].dtype

    def codegen(context, builder, signature, arguments):
        packed, r, columns, seen = arguments
        emit = _Permuter(context, builder, element)
        x, x0, pixels, taps, count, inner, indices, weights, w0, results, start, c, c0, spread = (
            cgutils.unpack_tuple(builder, packed)
        )
        numbers = [ir.Constant(_I64, m) for m in range(TILE_ROWS)]
        windows = [emit.at(x, x0, builder.load(emit.at(pixels, r, m))) for m in numbers]
        stored, source = emit.mask(columns, 0), emit.mask(seen, 0)
        zero, lanes = ir.Constant(_I64, 0), ir.Constant(_I64, emit.lanes)

        def add_tap(t, sums):
            first = builder.mul(t, inner)
            offset = builder.load(emit.at(taps, first))
            values = [emit.load(emit.at(window, offset), source) for window in windows]
            rows = emit.at(weights, w0, builder.mul(first, results))

            def add_channel(i, sums):
                index = emit.index(emit.at(indices, builder.mul(i, lanes)))
                weight = emit.load(emit.at(rows, builder.mul(i, results)), stored)
                chosen = [emit.permuted(value, index) for value in values]
                return [emit.multiply_add(a, weight, total) for a, total in zip(chosen, sums, strict=True)]

            return sum_loop(emit, zero, inner, sums, add_channel, unrolls=False)

        sums = sum_loop(emit, zero, count, [emit.load(start)] * TILE_ROWS, add_tap, unrolls=False)
        for m, total in zip(numbers, sums, strict=True):
            emit.store(total, emit.at(c, c0, builder.load(emit.at(spread, r, m))), stored)
        return context.get_dummy_value()

    return types.void(operands, types.intp, types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _add_products(typing_context, taps, channels, operands, t0, i0, r0, r1, columns, seen):
    """Add the gradients, over pixels r0 to r1, of some taps from t0 on and of some of a group's channels.

    sums[(t * inner + i) * results + lane] takes the sum over r of dout[d0 + spread[r] + lane] * x[x0 +
    pixels[r] + offsets[t * inner] + indices[i * lanes + lane]], with i from i0 on. The literals are how many
    taps and channels are taken together; those beyond the last stand for it, so that all of the sums are read
    before any is written. `operands` are pointers and numbers, as the code takes them apart.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (taps, channels)):
        return None
    many_taps, many_channels = taps.literal_value, channels.literal_value
    element = operands.types[0].dtype

    def codegen(context, builder, signature, arguments):
        _, _, packed, t0, i0, r0, r1, columns, seen = arguments
        emit = _Permuter(context, builder, element)
        x, x0, pixels, offsets, count, inner, indices, dout, d0, spread, sums, s0, results = (
            cgutils.unpack_tuple(builder, packed)
        )
        stored, source = emit.mask(columns, 0), emit.mask(seen, 0)
        one, lanes = ir.Constant(_I64, 1), ir.Constant(_I64, emit.lanes)

        def some(first, size, many):
            last = builder.sub(size, one)
            numbers = [builder.add(first, ir.Constant(_I64, k)) for k in range(many)]
            return [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]

        ts, channel_numbers = some(t0, count, many_taps), some(i0, inner, many_channels)
        firsts = [builder.mul(t, inner) for t in ts]
        images = [emit.at(x, x0, builder.load(emit.at(offsets, first))) for first in firsts]
        orders = [emit.index(emit.at(indices, builder.mul(i, lanes))) for i in channel_numbers]

        def add_pixel(r, totals):
            gradient = emit.load(emit.at(dout, d0, builder.load(emit.at(spread, r))), stored)
            pixel = builder.load(emit.at(pixels, r))
            values = [emit.load(emit.at(image, pixel), source) for image in images]
            chosen = [emit.permuted(value, order) for value in values for order in orders]
            return [emit.multiply_add(a, gradient, c) for a, c in zip(chosen, totals, strict=True)]

        zeros = [ir.Constant(emit.vector, None)] * (many_taps * many_channels)
        totals = sum_loop(emit, r0, r1, zeros, add_pixel, unrolls=False)
        rows = [builder.add(first, i) for first in firsts for i in channel_numbers]
        places = [emit.at(sums, s0, builder.mul(row, results)) for row in rows]
        before = [emit.load(place, stored) for place in places]
        for value, total, place in zip(before, totals, places, strict=True):
            emit.store(emit.builder.fadd(value, total, flags=("nsz",)), place, stored)
        return context.get_dummy_value()

    numbers = [types.intp] * 6
    return types.void(taps, channels, operands, *numbers), codegen


@kernel
def _fill_tiles(r0, r1, operands, columns, seen):
    keep_out_of_line()
    for r in range(r0, r1, TILE_ROWS):
        _tile(operands, r, columns, seen)


@parallel
def _correlate(part, parts, x, images, weights, start, y, argmax, of, by, windows, e, taps, zs):
    keep_out_of_line()
    lanes, vectors = lanes_of(x), by.first.size
    b, window, z = of.blocks, windows[part], zs[part]
    # The work is every block of every image for every vector, so that one small image keeps all threads busy.
    lo, hi = span(part, parts, images * b.blocks * vectors)
    source, x0, last = x, 0, -1
    for item in range(lo, hi):
        block, v = item // vectors, item % vectors
        n = block // b.blocks
        first = (block - n * b.blocks) * b.rows
        rows = min(b.rows, b.height - first)
        r0, r1 = (b.tail, of.pixels.size) if first + b.rows >= b.height else (0, b.tail)
        if block != last:
            source, x0 = read_block(x, n, first, b, True, window)
            last = block
        # Rows of taps that none of the block's rows needs are left out.
        top, bottom = of.reach[first], of.reach[first + rows - 1]
        t0, t1 = min(top[0], bottom[0]) * b.line, max(top[1], bottom[1]) * b.line
        columns = min(by.results - v * by.each, by.each)
        steps = pointer(of.taps[t0:]), (t1 - t0) // by.inner, by.inner
        inputs = pointer(source), x0 + by.first[v], pointer(of.pixels), *steps
        place = t0 * by.results + v * by.each
        begin = pointer(start[v * by.each :])
        factors = pointer(by.indices[v]), pointer(weights), place, by.results, begin
        if e.pool_h > 0:
            place = (n * e.out_h + first // e.pool_h) * e.out_w * e.filters + v * by.each
            _fill_tiles(r0, r1, inputs + factors + (pointer(z), 0, pointer(of.spread)), columns, by.sizes[v])
            finish_panel(z, lanes, rows // e.pool_h, e, taps, y, place, argmax, columns)
        else:
            place = n * (y.size // images) + b.out_first + first * b.out_row + v * by.each
            outputs = pointer(y), place, pointer(of.spread)
            _fill_tiles(r0, r1, inputs + factors + outputs, columns, by.sizes[v])


@kernel
def _add_block(operands, count, inner, r0, r1, columns, seen):
    """The products of a block's pixels with what all taps see, for one vector of filters."""
    keep_out_of_line()
    if count == 1:
        for i in range(0, inner, 4):
            _add_products(1, 4, operands, 0, i, r0, r1, columns, seen)
    elif inner < 3:
        for t in range(0, count, 6):
            _add_products(6, 2, operands, t, 0, r0, r1, columns, seen)
    else:
        for t in range(0, count, 3):
            for i in range(0, inner, 4):
                _add_products(3, 4, operands, t, i, r0, r1, columns, seen)


@parallel
def _weight(part, parts, x, images, dout, partial, of, by, windows):
    """For each piece of the batch, the gradient of the weights, (kH * kW, C / groups, F)."""
    keep_out_of_line()
    pieces, size = partial.shape
    b, window = of.blocks, windows[part]
    count = of.taps.size // by.inner
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        sums = partial[piece]
        clear(sums, 0, size)
        first_block, last_block = span(piece, pieces, images * b.blocks)
        for block in range(first_block, last_block):
            n = block // b.blocks
            first = (block - n * b.blocks) * b.rows
            rows = min(b.rows, b.height - first)
            source, x0 = read_block(x, n, first, b, False, window)
            d0 = n * (dout.size // images) + b.out_first + first * b.out_row
            r0 = b.tail if first + b.rows >= b.height else 0
            for v in range(by.first.size):
                inputs = (
                    pointer(source),
                    x0 + by.first[v],
                    pointer(of.pixels),
                    pointer(of.taps),
                    count,
                    by.inner,
                )
                gradients = pointer(by.indices[v]), pointer(dout), d0 + v * by.each, pointer(of.spread)
                operands = inputs + gradients + (pointer(sums), v * by.each, by.results)
                columns = min(by.results - v * by.each, by.each)
                _add_block(operands, count, by.inner, r0, r0 + rows * b.width, columns, by.sizes[v])


@parallel
def _pack(part, parts, weight, positions, bias, packed, start):
    """Weights (kH * kW, C / groups, F) for the way back: by tap, filter of a group, and channel.

    Nothing if `packed` is empty; and what sums start with.
    """
    keep_out_of_line()
    if part == 0:
        set_start(bias, start)
    if packed.size == 0:
        return
    inner = weight.shape[1]
    taps, group, channels = packed.shape
    lo, hi = span(part, parts, taps * group)
    for row in range(lo, hi):
        t, j = row // group, row % group
        for channel in range(channels):
            g = channel // inner
            packed[t, j, channel] = weight[positions[t], channel - g * inner, g * group + j]


@lru_cache(maxsize=512)
def _lanes(results: int, group: int, inner: int, dtype: np.dtype) -> Lanes | None:
    """What the vectors of `results` in groups of `group` see; None if it doesn't fit a vector."""
    lanes = simd.lanes(dtype)
    if inner > lanes:
        return None
    # Full vectors of results; or, where they see more than a vector, those of as many groups as fill one.
    for each in (lanes, min(lanes // inner * group, lanes)):
        begin = np.arange(0, results, each)[:, np.newaxis]
        last = np.minimum(begin + each, results) - 1
        groups = np.minimum(begin + np.arange(lanes), last) // group
        first = groups[:, 0] * inner
        sizes = (groups[:, -1] + 1) * inner - first
        if sizes.max() <= lanes:
            indices = (groups * inner - first[:, np.newaxis])[:, np.newaxis] + np.arange(inner)[:, np.newaxis]
            indices = np.ascontiguousarray(indices.astype(f"i{dtype.itemsize}"))
            return Lanes(first, sizes, indices, inner, results, each)
    return None


def _run(
    layer: Layer,
    x: np.ndarray,
    of: Correlation,
    by: Lanes,
    weights: np.ndarray,
    start: np.ndarray,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    b, dtype, images = of.blocks, x.dtype, len(x)
    lanes, items = simd.lanes(dtype), images * b.blocks * len(by.first)
    parts = part_count(items, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    size = 1 if b.in_place else b.window_h * b.window_w * b.channels
    _correlate(
        parts,
        x.reshape(-1),
        images,
        weights.reshape(-1),
        start,
        y.reshape(-1),
        argmax.reshape(-1),
        of,
        by,
        scratch("windows", (parts, size), dtype),
        e,
        window_taps(e, lanes),
        scratch("rows", (parts, b.rows * b.width * lanes if e.pool_h else 1), dtype),
    )


def _prepared(
    weight: np.ndarray, positions: np.ndarray, bias: np.ndarray | None, packed: np.ndarray, by: Lanes
) -> np.ndarray:
    """What sums start with; the weights are packed too."""
    start = scratch("start", by.results + by.indices.shape[2], weight.dtype)
    flat = weight.reshape(-1, *weight.shape[2:])
    biases = NOTHING[weight.dtype] if bias is None else bias
    rows = max(packed.shape[0] * packed.shape[1], 1)
    _pack(part_count(rows, packed.nbytes), flat, positions, biases, packed, start)
    return start


def _forward_lanes(layer: Layer, dtype: np.dtype) -> Lanes | None:
    return _lanes(layer.filters, layer.filters // layer.groups, layer.channels // layer.groups, dtype)


def _input_lanes(layer: Layer, dtype: np.dtype) -> Lanes | None:
    return _lanes(layer.channels, layer.channels // layer.groups, layer.filters // layer.groups, dtype)


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`; see `suits_forward`."""
    by = _forward_lanes(layer, x.dtype)
    assert by is not None
    nothing = scratch("weights", (0, 0, 0), x.dtype)
    start = _prepared(weight, layer.positions, bias, nothing, by)
    of = layer.pooled_tables(e, simd.lanes(x.dtype)) if e.pool_h else layer.forward_tables
    _run(layer, x, of, by, weight, start, y, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input; see `suits_input`."""
    if layer.rows.skips or layer.columns.skips:
        clear_all(dx)
    by = _input_lanes(layer, dout.dtype)
    assert by is not None
    for of, positions in layer.input_tables:
        packed = scratch("weights", (len(positions), by.inner, layer.channels), dout.dtype)
        start = _prepared(weight, positions, None, packed, by)
        _run(layer, dout, of, by, packed, start, dx)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`; see `suits_forward`."""
    by, of, images = _forward_lanes(layer, x.dtype), layer.forward_tables, len(x)
    assert by is not None
    b = of.blocks
    pieces = min(_PIECES, images * b.blocks)
    partial = scratch("partial", (pieces, dweight.size), x.dtype)
    parts = part_count(pieces, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    size = 1 if b.in_place else b.window_h * b.window_w * b.channels
    windows = scratch("windows", (parts, size), x.dtype)
    _weight(parts, x.reshape(-1), images, dout.reshape(-1), partial, of, by, windows)
    add_up(1, partial, dweight.reshape(-1), 1)


def _suits(layer: Layer, by: Lanes | None, group: int, dtype: np.dtype) -> bool:
    """Whether vectors that see what `by` says take less time than vectors of one group."""
    if by is None or not layer.multiply_adds:
        return False
    direct = layer.groups * -(-group // simd.lanes(dtype))
    return _CYCLES * len(by.first) < direct


def _fits(layer: Layer, dtype: np.dtype) -> bool:
    return layer.groups > 1 and (VECTOR_BITS, 8 * dtype.itemsize) in _PERMUTATIONS


def suits_forward(layer: Layer, dtype: np.dtype) -> bool:
    """Whether the forward pass, and the weights' gradient, are faster here than a group at a time."""
    if not _fits(layer, dtype):
        return False
    return _suits(layer, _forward_lanes(layer, dtype), layer.filters // layer.groups, dtype)


def suits_input(layer: Layer, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is computed faster here than a group at a time."""
    if not _fits(layer, dtype):
        return False
    return _suits(layer, _input_lanes(layer, dtype), layer.channels // layer.groups, dtype)
