"""Tables of the windows of a pooling along an axis, and of the windows around each pixel."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..windows import Axis, tap_table


class Side(NamedTuple):
    """The windows along one axis.

    Windows are alike if they see as many pixels, numbered alike, have one divisor, and each begins a pixel
    behind the one before. In a row the channels of such a run are as those of one window.
    """

    windows: np.ndarray  # of each: its first pixel, divisor and kind
    runs: np.ndarray  # of each run: the same of its first window, and how many there are
    kinds: np.ndarray  # of each kind: the pixels from a window's first to its last, and the first one's tap

    @property
    def most(self) -> int:
        """Pixels of a window from its first to its last, at most."""
        return int(self.kinds[:, 0].max())

    @property
    def slides(self) -> bool:
        """Whether any windows are alike."""
        return len(self.runs) < len(self.windows)


def _side(table: np.ndarray, taps: np.ndarray, divisors: np.ndarray) -> Side:
    """That of windows in a table as `Axis` has it."""
    first, last = table[:, 0], table[:, 1]
    kinds, kind = np.unique(np.stack([last - first, taps], axis=1), axis=0, return_inverse=True)
    windows = np.stack([first, divisors, kind.reshape(-1)], axis=1)
    begins, counts = _alike(*windows.T)
    return Side(windows, np.column_stack([windows[begins], counts]), kinds)


def _alike(places: np.ndarray, *features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs begin in which places go up by one and nothing else changes, and how long each is."""
    breaks = np.diff(places) != 1
    for feature in features:
        breaks |= np.diff(feature) != 0
    begins = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    return begins, np.diff(begins, append=len(places))


def joined(rows: Side, columns: Side) -> np.ndarray:
    """All that kernels read of both sides, in one array: how much there is of each, and then each.

    Each further array would take as long to hand over as a small image's windows take.
    """
    parts = rows.windows, columns.runs, rows.kinds, columns.kinds
    counts = [len(columns.windows), *(len(part) for part in parts)]
    return np.concatenate([counts, *(part.ravel() for part in parts)])


@lru_cache(maxsize=512)
def largest(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> Side:
    """Windows of max-pooling: `tap_table`."""
    table = tap_table(size, outputs, kernel, stride, before, dilation)
    return _side(table, table[:, 2], np.ones(len(table), np.int64))


def mean(axis: Axis) -> Side:
    """Windows of average pooling."""
    return _side(axis.table, np.zeros(len(axis.table), np.int64), axis.table[:, 2])


def mirrored(axis: Axis, size: int) -> Side | None:
    """Of each of `size` pixels the windows that see it: averages of these are the gradient of averages.

    There is none where divisors differ.
    """
    first, last, divisors = axis.table.T
    if (divisors != divisors[0]).any():
        return None
    pixels = np.arange(size)
    seen = last.searchsorted(pixels, "right"), first.searchsorted(pixels, "right")
    return _side(np.stack(seen, axis=1), np.zeros_like(pixels), np.full(size, divisors[0]))


class Around(NamedTuple):
    """The windows around each pixel of an axis."""

    starts: np.ndarray  # where those of each pixel begin
    windows: np.ndarray  # of each its number, and that of the pixel in it
    runs: np.ndarray  # of each run of pixels that are alike, as windows are in `Side`: the first, how many


@lru_cache(maxsize=512)
def around(
    size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int, scales: tuple[int, int]
) -> Around:
    """Those of max-pooling, the numbers of windows and of pixels multiplied by `scales`."""
    starts, entries, first = [0], [], []
    for pixel in range(size):
        for tap in range(kernel):
            window, beside = divmod(pixel + before - tap * dilation, stride)
            if beside == 0 and 0 <= window < outputs:
                entries.append((window, tap))
        # One without windows is like no other.
        first.append(entries[starts[-1]] if len(entries) > starts[-1] else (-2 * pixel, 0))
        starts.append(len(entries))
    windows, taps = np.array(first, np.int64).T
    scaled = np.array(entries, np.int64).reshape(-1, 2) * scales
    runs = np.column_stack(_alike(windows, taps, np.diff(starts)))
    return Around(np.array(starts), scaled.reshape(-1), runs)
