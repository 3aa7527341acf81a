"""Max-pooling's gradient where windows of 3 x 3 pixels begin two pixels apart, by pairs of pixels in a row.

A pixel where a window begins and the one behind it are seen by the same windows: in rows where windows begin
that window, the one before it and the two above these, in the rows between the first two. So nobody looks for
a pixel's windows, and dx is written from end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from ..windows import Windows
from . import simd
from .elementwise import passes_caches
from .vectors import (
    all_lanes,
    fence,
    first_lanes,
    keep_in_line,
    lanes_of,
    like,
    load,
    pointer,
    prefetch,
    select,
    store,
    store_around,
)

# So many elements ahead of those that are written the caches are told to fetch.
_AHEAD = 4096


class _Way(NamedTuple):
    """How dx is written: around the caches, or where they have been told to fetch it, or as it comes."""

    around: bool
    ahead: bool


def suits(g: Windows, dtype: np.dtype) -> bool:
    """Whether the windows are such, and channels fill a vector."""
    sizes = g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.dilation_h, g.dilation_w
    return sizes == (3, 3, 2, 2, 1, 1) and g.channels >= simd.lanes(dtype)


def max_backward(dout: np.ndarray, argmax: np.ndarray, dx: np.ndarray, g: Windows, ahead: bool) -> None:
    """Overwrite dx with the gradient; see `pooling.max_pool2d_backward`. `ahead`: from and to memory."""
    around = g.channels % simd.lanes(dx.dtype) == 0 and passes_caches(dx, 1)
    way = _Way(around, ahead and not around)
    parts = part_count(len(dx) * g.height, dx.size)
    _gather(parts, dout.reshape(-1), argmax.reshape(-1), dx.reshape(-1), g, way)


@kernel
def _chosen(gradient, where, tap, total):
    """`total`, and the gradient of a window that chose its pixel `tap`."""
    keep_in_line()
    return select(where == like(where, tap), total + gradient, total)


@kernel
def _write(first, second, dx, t, channels, pixels, around):
    keep_in_line()
    if around:
        store_around(first, dx, t)
        store_around(second, dx, t + channels)
    else:
        store(first, dx, t, pixels[0])
        store(second, dx, t + channels, pixels[1])


@kernel
def _where_windows_begin(dout, argmax, s, line, dx, t, channels, above, windows, pixels, around):
    """A vector of channels of the pair at `t`, where the window at `s` begins.

    `above`, `windows` and `pixels` are masks for the left and the right one: of the windows above those at
    `s`, of these, and of the pixels.
    """
    keep_in_line()
    up, left = s - line, s - channels
    g0, at0 = load(dout, up - channels, above[0]), load(argmax, up - channels, above[0])
    g1, at1 = load(dout, up, above[1]), load(argmax, up, above[1])
    g2, at2 = load(dout, left, windows[0]), load(argmax, left, windows[0])
    g3, at3 = load(dout, s, windows[1]), load(argmax, s, windows[1])
    zero = like(g0, 0)
    first = _chosen(g2, at2, 2, _chosen(g3, at3, 0, _chosen(g1, at1, 6, _chosen(g0, at0, 8, zero))))
    second = _chosen(g3, at3, 1, _chosen(g1, at1, 7, zero))
    _write(first, second, dx, t, channels, pixels, around)


@kernel
def _between(dout, argmax, s, dx, t, channels, windows, pixels, around):
    """A vector of channels of the pair below that of `_where_windows_begin`."""
    keep_in_line()
    left = s - channels
    g0, at0 = load(dout, left, windows[0]), load(argmax, left, windows[0])
    g1, at1 = load(dout, s, windows[1]), load(argmax, s, windows[1])
    zero = like(g0, 0)
    first, second = _chosen(g1, at1, 3, _chosen(g0, at0, 5, zero)), _chosen(g1, at1, 4, zero)
    _write(first, second, dx, t, channels, pixels, around)


@kernel
def _there(first, count):
    """Whether `first` and the one behind it are among so many."""
    return 0 <= first < count, -1 <= first < count - 1


@kernel
def _both(there, mask, none):
    """The masks of two that are there or not."""
    return mask if there[0] else none, mask if there[1] else none


@parallel
def _gather(part, parts, dout, argmax, dx, g, way):
    """dx, overwritten: at each pixel the sum of dout over the windows that chose it."""
    keep_out_of_line()
    gradient, at, to = pointer(dout), pointer(argmax), pointer(dx)
    lanes, channels = lanes_of(to), g.channels
    line, dx_line = g.out_w * channels, g.width * channels
    every, none = all_lanes(to), first_lanes(to, 0)
    both = every, every
    lo, hi = span(part, parts, dx.size // dx_line)
    for row in range(lo, hi):
        n = row // g.height
        below = row - n * g.height + g.top
        i = below // 2
        between = below % 2 == 1
        up, down = _there(i - 1, g.out_h)
        for j in range(g.left // 2, (g.width + g.left + 1) // 2):
            w = 2 * j - g.left
            columns, pixels = _there(j - 1, g.out_w), _there(w, g.width)
            inside = columns[0] and columns[1] and pixels[0] and pixels[1] and down and (up or between)
            s, t = (n * g.out_h + i) * line + j * channels, row * dx_line + w * channels
            for c in range(0, channels, lanes):
                u, v = s + c, t + c
                if way.ahead:
                    prefetch(to, v + _AHEAD)
                    prefetch(to, v + channels + _AHEAD)
                if inside and c + lanes <= channels and between:
                    _between(gradient, at, u, to, v, channels, both, both, way.around)
                elif inside and c + lanes <= channels:
                    _where_windows_begin(gradient, at, u, line, to, v, channels, both, both, both, way.around)
                else:
                    some = first_lanes(to, channels - c)
                    above = _both(columns, some if up else none, none)
                    windows = _both(columns, some if down else none, none)
                    mine = _both(pixels, some, none)
                    if between:
                        _between(gradient, at, u, to, v, channels, windows, mine, False)
                    else:
                        _where_windows_begin(
                            gradient, at, u, line, to, v, channels, above, windows, mine, False
                        )
    if way.around:
        fence()
