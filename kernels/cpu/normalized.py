"""The loops of batch normalization, with ReLU and max-pooling behind it or not: forward, sums, backward.

An array without windows is one long row of channels. Its pixels are counted in rows of equal length, and few
channels are taken several pixels at a time, so that they fill vectors.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from .moments import AHEAD, column_width
from .pieces import fill, repeat
from .vectors import (
    all_lanes,
    first_lanes,
    keep_in_line,
    lanes_of,
    like,
    load,
    multiply_add,
    pointer,
    prefetch,
    select,
    splat,
    store,
    wide,
)
from .workspace import scratch

# In place of an offset in the window: ReLU let nothing pass, so that the window's gradient is zero.
DEAD = 255

# Elements of a row where there are no windows, and pieces in which sums are taken.
_ROW = 2048
_PIECES = 16


class Normalized(NamedTuple):
    """Images and the windows on them; everything in elements or pixels."""

    images: int
    height: int
    width: int
    channels: int
    out_h: int
    out_w: int
    pool_h: int
    pool_w: int
    relu: int  # 0 or 1


def geometry(shape: tuple[int, ...], pool: tuple[int, int], relu: bool, dtype: np.dtype) -> Normalized:
    """That of an array (..., C), which must be images (N, H, W, C) unless `pool` is (1, 1)."""
    channels = shape[-1]
    if pool != (1, 1):
        n, h, w = shape[:3]
        return Normalized(n, h, w, channels, h // pool[0], w // pool[1], *pool, int(relu))
    pixels = math.prod(shape[:-1])
    # As many pixels at a time as fill whole vectors, if the number of all can be divided by it.
    together = math.gcd(pixels, column_width(max(channels, 1), dtype) // max(channels, 1))
    width = max(1, channels * together)
    row = max(1, _ROW // width)
    return Normalized(-(-pixels // (row * together)), 1, row, width, 1, row, 1, 1, int(relu))


@lru_cache(maxsize=64)
def taps(g: Normalized) -> np.ndarray:
    """Offsets of a window's pixels, and -1 behind the last; then those of a pixel by itself.

    A loop that ends there is not unrolled by LLVM, which would make it longer than most windows are.
    """
    places = [(a * g.width + b) * g.channels for a in range(g.pool_h) for b in range(g.pool_w)]
    return np.array([*places, -1, 0, -1])


@parallel
def _repeat_rows(part, parts, rows, tables):
    for i in range(len(rows)):
        repeat(rows[i], tables[i])


def table(use: str, rows: np.ndarray, g: Normalized, dtype: np.dtype) -> np.ndarray:
    """The values for the channels, repeated over g.channels, of the first of `rows`, then of the next."""
    result = scratch(use, len(rows) * g.channels, dtype)
    _repeat_rows(1, rows, result.reshape(len(rows), -1))
    return result


@kernel
def _forward_vector(x, y, argmax, keeps, table, taps, source, target, c, mask, g):
    """One vector of channels of one window, or of a pixel."""
    keep_in_line()
    mean, scale = load(table, c, mask), load(table, g.channels + c, mask)
    bias = load(table, 2 * g.channels + c, mask)
    zero, best = like(mean, 0), like(mean, -np.inf)
    where = splat(np.uint8(0), mask)
    tap = 0
    while taps[tap] >= 0:
        if g.pool_h > 1:
            # Processors foresee steps from one address to the next only, not from one row to another.
            prefetch(x, source + taps[tap] + AHEAD)
        value = multiply_add(load(x, source + taps[tap], mask) - mean, scale, bias)
        takes = (value > best) | (value != value)
        best = select(takes, value, best)
        where = select(takes, splat(np.uint8(tap), mask), where)
        tap += 1
    if g.relu:
        where = select(best > zero, where, splat(np.uint8(DEAD), mask))
        best = select(best <= zero, zero, best)
    store(best, y, target, mask)
    if keeps:
        store(where, argmax, target, mask)


@parallel
def _forward(part, parts, x, y, argmax, table, taps, g):
    keep_out_of_line()
    lanes = lanes_of(x)
    from_, to, where, rows, places = pointer(x), pointer(y), pointer(argmax), pointer(table), pointer(taps)
    whole = g.channels // lanes * lanes
    keeps, everything, some = argmax.size > 0, all_lanes(from_), first_lanes(from_, g.channels - whole)
    lo, hi = span(part, parts, g.images * g.out_h)
    for row in range(lo, hi):
        n = row // g.out_h
        i = row - n * g.out_h
        source = (n * g.height + i * g.pool_h) * g.width * g.channels
        target = row * g.out_w * g.channels
        for _ in range(min(g.out_w, (y.size - target) // g.channels)):
            for c in range(0, whole, lanes):
                s, t = source + c, target + c
                _forward_vector(from_, to, where, keeps, rows, places, s, t, c, everything, g)
            if whole < g.channels:
                s, t = source + whole, target + whole
                _forward_vector(from_, to, where, keeps, rows, places, s, t, whole, some, g)
            source += g.pool_w * g.channels
            target += g.channels


def run_forward(x: np.ndarray, y: np.ndarray, argmax: np.ndarray, rows: np.ndarray, g: Normalized) -> None:
    """Overwrite y, and argmax unless it is empty; `rows` are mean, scale and bias."""
    parts = part_count(g.images * g.out_h, x.size)
    _forward(parts, x.reshape(-1), y.reshape(-1), argmax.reshape(-1), rows, taps(g), g)


@kernel
def _sum_column(dout, argmax, keeps, x, mean, slab, taps, source, target, pixels, c, mask, g):
    """Add one vector of channels of a row of windows to the sums."""
    keep_in_line()
    center, dead = load(mean, c, mask), splat(np.uint8(DEAD), mask)
    total, product = load(slab, c, mask), load(slab, g.channels + c, mask)
    # Processors foresee steps from one address to the next only. Without windows line after line is fetched,
    # in whatever order they are read.
    rows = max(1, AHEAD // (g.pool_h * g.width * g.channels))
    ahead, ahead_in_dout = rows * g.pool_h * g.width * g.channels, rows * g.out_w * g.channels
    step, step_in_dout = g.pool_w * g.channels, g.channels
    if g.pool_h * g.pool_w == 1:
        ahead, ahead_in_dout = ahead + c * (pixels - 1), ahead_in_dout + c * (pixels - 1)
        step = step_in_dout = lanes_of(dout)
    ahead, ahead_in_dout = source + ahead, target + ahead_in_dout
    for _ in range(pixels):
        prefetch(dout, ahead_in_dout)
        gradient, where = load(dout, target, mask), splat(np.uint8(0), mask)
        if keeps:
            where = load(argmax, target, mask)
            gradient = select(where == dead, like(gradient, 0), gradient)
        chosen = center
        tap = 0
        while taps[tap] >= 0:
            place = source + taps[tap]
            prefetch(x, ahead + taps[tap])
            chosen = select(where == splat(np.uint8(tap), mask), load(x, place, mask), chosen)
            tap += 1
        total = total + wide(gradient)
        product = multiply_add(wide(gradient), wide(chosen - center), product)
        source += g.pool_w * g.channels
        target += g.channels
        ahead += step
        ahead_in_dout += step_in_dout
    store(total, slab, c, mask)
    store(product, slab, g.channels + c, mask)


@parallel
def _sums(part, parts, dout, argmax, x, mean, slabs, taps, g):
    """Sums of the gradient, and of its products with x - mean at the pixels that it goes to."""
    keep_out_of_line()
    lanes = lanes_of(x)
    gradient, where, values, center = pointer(dout), pointer(argmax), pointer(x), pointer(mean)
    whole = g.channels // lanes * lanes
    keeps, everything, some = argmax.size > 0, all_lanes(values), first_lanes(values, g.channels - whole)
    places = pointer(taps)
    lo, hi = span(part, parts, slabs.shape[0])
    for piece in range(lo, hi):
        slab = slabs[piece]
        fill(slab, 0)
        sums = pointer(slab)
        first, last = span(piece, slabs.shape[0], g.images * g.out_h)
        for row in range(first, last):
            n = row // g.out_h
            i = row - n * g.out_h
            source = (n * g.height + i * g.pool_h) * g.width * g.channels
            target = row * g.out_w * g.channels
            pixels = min(g.out_w, (dout.size - target) // g.channels)
            for c in range(0, whole, lanes):
                s, t = source + c, target + c
                _sum_column(
                    gradient, where, keeps, values, center, sums, places, s, t, pixels, c, everything, g
                )
            if whole < g.channels:
                s, t = source + whole, target + whole
                _sum_column(
                    gradient, where, keeps, values, center, sums, places, s, t, pixels, whole, some, g
                )


def run_sums(
    dout: np.ndarray, argmax: np.ndarray, x: np.ndarray, mean: np.ndarray, g: Normalized
) -> np.ndarray:
    """Slabs of each channel's sums of the gradient, and beside them of its products with x - mean."""
    center = table("center", mean[np.newaxis], g, x.dtype)
    pieces = max(1, min(_PIECES, g.images * g.out_h))
    slabs = scratch("products", pieces * 2 * g.channels, np.float64).reshape(pieces, 2 * g.channels)
    parts = part_count(pieces, x.size)
    _sums(parts, dout.reshape(-1), argmax.reshape(-1), x.reshape(-1), center, slabs, taps(g), g)
    return slabs


@kernel
def _backward_vector(arrays, keeps, taps, source, target, c, mask, inside, training, g):
    """One vector of channels of one window, or of a pixel outside of all windows."""
    keep_in_line()
    dout, argmax, x, dx, table = arrays
    scale = load(table, c, mask)
    mean, shift = load(table, g.channels + c, mask), load(table, 2 * g.channels + c, mask)
    slope = load(table, 3 * g.channels + c, mask)
    where, gradient = splat(np.uint8(0), mask), like(scale, 0)
    if inside:
        gradient = load(dout, target + c, mask)
        if keeps:
            where = load(argmax, target + c, mask)
    gradient = gradient * scale
    tap = 0
    while taps[tap] >= 0:
        place = source + taps[tap] + c
        if g.pool_h > 1:
            prefetch(x, place + AHEAD)
            prefetch(dx, place + AHEAD)
        change = like(scale, 0) * scale
        if training:
            change = multiply_add(load(x, place, mask) - mean, slope, shift)
        here = where == splat(np.uint8(tap), mask)
        store(select(here, change + gradient, change), dx, place, mask)
        tap += 1


@parallel
def _backward(part, parts, dout, argmax, x, dx, table, taps, training, g):
    """dx = gradient * scale, and in training + shift + (x - mean) * slope: the rows of `table`.

    `taps` are a window's, and behind them those of a pixel.
    """
    keep_out_of_line()
    lanes = lanes_of(x)
    arrays = pointer(dout), pointer(argmax), pointer(x), pointer(dx), pointer(table)
    keeps, everything = argmax.size > 0, all_lanes(pointer(x))
    window, pixel = pointer(taps), pointer(taps[g.pool_h * g.pool_w + 1 :])
    channels = g.channels
    whole = channels // lanes * lanes
    some = first_lanes(pointer(x), channels - whole)
    lo, hi = span(part, parts, g.images * g.out_h)
    for row in range(lo, hi):
        n = row // g.out_h
        i = row - n * g.out_h
        first = n * g.height + i * g.pool_h
        last = first + g.pool_h if i + 1 < g.out_h else (n + 1) * g.height
        s, t = first * g.width * channels, row * g.out_w * channels
        for _ in range(min(g.out_w, (dout.size - t) // channels)):
            for c in range(0, whole, lanes):
                _backward_vector(arrays, keeps, window, s, t, c, everything, True, training, g)
            if whole < channels:
                _backward_vector(arrays, keeps, window, s, t, whole, some, True, training, g)
            s += g.pool_w * channels
            t += channels
        for h in range(first, last):
            inside = g.out_w * g.pool_w if h < first + g.pool_h else 0
            for w in range(inside, g.width):
                s = (h * g.width + w) * channels
                for c in range(0, channels, lanes):
                    rest = first_lanes(pointer(x), channels - c)
                    _backward_vector(arrays, keeps, pixel, s, t, c, rest, False, training, g)


def run_backward(
    dout: np.ndarray,
    argmax: np.ndarray,
    x: np.ndarray,
    dx: np.ndarray,
    rows: np.ndarray,
    training: bool,
    g: Normalized,
) -> None:
    """Overwrite dx; `rows` are scale, mean, shift and slope; see `_backward`."""
    parts = part_count(g.images * g.out_h, x.size)
    flat = (array.reshape(-1) for array in (dout, argmax, x, dx))
    _backward(parts, *flat, rows, taps(g), int(bool(training)), g)
