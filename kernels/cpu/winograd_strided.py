"""Strided convolution by Winograd's algorithm, on an image whose neighbouring pixels are its channels.

With stride s the output i takes the inputs s i + k. Written as k = s a + p it takes the pixel i + a of an
image that holds s inputs in each pixel, of which it sees the p-th through its tap a: a convolution of stride
1, of filters s times smaller, on s x s times as many channels. 7x7 filters with stride 2 become filters of
4x4, for which 16 outputs take 49 products of 4 C channels instead of 784 of C.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from . import direct, simd, winograd, winograd_weights
from .direct import Layer
from .epilogue import NO_EPILOGUE, Epilogue
from .pieces import clear_all
from .vectors import first_lanes, lanes_of, load, pointer, store
from .winograd_points import TILE
from .winograd_tiling import filters_of
from .workspace import NOWHERE, clear, copy, scratch

# Products that must be spared, as a ratio, and filters that are needed, to repay the folding of images and
# the writing of as many results.
_LEAST_GAIN = 2.5
_FEWEST_FILTERS = 32
# Channels of the folded image whose products repay it where vectors are multiplied at full width.
_FEWEST_CHANNELS = 32 if simd.FULL_WIDTH else 1
# Images are folded by as many as stay in the last-level cache.
_FOLDED_BYTES = 8 << 20


class Fold(NamedTuple):
    """The integers that the compiled drivers read."""

    height: int  # of an image
    width: int
    channels: int
    stride_h: int
    stride_w: int
    top: int  # zeros above the image and left of it
    left: int
    rows: int  # of the folded image
    columns: int
    depth: int  # channels of the folded image, the last of which may be zeros
    kernel_h: int  # of the filters, and of the folded ones
    kernel_w: int
    side_h: int
    side_w: int
    filters: int


@kernel
def _copy_run(x, source, z, target, count):
    """`copy` of few elements, by vectors."""
    values, places = pointer(x), pointer(z)
    lanes = lanes_of(x)
    for begin in range(0, count, lanes):
        some = first_lanes(values, min(count - begin, lanes))
        store(load(values, source + begin, some), places, target + begin, some)


@parallel
def _fold_images(part, parts, x, first, images, f, z):
    """Write images from `first` on to `z` (images, rows, columns, depth); see above."""
    keep_out_of_line()
    line = f.columns * f.depth
    lo, hi = span(part, parts, images * f.rows)
    for row in range(lo, hi):
        n = row // f.rows
        u = row - n * f.rows
        clear(z, row * line, line)
        for p in range(f.stride_h):
            h = u * f.stride_h + p - f.top
            if h < 0 or h >= f.height:
                continue
            source = ((first + n) * f.height + h) * f.width
            for column in range(f.columns):
                w = column * f.stride_w - f.left
                before, end = max(-w, 0), min(f.stride_w, f.width - w)
                place = row * line + column * f.depth + (p * f.stride_w + before) * f.channels
                _copy_run(x, (source + w + before) * f.channels, z, place, (end - before) * f.channels)


@kernel
def _folded_tap(f, tap, p):
    """The place in the filter of the `p`-th of what the folded filters' `tap` holds; -1 if it has none."""
    kh = tap // f.side_w * f.stride_h + p // f.stride_w
    kw = tap % f.side_w * f.stride_w + p % f.stride_w
    return kh * f.kernel_w + kw if kh < f.kernel_h and kw < f.kernel_w else -1


@parallel
def _fold_filters(part, parts, weight, f, folded):
    """(kH, kW, C, F) to (side_h, side_w, depth, F), filled up with zeros."""
    keep_out_of_line()
    size = f.channels * f.filters
    lo, hi = span(part, parts, f.side_h * f.side_w)
    for tap in range(lo, hi):
        target = tap * f.depth * f.filters
        clear(folded, target, f.depth * f.filters)
        for p in range(f.stride_h * f.stride_w):
            place = _folded_tap(f, tap, p)
            if place >= 0:
                copy(weight, place * size, folded, target + p * size, size)


@parallel
def _add_folded(part, parts, folded, f, dweight):
    """Add the gradient of folded filters to that of the filters."""
    keep_out_of_line()
    size = f.channels * f.filters
    lo, hi = span(part, parts, f.side_h * f.side_w)
    for tap in range(lo, hi):
        for p in range(f.stride_h * f.stride_w):
            place = _folded_tap(f, tap, p)
            if place >= 0:
                begin = (tap * f.depth + p * f.channels) * f.filters
                values, places = folded[begin : begin + size], dweight[place * size : (place + 1) * size]
                for i in range(size):
                    places[i] += values[i]


def _depth(channels: int) -> int:
    """So many channels or a few more, which fill vectors."""
    lanes, panel = simd.lanes(np.float32), simd.panel_width(np.float32)
    return channels if channels >= panel else -(-channels // lanes) * lanes


@lru_cache(maxsize=256)
def _fold(layer: Layer) -> tuple[Fold, Layer]:
    """A layer's sizes, and the layer of stride 1 on the folded image."""
    rows, columns = layer.rows, layer.columns
    strides, kernel = (rows.stride, columns.stride), (rows.kernel, columns.kernel)
    side = -(-kernel[0] // strides[0]), -(-kernel[1] // strides[1])
    image = layer.out_image[0] + side[0] - 1, layer.out_image[1] + side[1] - 1
    depth = _depth(strides[0] * strides[1] * layer.channels)
    padding = rows.padding[0], columns.padding[0]
    f = Fold(*layer.image, layer.channels, *strides, *padding, *image, depth, *kernel, *side, layer.filters)
    return f, direct.layer((1, *image, depth), side, None, layer.filters, 1, 0, 1, 1)


def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether a layer's forward pass and its filters' gradient can be done here, are faster, and wanted."""
    sides = layer.rows, layer.columns
    if dtype != np.float32 or layer.groups != 1 or all(side.stride == 1 for side in sides):
        return False
    if any(side.dilation > 1 or side.stride >= side.kernel for side in sides) or not layer.multiply_adds:
        return False
    f, folded = _fold(layer)
    products = TILE**2 * f.kernel_h * f.kernel_w * f.channels
    if layer.filters < _FEWEST_FILTERS or f.depth < _FEWEST_CHANNELS:
        return False
    if products < _LEAST_GAIN * filters_of(folded).products * f.depth:
        return False
    return winograd.suits(folded, images, dtype)


def _folded(f: Fold, x: np.ndarray, images: int, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    """Some images after others, folded, in scratch."""
    size = f.rows * f.columns * f.depth
    many = max(min(_FOLDED_BYTES // (size * dtype.itemsize), images), 1)
    memory = scratch("folded", many * size, dtype)
    for first in range(0, images, many):
        count = min(many, images - first)
        z = memory[: count * size]
        _fold_images(part_count(count * f.rows, z.nbytes), x, first, count, f, z)
        yield slice(first, first + count), z.reshape(count, f.rows, f.columns, f.depth)


def forward(
    layer: Layer,
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    y: np.ndarray,
    e: Epilogue = NO_EPILOGUE,
    argmax: np.ndarray = NOWHERE,
) -> None:
    """Overwrite `y`, and `argmax`, with the convolution of `x` that ends in `e`; see `suits`."""
    f, folded = _fold(layer)
    shape = f.side_h, f.side_w, f.depth, f.filters
    filters = scratch("folded filters", f.side_h * f.side_w * f.depth * f.filters, x.dtype)
    _fold_filters(part_count(f.side_h * f.side_w, filters.nbytes), weight.reshape(-1), f, filters)
    for some, z in _folded(f, x.reshape(-1), len(x), x.dtype):
        places = argmax[some] if argmax.size else argmax
        winograd.forward(folded, z, filters.reshape(shape), bias, y[some], e, places)


def add_weight_gradient(layer: Layer, dout: np.ndarray, x: np.ndarray, dweight: np.ndarray) -> None:
    """Add the gradient to the filters to `dweight`; see `suits`."""
    f, folded = _fold(layer)
    gradient = scratch("folded filters", f.side_h * f.side_w * f.depth * f.filters, x.dtype)
    clear_all(gradient)
    for some, z in _folded(f, x.reshape(-1), len(x), x.dtype):
        shaped = gradient.reshape(f.side_h, f.side_w, f.depth, f.filters)
        winograd_weights.add_weight_gradient(folded, dout[some], z, shaped)
    _add_folded(part_count(f.side_h * f.side_w, gradient.nbytes), gradient, f, dweight.reshape(-1))
