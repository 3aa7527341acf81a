"""Depthwise convolution: every channel has a filter of its own, so that vectors run over channels.

Windows of 3 x 3, 5 x 5 and 7 x 7 slide where they can (`sliding.py`). Else pixels are done class by class
(see `depthwise_classes.py`): a tile keeps several of them in registers while it goes over the taps, or
several taps while it goes over the pixels. Taps that fall into the padding are left out, so that the images
are read in place.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from . import simd
from .depthwise_classes import Classes, forward_classes, input_classes
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .loops import memory, sum_loop
from .pieces import add_up, clear_all
from .simd import TILE_ROWS
from .sliding import add_strip, pack, slide_band
from .tile import Emitter
from .vectors import keep_in_line, lanes_of, pointer
from .workspace import NOWHERE, clear, scratch

_I64 = ir.IntType(64)

# Pixels of a forward tile, and taps of the two tiles of the gradient to the weights: enough to hide the
# latency of an addition, few enough for a pointer each.
_PIXELS = TILE_ROWS
_FEW_PIXELS = 4
_TAPS = 9 if TILE_ROWS == 8 else 5
_FEW_TAPS = 3
_PIECES = 16
# Multiply-adds that take about as long as moving one byte: the unit of part_count.
_MULTIPLY_ADDS_PER_BYTE = 4


def _tables(context, builder, kind, classes):
    """The pointers to the tables of pixels, places, taps and weights."""
    positions = [kind.fields.index(name) for name in ("pixels", "places", "taps", "weights")]
    return [memory(context, builder, kind.types[i], builder.extract_value(classes, i)) for i in positions]


def _row_steps(builder, kind, classes):
    """Elements from one row of the input, and of the result, to the next."""
    steps = builder.extract_value(classes, kind.fields.index("steps"))
    return builder.extract_value(steps, 1), builder.extract_value(steps, 3)


def _fetch_ahead(emit, pointer, lanes):
    """Have the cache fetch vectors that are needed a row later, which processors don't foresee."""
    switches = [ir.Constant(ir.IntType(32), number) for number in (0, 3, 1)]
    for lane in lanes:
        place = emit.builder.bitcast(emit.at(pointer, lane), ir.IntType(8).as_pointer())
        emit.call("llvm.prefetch.p0", ir.VoidType(), [place, *switches])


@intrinsic(prefer_literal=True)
def _pixels_tile(
    typing_context, pixels, vectors, ragged, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left
):
    """y[place] = start + sum over taps k of x[pixel + tap] * weight[tap], for some pixels from p0 on.

    The literals: the number of `pixels`, and of `vectors` of channels from `c` on; `ragged` reads and stores
    only the first `left` channels. Nothing is checked.
    """
    literals = (pixels, vectors, ragged)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    many_pixels, many_vectors, is_ragged = (literal.literal_value for literal in literals)
    signature = types.void(*literals, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        x0, p0, k0, k1, y0, c, left = (arguments[i] for i in (4, 6, 7, 8, 12, 13, 14))
        image, filters, bias, result = (
            emit.at(memory(context, builder, signature.args[i], arguments[i]), c) for i in (3, 9, 10, 11)
        )
        pixel_table, place_table, taps, weights = _tables(context, builder, of, arguments[5])
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(many_vectors)]
        masks = [emit.mask(left, v) if is_ragged else None for v in range(many_vectors)]
        numbers = [ir.Constant(_I64, p) for p in range(many_pixels)]
        inputs = [emit.at(image, x0, builder.load(emit.at(pixel_table, p0, p))) for p in numbers]

        def row(pointer):
            return [emit.load(emit.at(pointer, lane), mask) for lane, mask in zip(lanes, masks, strict=True)]

        def step(k, sums):
            w = row(emit.at(filters, builder.load(emit.at(weights, k))))
            tap = builder.load(emit.at(taps, k))
            values = [value for pointer in inputs for value in row(emit.at(pointer, tap))]
            return [
                emit.multiply_add(value, w[i % many_vectors], total)
                for i, (value, total) in enumerate(zip(values, sums, strict=True))
            ]

        sums = sum_loop(emit, k0, k1, row(bias) * many_pixels, step)
        places = [emit.at(result, y0, builder.load(emit.at(place_table, p0, p))) for p in numbers]
        for i, total in enumerate(sums):
            v = i % many_vectors
            emit.store(total, emit.at(places[i // many_vectors], lanes[v]), masks[v])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _taps_tile(
    typing_context, taps, vectors, ragged, x, x0, of, k0, last, p0, p1, dout, d0, dweight, c, left
):
    """dweight[tap] += sum over pixels p0 to p1 of x[pixel + tap] * dout[place], for some taps from k0 on.

    The literals: the number of `taps`, and of `vectors` of channels from `c` on; `ragged` reads and stores
    only the first `left` channels. Taps beyond `last` stand for it, so that all of dweight is read before any
    is written. Nothing is checked.
    """
    literals = (taps, vectors, ragged)
    if not all(isinstance(literal, types.IntegerLiteral) for literal in literals):
        return None
    many_taps, many_vectors, is_ragged = (literal.literal_value for literal in literals)
    signature = types.void(*literals, x, x0, of, k0, last, p0, p1, dout, d0, dweight, c, left)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        x0, k0, last, p0, p1, d0, c, left = (arguments[i] for i in (4, 6, 7, 8, 9, 11, 13, 14))
        image, gradient, result = (
            emit.at(memory(context, builder, signature.args[i], arguments[i]), c) for i in (3, 10, 12)
        )
        pixel_table, place_table, tap_table, weights = _tables(context, builder, of, arguments[5])
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(many_vectors)]
        masks = [emit.mask(left, v) if is_ragged else None for v in range(many_vectors)]
        ks = [builder.add(k0, ir.Constant(_I64, t)) for t in range(many_taps)]
        ks = [builder.select(builder.icmp_signed("<", k, last), k, last) for k in ks]
        inputs = [emit.at(image, x0, builder.load(emit.at(tap_table, k))) for k in ks]

        def row(pointer):
            return [emit.load(emit.at(pointer, lane), mask) for lane, mask in zip(lanes, masks, strict=True)]

        in_row, out_row = _row_steps(builder, of, arguments[5])

        def step(p, sums):
            place = emit.at(gradient, d0, builder.load(emit.at(place_table, p)))
            d = row(place)
            pixel = builder.load(emit.at(pixel_table, p))
            _fetch_ahead(emit, emit.at(place, out_row), lanes)
            _fetch_ahead(emit, emit.at(inputs[-1], pixel, in_row), lanes)
            values = [value for pointer in inputs for value in row(emit.at(pointer, pixel))]
            return [
                emit.multiply_add(value, d[i % many_vectors], total)
                for i, (value, total) in enumerate(zip(values, sums, strict=True))
            ]

        zero = ir.Constant(emit.vector, None)
        sums = sum_loop(emit, p0, p1, [zero] * (many_taps * many_vectors), step)
        places = [emit.at(result, builder.load(emit.at(weights, k))) for k in ks]
        before = [value for place in places for value in row(place)]
        for i, (value, total) in enumerate(zip(before, sums, strict=True)):
            v = i % many_vectors
            place = emit.at(places[i // many_vectors], lanes[v])
            emit.store(builder.fadd(value, total), place, masks[v])
        return context.get_dummy_value()

    return signature, codegen


@kernel
def _fill_band(x, x0, band, weight, start, y, y0, of):
    """The rows of a band, from y[y0] on."""
    lanes = lanes_of(x)
    spans = of.spans
    for s in range(band[4], band[5]):
        begin, columns, tap, width = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3]
        channels = spans[s, 4]
        end = begin + band[1] * columns
        k0, k1 = tap + band[2] * width, tap + band[3] * width
        p = begin
        while p < end:
            # The last tile begins earlier than it would, if it then fits: some pixels are done twice.
            many = 1
            if end - begin >= _PIXELS and end - p > _FEW_PIXELS:
                many = _PIXELS
            elif end - begin >= _FEW_PIXELS and end - p > 1:
                many = _FEW_PIXELS
            p0 = min(p, end - many)
            p += many
            c = 0
            while c < channels:
                left = channels - c
                if many == 1:
                    _pixels_tile(1, 2, 1, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left)
                    c += 2 * lanes
                elif many == _FEW_PIXELS:
                    _pixels_tile(_FEW_PIXELS, 2, 1, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left)
                    c += 2 * lanes
                elif left >= 2 * lanes:
                    _pixels_tile(_PIXELS, 2, 0, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left)
                    c += 2 * lanes
                else:
                    _pixels_tile(_PIXELS, 1, 1, x, x0, of, p0, k0, k1, weight, start, y, y0, c, left)
                    c += lanes


@kernel
def _fill_block(x, x0, block, weight, start, y, y0, of):
    """The rows of a block, from y[y0] on, of the image at x[x0]."""
    _, in_row, _, out_row = of.steps
    for b in range(block[0], block[1]):
        band = of.bands[b]
        below = band[0] - block[2]
        _fill_band(x, x0 + block[4] + below * in_row, band, weight, start, y, y0 + below * out_row, of)


@parallel
def _correlate(part, parts, x, images, weight, start, y, argmax, of, e, taps, zs, all_packed):
    keep_out_of_line()
    _, in_row, out_first, out_row = of.steps
    z, packed = zs[part], all_packed[part]
    slides = of.side > 0
    blocks = len(of.strips) if slides else len(of.blocks)
    if slides:
        pack(pointer(weight), pointer(of.sliding), of.sliding.size, start.size, pointer(packed))
    lo, hi = span(part, parts, images * blocks)
    for task in range(lo, hi):
        n = task // blocks
        b = task - n * blocks
        first = of.strips[b, 0] if slides else of.blocks[b, 2]
        rows = of.strips[b, 1] if slides else of.blocks[b, 3]
        begin = out_first + first * out_row if slides else of.blocks[b, 5]
        x0, y0, target = n * (x.size // images), n * (y.size // images) + begin, y
        if e.pool_h > 0:
            y0, target = 0, z
        if slides:
            slide_band(
                of.side,
                pointer(x[x0:]),
                pointer(of.nothing),
                pointer(packed),
                pointer(start),
                pointer(target[y0:]),
                of.rows[0] + first,
                rows,
                of.rows[1],
                (in_row, out_row),
                start.size,
                of.columns,
            )
        else:
            _fill_block(x, x0, of.blocks[b], weight, start, target, y0, of)
        if e.pool_h > 0:
            row = n * e.out_h + first // e.pool_h
            windows, width = rows // e.pool_h, e.filters
            finish_panel(z, width, windows, e, taps, y, row * e.out_w * width, argmax, width)


@kernel
def _add_band(x, x0, band, dout, d0, sums, of):
    """Add the products of a band to the sums of the taps that it sees."""
    keep_in_line()
    lanes = lanes_of(x)
    spans = of.spans
    for s in range(len(spans)):
        p0, columns, tap, width = spans[s, 0], spans[s, 1], spans[s, 2], spans[s, 3]
        channels = spans[s, 4]
        p1 = p0 + band[1] * columns
        last = tap + band[3] * width - 1
        k = tap + band[2] * width
        while k <= last:
            many = _TAPS if last - k >= _FEW_TAPS else _FEW_TAPS
            c = 0
            while c < channels:
                left = channels - c
                if many == _FEW_TAPS:
                    _taps_tile(_FEW_TAPS, 2, 1, x, x0, of, k, last, p0, p1, dout, d0, sums, c, left)
                    c += 2 * lanes
                elif left >= 2 * lanes:
                    _taps_tile(_TAPS, 2, 0, x, x0, of, k, last, p0, p1, dout, d0, sums, c, left)
                    c += 2 * lanes
                else:
                    _taps_tile(_TAPS, 1, 1, x, x0, of, k, last, p0, p1, dout, d0, sums, c, left)
                    c += lanes
            k += many


@parallel
def _weight(part, parts, x, images, dout, partial, of):
    keep_out_of_line()
    in_first, in_row, out_first, out_row = of.steps
    slides, pieces = of.side > 0, len(partial)
    blocks = len(of.strips) if slides else len(of.bands)
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        sums = partial[piece]
        clear(sums, 0, sums.size)
        task0, task1 = span(piece, pieces, images * blocks)
        for task in range(task0, task1):
            n = task // blocks
            b = task - n * blocks
            first = of.strips[b, 0] if slides else of.bands[b, 0]
            x0, d0 = n * (x.size // images), n * (dout.size // images) + out_first + first * out_row
            if slides:
                add_strip(
                    of.side,
                    pointer(x[x0:]),
                    pointer(of.nothing),
                    pointer(dout[d0:]),
                    pointer(sums),
                    of.rows[0] + first,
                    of.strips[b, 1],
                    of.rows[1],
                    (in_row, out_row),
                    out_row // of.columns[2],
                    of.columns,
                )
            else:
                _add_band(x, x0 + in_first + first * in_row, of.bands[b], dout, d0, sums, of)


def fits(layer: Layer) -> bool:
    """Whether a layer is a depthwise convolution."""
    return layer.groups == layer.channels == layer.filters


def _parts(layer: Layer, images: int, tasks: int) -> int:
    return part_count(tasks, images * layer.multiply_adds / _MULTIPLY_ADDS_PER_BYTE)


def _run(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    of: Classes,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    images, channels = len(x), layer.channels
    if of.repeats > 1:
        flat = weight.reshape(-1, 1, channels)
        weight = scratch("weights", flat.size * of.repeats, x.dtype).reshape(len(flat), of.repeats, channels)
        between_jobs(np.copyto, weight, flat)
    start = scratch("start", channels * of.repeats, x.dtype)
    between_jobs(np.copyto, start.reshape(of.repeats, channels), 0 if bias is None else bias)
    rows = of.strips[:, 1] if of.side else of.blocks[:, 3]
    parts = _parts(layer, images, images * len(rows))
    size = rows.max() * of.steps[3] if e.pool_h else 1
    lanes = simd.lanes(x.dtype)
    _correlate(
        parts,
        x.reshape(-1),
        images,
        weight.reshape(-1),
        start,
        y.reshape(-1),
        argmax.reshape(-1),
        of,
        e,
        window_taps(e, channels),
        scratch("rows", (parts, size), x.dtype),
        scratch("packed", (parts, of.sliding.size * -(-channels // lanes) * lanes), x.dtype),
    )


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`."""
    _run(layer, x, weight, bias, y, forward_classes(layer, x.dtype, e), e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    if layer.rows.skips or layer.columns.skips:
        clear_all(dx)
    classes = input_classes(layer, dout.dtype)
    if classes is not None:
        _run(layer, dout, weight, None, dx, classes)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    of = forward_classes(layer, x.dtype)
    images = len(x)
    pieces = min(_PIECES, images * len(of.strips if of.side else of.bands))
    size = dweight.size * of.repeats
    partial = scratch("partial", pieces * size, x.dtype).reshape(pieces, size)
    parts = _parts(layer, images, pieces)
    _weight(parts, x.reshape(-1), images, dout.reshape(-1), partial, of)
    if of.repeats == 1:
        add_up(1, partial, dweight.reshape(-1), 1)
        return
    # Pixels that count as one have sums of their own too.
    taps = layer.rows.kernel * layer.columns.kernel
    sums = partial.reshape(pieces, taps, -1)
    for tap, gradient in enumerate(dweight.reshape(taps, -1)):
        add_up(1, sums[:, tap], gradient, 1)
