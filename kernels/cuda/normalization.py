"""Batch normalization over all axes but the last, alone or with ReLU and max-pooling; and the gradients.

Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2 and the gradients of section 3. Memory is
read once for the sums and once for the result: two launches a pass. In the first, the block that comes last
adds up the sums of all blocks.

All sums are in float64. Those of a mean and a variance are of distances from the first value that a thread
sees, and threads' results are merged as in Chan, Golub and LeVeque: Algorithms for computing the sample
variance, The American Statistician 37 (1983), so that a mean far from zero costs no accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ..cpu import normalization as cpu
from ..cpu.normalized import DEAD
from . import checks
from .arrays import THREADS, DeviceArray, empty
from .channel_sums import Layout, add_up, counters, is_last, layout, place
from .jit import Kernel, device_function, kernel
from .pooling import split
from .twin import twin_of

# Rows whose loads a thread has under way at the same time.
_AHEAD = 4
# Rows of a (rows, channels) array that one thread normalizes.
_EACH = 4

# What a block leaves of each channel: number, mean and sum of squared distances.
_MOMENTS = 3


# ------------------------------------------------------------------ mean and variance


@device_function
def _merged(one, other):
    """Number, mean and sum of squared distances of two sets of values together."""
    count, mean, squares = one
    other_count, other_mean, other_squares = other
    if other_count == 0:
        return one
    if count == 0:
        return other
    total, distance = count + other_count, other_mean - mean
    share = other_count / total
    return total, mean + distance * share, squares + other_squares + distance * distance * count * share


@device_function
def _fold_moments(counts, means, squares, columns, lanes):
    """Merge in each column the moments of all lanes into those of lane 0."""
    thread = cuda.threadIdx.x
    cuda.syncthreads()
    while lanes > 1:
        half = (lanes + 1) // 2
        if thread < (lanes - half) * columns:
            other = thread + half * columns
            counts[thread], means[thread], squares[thread] = _merged(
                (counts[thread], means[thread], squares[thread]),
                (counts[other], means[other], squares[other]),
            )
        lanes = half
        cuda.syncthreads()


@device_function
def _moments_of(x, lane, channel, lanes, rows, channels):
    """The moments of every row that one thread steps to."""
    step = cuda.gridDim.x * lanes
    row = cuda.blockIdx.x * lanes + lane
    if row >= rows:
        return 0.0, 0.0, 0.0
    count = (rows - row + step - 1) // step
    shift = np.float64(x[row * channels + channel])
    total, squares = 0.0, 0.0
    while row < rows:
        for k in range(_AHEAD):
            at = row + k * step
            # Of a row too many, the distance is zero.
            value = x[(at if at < rows else row) * channels + channel]
            distance = np.float64(value) - shift if at < rows else 0.0
            total += distance
            squares += distance * distance
        row += _AHEAD * step
    return np.float64(count), shift + total / count, squares - total * total / count


@kernel(
    "T[::1], float64[:, :, ::1], uint32[::1], T[::1], T[::1], T[::1], T[::1], "
    "UniTuple(int64, 3), UniTuple(int64, 2), float64, float64"
)
def _moments(x, partial, arrived, mean, inv_std, running_mean, running_var, sizes, moves, momentum, eps):
    """Overwrite mean and inv_std with those of x's channels, and move the running statistics."""
    counts = cuda.shared.array(THREADS, np.float64)
    means = cuda.shared.array(THREADS, np.float64)
    squares = cuda.shared.array(THREADS, np.float64)
    ticket = cuda.shared.array(1, np.uint32)
    rows, columns, lanes = sizes
    thread, channels = cuda.threadIdx.x, mean.size
    lane, channel = place(columns)
    counts[thread], means[thread], squares[thread] = 0.0, 0.0, 0.0
    if channel < channels:
        moments = _moments_of(x, lane, channel, lanes, rows, channels)
        counts[thread], means[thread], squares[thread] = moments
    _fold_moments(counts, means, squares, columns, lanes)
    if lane == 0 and channel < channels:
        block = cuda.blockIdx.x
        partial[block, 0, channel], partial[block, 1, channel] = counts[thread], means[thread]
        partial[block, 2, channel] = squares[thread]
    if not is_last(arrived, ticket):
        return
    moments = 0.0, 0.0, 0.0
    if channel < channels:
        for block in range(lane, cuda.gridDim.x, lanes):
            left = partial[block, 0, channel], partial[block, 1, channel], partial[block, 2, channel]
            moments = _merged(moments, left)
    counts[thread], means[thread], squares[thread] = moments
    _fold_moments(counts, means, squares, columns, lanes)
    if lane == 0 and channel < channels:
        center, spread = means[thread], squares[thread]
        mean[channel] = center
        inv_std[channel] = 1 / math.sqrt(spread / rows + eps)
        if moves[0]:
            running_mean[channel] = (1 - momentum) * running_mean[channel] + momentum * center
        if moves[1]:
            spread /= rows - 1
            running_var[channel] = (1 - momentum) * running_var[channel] + momentum * spread


@kernel("T[::1], T[::1], T[::1], T[::1], float64")
def _given_moments(running_mean, running_var, mean, inv_std, eps):
    """Overwrite mean and inv_std with those of the running statistics."""
    channel = cuda.grid(1)
    if channel < mean.size:
        mean[channel] = running_mean[channel]
        inv_std[channel] = 1 / math.sqrt(np.float64(running_var[channel]) + eps)


# ------------------------------------------------------------------ forward


@device_function
def _affine(inv_std, weight, bias, has, channel):
    """The factor of a distance from the mean, and the summand; `has` tells whether weight and bias exist."""
    scale, summand = inv_std[channel], inv_std.dtype.type(0)
    if has[0]:
        scale *= weight[channel]
    if has[1]:
        summand = bias[channel]
    return scale, summand


@kernel("T[::1], T[::1], T[::1], T[::1], T[::1], T[::1], UniTuple(int64, 2), UniTuple(int64, 3)")
def _normalize(x, y, mean, inv_std, weight, bias, has, sizes):
    """y = (x - mean) * inv_std * weight + bias."""
    rows, columns, lanes = sizes
    lane, channel = place(columns)
    channels = mean.size
    if channel >= channels:
        return
    center = mean[channel]
    scale, summand = _affine(inv_std, weight, bias, has, channel)
    values = cuda.local.array(_EACH, x.dtype)
    first = cuda.blockIdx.x * lanes * _EACH + lane
    for k in range(_EACH):
        row = min(first + k * lanes, rows - 1)
        values[k] = (x[row * channels + channel] - center) * scale + summand
    for k in range(_EACH):
        row = first + k * lanes
        if row < rows:
            y[row * channels + channel] = values[k]


def _lines_of_a_thread(pool_h: int, pool_w: int) -> int:
    """Rows of outputs in each of which a thread computes one: several where windows are small."""
    return max(1, _EACH // (pool_h * pool_w))


@cache
def _normalize_pool(pool_h: int, pool_w: int) -> Kernel:
    """The kernel for one size of windows; a thread computes several outputs where those are small."""
    each = _lines_of_a_thread(pool_h, pool_w)

    @kernel(
        "T[::1], T[::1], uint8[::1], T[::1], T[::1], T[::1], T[::1], "
        "UniTuple(int64, 2), UniTuple(int64, 5), int64",
        name=f"{pool_h}x{pool_w}",
    )
    def normalize_pool(x, y, argmax, mean, inv_std, weight, bias, has, sizes, relu):
        lines, height, width, out_h, out_w = sizes
        channels = mean.size
        at = cuda.grid(1)
        pixel = at // channels
        group = pixel // out_w
        if group * each >= lines:
            return
        c, j = at - pixel * channels, pixel - group * out_w
        center = mean[c]
        scale, summand = _affine(inv_std, weight, bias, has, c)
        values = cuda.local.array(each, x.dtype)
        offsets = cuda.local.array(each, np.uint8)
        for r in range(each):
            line = min(group * each + r, lines - 1)
            n = line // out_h
            corner = ((n * height + (line - n * out_h) * pool_h) * width + j * pool_w) * channels + c
            best, where = x.dtype.type(-math.inf), 0
            for a in range(pool_h):
                for b in range(pool_w):
                    value = (x[corner + (a * width + b) * channels] - center) * scale + summand
                    if value > best or value != value:
                        best, where = value, a * pool_w + b
            if relu and not best > 0:
                where = DEAD
                best = best if best != best else x.dtype.type(0)
            values[r], offsets[r] = best, where
        for r in range(each):
            line = group * each + r
            if line < lines:
                y[(line * out_w + j) * channels + c] = values[r]
                argmax[(line * out_w + j) * channels + c] = offsets[r]

    return normalize_pool


# ------------------------------------------------------------------ backward


@kernel("T[::1], T[::1], T[::1], float64[:, :, ::1], uint32[::1], float64[:, ::1], UniTuple(int64, 3)")
def _gradient_sums(dout, x, mean, partial, arrived, sums, sizes):
    """Overwrite `sums` with each channel's of dout and of dout times the distance to the mean."""
    rows, columns, lanes = sizes
    lane, channel = place(columns)
    channels, step = mean.size, cuda.gridDim.x * lanes
    total, product = 0.0, 0.0
    if channel < channels:
        center = np.float64(mean[channel])
        for first in range(cuda.blockIdx.x * lanes + lane, rows, _AHEAD * step):
            for k in range(_AHEAD):
                row = first + k * step
                at = (row if row < rows else first) * channels + channel
                gradient, value = np.float64(dout[at]), np.float64(x[at])
                if row < rows:
                    total += gradient
                    product += gradient * (value - center)
    add_up((total, product), partial, arrived, sums, columns, lanes)


@cache
def _pooled_sums(pool_h: int, pool_w: int) -> Kernel:
    """The kernel of the same sums for one size of windows."""

    @kernel(
        "T[::1], uint8[::1], T[::1], T[::1], float64[:, :, ::1], uint32[::1], float64[:, ::1], "
        "UniTuple(int64, 3), UniTuple(int64, 4)",
        name=f"{pool_h}x{pool_w}",
    )
    def pooled_sums(dout, argmax, x, mean, partial, arrived, sums, sizes, shape):
        rows, columns, lanes = sizes
        height, width, out_h, out_w = shape
        lane, channel = place(columns)
        channels, step = mean.size, cuda.gridDim.x * lanes
        total, product = 0.0, 0.0
        if channel < channels:
            center = np.float64(mean[channel])
            for first in range(cuda.blockIdx.x * lanes + lane, rows, _AHEAD * step):
                for k in range(_AHEAD):
                    row = first + k * step
                    at = (row if row < rows else first) * channels + channel
                    n, i, j, _ = split(at, channels, out_w, out_h)
                    where = argmax[at]
                    gradient = 0.0 if where == DEAD else np.float64(dout[at])
                    tap = 0 if where == DEAD else int(where)
                    h, w = i * pool_h + tap // pool_w, j * pool_w + tap % pool_w
                    value = np.float64(x[((n * height + h) * width + w) * channels + channel])
                    if row < rows:
                        total += gradient
                        product += gradient * (value - center)
        add_up((total, product), partial, arrived, sums, columns, lanes)

    return pooled_sums


@device_function
def _spread(sums, inv_std, weight, has_weight, count, channel):
    """Of a channel: scale, shift and slope of dx = scale * dout + shift + slope * (x - mean)."""
    inverse = np.float64(inv_std[channel])
    scale = inverse * weight[channel] if has_weight else inverse
    share = scale / count
    kind = inv_std.dtype.type
    shift, slope = -share * sums[0, channel], -share * sums[1, channel] * inverse * inverse
    return kind(scale), kind(shift), kind(slope)


@device_function
def _leave(sums, inv_std, dweight, dbias, adds, channel):
    """Overwrite, or add to, a channel of dweight and dbias."""
    product, total = sums[1, channel] * inv_std[channel], sums[0, channel]
    dweight[channel] = dweight[channel] + product if adds[0] else product
    dbias[channel] = dbias[channel] + total if adds[1] else total


# Of the kernels that write dx: x, dx, mean, inv_std, weight, sums, dweight, dbias; and flags: training, has
# weight, adds to dweight, adds to dbias.
_BACK = "T[::1], T[::1], T[::1], T[::1], T[::1], float64[:, ::1], T[::1], T[::1], UniTuple(int64, 4)"


@kernel(f"T[::1], {_BACK}, UniTuple(int64, 3)")
def _backward(dout, x, dx, mean, inv_std, weight, sums, dweight, dbias, flags, sizes):
    training, has_weight = flags[0], flags[1]
    rows, columns, lanes = sizes
    lane, channel = place(columns)
    channels = mean.size
    if channel >= channels:
        return
    if cuda.blockIdx.x == 0 and lane == 0:
        _leave(sums, inv_std, dweight, dbias, flags[2:], channel)
    center = mean[channel]
    scale, shift, slope = _spread(sums, inv_std, weight, has_weight, rows, channel)
    values = cuda.local.array(_EACH, x.dtype)
    first = cuda.blockIdx.x * lanes * _EACH + lane
    for k in range(_EACH):
        at = min(first + k * lanes, rows - 1) * channels + channel
        values[k] = dout[at] * scale
        if training:
            values[k] += (x[at] - center) * slope + shift
    for k in range(_EACH):
        row = first + k * lanes
        if row < rows:
            dx[row * channels + channel] = values[k]


@cache
def _backward_pool(pool_h: int, pool_w: int) -> Kernel:
    """The kernel for one size of windows; a thread writes all pixels of one, or those that fill none."""
    pixels = pool_h * pool_w

    @kernel(f"T[::1], uint8[::1], {_BACK}, UniTuple(int64, 5)", name=f"{pool_h}x{pool_w}")
    def backward_pool(dout, argmax, x, dx, mean, inv_std, weight, sums, dweight, dbias, flags, sizes):
        training, has_weight = flags[0], flags[1]
        images, height, width, out_h, out_w = sizes
        channels, at = mean.size, cuda.grid(1)
        n, i, j, c = split(at, channels, (width + pool_w - 1) // pool_w, (height + pool_h - 1) // pool_h)
        if n >= images:
            return
        if at < channels:
            _leave(sums, inv_std, dweight, dbias, flags[2:], c)
        center = mean[c]
        scale, shift, slope = _spread(sums, inv_std, weight, has_weight, images * height * width, c)
        full = i < out_h and j < out_w
        window = ((n * out_h + min(i, out_h - 1)) * out_w + min(j, out_w - 1)) * channels + c
        gradient, where = dout[window], argmax[window]
        values = cuda.local.array(pixels, x.dtype)
        for tap in range(pixels):
            h, w = i * pool_h + tap // pool_w, j * pool_w + tap % pool_w
            values[tap] = (gradient if full and where == tap else x.dtype.type(0)) * scale
            if training:
                line = n * height + min(h, height - 1)
                values[tap] += (x[(line * width + min(w, width - 1)) * channels + c] - center) * slope + shift
        for tap in range(pixels):
            h, w = i * pool_h + tap // pool_w, j * pool_w + tap % pool_w
            if h < height and w < width:
                dx[((n * height + h) * width + w) * channels + c] = values[tap]

    return backward_pool


# Those of the usual windows are known from the start.
for _window in ((1, 1), (2, 2)):
    _normalize_pool(*_window)
    _pooled_sums(*_window)
    _backward_pool(*_window)


# ------------------------------------------------------------------ host side


def _channels_last(x: Any) -> DeviceArray:
    x = checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., C) with 2 axes or more, got shape {x.shape}")
    return x


def _vector(name: str, values: Any, x: DeviceArray) -> DeviceArray:
    """An array with one value for each channel of x."""
    return checks.same_shape(name, checks.floating(name, values, 1, x.dtype), x.shape[-1:])


def _or(values: DeviceArray | None, other: DeviceArray) -> DeviceArray:
    """`values`, or in its place `other`, which the kernel is told not to touch."""
    return other if values is None else values


class _Affine:
    """weight and bias of a call, checked."""

    def __init__(self, x: DeviceArray, weight: Any, bias: Any):
        self.weight = None if weight is None else _vector("weight", weight, x)
        self.bias = None if bias is None else _vector("bias", bias, x)

    def arguments(self, other: DeviceArray) -> tuple[Any, ...]:
        """weight, bias, and whether there are any."""
        has = int(self.weight is not None), int(self.bias is not None)
        return _or(self.weight, other), _or(self.bias, other), has


def _rows_of(x: DeviceArray) -> int:
    return x.size // x.shape[-1] if x.shape[-1] else 0


def _sizes(rows: int, grid: Layout) -> tuple[int, int, int]:
    return rows, grid.columns, grid.lanes


def _running(name: str, values: Any, x: DeviceArray, training: bool) -> DeviceArray | None:
    """Running statistics, as kernels read them or, in training, change them."""
    if values is None:
        return None
    if training:
        return checks.updated(name, values, x.shape[-1:], x.dtype, "x")
    return _vector(name, values, x)


def _statistics(
    x: DeviceArray,
    running: tuple[Any, Any],
    training: bool,
    momentum: float,
    eps: float,
    out: tuple[Any, Any],
) -> tuple[DeviceArray, DeviceArray]:
    """mean and inv_std; in training, the running statistics move."""
    running_mean = _running("running_mean", running[0], x, training)
    running_var = _running("running_var", running[1], x, training)
    mean = checks.output("out_mean", out[0], x.shape[-1:], x.dtype)
    inv_std = checks.output("out_inv_std", out[1], x.shape[-1:], x.dtype)
    channels, rows = x.shape[-1], _rows_of(x)
    if training and rows == 1:
        raise ValueError(f"x: shape {x.shape} has one value per channel, training needs more")
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean, running_var: needed where training is False")
    if not channels:
        return mean, inv_std
    if not training:
        _given_moments[-(-channels // THREADS), THREADS](running_mean, running_var, mean, inv_std, eps)
    elif rows:
        grid = layout(rows, channels)
        partial = empty((grid.blocks, _MOMENTS, channels), np.float64)
        moves = int(running_mean is not None), int(running_var is not None)
        moved = _or(running_mean, mean), _or(running_var, inv_std)
        given = x.reshape(-1), partial, counters(grid.tiles), mean, inv_std, *moved
        _moments[grid.grid, grid.threads](*given, _sizes(rows, grid), moves, momentum, eps)
    else:
        mean.fill(0)
        inv_std.fill(1 / math.sqrt(eps) if eps > 0 else math.inf)
    return mean, inv_std


@twin_of(cpu.batch_norm_forward)
def batch_norm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: Any = None,
    out_mean: Any = None,
    out_inv_std: Any = None,
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    x = _channels_last(x)
    y = checks.output("out", out, x.shape, x.dtype)
    affine = _Affine(x, weight, bias)
    running, outputs = (running_mean, running_var), (out_mean, out_inv_std)
    mean, inv_std = _statistics(x, running, bool(training), momentum, eps, outputs)
    if y.size:
        rows = _rows_of(x)
        grid = layout(rows, x.shape[-1], _EACH)
        flat = x.reshape(-1), y.reshape(-1), mean, inv_std
        _normalize[grid.grid, grid.threads](*flat, *affine.arguments(mean), _sizes(rows, grid))
    return y, mean, inv_std


class _Gradients:
    """What both backward passes do around their kernels; checks its arguments when it is made."""

    def __init__(
        self,
        x: DeviceArray,
        given: tuple[Any, Any, Any],
        training: bool,
        out: tuple[Any, Any],
        accumulate: bool,
    ):
        weight, mean, inv_std = given
        self.x = x
        self.mean, self.inv_std = _vector("mean", mean, x), _vector("inv_std", inv_std, x)
        self.weight = None if weight is None else _vector("weight", weight, x)
        self.dweight = checks.output("out_dweight", out[0], x.shape[-1:], x.dtype)
        self.dbias = checks.output("out_dbias", out[1], x.shape[-1:], x.dtype)
        self.adds = tuple(int(bool(accumulate) and target is not None) for target in out)
        self.training = int(bool(training))

    def nothing(self) -> None:
        """The gradients of an empty batch."""
        for target, adds in zip((self.dweight, self.dbias), self.adds, strict=True):
            if not adds:
                target.fill(0)

    def sum(self, run: Kernel, arrays: tuple[DeviceArray, ...], rows: int, *more: Any) -> DeviceArray:
        """The sums that a kernel takes over `rows` rows of `arrays`."""
        channels = self.x.shape[-1]
        grid = layout(rows, channels)
        partial, sums = empty((grid.blocks, 2, channels), np.float64), empty((2, channels), np.float64)
        flat = [array.reshape(-1) for array in arrays]
        made = partial, counters(grid.tiles), sums
        run[grid.grid, grid.threads](*flat, self.mean, *made, _sizes(rows, grid), *more)
        return sums

    def arguments(self, dx: DeviceArray, sums: DeviceArray) -> tuple[Any, ...]:
        """Those that kernels which write dx have in common."""
        flags = self.training, int(self.weight is not None), *self.adds
        vectors = self.mean, self.inv_std, _or(self.weight, self.mean), sums, self.dweight, self.dbias
        return self.x.reshape(-1), dx.reshape(-1), *vectors, flags


@twin_of(cpu.batch_norm_backward)
def batch_norm_backward(
    dout: Any,
    x: Any,
    weight: Any,
    mean: Any,
    inv_std: Any,
    training: bool,
    *,
    out: Any = None,
    out_dweight: Any = None,
    out_dbias: Any = None,
    accumulate: bool = False,
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    x = _channels_last(x)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, x.dtype), x.shape)
    dx = checks.output("out", out, x.shape, x.dtype)
    back = _Gradients(x, (weight, mean, inv_std), training, (out_dweight, out_dbias), accumulate)
    if x.size:
        rows = _rows_of(x)
        sums = back.sum(_gradient_sums, (dout, x), rows)
        grid = layout(rows, x.shape[-1], _EACH)
        _backward[grid.grid, grid.threads](dout.reshape(-1), *back.arguments(dx, sums), _sizes(rows, grid))
    else:
        back.nothing()
    return dx, back.dweight, back.dbias


def _pool(x: DeviceArray, pool_size: int | Sequence[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The window, and the shape of the result."""
    pool = checks.pair("pool_size", pool_size, 1)
    if pool[0] * pool[1] > DEAD:
        raise ValueError(f"pool_size: {pool_size!r} has more than {DEAD} pixels")
    n, h, w, c = x.shape
    if pool[0] > h or pool[1] > w:
        raise ValueError(f"pool_size: {pool_size!r} is larger than images of {h} x {w}")
    return pool, (n, h // pool[0], w // pool[1], c)


@twin_of(cpu.batch_norm_pool_forward)
def batch_norm_pool_forward(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    pool_size: int | Sequence[int] = 1,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: Any = None,
    out_argmax: Any = None,
    out_mean: Any = None,
    out_inv_std: Any = None,
) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
    x = checks.floating("x", x, 4)
    pool, shape = _pool(x, pool_size)
    y = checks.output("out", out, shape, x.dtype)
    argmax = checks.output("out_argmax", out_argmax, shape, np.uint8)
    affine = _Affine(x, weight, bias)
    running, outputs = (running_mean, running_var), (out_mean, out_inv_std)
    mean, inv_std = _statistics(x, running, bool(training), momentum, eps, outputs)
    if y.size:
        n, out_h, out_w, channels = shape
        lines = n * out_h
        groups = -(-lines // _lines_of_a_thread(*pool))
        run = _normalize_pool(*pool)[-(-groups * out_w * channels // THREADS), THREADS]
        flat = x.reshape(-1), y.reshape(-1), argmax.reshape(-1), mean, inv_std
        run(*flat, *affine.arguments(mean), (lines, *x.shape[1:3], out_h, out_w), int(bool(relu)))
    return y, argmax, mean, inv_std


@twin_of(cpu.batch_norm_pool_backward)
def batch_norm_pool_backward(
    dout: Any,
    argmax: Any,
    x: Any,
    weight: Any,
    mean: Any,
    inv_std: Any,
    training: bool,
    pool_size: int | Sequence[int] = 1,
    *,
    out: Any = None,
    out_dweight: Any = None,
    out_dbias: Any = None,
    accumulate: bool = False,
) -> tuple[DeviceArray, DeviceArray, DeviceArray]:
    x = checks.floating("x", x, 4)
    pool, shape = _pool(x, pool_size)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, x.dtype), shape)
    argmax = checks.array("argmax", argmax)
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax: dtype {argmax.dtype} is not uint8")
    checks.same_shape("argmax", argmax, shape)
    dx = checks.output("out", out, x.shape, x.dtype)
    back = _Gradients(x, (weight, mean, inv_std), training, (out_dweight, out_dbias), accumulate)
    if x.size:
        n, out_h, out_w, channels = shape
        sizes = *x.shape[1:3], out_h, out_w
        sums = back.sum(_pooled_sums(*pool), (dout, argmax, x), n * out_h * out_w, sizes)
        cells = n * -(-x.shape[1] // pool[0]) * -(-x.shape[2] // pool[1])
        run = _backward_pool(*pool)[-(-cells * channels // THREADS), THREADS]
        run(dout.reshape(-1), argmax.reshape(-1), *back.arguments(dx, sums), (n, *sizes))
    else:
        back.nothing()
    return dx, back.dweight, back.dbias
