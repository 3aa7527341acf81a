"""Windows of images as rows of a matrix and back, and sums over rows: all bound by the memory's bandwidth.

Neighbouring threads have neighbouring elements of the last axis, and a block as many rows as that leaves it
threads for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import cuda

from .. import windows
from ..cpu import columns as cpu
from . import checks
from .arrays import DeviceArray, empty
from .jit import THREADS, kernel
from .splits import multiprocessors, nothing
from .taps import digits, narrow, quotient
from .twin import twin_of

# Blocks that a multiprocessor holds, and rows that make it worth to start one more.
_RESIDENT = 8
_FEWEST_ROWS = 64


def _block(width: int, most: int = THREADS) -> tuple[int, int]:
    """Threads along the last axis and along the rows."""
    across = 1
    while across < min(width, most):
        across *= 2
    return across, THREADS // across


def _grid(rows: int, down: int) -> int:
    return max(1, min(-(-rows // down), _RESIDENT * multiprocessors()))


_WINDOWS = f"UniTuple(int32, {len(windows.Windows._fields)})"


@kernel(f"T[::1], T[::1], int64, {_WINDOWS}")
def _im2col(x, cols, rows, sizes):
    g = windows.Windows(*sizes)
    width = g.kernel_h * g.kernel_w * g.channels
    for row in range(
        cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, rows, cuda.gridDim.x * cuda.blockDim.y
    ):
        n, i, j = digits(row, g.out_h, g.out_w)
        for k in range(cuda.threadIdx.x, width, cuda.blockDim.x):
            kh, kw, c = digits(k, g.kernel_w, g.channels)
            h = narrow(i * g.stride_h - g.top + kh * g.dilation_h)
            w = narrow(j * g.stride_w - g.left + kw * g.dilation_w)
            value = x.dtype.type(0)
            if h >= 0 and h < g.height and w >= 0 and w < g.width:
                value = x[((n * g.height + h) * g.width + w) * g.channels + c]
            cols[row * width + k] = value


@twin_of(cpu.im2col)
def im2col(
    x: Any,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: Any = None,
) -> DeviceArray:
    x = checks.floating("x", x, 4)
    g = windows.windows(x.shape, kernel_size, stride, checks.padding2d(padding), dilation)
    rows = checks.countable("x", x.shape[0] * g.out_h * g.out_w)
    shape = (rows, g.kernel_h * g.kernel_w * g.channels)
    cols = checks.output("out", out, shape, x.dtype)
    if cols.size:
        block = _block(shape[1])
        _im2col[_grid(shape[0], block[1]), block](x.ravel(), cols.ravel(), shape[0], g)
    return cols


@kernel(f"T[::1], T[::1], int64, {_WINDOWS}")
def _col2im(cols, x, pixels, sizes):
    """Each pixel gathers from all windows that see it, always in the same order."""
    g = windows.Windows(*sizes)
    width = g.kernel_h * g.kernel_w * g.channels
    for pixel in range(
        cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y, pixels, cuda.gridDim.x * cuda.blockDim.y
    ):
        n, h, w = digits(pixel, g.height, g.width)
        for c in range(cuda.threadIdx.x, g.channels, cuda.blockDim.x):
            total = x.dtype.type(0)
            for kh in range(g.kernel_h):
                above = h + g.top - kh * g.dilation_h
                i = quotient(max(above, 0), g.stride_h)
                if above < 0 or i >= g.out_h or i * g.stride_h != above:
                    continue
                for kw in range(g.kernel_w):
                    before = w + g.left - kw * g.dilation_w
                    j = quotient(max(before, 0), g.stride_w)
                    if before >= 0 and j < g.out_w and j * g.stride_w == before:
                        row = (n * g.out_h + i) * g.out_w + j
                        total += cols[row * width + (kh * g.kernel_w + kw) * g.channels + c]
            x[pixel * g.channels + c] = total


@twin_of(cpu.col2im)
def col2im(
    cols: Any,
    x_shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Any = 0,
    dilation: int | Sequence[int] = 1,
    *,
    out: Any = None,
) -> DeviceArray:
    cols = checks.floating("cols", cols, 2)
    shape = checks.shape4("x_shape", x_shape)
    g = windows.windows(shape, kernel_size, stride, checks.padding2d(padding), dilation)
    rows = shape[0] * g.out_h * g.out_w
    checks.same_shape("cols", cols, (rows, g.kernel_h * g.kernel_w * g.channels))
    x = checks.output("out", out, shape, cols.dtype)
    if x.size:
        pixels = checks.countable("x_shape", shape[0] * g.height * g.width)
        block = _block(g.channels)
        _col2im[_grid(pixels, block[1]), block](cols.ravel(), x.ravel(), pixels, g)
    return x


@kernel("T[::1], uint8[::1], float64[::1], T[::1], int64, int32, int32, int32")
def _sum_rows(dout, argmax, parts, dbias, rows, channels, area, accumulate):
    """A block's sums, in float64, of dout, or of what passed a max-pooling of `area` pixels if not 0.

    A single block writes them to dbias itself.
    """
    sums = cuda.shared.array(THREADS, np.float64)
    across, down = cuda.blockDim.x, cuda.blockDim.y
    channel = cuda.blockIdx.y * across + cuda.threadIdx.x
    total = 0.0
    if channel < channels:
        for row in range(cuda.blockIdx.x * down + cuda.threadIdx.y, rows, cuda.gridDim.x * down):
            at = row * channels + channel
            if area == 0 or argmax[at] < area:
                total += dout[at]
    place = cuda.threadIdx.y * across + cuda.threadIdx.x
    sums[place] = total
    cuda.syncthreads()
    reach = down // 2
    while reach > 0:
        if cuda.threadIdx.y < reach:
            sums[place] += sums[place + reach * across]
        cuda.syncthreads()
        reach //= 2
    if cuda.threadIdx.y == 0 and channel < channels:
        if cuda.gridDim.x > 1:
            parts[cuda.blockIdx.x * channels + channel] = sums[place]
        else:
            dbias[channel] = sums[place] + dbias[channel] if accumulate else sums[place]


@kernel("T[::1], float64[::1], int32, int32")
def _add_sums(dbias, parts, count, accumulate):
    """dbias (+)= the sum of all blocks' sums."""
    channel = cuda.grid(1)
    if channel < dbias.size:
        total = 0.0
        for part in range(count):
            total += parts[part * dbias.size + channel]
        dbias[channel] = total + dbias[channel] if accumulate else total


def sum_rows(
    dout: DeviceArray, dbias: DeviceArray, accumulate: bool, area: int = 0, argmax: DeviceArray | None = None
) -> None:
    """Overwrite `dbias` with the sums of dout's rows, or add them; of what `argmax` let pass, if given."""
    channels = dbias.size
    if not channels:
        return
    rows = dout.size // channels
    across, down = _block(channels, 32)
    most = -(-_RESIDENT * multiprocessors() // -(-channels // across))
    count = max(1, min(-(-rows // max(down, _FEWEST_ROWS)), most))
    parts = empty(count * channels, np.float64)
    where = nothing(np.dtype(np.uint8)) if argmax is None else argmax.ravel()
    grid = (count, -(-channels // across))
    arrays = dout.ravel(), where, parts, dbias
    _sum_rows[grid, (across, down)](*arrays, rows, channels, area, int(accumulate))
    if count > 1:
        _add_sums[-(-channels // 32), 32](dbias, parts, count, int(accumulate))


@twin_of(cpu.conv2d_backward_bias)
def conv2d_backward_bias(dout: Any, *, out: Any = None, accumulate: bool = False) -> DeviceArray:
    dout = checks.floating("dout", dout)
    if not dout.ndim:
        raise ValueError("dout: expected (..., F), got a scalar")
    dbias = checks.output("out", out, (dout.shape[-1],), dout.dtype)
    sum_rows(dout, dbias, accumulate and out is not None)
    return dbias
