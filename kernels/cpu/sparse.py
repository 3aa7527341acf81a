"""Gradients of a convolution behind max-pooling, from the pixels that have one.

Of each window of pixels only the largest has a gradient g, and none has where ReLU was shut. A pixel's
gradient meets one row of the kernel as a contiguous run of kW * C numbers, both in the image and in the
gradient of the image, so that both passes are sums of weighted runs, held in registers:

    dweight[f, kh, :] += sum over pixels of g * x[pixel's row + kh, its kW columns, :]
    dx[pixel's row + kh, its kW columns, :] += sum over filters of g * weight[f, kh, :]

For 2x2 windows that is a quarter of the multiplications of the dense sums, or less.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import direct, lists, simd
from .direct import fill_window
from .epilogue import Epilogue
from .lists import sort_by_filter, sort_by_pixel
from .runs import add_rows_of_runs, add_runs
from .workspace import clear, copy, scratch

_INPUT_BYTES = 128 * 1024
_CHUNK = 16
# What a sum of few runs takes beside its multiply-adds.
_CYCLES_A_SUM = 25
# The gradient of the weights is summed in at most this many pieces of the batch; of the input, one image
# alone is cut into at least as many.
_PIECES = 16


class Sparse(NamedTuple):
    """The integers that the drivers read."""

    image_h: int
    image_w: int
    channels: int
    filters: int
    pooled_h: int
    pooled_w: int
    pool_h: int
    pool_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    kernel_h: int
    origin_h: int  # input row of the first tap of row 0
    origin_w: int
    window_w: int  # columns of the padded image that any window reaches
    run: int  # numbers in one row of the kernel: kW * C
    padded_run: int  # in whole vectors
    rows: int  # rows in a block: of windows for the weights, of the image for the input
    blocks: int  # in an image
    room: int  # entries from one list to the next


@parallel
def _weight(
    part, parts, dout, argmax, x, s, bases, pooled, partial, biases, windows, values, offsets, counts
):
    keep_out_of_line()
    pieces = partial.shape[0]
    images = dout.size // (s.pooled_h * s.pooled_w * s.filters)
    window, values, offsets, counts = windows[part], values[part], offsets[part], counts[part]
    pitch = s.window_w * s.channels
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        sums, bias = partial[piece], biases[piece]
        clear(sums, 0, sums.size)
        clear(bias, 0, bias.size)
        task0, task1 = span(piece, pieces, images * s.blocks)
        for task in range(task0, task1):
            n = task // s.blocks
            first = (task - n * s.blocks) * s.rows
            rows = min(s.rows, s.pooled_h - first)
            window_rows = (rows * s.pool_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1
            h0 = first * s.pool_h * s.stride_h + s.origin_h
            fill_window(x, n, s, h0, window_rows, window_rows, window)
            p0 = (n * s.pooled_h + first) * s.pooled_w * s.filters
            sort_by_filter(
                dout,
                argmax,
                p0,
                rows * s.pooled_w,
                s.filters,
                pooled,
                bases,
                values,
                offsets,
                s.room,
                counts,
                bias,
            )
            for f in range(s.filters):
                add_rows_of_runs(
                    values,
                    offsets,
                    f * s.room,
                    counts[f],
                    window,
                    0,
                    s.dilation_h * pitch,
                    sums,
                    f * s.padded_run,
                    s.filters * s.padded_run,
                    s.kernel_h,
                    s.run,
                )


@parallel
def _reduce_weight(part, parts, partial, biases, s, dweight, dbias):
    """Add all pieces to dweight (kH, kW * C, F) and dbias."""
    keep_out_of_line()
    pieces = partial.shape[0]
    if part == 0:
        for f in range(s.filters):
            for piece in range(pieces):
                dbias[f] += biases[piece, f]
    lo, hi = span(part, parts, s.kernel_h * s.filters)
    for row in range(lo, hi):
        kh = row // s.filters
        f = row - kh * s.filters
        sums = partial[0, row * s.padded_run : row * s.padded_run + s.run]
        for piece in range(1, pieces):
            more = partial[piece, row * s.padded_run : row * s.padded_run + s.run]
            for c in range(sums.size):
                sums[c] += more[c]
        places = dweight[(kh * s.run) * s.filters + f : (kh + 1) * s.run * s.filters : s.filters]
        for c in range(sums.size):
            places[c] += sums[c]


@kernel
def _scatter(window, h0, rows, i, j0, pixels, s, weights, values, offsets, counts):
    """Add what `pixels` windows from (i, j0) on have for the rows from `h0` on to the window."""
    area, pitch = s.pool_h * s.pool_w, s.window_w * s.channels
    for kh in range(s.kernel_h):
        for qh in range(s.pool_h):
            r = (i * s.pool_h + qh) * s.stride_h + kh * s.dilation_h + s.origin_h - h0
            if r < 0 or r >= rows:
                continue
            for j in range(pixels):
                for qw in range(s.pool_w):
                    place = j * area + qh * s.pool_w + qw
                    column = ((j0 + j) * s.pool_w + qw) * s.stride_w
                    add_runs(
                        values,
                        offsets,
                        place * s.room,
                        counts[place],
                        weights,
                        kh * s.filters * s.padded_run,
                        window,
                        r * pitch + column * s.channels,
                        s.run,
                    )


@parallel
def _input(part, parts, dout, argmax, weights, s, dx, windows, values, offsets, counts):
    keep_out_of_line()
    images = dout.size // (s.pooled_h * s.pooled_w * s.filters)
    window, values, offsets, counts = windows[part], values[part], offsets[part], counts[part]
    pitch = s.window_w * s.channels
    step = s.pool_h * s.stride_h
    reach = (s.pool_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h
    left = min(max(-s.origin_w, 0), s.window_w)
    copied = min(s.image_w, s.window_w - left) * s.channels
    line = s.image_w * s.channels
    lo, hi = span(part, parts, images * s.blocks)
    for task in range(lo, hi):
        n = task // s.blocks
        h0 = (task - n * s.blocks) * s.rows
        rows = min(s.rows, s.image_h - h0)
        clear(window, 0, rows * pitch)
        first = max(-((reach + s.origin_h - h0) // step), 0)
        last = min((h0 + rows - 1 - s.origin_h) // step + 1, s.pooled_h)
        for i in range(first, last):
            for j0 in range(0, s.pooled_w, _CHUNK):
                pixels = min(_CHUNK, s.pooled_w - j0)
                p0 = ((n * s.pooled_h + i) * s.pooled_w + j0) * s.filters
                sort_by_pixel(
                    dout,
                    argmax,
                    p0,
                    pixels,
                    s.filters,
                    s.pool_h * s.pool_w,
                    s.padded_run,
                    values,
                    offsets,
                    s.room,
                    counts,
                )
                _scatter(window, h0, rows, i, j0, pixels, s, weights, values, offsets, counts)
        for r in range(rows):
            target = (n * s.image_h + h0 + r) * line
            copy(window, r * pitch + left * s.channels, dx, target, copied)
            clear(dx, target + copied, line - copied)


@parallel
def _runs_of_weights(part, parts, weight, s, runs):
    """weight (kH, kW * C, F) as (kH, F, padded run)."""
    keep_out_of_line()
    lo, hi = span(part, parts, s.kernel_h * s.filters)
    for row in range(lo, hi):
        kh = row // s.filters
        f = row - kh * s.filters
        source = weight[kh * s.run * s.filters + f : (kh + 1) * s.run * s.filters : s.filters]
        target = runs[row * s.padded_run : (row + 1) * s.padded_run]
        for c in range(source.size):
            target[c] = source[c]
        clear(target, source.size, target.size - source.size)


def _sizes(
    layer: direct.Layer, e: Epilogue, dtype: np.dtype, rows: int, image_rows: int, room: int
) -> Sparse:
    high, wide = layer.rows, layer.columns
    run = wide.kernel * layer.channels
    lanes = simd.lanes(dtype)
    return Sparse(
        image_h=layer.image[0],
        image_w=layer.image[1],
        channels=layer.channels,
        filters=layer.filters,
        pooled_h=e.out_h,
        pooled_w=e.out_w,
        pool_h=e.pool_h,
        pool_w=e.pool_w,
        stride_h=high.stride,
        stride_w=wide.stride,
        dilation_h=high.dilation,
        kernel_h=high.kernel,
        origin_h=-high.padding[0],
        origin_w=-wide.padding[0],
        window_w=(e.out_w * e.pool_w - 1) * wide.stride + wide.kernel,
        run=run,
        padded_run=-(-run // lanes) * lanes,
        rows=rows,
        blocks=-(-image_rows // rows),
        room=room + lanes,
    )


def _work(layer: direct.Layer, images: int) -> float:
    # A quarter of the dense multiply-adds, each of which takes a tenth of the time of a byte.
    return images * layer.multiply_adds / 40


@lru_cache(maxsize=512)
def _weight_tables(
    layer: direct.Layer, e: Epilogue, dtype: np.dtype
) -> tuple[Sparse, np.ndarray, lists.Geometry]:
    """Sizes, where in a part's window that of a pooled pixel begins, and where in that each of its pixels."""
    s = _sizes(layer, e, dtype, 1, e.out_h, 0)
    pitch = s.window_w * s.channels
    extent = (s.kernel_h - 1) * s.dilation_h + 1
    # A window, or its part for one row of the kernel, should stay in the first-level cache.
    most = (3 * simd.cache_bytes(1) // 4 // (pitch * dtype.itemsize) - extent) // (s.pool_h * s.stride_h) + 1
    rows = -(-e.out_h // -(-e.out_h // max(most, 1)))
    s = _sizes(layer, e, dtype, rows, e.out_h, rows * e.out_w)
    line, pixel = s.stride_h * pitch, s.stride_w * s.channels
    bases = np.zeros(s.room, np.int32)
    first = np.add.outer(np.arange(rows) * (s.pool_h * line), np.arange(e.out_w) * (s.pool_w * pixel))
    bases[: first.size] = first.ravel()
    return s, bases, lists.geometry(s.pool_h, s.pool_w, line, pixel)


def add_weight_gradient(
    dout: np.ndarray,
    argmax: np.ndarray,
    x: np.ndarray,
    layer: direct.Layer,
    e: Epilogue,
    dweight: np.ndarray,
    dbias: np.ndarray,
) -> None:
    """Add the gradients of weight and bias to `dweight` and `dbias`."""
    images, dtype = x.shape[0], x.dtype
    s, bases, pooled = _weight_tables(layer, e, dtype)
    pieces = min(images * s.blocks, _PIECES)
    parts = part_count(pieces, _work(layer, images))
    partial = scratch("partial", pieces * s.kernel_h * s.filters * s.padded_run, dtype).reshape(pieces, -1)
    biases = scratch("biases", pieces * s.filters, dtype).reshape(pieces, -1)
    window_rows = (s.rows * s.pool_h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1
    windows = _parts("windows", parts, window_rows * s.window_w * s.channels + s.padded_run, dtype)
    entries = s.filters * s.room
    values = _parts("values", parts, entries, dtype)
    offsets = _parts("offsets", parts, entries, np.dtype(np.int32))
    counts = _parts("counts", parts, s.filters, np.dtype(np.intp))
    flat = (dout.reshape(-1), argmax.reshape(-1), x.reshape(-1))
    _weight(parts, *flat, s, bases, pooled, partial, biases, windows, values, offsets, counts)
    parts = part_count(s.kernel_h * s.filters, partial.nbytes)
    _reduce_weight(parts, partial, biases, s, dweight.reshape(-1), dbias)


def input_gradient(
    dout: np.ndarray,
    argmax: np.ndarray,
    weight: np.ndarray,
    layer: direct.Layer,
    e: Epilogue,
    dx: np.ndarray,
) -> None:
    """Overwrite `dx` with the gradient of the input."""
    images, dtype = dx.shape[0], dx.dtype
    s = _sizes(layer, e, dtype, layer.image[0], layer.image[0], layer.filters)
    pitch = s.window_w * s.channels
    rows = min(s.image_h, max(_INPUT_BYTES // (pitch * dtype.itemsize), s.kernel_h))
    if images < _PIECES:
        rows = min(rows, max(-(-s.image_h * images // _PIECES), 2))
    s = s._replace(rows=rows, blocks=-(-s.image_h // rows))
    runs = scratch("weights", s.kernel_h * s.filters * s.padded_run, dtype)
    _runs_of_weights(part_count(s.kernel_h * s.filters, runs.nbytes), weight.reshape(-1), s, runs)
    parts = part_count(images * s.blocks, _work(layer, images))
    windows = _parts("windows", parts, rows * pitch + s.padded_run, dtype)
    pixels = _CHUNK * s.pool_h * s.pool_w
    values = _parts("values", parts, pixels * s.room, dtype)
    offsets = _parts("offsets", parts, pixels * s.room, np.dtype(np.int32))
    counts = _parts("counts", parts, pixels, np.dtype(np.intp))
    flat = (dout.reshape(-1), argmax.reshape(-1), runs)
    _input(parts, *flat, s, dx.reshape(-1), windows, values, offsets, counts)


def _parts(use: str, parts: int, size: int, dtype: np.dtype) -> np.ndarray:
    return scratch(use, parts * size, dtype).reshape(parts, size)


def pays(layer: direct.Layer, e: Epilogue, dtype: np.dtype) -> tuple[bool, bool]:
    """Whether to expect less work of these sums than of dense ones, for the weights and for the input."""
    area = e.pool_h * e.pool_w
    if area == 1 or layer.groups > 1 or layer.columns.dilation > 1:
        return False, False
    lanes = simd.lanes(dtype)
    runs = layer.filters * layer.rows.kernel
    vectors = _run_vectors(layer, dtype)
    # Runs of the image cross cache lines, those of weights don't.
    crossing = 1.0 if layer.channels % lanes == 0 else 1.6
    taps = layer.rows.kernel * layer.columns.kernel
    dense = area * taps * layer.channels * -(-layer.filters // lanes)
    dense_input = area * taps * layer.filters * -(-layer.channels // lanes)
    return runs * (vectors * crossing + 2) < dense, input_work(layer, e, dtype) < dense_input


def input_work(layer: direct.Layer, e: Epilogue, dtype: np.dtype) -> float:
    """Multiply-adds of vectors that take as long as one window's share in the gradient to the input.

    Runs are summed for each pixel of the window by itself.
    """
    vectors = _run_vectors(layer, dtype)
    sums = e.pool_h * e.pool_w * layer.rows.kernel
    return layer.filters * layer.rows.kernel * (vectors + 2) + sums * (2 * vectors + _CYCLES_A_SUM)


def _run_vectors(layer: direct.Layer, dtype: np.dtype) -> int:
    return -(-layer.columns.kernel * layer.channels // simd.lanes(dtype))
