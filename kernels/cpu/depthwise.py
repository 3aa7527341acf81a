"""Depthwise convolution: every channel has a filter of its own, so that vectors run over channels.

Output pixels that see the same taps of the kernel are one class: the inner pixels, which see all of them, and
some lines along the border. Within a class a tile keeps several pixels in registers while it goes over the
taps, or several taps while it goes over the pixels. Taps that fall into the padding are left out, so that the
images are read in place. Where channels are too few for a vector, neighbouring pixels count as one with all
of their channels, and the weights are repeated. Windows of 3 x 3 and 5 x 5 slide instead where they can
(`sliding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from ..threads import between_jobs, parallel, part_count, span
from . import simd
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .geometry import Axis
from .loops import memory, sum_loop
from .pieces import add_up
from .simd import TILE_ROWS, VECTOR_BITS
from .sliding import ROWS, SIDES, add_strip, pack, slide_band
from .tile import Emitter
from .vectors import keep_in_line, pointer
from .workspace import NOWHERE, clear, scratch

_I64 = ir.IntType(64)

# Pixels of a forward tile, and taps of the two tiles of the gradient to the weights: enough to hide the
# latency of an addition, few enough for a pointer each.
_PIXELS = TILE_ROWS
_FEW_PIXELS = 4
_TAPS = 9 if TILE_ROWS == 8 else 5
_FEW_TAPS = 3
# Rows of a band: enough to fill a tile with the pixels of one column along the border.
_ROWS = 8
_BAND_PIXELS = 256
_PIECES = 16
# Elements of neighbouring pixels that count as one, at most: their repeated weights should stay in the cache.
_ELEMENTS_AS_ONE = 128
# Multiply-adds that take about as long as moving one byte: the unit of part_count.
_MULTIPLY_ADDS_PER_BYTE = 4


class Classes(NamedTuple):
    """Which pixels see which taps; all offsets are in elements.

    A band is some rows of the result that see the same rows of the kernel; its columns are cut into spans
    that see the same columns of the kernel. Tables of pixels are made for a full band: row by row, so that a
    band of fewer rows uses their beginning. A block is one band, or several whose rows are pooled together.
    Windows that slide see all of the kernel everywhere, and what they see beyond the image is zero.
    """

    blocks: np.ndarray  # (_, 4): first and last + 1 band, first row, rows
    bands: np.ndarray  # (_, 4): first row, rows, first and last + 1 row of taps
    spans: np.ndarray  # (_, 5): first pixel in the tables, columns, first tap, taps in a row, channels
    pixels: np.ndarray  # offset of each pixel's input
    places: np.ndarray  # offset of each pixel in the result
    taps: np.ndarray  # offset of each tap from the pixel's input
    weights: np.ndarray  # offset of each tap's weights
    steps: tuple[int, int, int, int]  # input: first row, next row; result: first row, next row
    repeats: int  # of the weights: pixels that count as one, at most
    side: int  # of windows that slide; else 0
    sliding: np.ndarray  # offsets of their weights
    strips: np.ndarray  # (_, 2): first row of the result, and rows, that they make at a time
    rows: tuple[int, int]  # where windows begin in the image, and its rows
    columns: tuple[int, int, int]  # of padding before the image, of the image, and of the result
    nothing: np.ndarray  # a row of zeros, if windows slide


def _runs(axis: Axis, size: int) -> list[tuple[int, int, int, int]]:
    """Outputs in a row that see the same taps: the first, how many, first and last + 1 tap."""
    offsets = axis.origin + np.array(axis.taps)
    runs: list[tuple[int, int, int, int]] = []
    for i in range(axis.outputs):
        seen = np.flatnonzero((i * axis.step + offsets >= 0) & (i * axis.step + offsets < size))
        first, last = (int(seen[0]), int(seen[-1]) + 1) if seen.size else (0, 0)
        if runs and runs[-1][2:] == (first, last):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, first, last)
        else:
            runs.append((i, 1, first, last))
    return runs


def _blocks(
    runs: list[tuple[int, int, int, int]], rows: int, most: int, multiple: int
) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]:
    """Blocks and bands of at most `most` rows; a block has a multiple of `multiple` rows, if that isn't 1."""
    if multiple == 1:
        bands = [
            (row, min(most, first + many - row), tap0, tap1)
            for first, many, tap0, tap1 in runs
            for row in range(first, first + many, most)
        ]
        return [(i, i + 1, row, many) for i, (row, many, _, _) in enumerate(bands)], bands
    blocks, bands = [], []
    for row in range(0, rows, most):
        end, band = min(row + most, rows), len(bands)
        for first, many, tap0, tap1 in runs:
            top, bottom = max(row, first), min(end, first + many)
            if top < bottom:
                bands.append((top, bottom - top, tap0, tap1))
        blocks.append((band, len(bands), row, end - row))
    return blocks, bands


def _strips(rows: int, most: int, multiple: int) -> np.ndarray:
    """First rows and numbers of rows of strips of the same length, about `most`; none has one row."""
    units = rows // multiple
    count = -(-rows // max(most, 2 * ROWS))
    ends = np.arange(count + 1) * units // count * multiple
    return np.stack([ends[:-1], np.diff(ends)], axis=1)


def _grid(
    rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray, steps: tuple[int, int]
) -> np.ndarray:
    """Offsets of points, row by row."""
    return np.add.outer(np.array(rows, np.intp) * steps[0], np.array(columns, np.intp) * steps[1]).ravel()


def _classes(
    rows: Axis,
    columns: Axis,
    kernel_rows: Sequence[int],
    kernel_columns: Sequence[int],
    kernel_w: int,
    image: tuple[int, int],
    out_width: int,
    channels: int,
    most_as_one: int,
    dtype: np.dtype,
    multiple: int = 1,
) -> Classes:
    """The classes of a correlation whose taps have the weights of these rows and columns of the kernel.

    A block has a multiple of `multiple` rows.
    """
    height, width = image
    most = -(-max(_ROWS, _BAND_PIXELS // columns.outputs) // multiple) * multiple
    count = min(rows.outputs, most)
    blocks, bands = _blocks(_runs(rows, height), rows.outputs, count, multiple)
    pitch, out_pitch = width * channels, out_width * channels
    pixel_steps = rows.step * pitch, columns.step * channels
    place_steps = rows.out_step * out_pitch, columns.out_step * channels
    runs = _runs(columns, width)
    repeats = min(most_as_one, max(many for _, many, _, _ in runs))
    spans: list[tuple[int, int, int, int, int]] = []
    tables: tuple[list, ...] = ([], [], [], [])
    for first, many, tap0, tap1 in runs:
        first_tap = sum(table.size for table in tables[2])
        for column in range(first, first + many, repeats if repeats > 1 else many):
            as_one = min(repeats, first + many - column)
            j = np.arange(column, column + (many if repeats == 1 else 1))
            first_pixel = sum(table.size for table in tables[0])
            spans.append((first_pixel, len(j), first_tap, tap1 - tap0, as_one * channels))
            tables[0].append(_grid(np.arange(count), j, pixel_steps))
            tables[1].append(_grid(np.arange(count), j, place_steps))
        seen = slice(tap0, tap1)
        tables[2].append(_grid(rows.taps, columns.taps[seen], (pitch, channels)))
        steps = kernel_w * channels * repeats, channels * repeats
        tables[3].append(_grid(kernel_rows, kernel_columns[seen], steps))
    side = _side(rows, columns) if repeats == 1 else 0
    ordered_rows = [kernel_rows[rows.taps.index(a)] for a in range(side)]
    ordered_columns = [kernel_columns[columns.taps.index(b)] for b in range(side)]
    return Classes(
        np.array(blocks, np.intp),
        np.array(bands, np.intp),
        np.array(spans, np.intp),
        np.concatenate(tables[0]),
        np.concatenate(tables[1]),
        np.concatenate(tables[2]),
        np.concatenate(tables[3]),
        (
            rows.origin * pitch + columns.origin * channels,
            rows.step * pitch,
            rows.out_first * out_pitch + columns.out_first * channels,
            rows.out_step * out_pitch,
        ),
        repeats,
        side,
        _grid(ordered_rows, ordered_columns, (kernel_w * channels, channels)),
        _strips(rows.outputs, most, multiple) if side else np.empty((0, 2), np.intp),
        (rows.origin, height),
        (-columns.origin, width, columns.outputs),
        np.zeros(pitch if side else 1, dtype),
    )


def _side(rows: Axis, columns: Axis) -> int:
    """Pixels along each side of windows that are square and one pixel apart, if such may slide; else 0."""
    if rows.outputs < ROWS:
        return 0
    for side in SIDES:
        taps = list(range(side))
        if all(sorted(axis.taps) == taps and axis.step == axis.out_step == 1 for axis in (rows, columns)):
            return side
    return 0


def _most_as_one(layer: Layer, dtype: np.dtype) -> int:
    """Pixels that count as one: they need to have neighbours everywhere, and fewer channels than a vector.

    Windows that slide are faster from a quarter of a vector on.
    """
    lanes = simd.lanes(dtype)
    if layer.columns.stride > 1 or layer.channels >= lanes:
        return 1
    if 4 * layer.channels >= lanes and _side(layer.rows.forward(), layer.columns.forward()):
        return 1
    return max(1, _ELEMENTS_AS_ONE // layer.channels)


@lru_cache(maxsize=512)
def _forward_classes(layer: Layer, dtype: np.dtype, e: Epilogue = NO_EPILOGUE) -> Classes:
    kernel_h, kernel_w = layer.rows.kernel, layer.columns.kernel
    rows, columns = layer.forward_axes(e)
    return _classes(
        rows,
        columns,
        range(kernel_h),
        range(kernel_w),
        kernel_w,
        layer.image,
        columns.outputs,
        layer.channels,
        _most_as_one(layer, dtype),
        dtype,
        max(e.pool_h, 1),
    )


@lru_cache(maxsize=512)
def _input_classes(layer: Layer, dtype: np.dtype) -> list[Classes]:
    return [
        _classes(
            rows,
            columns,
            kernel_rows,
            kernel_columns,
            layer.columns.kernel,
            layer.out_image,
            layer.image[1],
            layer.channels,
            _most_as_one(layer, dtype),
            dtype,
        )
        for rows, kernel_rows in layer.rows.phases()
        for columns, kernel_columns in layer.columns.phases()
    ]


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
    lanes = VECTOR_BITS // (8 * x.itemsize)
    spans = of.spans
    for s in range(len(spans)):
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
    in_first, in_row, _, out_row = of.steps
    for b in range(block[0], block[1]):
        band = of.bands[b]
        place = y0 + (band[0] - block[2]) * out_row
        _fill_band(x, x0 + in_first + band[0] * in_row, band, weight, start, y, place, of)


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
        x0, y0, target = n * (x.size // images), n * (y.size // images) + out_first + first * out_row, y
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
    lanes = VECTOR_BITS // (8 * x.itemsize)
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
    _run(layer, x, weight, bias, y, _forward_classes(layer, x.dtype, e), e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input."""
    if layer.rows.skips or layer.columns.skips:
        between_jobs(dx.fill, 0)
    for classes in _input_classes(layer, dout.dtype):
        _run(layer, dout, weight, None, dx, classes)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient of the weights to `dweight`."""
    of = _forward_classes(layer, x.dtype)
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
