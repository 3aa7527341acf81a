"""What follows a convolution before its results reach memory: ReLU and max-pooling of a block of rows.

The block lies in scratch, a panel of filters at a time, still in the cache. Pooling comes first, for the
larger of two values is the larger after ReLU too, and ReLU then sees a quarter of the values.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from .vectors import (
    all_lanes,
    first_lanes,
    keep_in_line,
    lanes_of,
    like,
    load,
    pointer,
    select,
    splat,
    store,
)

# In place of an offset in the window: ReLU let nothing pass, so that the window's gradient is zero.
DEAD = 255


class Epilogue(NamedTuple):
    """Max-pooling with windows that touch and don't overlap, of 1x1 or more, behind ReLU or not."""

    pool_h: int
    pool_w: int
    relu: int  # 0 or 1
    out_h: int  # pooled rows and columns
    out_w: int
    filters: int
    keeps: int  # 1: where each maximum was is written too


# The convolution's results are stored as they are.
NO_EPILOGUE = Epilogue(pool_h=0, pool_w=0, relu=0, out_h=0, out_w=0, filters=0, keeps=0)


@kernel
def pool_vector(relu, keeps, kind, z, source, taps, area, y, argmax, target, mask):
    """Largest of the vectors z[source + taps], and which it was, in a vector of `kind`'s type."""
    keep_in_line()
    best = load(z, source + taps[0], mask)
    where = like(splat(kind, mask), 0)
    for tap in range(1, area):
        value = load(z, source + taps[tap], mask)
        # NaN wins, and the last of several.
        takes = (value > best) | (value != value)
        best = select(takes, value, best)
        where = select(takes, like(where, tap), where)
    if relu:
        zero = like(best, 0)
        where = select(best > zero, where, like(where, DEAD))
        best = select(best <= zero, zero, best)
    store(best, y, target, mask)
    if keeps:
        store(where, argmax, target, mask)


@kernel
def _pass_positive(keeps, kind, z, source, y, argmax, target, mask):
    """ReLU of the vector z[source], and where it let pass, in a vector of `kind`'s type."""
    keep_in_line()
    value = load(z, source, mask)
    zero = like(value, 0)
    store(select(value <= zero, zero, value), y, target, mask)
    if keeps:
        dead = like(splat(kind, mask), DEAD)
        store(select(value > zero, like(dead, 0), dead), argmax, target, mask)


@kernel
def _finish_pixels(keeps, z, width, pixels, y, y0, filters, argmax, columns):
    """See `pass_positive`."""
    keep_in_line()
    block, result, where = pointer(z), pointer(y), pointer(argmax)
    lanes, kind = lanes_of(z), argmax.dtype.type(0)
    whole = columns // lanes * lanes
    everything, some = all_lanes(block), first_lanes(block, columns - whole)
    for i in range(pixels):
        s, t = i * width, y0 + i * filters
        for c in range(0, whole, lanes):
            _pass_positive(keeps, kind, block, s + c, result, where, t + c, everything)
        if whole < columns:
            _pass_positive(keeps, kind, block, s + whole, result, where, t + whole, some)


@kernel
def pass_positive(z, width, pixels, e, y, y0, argmax, columns):
    """ReLU of `pixels` pixels of `width` filters, as `finish_panel` does it; z may be y."""
    keep_out_of_line()
    # Literals: what is done for each vector is then known beforehand.
    if e.keeps:
        _finish_pixels(True, z, width, pixels, y, y0, e.filters, argmax, columns)
    else:
        _finish_pixels(False, z, width, pixels, y, y0, e.filters, argmax, columns)


@kernel
def finish_panel(z, width, rows, e, taps, y, y0, argmax, columns):
    """Pool `rows` rows of windows of a block, and write them from y[y0] on.

    `z` holds the block's convolution, pixels of `width` filters each, rows of `e.out_w` windows; `taps` are
    the offsets in it of a window's pixels, from the first; `columns` of the filters are the result's.
    """
    keep_out_of_line()
    if taps.size == 1 and e.relu:
        pass_positive(z, width, rows * e.out_w, e, y, y0, argmax, columns)
        return
    lanes = lanes_of(z)
    line = e.out_w * e.pool_w * width
    kind = argmax.dtype.type(0)
    area, offsets, block, result, where = taps.size, pointer(taps), pointer(z), pointer(y), pointer(argmax)
    whole = columns // lanes * lanes
    everything, some = all_lanes(block), first_lanes(block, columns - whole)
    for i in range(rows):
        for j in range(e.out_w):
            s = i * e.pool_h * line + j * e.pool_w * width
            t = y0 + (i * e.out_w + j) * e.filters
            for c in range(0, whole, lanes):
                pool_vector(
                    e.relu, e.keeps, kind, block, s + c, offsets, area, result, where, t + c, everything
                )
            if whole < columns:
                s, t = s + whole, t + whole
                pool_vector(e.relu, e.keeps, kind, block, s, offsets, area, result, where, t, some)


@parallel
def _finish(part, parts, z, image, pitch, y, argmax, e, taps):
    """Rows of windows of images of `image` elements, whose rows are `pitch` apart."""
    keep_out_of_line()
    row = e.out_w * e.filters
    lo, hi = span(part, parts, y.size // row)
    for i in range(lo, hi):
        n, h = i // e.out_h, i % e.out_h
        source = z[n * image + h * e.pool_h * pitch :]
        finish_panel(source, e.filters, 1, e, taps, y, i * row, argmax, e.filters)


def finish(z: np.ndarray, y: np.ndarray, e: Epilogue, argmax: np.ndarray) -> None:
    """Overwrite `y`, and `argmax`, with what `e` makes of a whole convolution, (N, H, W, F).

    `z` may be `y` where nothing is pooled.
    """
    _, height, width, filters = z.shape
    pitch = width * filters
    rows, columns = np.arange(e.pool_h) * pitch, np.arange(e.pool_w) * filters
    taps = np.add.outer(rows, columns).ravel().astype(np.intp)
    parts = part_count(len(y) * e.out_h, z.nbytes)
    _finish(parts, z.reshape(-1), height * pitch, pitch, y.reshape(-1), argmax.reshape(-1), e, taps)


@kernel
def _unpool_vector(dout, argmax, source, taps, area, z, target, sums, s0, mask):
    """Write to each z[target + taps] the lanes of dout[source:] from there, else zero; add them to sums."""
    keep_in_line()
    everything = all_lanes(z)
    gradient, where = load(dout, source, mask), load(argmax, source, mask)
    zero = like(gradient, 0)
    total = load(sums, s0, everything)
    for tap in range(area):
        here = select(where == like(where, tap), gradient, zero)
        store(here, z, target + taps[tap], everything)
        total = total + here
    store(total, sums, s0, everything)


@kernel
def unpool_panel(dout, argmax, p0, rows, e, taps, z, width, sums, s0, columns):
    """The adjoint of `finish_panel`: write the gradients of a block's pixels to `z`, zeros included.

    `dout` and `argmax` are read from p0 on; the gradients' sums over all pixels are added to `sums` from s0
    on, which like `z` is in whole vectors.
    """
    keep_out_of_line()
    lanes = lanes_of(z)
    line = e.out_w * e.pool_w * width
    area, offsets, block, totals = taps.size, pointer(taps), pointer(z), pointer(sums)
    gradients, where = pointer(dout), pointer(argmax)
    whole = columns // lanes * lanes
    everything, some = all_lanes(block), first_lanes(block, columns - whole)
    for i in range(rows):
        for j in range(e.out_w):
            t = i * e.pool_h * line + j * e.pool_w * width
            s = p0 + (i * e.out_w + j) * e.filters
            for c in range(0, columns, lanes):
                mask = everything if c < whole else some
                _unpool_vector(gradients, where, s + c, offsets, area, block, t + c, totals, s0 + c, mask)


@lru_cache(maxsize=512)
def window_taps(e: Epilogue, width: int) -> np.ndarray:
    """Offsets of a window's pixels in a block whose pixels are `width` elements apart."""
    line = e.out_w * e.pool_w * width
    return np.add.outer(np.arange(e.pool_h) * line, np.arange(e.pool_w) * width).ravel().astype(np.intp)
