"""Interleaved timing, and what is made of it: medians of pairs and their spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# A side's turn begins when the threads of the side before have gone to sleep: libraries let them look for
# more work in a loop first, for 5 ms (OpenMP) to 50 ms (ONNX Runtime) after a call. They have, when the
# process takes less than a tenth of a processor while this thread sleeps, for two of the system's ticks of
# up to 10 ms: what another thread takes may be counted at ticks only.
_SETTLE_SECONDS = 20e-3
_SETTLE_TRIES = 20
# Then come calls that are not timed, for at least so long: caches and branch predictors turn to this side.
WARMUP_SECONDS = 5e-3
# How long a first look at a side lasts.
_LOOK_SECONDS = 0.05


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
    """Seconds of a call: the best of those that a first look has time for."""
    _settle()
    _warm(run)
    best = float("inf")
    end = time.perf_counter() + _LOOK_SECONDS
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, _timed(run, 1))
    return best


def _timed(run: Callable[[], Any], calls: int) -> float:
    """Seconds a call, on average."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def _settle() -> None:
    for _ in range(_SETTLE_TRIES):
        used = time.process_time()
        time.sleep(_SETTLE_SECONDS)
        if time.process_time() - used < 0.1 * _SETTLE_SECONDS:
            return


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
                _settle()
                _warm(runs[side])
                times[side].append(_timed(runs[side], calls[side]))
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return times
