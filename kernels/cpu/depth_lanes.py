"""Convolutions of few results, up to twelve: what is summed lies in the lanes of vectors, not the results.

A window's row of taps is one run of kernel columns * channels in memory, where columns are neighbours. Of a
few pixels, each result is summed in a vector of its own; the lanes of as many of those as a vector has are
then added all at once. So do images of many channels become images of few, as in the last layer of a decoder;
and so does the gradient come to an input of few channels, above all of one or three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import few_channels, geometry, simd
from .direct import MULTIPLY_ADDS_PER_BYTE, Layer, following, read_block
from .dots import totals
from .epilogue import NO_EPILOGUE, Epilogue, finish_panel, window_taps
from .geometry import Axis, Blocks
from .loops import sum_loop
from .simd import VECTOR_BITS
from .tile import Emitter
from .vectors import Vector, all_lanes, first_lanes, keep_in_line, load, pointer, prefetch, store
from .workspace import NOTHING, NOWHERE, clear, copy, scratch

_I64 = ir.IntType(64)
# Results that are summed together, as long as a near cache holds their weights. Where it doesn't, and where
# there are more, they are summed in panels of so many, for about as many pixels: such tiles read the least.
_MOST_TOGETHER = 8
_NEAR_BYTES = 32 << 10
_MOST_OF_PANEL = 4
# With more results that repays while they fill no more of a vector than this, and if filters have so many
# taps: those of 1 x 1 read each element once a panel, from where the image lies.
_MOST_RESULTS = 0.75
_LEAST_TAPS = 4
# Up to so many, and with filters as small and vectors of channels as many as these, Winograd's algorithm by
# vectors of images is no faster.
_FEW_RESULTS = 4
_SMALL_FILTER = 9
_MANY_VECTORS = 4
# Pixels of a block, whose window should stay in the second-level cache.
_BLOCK_PIXELS = 512
# With fewer multiply-adds a call of another way, which needs no weights packed beforehand, is over sooner; so
# is, with more than `_MOST_TOGETHER` results, a call of the way for few pixels.
_LEAST_WORK = 1 << 15
_LEAST_WORK_OF_MANY = 1 << 20
# Measured cycles: of loading a vector that is multiplied with all results, of what adding the lanes of a
# result takes, and of copying a vector to a window.
_LOAD_CYCLES = 1.0
_RESULT_CYCLES = 4.0
_COPY_CYCLES = 3.0


class Tables(NamedTuple):
    """What the compiled driver reads; offsets are in elements."""

    blocks: Blocks
    pixels: np.ndarray  # of each grid point's first tap in its window
    runs: np.ndarray  # from there to each run of taps
    size: int  # elements of a run
    results: int  # of a grid point


@intrinsic(prefer_literal=True)
def _sums(typing_context, results, p0, last, operands):
    """Lane t * results + k: the k-th result of pixel p0 + t, or of the `last`.

    It is the sum of x[x0 + pixels[t] + runs[r] + i] * weights[w0 + (k * count + r) * padded + i] over all
    runs r < count and the elements i < size of a run; `padded` is a multiple of a vector's lanes. `operands`
    are the pixels, runs, count, size, padded, x, x0, weights and w0, all arrays being pointers.
    """
    if not isinstance(results, types.IntegerLiteral):
        return None
    many = results.literal_value
    element = operands.types[5].dtype
    vector = Vector(element, VECTOR_BITS // element.bitwidth)

    def codegen(context, builder, signature, arguments):
        _, p0, last, packed = arguments
        emit = Emitter(context, builder, element)
        pixels, runs, count, size, padded, x, x0, weights, w0 = cgutils.unpack_tuple(builder, packed)
        weights = emit.at(weights, w0)
        windows = []
        for t in range(emit.lanes // many):
            pixel = builder.add(p0, ir.Constant(_I64, t))
            pixel = builder.select(builder.icmp_signed("<", pixel, last), pixel, last)
            windows.append(emit.at(x, x0, builder.load(emit.at(pixels, pixel))))
        steps = [builder.mul(builder.mul(count, padded), ir.Constant(_I64, k)) for k in range(many)]
        lanes, zero = ir.Constant(_I64, emit.lanes), ir.Constant(_I64, 0)
        whole = builder.sdiv(size, lanes)
        rest = builder.sub(size, builder.mul(whole, lanes))
        end = builder.add(whole, builder.zext(builder.icmp_signed(">", rest, zero), _I64))

        def add_run(r, sums):
            offset, row = builder.load(emit.at(runs, r)), emit.at(weights, builder.mul(r, padded))

            def add_vector(v, sums, mask=None):
                first = builder.mul(v, lanes)
                place = builder.add(offset, first)
                factors = [emit.load(emit.at(row, step, first)) for step in steps]
                new: list = []
                for window in windows:
                    value = emit.load(emit.at(window, place), mask)
                    new += [
                        emit.multiply_add(value, f, c)
                        for f, c in zip(factors, sums[len(new) :], strict=False)
                    ]
                return new

            def add_rest(v, sums):
                return add_vector(v, sums, emit.mask(rest, 0))

            sums = sum_loop(emit, zero, whole, sums, add_vector, unrolls=False)
            return sum_loop(emit, whole, end, sums, add_rest, unrolls=False)

        nothing = ir.Constant(emit.vector, None)
        sums = sum_loop(emit, zero, count, [nothing] * (len(windows) * many), add_run, unrolls=False)
        return totals(emit, sums + [nothing] * (emit.lanes - len(sums)))

    return vector(results, types.intp, types.intp, operands), codegen


@kernel
def _few_sums(results, p0, last, operands):
    """`_sums` of up to four results, whose number is not known before."""
    keep_in_line()
    if results == 1:
        return _sums(1, p0, last, operands)
    if results == 2:
        return _sums(2, p0, last, operands)
    if results == 3:
        return _sums(3, p0, last, operands)
    return _sums(4, p0, last, operands)


@kernel
def _some_sums(results, p0, last, operands):
    """`_sums` of up to eight results, whose number is not known before."""
    keep_in_line()
    if results <= 4:
        return _few_sums(results, p0, last, operands)
    if results == 5:
        return _sums(5, p0, last, operands)
    if results == 6:
        return _sums(6, p0, last, operands)
    if results == 7:
        return _sums(7, p0, last, operands)
    return _sums(8, p0, last, operands)


@kernel
def _fetch(fetch, step, steps, lanes):
    """Have a cache fetch this step's share of `fetch`: a pointer, and the elements from where to where."""
    keep_in_line()
    ahead, begin, end = fetch
    lo, hi = span(step, steps, end - begin)
    for k in range(begin + lo, begin + hi, 64 * lanes * 8 // VECTOR_BITS):
        prefetch(ahead, k)


@kernel
def _fill_block(results, count, operands, start, y, y0, fetch):
    """The results of `count` pixels, which lie one after another in y."""
    keep_out_of_line()
    lanes = start.size
    together = lanes // results
    first = load(pointer(start), 0, all_lanes(y))
    tiles = (count + together - 1) // together
    for p in range(0, count, together):
        _fetch(fetch, p // together, tiles, lanes)
        total = _some_sums(results, p, count - 1, (*operands, 0))
        many = min(count - p, together)
        store(total + first, y, y0 + p * results, first_lanes(y, many * results))


@kernel
def _fill_panel(results, count, operands, start, y, y0, pitch, fetch):
    """`_fill_block` of a panel of up to four results, where a pixel has `pitch`."""
    keep_out_of_line()
    lanes = start.size
    together = lanes // results
    first = load(pointer(start), 0, all_lanes(y))
    tiles = (count + together - 1) // together
    for p in range(0, count, together):
        _fetch(fetch, p // together, tiles, lanes)
        total = _few_sums(results, p, count - 1, operands) + first
        for t in range(min(count - p, together)):
            its = first_lanes(y, (t + 1) * results) ^ first_lanes(y, t * results)
            store(total, y, y0 + (p + t) * pitch - t * results, its)


@kernel
def _fill(of, count, operands, step, start, y, y0, fetch):
    """The results of a block, all together or panel by panel; a result's weights are `step` elements."""
    panels = len(start)
    if panels == 1:
        _fill_block(of.results, count, operands, start[0], y, y0, fetch)
        return
    ahead, begin, end = fetch
    for panel in range(panels):
        k0, k1 = span(panel, panels, of.results)
        lo, hi = span(panel, panels, end - begin)
        share = ahead, begin + lo, begin + hi
        weights = (*operands, k0 * step)
        _fill_panel(k1 - k0, count, weights, start[panel], y, y0 + k0, of.results, share)


@parallel
def _correlate(part, parts, x, images, weights, start, y, argmax, of, e, taps, windows, zs):
    keep_out_of_line()
    b, window, z = of.blocks, windows[part], zs[part]
    padded = weights.size // max(of.runs.size * of.results, 1)
    step = of.runs.size * padded
    tables = pointer(of.pixels), pointer(of.runs), of.runs.size, of.size, padded
    lo, hi = span(part, parts, images * b.blocks)
    for task in range(lo, hi):
        n = task // b.blocks
        first = (task - n * b.blocks) * b.rows
        rows = min(b.rows, b.height - first)
        source, x0 = read_block(x, n, first, b, False, window)
        ahead = max(following(n, first, b), 0)
        end = min(ahead + b.rows * b.step * b.image_w * b.channels, x.size)
        operands = (*tables, pointer(source), x0, pointer(weights))
        fetch = pointer(x), ahead, end
        if e.pool_h > 0:
            y0 = (n * e.out_h + first // e.pool_h) * e.out_w * of.results
            _fill(of, rows * b.width, operands, step, start, pointer(z), 0, fetch)
            finish_panel(z, of.results, rows // e.pool_h, e, taps, y, y0, argmax, of.results)
        else:
            y0 = (n * b.height + first) * b.width * of.results
            _fill(of, rows * b.width, operands, step, start, pointer(y), y0, fetch)


@parallel
def _pack(part, parts, weight, positions, transposed, bias, of, weights, start):
    """Weights (kH * kW, C, F) by result, run and element of the run; and what is added to the sums."""
    keep_out_of_line()
    _, channels, filters = weight.shape
    flat = weight.reshape(weight.size)
    taps = positions.size // of.runs.size
    depth = of.size // taps
    padded = weights.size // (of.runs.size * of.results)
    lo, hi = span(part, parts, of.runs.size * of.results)
    for task in range(lo, hi):
        k, r = task // of.runs.size, task % of.runs.size
        for i in range(taps):
            target = task * padded + i * depth
            source = positions[r * taps + i] * channels * filters
            if transposed:
                copy(flat, source + k * filters, weights, target, depth)
            else:
                for d in range(depth):
                    weights[target + d] = flat[source + d * filters + k]
        clear(weights, task * padded + of.size, padded - of.size)
    if part == 0:
        panels, lanes = start.shape
        for panel in range(panels):
            k0, k1 = span(panel, panels, of.results)
            for lane in range(lanes):
                start[panel, lane] = bias[k0 + lane % (k1 - k0)] if bias.size > 0 else 0


def _tables(
    rows: Axis,
    columns: Axis,
    kernel: tuple[Sequence[int], Sequence[int]],
    kernel_w: int,
    image: tuple[int, int],
    depth: int,
    results: int,
    multiple: int = 1,
) -> tuple[Tables, np.ndarray]:
    """Those of a correlation of images of `depth` channels; and where in a kernel its taps are, by run.

    `kernel` has the rows and columns of the kernel that the axes' taps are. A block has a multiple of
    `multiple` rows.
    """
    b = geometry.blocks(rows, columns, image, depth, depth, multiple, _BLOCK_PIXELS)
    pitch = b.window_w * depth
    order = np.argsort(columns.taps)
    taps = np.array(columns.taps, np.intp)[order]
    joined = len(taps) if np.all(np.diff(taps) == 1) else 1
    positions = np.add.outer(np.array(kernel[0]) * kernel_w, np.array(kernel[1])[order])
    down, right = np.arange(b.rows) * rows.step * pitch, np.arange(b.width) * columns.step * depth
    of = Tables(
        blocks=b,
        pixels=np.add.outer(down, right).ravel(),
        runs=np.add.outer(np.array(rows.taps, np.intp) * pitch, taps[::joined] * depth).ravel(),
        size=joined * depth,
        results=results,
    )
    return of, positions.ravel()


@lru_cache(maxsize=512)
def _forward_tables(layer: Layer, e: Epilogue) -> tuple[Tables, np.ndarray]:
    kernel = range(layer.rows.kernel), range(layer.columns.kernel)
    sizes = layer.columns.kernel, layer.image, layer.channels, layer.filters, max(e.pool_h, 1)
    rows, columns = layer.forward_axes(e)
    return _tables(rows, columns, kernel, *sizes)


@lru_cache(maxsize=512)
def _input_tables(layer: Layer) -> tuple[Tables, np.ndarray]:
    # Where neither axis has a stride there is one phase.
    ((rows, kernel_rows),), ((columns, kernel_columns),) = layer.rows.phases(), layer.columns.phases()
    kernel = kernel_rows, kernel_columns
    return _tables(
        rows, columns, kernel, layer.columns.kernel, layer.out_image, layer.filters, layer.channels
    )


def _weights(of: Tables, dtype: np.dtype) -> int:
    """Elements of a result's weights, each run of which fills whole vectors."""
    lanes = simd.lanes(dtype)
    return of.runs.size * -(-of.size // lanes) * lanes


def _panels(of: Tables, dtype: np.dtype) -> int:
    """How many panels the results are summed in."""
    lanes = simd.lanes(dtype)
    read = of.results * _weights(of, dtype) * dtype.itemsize
    if of.results <= min(_MOST_TOGETHER, lanes) and (of.results <= _MOST_OF_PANEL or read <= _NEAR_BYTES):
        return 1
    return -(-of.results // min(_MOST_OF_PANEL, lanes))


def _run(layer, x, tables, weight, transposed, bias, y, e=NO_EPILOGUE, argmax=NOWHERE) -> None:
    of, positions = tables
    b, dtype, images = of.blocks, x.dtype, len(x)
    lanes = simd.lanes(dtype)
    weights = scratch("weights", of.results * _weights(of, dtype), dtype)
    start = scratch("start", (_panels(of, dtype), lanes), dtype)
    flat = weight.reshape(-1, *weight.shape[2:])
    biases = NOTHING[dtype] if bias is None else bias
    parts = part_count(of.results * of.runs.size, weights.nbytes)
    _pack(parts, flat, positions, int(transposed), biases, of, weights, start)
    parts = part_count(images * b.blocks, images * layer.multiply_adds / MULTIPLY_ADDS_PER_BYTE)
    window = 1 if b.in_place else b.window_h * b.window_w * b.channels
    _correlate(
        parts,
        x.reshape(-1),
        images,
        weights,
        start,
        y.reshape(-1),
        argmax.reshape(-1),
        of,
        e,
        window_taps(e, of.results),
        scratch("windows", (parts, window), dtype),
        scratch("rows", (parts, b.rows * b.width * of.results if e.pool_h else 1), dtype),
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
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`; see `suits_forward`."""
    _run(layer, x, _forward_tables(layer, e), weight, False, bias, y, e, argmax)


def backward_input(layer: Layer, dout: np.ndarray, weight: np.ndarray, dx: np.ndarray) -> None:
    """Overwrite `dx` with the gradient to the input; see `suits_input`."""
    _run(layer, dout, _input_tables(layer), weight, True, None, dx)


def _cycles(of: Tables, dtype: np.dtype) -> float:
    b, lanes = of.blocks, simd.lanes(dtype)
    vectors = _weights(of, dtype) // lanes
    loads = _panels(of, dtype) * vectors * _LOAD_CYCLES
    sums = b.height * b.width * (of.results * (vectors + _RESULT_CYCLES) + loads)
    copies = 0 if b.in_place else b.blocks * b.window_h * b.window_w * b.channels / lanes
    return sums + _COPY_CYCLES * copies


def _is_narrow(layer: Layer, images: int, depth: int, results: int, dtype: np.dtype) -> bool:
    """What must hold of a correlation from `depth` channels to `results`."""
    lanes, work = simd.lanes(dtype), images * layer.multiply_adds
    # Vectors of images do as well if channels fill none.
    if layer.groups > 1 or (depth < lanes <= images):
        return False
    if results <= min(_MOST_TOGETHER, lanes):
        return work >= _LEAST_WORK
    taps = layer.rows.kernel * layer.columns.kernel
    return results <= _MOST_RESULTS * lanes and taps >= _LEAST_TAPS and work >= _LEAST_WORK_OF_MANY


def yields(layer: Layer, depth: int, results: int, dtype: np.dtype) -> bool:
    """Whether Winograd's algorithm by vectors of images is faster, where it goes."""
    if results <= _FEW_RESULTS:
        return False
    if results > _MOST_TOGETHER:
        return True
    area = layer.rows.kernel * layer.columns.kernel
    return area > _SMALL_FILTER or depth < _MANY_VECTORS * simd.lanes(dtype)


@lru_cache(maxsize=512)
def suits_forward(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the forward pass is faster here than elsewhere."""
    if not _is_narrow(layer, images, layer.channels, layer.filters, dtype):
        return False
    return _cycles(_forward_tables(layer, NO_EPILOGUE)[0], dtype) < layer.forward_cycles(dtype)


@lru_cache(maxsize=512)
def suits_input(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether the gradient to the input is computed faster here than elsewhere."""
    if max(layer.rows.stride, layer.columns.stride) > 1:
        return False
    if not _is_narrow(layer, images, layer.filters, layer.channels, dtype):
        return False
    others = layer.input_cycles(dtype)
    if few_channels.suits(layer, dtype):
        others = min(others, few_channels.cycles(layer, dtype))
    return _cycles(_input_tables(layer)[0], dtype) < others
