"""One row of the comparison: parity first, then interleaved timing, then memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import inputs, measure, memory, parity, work
from .machine import Peaks
from .measure import Spread
from .peers import OURS
from .shapes import Workload, scaled_down

# A side that takes this many times as long as the fastest peer can't become the best: it isn't timed further.
_HOPELESS = 4.0


class Options(NamedTuple):
    """How a row is timed: rounds, and seconds of each side's turn in a round."""

    threads: int
    rounds: int = 15
    seconds: float = 0.05
    memory: bool = True


@dataclass
class Timing:
    """What was found out about one side.

    `seconds` are of a call; `ratio` says how many times longer it took than fastcnn, None where only a first
    look was taken, because the side was far slower than another peer. `error` says why it could not be run.
    """

    peer: str
    variant: str
    seconds: Spread | None = None
    ratio: Spread | None = None
    parity: float | None = None
    memory: dict[str, int] | None = None
    error: str | None = None


@dataclass
class Row:
    """A workload, fastcnn's figures and its peers'. `failed` says why nothing was timed."""

    name: str
    op: str
    flops: int
    bytes: int
    ours: Timing
    peers: list[Timing] = field(default_factory=list)
    failed: str | None = None

    def best(self, peer: str | None = None) -> Timing | None:
        """The fastest peer, or the fastest variant of one library."""
        timed = [t for t in self.peers if t.ratio is not None and peer in (None, t.peer)]
        return min(timed, key=lambda t: t.ratio.median, default=None)

    def bound(self, peaks: Peaks) -> tuple[str, float, float]:
        """What bounds the row, "FMA" or "copy": the resource that takes longer at its peak.

        With it fastcnn's rate, in GFLOP/s or GB/s, and its share of the peak.
        """
        assert self.ours.seconds is not None
        seconds = self.ours.seconds.median
        gflops, gbytes = self.flops / 1e9, self.bytes / 1e9
        if gflops / peaks.fma >= gbytes / peaks.copy:
            return "FMA", gflops / seconds, gflops / seconds / peaks.fma
        return "copy", gbytes / seconds, gbytes / seconds / peaks.copy

    def as_dict(self, peaks: Peaks) -> dict[str, Any]:
        """Plain data for JSON."""
        data = asdict(self)
        # asdict keeps named tuples, which JSON would write as lists.
        for side, timing in zip([data["ours"], *data["peers"]], [self.ours, *self.peers], strict=True):
            side["seconds"] = None if timing.seconds is None else timing.seconds._asdict()
            side["ratio"] = None if timing.ratio is None else timing.ratio._asdict()
        if self.ours.seconds is not None:
            seconds = self.ours.seconds.median
            data["gflops"], data["gbytes"] = self.flops / seconds / 1e9, self.bytes / seconds / 1e9
            data["share_of_fma"] = data["gflops"] / peaks.fma
            data["share_of_copy"] = data["gbytes"] / peaks.copy
            data["bound"] = self.bound(peaks)[0]
        best = self.best()
        data["best_peer"] = None if best is None else best.variant
        return data


def against_reference(workload: Workload, ours: ModuleType) -> None:
    """Compare fastcnn with the NumPy reference on a small shape; raises a ParityError where they disagree."""
    from .peers import reference

    small = scaled_down(workload)
    arrays = inputs.build(small)
    found = ours.prepare(small, arrays, ours.variants(small)[0]).result()
    try:
        parity.check(found, reference.result(small, arrays))
    except parity.ParityError as error:
        raise parity.ParityError(f"reference: {error}") from None


def compare(workload: Workload, libraries: Mapping[str, ModuleType], options: Options) -> Row:
    """Measure a row; `libraries` are the peers and fastcnn."""
    ours = libraries[OURS]
    needed = work.of(workload)
    row = Row(workload.name, workload.op, *needed, Timing(OURS, ours.variants(workload)[0]))
    try:
        against_reference(workload, ours)
        arrays = inputs.build(workload)
        side = ours.prepare(workload, arrays, row.ours.variant)
        expected = side.result()
    except Exception as error:
        row.failed = _reason(error)
        return row
    runs = _prepare_peers(row, workload, arrays, expected, libraries)
    if row.failed is None:
        del expected
        _time(row, side.run, runs, options)
        if options.memory:
            _add_memory(row, options)
    return row


def _reason(error: Exception) -> str:
    if isinstance(error, parity.ParityError):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _prepare_peers(
    row: Row,
    workload: Workload,
    arrays: inputs.Arrays,
    expected: dict[str, np.ndarray],
    libraries: Mapping[str, ModuleType],
) -> list[Callable[[], Any] | None]:
    """Prepare and check every variant of every peer; what to time, in the order of `row.peers`."""
    runs: list[Callable[[], Any] | None] = []
    for name, library in libraries.items():
        for variant in library.variants(workload) if name != OURS else ():
            timing = Timing(name, variant)
            row.peers.append(timing)
            runs.append(None)
            try:
                side = library.prepare(workload, arrays, variant)
                timing.parity = parity.check(expected, side.result())
                side.run()
                runs[-1] = side.run
            except parity.ParityError as error:
                timing.error = str(error)
                row.failed = f"{variant}: {error}"
            except Exception as error:
                timing.error = _reason(error)
    return runs


def _time(row: Row, ours: Callable[[], Any], runs: list[Callable[[], Any] | None], options: Options) -> None:
    sides = [(row.ours, ours)]
    sides += [(timing, run) for timing, run in zip(row.peers, runs, strict=True) if run is not None]
    first = [measure.once(run) for _, run in sides]
    limit = _HOPELESS * min(first[1:], default=float("inf"))
    calls = []
    contenders = []
    for (timing, run), seconds in zip(sides, first, strict=True):
        timing.seconds = measure.spread([seconds])
        if timing is row.ours or seconds <= limit:
            contenders.append((timing, run))
            calls.append(max(1, round(options.seconds / max(seconds, 1e-7))))
    times = measure.interleaved([run for _, run in contenders], calls, options.rounds)
    for (timing, _), seconds in zip(contenders, times, strict=True):
        timing.seconds = measure.spread(seconds)
        if timing is not row.ours:
            timing.ratio = measure.ratios(times[0], seconds)


def _add_memory(row: Row, options: Options) -> None:
    best = row.best()
    for timing in [row.ours] if best is None else [row.ours, best]:
        timing.memory = memory.in_child(row.name, timing.peer, timing.variant, options.threads)
