"""The loops of pooling, by vectors of channels: the largest of a window's pixels, their sum, and back.

Windows are the product of two tables, one for each axis of the image; see `pool_tables`. The pixels of a
window are kept as a list, which all windows of its kind share.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..jit import keep_out_of_line, kernel
from ..threads import parallel, span
from .pieces import fill
from .pool_nine import AHEAD, largest_of_nine
from .vectors import (
    LONG,
    all_lanes,
    all_long_lanes,
    first_lanes,
    first_long_lanes,
    keep_in_line,
    lanes_of,
    like,
    load,
    pointer,
    prefetch,
    prefetch_vector,
    select,
    splat,
    store,
    zeros,
)

# From so many channels and pixels of a window on, a mean is taken pixel by pixel.
_MANY_CHANNELS = 512
_MANY_PIXELS = 32


class Taps(NamedTuple):
    """Images, and how the taps of the windows on them are numbered and spaced."""

    height: int
    width: int
    channels: int
    kernel_w: int
    dilation_h: int
    dilation_w: int


class Apart(NamedTuple):
    """Windows that begin at the image's corner and don't overlap."""

    out_h: int
    out_w: int
    stride_h: int
    stride_w: int
    kernel_h: int


class Lattice(NamedTuple):
    """How many windows there are, how far apart, and where the first begins, above and left of the image."""

    out_h: int
    out_w: int
    stride_h: int
    stride_w: int
    top: int
    left: int


@kernel
def _list_taps(taps, entry, tall, wide, first, g):
    """From `entry` on: offsets of a window's pixels from its first, and their numbers from `first` on; -1."""
    for a in range(0, tall, g.dilation_h):
        number = first + a // g.dilation_h * g.kernel_w
        for b in range(0, wide, g.dilation_w):
            taps[entry] = (a * g.width + b) * g.channels
            taps[entry + 1] = number
            number += 1
            entry += 2
    # LLVM does not unroll a loop that ends here, which would make it longer than most windows are.
    taps[entry + 1] = -1


class Sections(NamedTuple):
    """Where in `pool_tables.joined` each of its parts begins, how many there are, and how long lists are."""

    out_w: int
    out_h: int
    runs: int
    column_kinds: int
    windows_at: int
    runs_at: int
    row_kinds_at: int
    column_kinds_at: int
    list: int


@kernel
def _read(tables, taps, g):
    """The sections of `tables`; and the lists of all kinds of windows, one after another, in `taps`."""
    out_w, out_h, runs, row_kinds, column_kinds = tables[0], tables[1], tables[2], tables[3], tables[4]
    runs_at = 5 + 3 * out_h
    row_kinds_at = runs_at + 4 * runs
    column_kinds_at = row_kinds_at + 2 * row_kinds
    length = taps.size // (row_kinds * column_kinds)
    entry = 0
    for i in range(row_kinds_at, column_kinds_at, 2):
        for j in range(column_kinds_at, tables.size, 2):
            first = tables[i + 1] * g.kernel_w + tables[j + 1]
            _list_taps(taps, entry, tables[i], tables[j], first, g)
            entry += length
    begins = 5, runs_at, row_kinds_at, column_kinds_at
    return Sections(out_w, out_h, runs, column_kinds, *begins, length)


@kernel
def _largest(x, y, argmax, kind, taps, entry, source, target, mask):
    """One vector of channels of one window, whose list begins at `entry`."""
    keep_in_line()
    best = like(zeros(x), -np.inf)
    where = like(splat(kind, mask), max(taps[entry + 1], 0))
    while taps[entry + 1] >= 0:
        prefetch(x, source + taps[entry] + AHEAD)
        value = load(x, source + taps[entry], mask)
        takes = (value > best) | (value != value)
        best = select(takes, value, best)
        where = select(takes, like(where, taps[entry + 1]), where)
        entry += 2
    store(best, y, target, mask)
    store(where, argmax, target, mask)


@parallel
def max_forward(part, parts, x, y, argmax, tables, lists, g):
    """y and argmax, overwritten; `tables` are `pool_tables.joined`."""
    keep_out_of_line()
    of = _read(tables, lists[part], g)
    lanes = lanes_of(x)
    kind, channels = argmax.dtype.type(0), g.channels
    table, taps, values, to, where = (
        pointer(tables),
        pointer(lists[part]),
        pointer(x),
        pointer(y),
        pointer(argmax),
    )
    line, down, right = of.out_w * channels, g.dilation_h * g.width * channels, g.dilation_w * channels
    three_tall, three_wide = 2 * g.dilation_h + 1, 2 * g.dilation_w + 1
    everything = all_lanes(values)
    size = whole = 0
    some = everything
    lo, hi = span(part, parts, y.size // line)
    for row in range(lo, hi):
        n = row // of.out_h
        window = of.windows_at + 3 * (row - n * of.out_h)
        above, tall, t = n * g.height + table[window], table[window + 2], row * line
        wide, entry, nine = -1, 0, False
        for run in range(of.runs_at, of.runs_at + 4 * of.runs, 4):
            if wide != table[run + 2]:
                wide = table[run + 2]
                entry = (tall * of.column_kinds + wide) * of.list
                nine = g.kernel_w == 3 and taps[entry + 1] == 0
                nine = nine and table[of.row_kinds_at + 2 * tall] == three_tall
                nine = nine and table[of.column_kinds_at + 2 * wide] == three_wide
            if size != table[run + 3] * channels:
                size = table[run + 3] * channels
                whole = size // lanes * lanes
                some = first_lanes(values, size - whole)
            s = (above * g.width + table[run]) * channels
            for c in range(0, whole, lanes):
                if not nine or largest_of_nine(values, to, where, s + c, down, right, t + c, everything):
                    _largest(values, to, where, kind, taps, entry, s + c, t + c, everything)
            if whole < size:
                u, v = s + whole, t + whole
                if not nine or largest_of_nine(values, to, where, u, down, right, v, some):
                    _largest(values, to, where, kind, taps, entry, u, v, some)
            t += size


@kernel
def _scatter_vector(dout, argmax, keeps, factor, dx, taps, source, target, mask):
    keep_in_line()
    gradient = load(dout, source, mask)
    entry = 0
    if keeps:
        where, zero = load(argmax, source, mask), like(gradient, 0)
        while taps[entry + 1] >= 0:
            here = where == like(where, taps[entry + 1])
            prefetch(dx, target + taps[entry] + AHEAD)
            store(select(here, gradient, zero), dx, target + taps[entry], mask)
            entry += 2
    else:
        gradient = gradient * like(gradient, factor)
        while taps[entry + 1] >= 0:
            prefetch(dx, target + taps[entry] + AHEAD)
            store(gradient, dx, target + taps[entry], mask)
            entry += 2


@kernel
def _spread(dout, factor, dx, taps, source, target, channels):
    """One window's gradient, to all of its pixels, one after another: memory is written from end to end."""
    lanes = lanes_of(dx)
    whole = channels // lanes * lanes
    everything, some = all_lanes(dx), first_lanes(dx, channels - whole)
    entry = 0
    while taps[entry + 1] >= 0:
        place = target + taps[entry]
        for c in range(0, whole, lanes):
            gradient = load(dout, source + c, everything)
            prefetch(dx, place + c + AHEAD)
            store(gradient * like(gradient, factor), dx, place + c, everything)
        if whole < channels:
            gradient = load(dout, source + whole, some)
            prefetch(dx, place + whole + AHEAD)
            store(gradient * like(gradient, factor), dx, place + whole, some)
        entry += 2


@parallel
def scatter(part, parts, dout, argmax, factor, dx, apart, lists, g):
    """dx, overwritten: dout at the pixels in argmax; if it is empty, dout * factor at all of a window."""
    keep_out_of_line()
    lanes = lanes_of(dx)
    channels, line = g.channels, g.width * g.channels
    whole = channels // lanes * lanes
    taps, gradient, where, to = pointer(lists[part]), pointer(dout), pointer(argmax), pointer(dx)
    keeps, everything = argmax.size > 0, all_lanes(gradient)
    some = first_lanes(gradient, channels - whole)
    spreads = not keeps and channels >= LONG * lanes
    _list_taps(lists[part], 0, apart.kernel_h, g.kernel_w, 0, g)
    tiled = apart.stride_h == apart.kernel_h and apart.out_w * g.kernel_w == g.width
    lo, hi = span(part, parts, dout.size // (apart.out_w * channels))
    for row in range(lo, hi):
        n = row // apart.out_h
        i = row - n * apart.out_h
        first = n * g.height + i * apart.stride_h
        last = first + apart.stride_h if i + 1 < apart.out_h else (n + 1) * g.height
        begin = first + apart.kernel_h if tiled else first
        if begin < last:
            fill(dx[begin * line : last * line], 0)
        s, t = row * apart.out_w * channels, first * line
        for _ in range(apart.out_w):
            if spreads:
                _spread(gradient, factor, to, taps, s, t, channels)
            else:
                for c in range(0, whole, lanes):
                    _scatter_vector(gradient, where, keeps, factor, to, taps, s + c, t + c, everything)
                if whole < channels:
                    _scatter_vector(gradient, where, keeps, factor, to, taps, s + whole, t + whole, some)
            s += channels
            t += apart.stride_w * channels


@parallel
def scatter_narrow(part, parts, dout, argmax, dx, apart, places, distances, g):
    """As `scatter`, where channels are few: one after another, each window's dout goes to its pixel.

    `places` are those of the windows' first pixels, in a row of windows and in elements of dx from its first
    one, and `distances` those of a window's pixels from its first.
    """
    keep_out_of_line()
    line, many, taps = g.width * g.channels, places.size, distances.size
    place, distance, to = pointer(places), pointer(distances), pointer(dx)
    gradient, where = pointer(dout), pointer(argmax)
    row, hi = span(part, parts, dout.size // many)
    while row < hi:
        # What this part does of an image lies in the nearest caches from here on.
        n = row // apart.out_h
        i0 = row - n * apart.out_h
        i1 = min(apart.out_h, i0 + hi - row)
        last = i1 * apart.stride_h if i1 < apart.out_h else g.height
        fill(dx[(n * g.height + i0 * apart.stride_h) * line : (n * g.height + last) * line], 0)
        for i in range(i0, i1):
            s, t = (n * apart.out_h + i) * many, (n * g.height + i * apart.stride_h) * line
            for k in range(many):
                tap = np.intp(where[s + k])
                if tap < taps:
                    to[t + place[k] + distance[tap]] = gradient[s + k]
        row += i1 - i0


@kernel
def _gather_vector(dout, argmax, rows, r0, r1, columns, c0, c1, source, dx, target, mask, ahead):
    """One vector of channels of one pixel, of one register or of several: the sum of its windows.

    `ahead` says whether the caches are told to fetch what is read and written later.
    """
    keep_in_line()
    zero = like(splat(dout[0], mask), 0)
    total = zero
    if ahead:
        prefetch_vector(dx, target + AHEAD, mask)
        if r0 < r1 and c0 < c1:
            last = source + rows[2 * r1 - 2] + columns[2 * c1 - 2] + AHEAD
            prefetch_vector(dout, last, mask)
            prefetch(argmax, last)
    for r in range(r0, r1):
        for c in range(c0, c1):
            place = source + rows[2 * r] + columns[2 * c]
            where = load(argmax, place, mask)
            here = where == like(where, rows[2 * r + 1] + columns[2 * c + 1])
            total = total + select(here, load(dout, place, mask), zero)
    store(total, dx, target, mask)


@parallel
def max_backward(part, parts, dout, argmax, dx, image_out, rows, columns, height, line, ahead):
    """dx, overwritten: at each pixel the sum of dout over the windows that chose it.

    The tables are `pool_tables.Around`, windows' numbers being offsets in an image's dout. An image has
    `height` rows of `line` elements.
    """
    keep_out_of_line()
    gradient, at, to = pointer(dout), pointer(argmax), pointer(dx)
    of_row, of_column = pointer(rows.windows), pointer(columns.windows)
    runs, starts = pointer(columns.runs), pointer(columns.starts)
    lanes = lanes_of(to)
    width = LONG * lanes
    channels = line // (len(columns.starts) - 1)
    many = all_long_lanes(to)
    size = whole = 0
    few, some = many, all_lanes(to)
    lo, hi = span(part, parts, dx.size // line)
    for row in range(lo, hi):
        n = row // height
        h = row - n * height
        r0, r1 = rows.starts[h], rows.starts[h + 1]
        s, t = n * image_out, row * line
        for run in range(0, columns.runs.size, 2):
            if size != runs[run + 1] * channels:
                size = runs[run + 1] * channels
                whole = size // width * width
                few, some = first_long_lanes(to, size - whole), first_lanes(to, size - whole)
            c0, c1 = starts[runs[run]], starts[runs[run] + 1]
            for c in range(0, whole, width):
                _gather_vector(gradient, at, of_row, r0, r1, of_column, c0, c1, s + c, to, t + c, many, ahead)
            u, v, left = s + whole, t + whole, size - whole
            # What is left takes one vector more, a short one if it fits.
            if 0 < left <= lanes:
                _gather_vector(gradient, at, of_row, r0, r1, of_column, c0, c1, u, to, v, some, ahead)
            elif left > 0:
                _gather_vector(gradient, at, of_row, r0, r1, of_column, c0, c1, u, to, v, few, ahead)
            t += size


@kernel
def _give(dout, argmax, dx, places, taps, row, rows, j0, j1, checked, g, at):
    """Add to dx the gradient of the windows j0 to j1 of a line, which `dout` and `argmax` begin with.

    The windows begin in `row` of the `rows` that `dx` begins with; `checked` leaves out what isn't in them.
    """
    keep_in_line()
    channels, step = g.channels, at.stride_w * g.channels
    source, target = j0 * channels, (row * g.width + j0 * at.stride_w - at.left) * channels
    for j in range(j0, j1):
        for c in range(channels):
            tap = np.intp(argmax[source + c])
            if tap >= taps:
                continue
            if checked:
                h, w = row + places[3 * tap], j * at.stride_w - at.left + places[3 * tap + 1]
                if h < 0 or h >= rows or w < 0 or w >= g.width:
                    continue
            dx[target + places[3 * tap + 2] + c] += dout[source + c]
        source += channels
        target += step


@parallel
def max_backward_narrow(part, parts, dout, argmax, dx, places, g, at):
    """dx, overwritten, where channels are few: dout is added window by window, channel by channel.

    Each part does rows of images, and all windows that reach them. `places` are the distances of a window's
    pixels from its first: down, to the right and in elements.
    """
    keep_out_of_line()
    of = pointer(places.reshape(-1))
    line, out_line, taps = g.width * g.channels, at.out_w * g.channels, places.shape[0]
    tall, wide = places[taps - 1, 0], places[taps - 1, 1]
    # The windows of a line that lie inside of it.
    j0 = min((at.left + at.stride_w - 1) // at.stride_w, at.out_w)
    j1 = max(j0, min((g.width - 1 - wide + at.left) // at.stride_w + 1, at.out_w))
    row, hi = span(part, parts, dx.size // line)
    fill(dx[row * line : hi * line], 0)
    while row < hi:
        n = row // g.height
        first = row - n * g.height
        rows = min(g.height - first, hi - row)
        to = pointer(dx[row * line :])
        # The windows that reach these rows begin at most `tall` rows above the first of them.
        i0 = max(0, (first + at.top - tall + at.stride_h - 1) // at.stride_h)
        i1 = min(at.out_h, (first + rows - 1 + at.top) // at.stride_h + 1)
        for i in range(i0, i1):
            h, s = i * at.stride_h - at.top - first, (n * at.out_h + i) * out_line
            gradient, where = pointer(dout[s:]), pointer(argmax[s:])
            inside0, inside1 = (j0, j1) if h >= 0 and h + tall < rows else (0, 0)
            _give(gradient, where, to, of, taps, h, rows, 0, inside0, True, g, at)
            _give(gradient, where, to, of, taps, h, rows, inside0, inside1, False, g, at)
            _give(gradient, where, to, of, taps, h, rows, inside1, at.out_w, True, g, at)
        row += rows


@kernel
def _mean_vector(x, y, zero, factor, taps, entry, source, target, mask):
    """One vector of channels of one window, of one register or of several."""
    keep_in_line()
    total = splat(zero, mask)
    while taps[entry + 1] >= 0:
        place = source + taps[entry]
        prefetch_vector(x, place + AHEAD, mask)
        total = total + load(x, place, mask)
        entry += 2
    store(total * like(total, factor), y, target, mask)


@kernel
def _add_vector(x, y, is_first, factor, source, target, mask):
    """Add a vector to the sums in y, or begin them, and multiply."""
    keep_in_line()
    total = load(x, source, mask)
    if not is_first:
        total = load(y, target, mask) + total
    store(total * like(total, factor), y, target, mask)


@kernel
def _mean_by_pixels(x, y, factor, taps, entry, source, target, channels):
    """All channels of one window, pixel by pixel: memory is read from end to end, and sums wait in y."""
    many, width = all_long_lanes(x), LONG * lanes_of(x)
    whole = channels // width * width
    some = first_long_lanes(x, channels - whole)
    first = entry
    while taps[entry + 1] >= 0:
        pixel, is_first = source + taps[entry], entry == first
        scale = factor if taps[entry + 3] < 0 else 1.0
        for c in range(0, whole, width):
            _add_vector(x, y, is_first, scale, pixel + c, target + c, many)
        if whole < channels:
            _add_vector(x, y, is_first, scale, pixel + whole, target + whole, some)
        entry += 2


@parallel
def mean_forward(part, parts, x, y, tables, lists, g):
    """y, overwritten; `tables` are `pool_tables.joined`."""
    keep_out_of_line()
    of = _read(tables, lists[part], g)
    table, taps, values, to = pointer(tables), pointer(lists[part]), pointer(x), pointer(y)
    channels, zero, lanes = g.channels, x.dtype.type(0), lanes_of(values)
    width, line = LONG * lanes, of.out_w * channels
    many, everything = all_long_lanes(values), all_lanes(values)
    slides = of.runs < of.out_w
    entry, factor, by_pixels = 0, 0.0, False
    lo, hi = span(part, parts, y.size // line)
    for row in range(lo, hi):
        n = row // of.out_h
        window = of.windows_at + 3 * (row - n * of.out_h)
        above, tall, t = n * g.height + table[window], table[window + 2], row * line
        wide = divisor = -1
        for run in range(of.runs_at, of.runs_at + 4 * of.runs, 4):
            if wide != table[run + 2] or divisor != table[run + 1]:
                divisor, wide = table[run + 1], table[run + 2]
                factor = 1 / (table[window + 1] * divisor)
                entry = (tall * of.column_kinds + wide) * of.list
                pixels = table[of.row_kinds_at + 2 * tall] * table[of.column_kinds_at + 2 * wide]
                by_pixels = channels >= _MANY_CHANNELS and pixels >= _MANY_PIXELS
            size = table[run + 3] * channels if slides else channels
            long, whole = size // width * width, size // lanes * lanes
            some = first_lanes(values, size - whole)
            s = (above * g.width + table[run]) * channels
            if by_pixels:
                for c in range(0, size, channels):
                    _mean_by_pixels(values, to, factor, taps, entry, s + c, t + c, channels)
                t += size
                continue
            for c in range(0, long, width):
                _mean_vector(values, to, zero, factor, taps, entry, s + c, t + c, many)
            for c in range(long, whole, lanes):
                _mean_vector(values, to, zero, factor, taps, entry, s + c, t + c, everything)
            if whole < size:
                _mean_vector(values, to, zero, factor, taps, entry, s + whole, t + whole, some)
            t += size
