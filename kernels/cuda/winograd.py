"""Convolution with 3x3 filters in a quarter of the multiplications: Winograd's F(4x4, 3x3).

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.3: a 4x4 tile of outputs
is A^T [sum over c of (G g G^T) * (B^T d B)] A, of the 6x6 window d of the image and the filter g. The 36
elements lie side by side in memory, (tiles, 36 C) times (C, 36 F), so that the sums are a convolution of 1x1
with 36 groups, and their gradient to the weights is that convolution's: both run on its tiles.

What it saves of an output pixel is 13.5 C F floating-point operations, and what it costs is some 22 (C + F)
bytes, as the transformed windows and products are written and read, 2.25 times as large as what they come
from. At 45 TFLOP/s and 3 TB/s that is even at 40 channels and filters, and at 128 of both it halves the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import cuda

from ..cpu import direct
from ..cpu.direct import Layer
from ..cpu.winograd import get_winograd
from ..cpu.winograd_points import FAR, NEAR
from . import correlation
from .arrays import DeviceArray, empty
from .correlation import PLAIN, Pool
from .correlation_memory import DEAD
from .jit import FLOATS, THREADS, Kernel, device_function, kernel
from .splits import nothing
from .taps import digits, narrow, quotient
from .tile import TILES, unrolled
from .weight_gradient import add_weight_gradient as multiply_gradients

WINDOW, TILE, TAPS = 6, 4, 3
AREA = WINDOW * WINDOW
WEIGHTS = TAPS * TAPS

# The opposite points, their squares, and the factors of the filters at each pair and at 0.
_NEAR, _FAR = float(NEAR), float(FAR)
_NEAR2, _FAR2 = float(NEAR**2), float(FAR**2)
_BOTH2, _SUM2 = float(NEAR**2 * FAR**2), float(NEAR**2 + FAR**2)
_AT_NEAR, _AT_FAR = (
    float(1 / (2 * NEAR**2 * (NEAR**2 - FAR**2))),
    float(1 / (2 * FAR**2 * (FAR**2 - NEAR**2))),
)
_AT_ZERO = float(1 / (NEAR**2 * FAR**2))

_FEWEST_CHANNELS = 64
# Fewer tiles fill no block of a product; and with fewer pixels in use of each, on average, too much is
# computed.
_FEWEST_TILES = 64
_FEWEST_PIXELS = 9
_MOST_ELEMENTS = (1 << 31) - 1
_FLOAT32 = FLOATS[:1]


class Tiling(NamedTuple):
    """Images, and the tiles or windows in them."""

    height: int
    width: int
    channels: int
    rows: int  # of tiles in an image
    columns: int
    tiles: int  # in all images
    top: int  # pixels above the image in the first window
    left: int
    pool_h: int  # of the max-pooling that follows, or whose gradient is read
    pool_w: int
    relu: int
    keeps: int
    biased: int


_TILING = f"UniTuple(int32, {len(Tiling._fields)})"


@device_function
def _transform_window(d):
    """B^T d B in place, of 6x6."""
    a, b, a2, b2 = d.dtype.type(_NEAR), d.dtype.type(_FAR), d.dtype.type(_NEAR2), d.dtype.type(_FAR2)
    both, added = d.dtype.type(_BOTH2), d.dtype.type(_SUM2)
    for axis in range(2):
        along, across = (WINDOW, 1) if axis == 0 else (1, WINDOW)
        for k in range(WINDOW):
            p = k * across
            d0, d1, d2 = d[p], d[p + along], d[p + 2 * along]
            d3, d4, d5 = d[p + 3 * along], d[p + 4 * along], d[p + 5 * along]
            near, near_odd = d4 - b2 * d2, a * (d3 - b2 * d1)
            far, far_odd = d4 - a2 * d2, b * (d3 - a2 * d1)
            d[p] = both * d0 - added * d2 + d4
            d[p + along] = near + near_odd
            d[p + 2 * along] = near - near_odd
            d[p + 3 * along] = far + far_odd
            d[p + 4 * along] = far - far_odd
            d[p + 5 * along] = both * d1 - added * d3 + d5


@device_function
def _products_of_tile(m):
    """A^T m A, of 6x6, whose first four rows and columns become the result."""
    a, b, a2, b2 = m.dtype.type(_NEAR), m.dtype.type(_FAR), m.dtype.type(_NEAR2), m.dtype.type(_FAR2)
    for axis in range(2):
        along, across = (WINDOW, 1) if axis == 0 else (1, WINDOW)
        for k in range(WINDOW if axis == 0 else TILE):
            p = k * across
            near, far = m[p + along] + m[p + 2 * along], m[p + 3 * along] + m[p + 4 * along]
            near_odd = a * (m[p + along] - m[p + 2 * along])
            far_odd = b * (m[p + 3 * along] - m[p + 4 * along])
            m[p] = m[p] + near + far
            m[p + along] = near_odd + far_odd
            m[p + 2 * along] = a2 * near + b2 * far
            m[p + 3 * along] = a2 * near_odd + b2 * far_odd + m[p + 5 * along]


@device_function
def _spread_tile(m):
    """A y A^T, of the first four rows and columns of 6x6, in place: the adjoint of `_products_of_tile`."""
    a, b, a2, b2 = m.dtype.type(_NEAR), m.dtype.type(_FAR), m.dtype.type(_NEAR2), m.dtype.type(_FAR2)
    for axis in range(2):
        along, across = (WINDOW, 1) if axis == 0 else (1, WINDOW)
        for k in range(TILE if axis == 0 else WINDOW):
            p = k * across
            y0, y1, y2, y3 = m[p], m[p + along], m[p + 2 * along], m[p + 3 * along]
            near, near_odd = y0 + a2 * y2, a * (y1 + a2 * y3)
            far, far_odd = y0 + b2 * y2, b * (y1 + b2 * y3)
            m[p + along] = near + near_odd
            m[p + 2 * along] = near - near_odd
            m[p + 3 * along] = far + far_odd
            m[p + 4 * along] = far - far_odd
            m[p + 5 * along] = y3


def _pixel_reader(pooled: bool) -> Callable:
    """A device function that reads a pixel of the images, or of the gradient before a max-pooling."""

    @device_function
    def image(x, argmax, n, h, w, c, g):
        if h < 0 or h >= g.height or w < 0 or w >= g.width:
            return x.dtype.type(0)
        return x[(n * g.height * g.width + narrow(h * g.width + w)) * g.channels + c]

    @device_function
    def behind(x, argmax, n, h, w, c, g):
        row, column = quotient(max(h, 0), g.pool_h), quotient(max(w, 0), g.pool_w)
        rows, columns = quotient(g.height, g.pool_h), quotient(g.width, g.pool_w)
        if h < 0 or row >= rows or w < 0 or column >= columns:
            return x.dtype.type(0)
        at = (n * rows * columns + narrow(row * columns + column)) * g.channels + c
        offset = (h - row * g.pool_h) * g.pool_w + w - column * g.pool_w
        return x[at] if argmax[at] == offset else x.dtype.type(0)

    return behind if pooled else image


def _gather(pooled: bool, side: int, name: str) -> Kernel:
    """A kernel that transforms squares of `side` pixels, a tile apart: windows, or tiles of a gradient."""
    read = _pixel_reader(pooled)
    transform = _transform_window if side == WINDOW else _spread_tile

    def read_row(r: int) -> Callable:
        @device_function
        def read_row(d, x, argmax, n, i, j, c, g):
            for s in range(side):
                h, w = narrow(i * TILE - g.top + r), narrow(j * TILE - g.left + s)
                d[r * WINDOW + s] = read(x, argmax, n, h, w, c, g)

        return read_row

    read_rows = unrolled(read_row, side)

    @kernel(
        f"T[::1], uint8[::1], T[::1], {_TILING}",
        name=f"{name}, pooled" if pooled else name,
        floats=_FLOAT32,
    )
    def gather(x, argmax, transformed, sizes):
        g = Tiling(*sizes)
        d = cuda.local.array(AREA, x.dtype)
        tile = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        c = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if tile >= g.tiles or c >= g.channels:
            return
        n, i, j = digits(tile, g.rows, g.columns)
        read_rows(d, x, argmax, n, i, j, c, g)
        transform(d)
        for k in range(AREA):
            transformed[(tile * AREA + k) * g.channels + c] = d[k]

    return gather


def _scatter(pool_h: int, pool_w: int, pooled: bool) -> Kernel:
    """A kernel that transforms products to tiles of outputs, and pools these."""
    area = pool_h * pool_w
    name = f"pooled {pool_h}x{pool_w}" if pooled else "plain"

    @kernel(f"T[::1], T[::1], T[::1], uint8[::1], {_TILING}", name=name, floats=_FLOAT32)
    def scatter(products, bias, y, argmax, sizes):
        g = Tiling(*sizes)
        m = cuda.local.array(AREA, y.dtype)
        tile = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
        f = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        if tile >= g.tiles or f >= g.channels:
            return
        for k in range(AREA):
            m[k] = products[(tile * AREA + k) * g.channels + f]
        _products_of_tile(m)
        zero = y.dtype.type(0)
        start = bias[f] if g.biased else zero
        n, i, j = digits(tile, g.rows, g.columns)
        height, width = g.height // pool_h, g.width // pool_w
        for r in range(TILE // pool_h):
            for s in range(TILE // pool_w):
                row, column = i * (TILE // pool_h) + r, j * (TILE // pool_w) + s
                best, where = m[r * pool_h * WINDOW + s * pool_w] + start, 0
                for offset in range(1, area):
                    place = (r * pool_h + offset // pool_w) * WINDOW + s * pool_w + offset % pool_w
                    value = m[place] + start
                    # The first of several, but the last NaN.
                    if value > best or value != value:
                        best, where = value, offset
                if g.relu and not best > zero:
                    where = DEAD
                    if best <= zero:
                        best = zero
                if row < height and column < width:
                    at = ((n * height + row) * width + column) * g.channels + f
                    y[at] = best
                    if g.keeps:
                        argmax[at] = where

    return scatter


_windows = {pooled: _gather(pooled, WINDOW, "windows") for pooled in (False, True)}
_gradients = {pooled: _gather(pooled, TILE, "gradients") for pooled in (False, True)}
_outputs = {
    PLAIN[:3]: _scatter(1, 1, False),
    (1, 1, 1): _scatter(1, 1, True),
    (2, 2, 1): _scatter(2, 2, True),
}


@kernel("T[::1], T[::1], int32, int32, int32", floats=_FLOAT32)
def _transform_weights(weight, transformed, channels, filters, mirrored):
    """G g G^T of all filters: (C, 36 F), or if `mirrored`, for the gradient to the input, (F, 36 C)."""
    u = cuda.local.array(AREA, weight.dtype)
    f = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    c = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if c >= channels or f >= filters:
        return
    a, b, a2, b2 = u.dtype.type(_NEAR), u.dtype.type(_FAR), u.dtype.type(_NEAR2), u.dtype.type(_FAR2)
    at_zero, at_near, at_far = u.dtype.type(_AT_ZERO), u.dtype.type(_AT_NEAR), u.dtype.type(_AT_FAR)
    for r in range(TAPS):
        for s in range(TAPS):
            tap = WEIGHTS - 1 - (r * TAPS + s) if mirrored else r * TAPS + s
            u[r * WINDOW + s] = weight[(tap * channels + c) * filters + f]
    for axis in range(2):
        along, across = (WINDOW, 1) if axis == 0 else (1, WINDOW)
        for k in range(TAPS if axis == 0 else WINDOW):
            p = k * across
            g0, g1, g2 = u[p], u[p + along], u[p + 2 * along]
            near, far = at_near * (g0 + a2 * g2), at_far * (g0 + b2 * g2)
            near_odd, far_odd = at_near * a * g1, at_far * b * g1
            u[p] = at_zero * g0
            u[p + along] = near + near_odd
            u[p + 2 * along] = near - near_odd
            u[p + 3 * along] = far + far_odd
            u[p + 4 * along] = far - far_odd
            u[p + 5 * along] = g2
    for k in range(AREA):
        if mirrored:
            transformed[(f * AREA + k) * channels + c] = u[k]
        else:
            transformed[(c * AREA + k) * filters + f] = u[k]


@kernel("T[::1], T[::1], int32, int32, int32", floats=_FLOAT32)
def _weights_gradient(transformed, dweight, channels, filters, accumulate):
    """G^T u G: the gradient of the filters from that of the transformed ones, (C, 36 F)."""
    u = cuda.local.array(AREA, dweight.dtype)
    f = cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x
    c = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if c >= channels or f >= filters:
        return
    a, b, a2, b2 = u.dtype.type(_NEAR), u.dtype.type(_FAR), u.dtype.type(_NEAR2), u.dtype.type(_FAR2)
    at_zero, at_near, at_far = u.dtype.type(_AT_ZERO), u.dtype.type(_AT_NEAR), u.dtype.type(_AT_FAR)
    for k in range(AREA):
        u[k] = transformed[(c * AREA + k) * filters + f]
    for axis in range(2):
        along, across = (WINDOW, 1) if axis == 0 else (1, WINDOW)
        for k in range(WINDOW if axis == 0 else TAPS):
            p = k * across
            near = at_near * (u[p + along] + u[p + 2 * along])
            far = at_far * (u[p + 3 * along] + u[p + 4 * along])
            near_odd = at_near * (u[p + along] - u[p + 2 * along])
            far_odd = at_far * (u[p + 3 * along] - u[p + 4 * along])
            u[p] = at_zero * u[p] + near + far
            u[p + along] = a * near_odd + b * far_odd
            u[p + 2 * along] = a2 * near + b2 * far + u[p + 5 * along]
    for r in range(TAPS):
        for s in range(TAPS):
            at = ((r * TAPS + s) * channels + c) * filters + f
            value = u[r * WINDOW + s]
            dweight[at] = value + dweight[at] if accumulate else value


def suits(layer: Layer, images: int, dtype: np.dtype) -> bool:
    """Whether Winograd's algorithm can do a layer's passes, is faster, and is wanted."""
    if not get_winograd() or dtype != np.float32 or layer.groups != 1:
        return False
    if any((side.kernel, side.stride, side.dilation) != (TAPS, 1, 1) for side in (layer.rows, layer.columns)):
        return False
    channels = layer.channels, layer.filters
    if min(channels) < _FEWEST_CHANNELS or any(many % TILES[0].run for many in channels):
        return False
    # The passes differ in their tiles by the padding only.
    return all(_repays(images, *image, max(channels)) for image in (layer.image, layer.out_image))


def _repays(images: int, height: int, width: int, channels: int) -> bool:
    tiles = images * -(-height // TILE) * -(-width // TILE)
    fills = tiles >= _FEWEST_TILES and images * height * width >= _FEWEST_PIXELS * tiles
    return fills and tiles * AREA * channels <= _MOST_ELEMENTS


def pools(pool: Pool) -> bool:
    """Whether `forward` can end in this."""
    return pool[:3] in _outputs


def _tiling(
    image: tuple[int, int],
    channels: int,
    result: tuple[int, int],
    images: int,
    top: int,
    left: int,
    pool: Pool,
) -> Tiling:
    """Of images of which windows are read, and that end at the tiles of a `result`."""
    rows, columns = (-(-size // TILE) for size in result)
    tail = pool.height, pool.width, pool.relu, pool.keeps
    return Tiling(*image, channels, rows, columns, images * rows * columns, top, left, *tail, 0)


def _shape(along: int, channels: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid and block of a thread for each of `along` times `channels`."""
    across = THREADS // 4
    return (-(-along * across // THREADS), -(-channels // across)), (across, THREADS // across)


def _product_layer(channels: int, filters: int) -> Layer:
    return direct.layer((1, 1, 1, AREA * channels), (1, 1), channels, AREA * filters, 1, 0, 1, AREA)


def _transformed(
    kernels: dict[bool, Kernel], x: DeviceArray, argmax: DeviceArray | None, g: Tiling
) -> DeviceArray:
    result = empty((g.tiles, AREA * g.channels), x.dtype)
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    grid, block = _shape(g.tiles, g.channels)
    kernels[argmax is not None][grid, block](x.ravel(), where, result.ravel(), g)
    return result


def _convolve(windows: DeviceArray, weight: DeviceArray, mirrored: bool, tiles: int) -> DeviceArray:
    """The products of all tiles: (tiles, 36 F)."""
    channels, filters = weight.shape[2:]
    inner, outer = (filters, channels) if mirrored else (channels, filters)
    transformed = empty((inner, AREA * outer), weight.dtype)
    grid, block = _shape(channels, filters)
    _transform_weights[grid, block](weight.ravel(), transformed.ravel(), channels, filters, int(mirrored))
    products = empty((tiles, AREA * outer), weight.dtype)
    correlation.forward(_product_layer(inner, outer), windows, transformed, None, products)
    return products


def forward(
    layer: Layer,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    y: DeviceArray,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `y` (and `argmax`) with the convolution of `x` that ends in `pool`; see `pools`."""
    images, top, left = x.shape[0], layer.rows.padding[0], layer.columns.padding[0]
    g = _tiling(layer.image, layer.channels, layer.out_image, images, top, left, pool)
    products = _convolve(_transformed(_windows, x, None, g), weight, False, g.tiles)
    height, width = layer.out_image
    g = g._replace(height=height, width=width, channels=layer.filters, biased=int(bias is not None))
    flat = y.ravel()
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    grid, block = _shape(g.tiles, layer.filters)
    _outputs[pool[:3]][grid, block](products.ravel(), flat if bias is None else bias, flat, where, g)


def backward_input(
    layer: Layer,
    dout: DeviceArray,
    weight: DeviceArray,
    dx: DeviceArray,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `dx` with the gradient to the input; with `pool`, `dout` is the gradient behind that."""
    top, left = (TAPS - 1 - side.padding[0] for side in (layer.rows, layer.columns))
    g = _tiling(layer.out_image, layer.filters, layer.image, dout.shape[0], top, left, pool)
    products = _convolve(_transformed(_windows, dout, argmax, g), weight, True, g.tiles)
    height, width = layer.image
    g = g._replace(height=height, width=width, channels=layer.channels, relu=0, keeps=0)
    flat = dx.ravel()
    grid, block = _shape(g.tiles, layer.channels)
    _outputs[PLAIN[:3]][grid, block](products.ravel(), flat, flat, nothing(np.dtype(np.uint8)), g)


def add_weight_gradient(
    layer: Layer,
    dout: DeviceArray,
    x: DeviceArray,
    dweight: DeviceArray,
    accumulate: bool,
    pool: Pool = PLAIN,
    argmax: DeviceArray | None = None,
) -> None:
    """Overwrite `dweight` with the gradient of the weights, or add it; `pool` as in `backward_input`."""
    images, top, left = x.shape[0], layer.rows.padding[0], layer.columns.padding[0]
    g = _tiling(layer.image, layer.channels, layer.out_image, images, top, left, PLAIN)
    windows = _transformed(_windows, x, None, g)
    tiling = _tiling(layer.out_image, layer.filters, layer.out_image, images, 0, 0, pool)
    gradients = _transformed(_gradients, dout, argmax, tiling)
    transformed = empty((layer.channels, AREA * layer.filters), x.dtype)
    multiply_gradients(_product_layer(layer.channels, layer.filters), gradients, windows, transformed, False)
    grid, block = _shape(layer.channels, layer.filters)
    _weights_gradient[grid, block](
        transformed.ravel(), dweight.ravel(), layer.channels, layer.filters, int(accumulate)
    )
