"""Interleaved timing, and what is made of it: medians of pairs and their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# A side's turn begins with calls that are not timed, for at least so long: caches and branch predictors turn
# to it, and the threads of the side before, which wait for more work in a loop, go to sleep.
WARMUP_SECONDS = 2e-3


class Spread(NamedTuple):
    """A median between its quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of one value or more."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times longer theirs took: of each pair of neighbours in time, then the median of the pairs."""
    return spread([their / our for our, their in zip(ours, theirs, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return statistics.geometric_mean(values)


def once(run: Callable[[], Any]) -> float:
    """Seconds of a call, the best of a few once it is warm."""
    run()
    best = float("inf")
    begin = time.perf_counter()
    for _ in range(5):
        best = min(best, _timed(run, 1))
        if time.perf_counter() - begin > 0.5:
            break
    return best


def _timed(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, on average."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _warm(run: Callable[[], Any]) -> None:
    end = time.perf_counter() + WARMUP_SECONDS
    run()
    while time.perf_counter() < end:
        run()


def interleaved(runs: Sequence[Callable[[], Any]], calls: Sequence[int], rounds: int) -> list[list[float]]:
    """Seconds a call of each of `runs`, in `rounds` rounds.

    In a round every side has its turn of so many `calls`, so that what slows the machine for a while slows
    all of them. Who begins changes from round to round. No garbage is collected meanwhile.
    """
    times: list[list[float]] = [[] for _ in runs]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for place in range(len(runs)):
                side = (place + turn) % len(runs)
                _warm(runs[side])
                times[side].append(_timed(runs[side], calls[side]))
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return times
