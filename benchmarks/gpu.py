"""``python -m benchmarks.gpu``: fastcnn and PyTorch on the same CUDA device, row by row.

Results are compared first, then the sides take turns. A turn is a series of calls and one wait for the device
at its end, so that what is timed is how fast work is done when it is asked for in advance. PyTorch runs in
both memory formats with cuDNN's benchmarking and fused Adam; the better format counts. Both sides compute in
float32: TF32, which keeps 10 bits of a factor, is off unless it is asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import inputs, measure, parity, work
from .measure import Spread
from .peers import OURS, Side, load
from .shapes import WORKLOADS, Workload

# Seconds of a turn.
_TURN = 0.03


@dataclass
class Row:
    """A workload; `ratio` says how many times longer PyTorch's better format took.

    `failed` says why nothing was timed.
    """

    name: str
    microseconds: float | None = None
    ratio: Spread | None = None
    best: str | None = None
    gflops: float | None = None
    gbytes: float | None = None
    parity: float | None = None
    failed: str | None = None

    def line(self) -> str:
        """The row as a line of the Markdown table."""
        if self.ratio is None:
            return f"| {self.name} | FAILED: {self.failed} | | | | |"
        spread = f"{self.ratio.median:.2f} ({self.ratio.low:.2f} to {self.ratio.high:.2f})"
        return (
            f"| {self.name} | {self.microseconds:.1f} | {spread} | {self.best} | {self.gflops:,.0f} | "
            f"{self.gbytes:,.0f} |"
        )


HEAD = "| row | fastcnn, microseconds | ratio | against | GFLOP/s | GB/s |\n|---|---|---|---|---|---|"


def turn(run: Callable[[], Any], wait: Callable[[], None], calls: int) -> Callable[[], None]:
    """A side's turn: so many calls, then one wait for the device."""

    def take() -> None:
        for _ in range(calls):
            run()
        wait()

    return take


def compare(workload: Workload, sides: dict[str, Side], wait: Callable[[], None], rounds: int) -> Row:
    """Measure a row; the first of `sides` is fastcnn's, `wait` waits for both libraries' work."""
    row = Row(workload.name)
    names = list(sides)
    expected = sides[names[0]].result()
    row.parity = max(parity.check(expected, sides[name].result()) for name in names[1:])
    calls, turns = [], []
    for side in sides.values():
        once = measure.once(turn(side.run, wait, 10)) / 10
        calls.append(max(1, int(_TURN / once)))
        turns.append(turn(side.run, wait, calls[-1]))
    times = measure.interleaved(turns, [1] * len(turns), rounds)
    seconds = [[time / count for time in series] for series, count in zip(times, calls, strict=True)]
    ratios = {
        name: measure.ratios(seconds[0], theirs) for name, theirs in zip(names[1:], seconds[1:], strict=True)
    }
    row.best = min(ratios, key=lambda name: ratios[name].median)
    row.ratio = ratios[row.best]
    median, needed = measure.spread(seconds[0]).median, work.of(workload)
    row.microseconds = median * 1e6
    row.gflops, row.gbytes = needed.flops / median / 1e9, needed.bytes / median / 1e9
    return row


def _measured(workload: Workload, wait: Callable[[], None], rounds: int) -> Row:
    from .peers import ours, pytorch

    try:
        arrays = inputs.build(workload)
        sides = {OURS: ours.prepare(workload, arrays, OURS, "cuda")}
        for variant in pytorch.variants(workload):
            sides[variant] = pytorch.prepare(workload, arrays, variant, "cuda")
        return compare(workload, sides, wait, rounds)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Row(workload.name, failed=f"{type(error).__name__}: {lines[0] if lines else ''}")


def _both(command: argparse.ArgumentParser, tf32: bool) -> tuple[Callable[[], None], str]:
    """What waits for both libraries, and the device's name; ends the program where one can't use a device."""
    if load("torch") is None:
        command.error("PyTorch is not installed")
    import torch

    try:
        from fastcnn.kernels import cuda
        from fastcnn.kernels.cuda.jit import require_device

        require_device()
    except (ImportError, RuntimeError) as error:
        command.error(str(error))
    if not torch.cuda.is_available():
        command.error("PyTorch can't use a CUDA device")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32

    def wait() -> None:
        cuda.synchronize()
        torch.cuda.synchronize()

    return (
        wait,
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, TF32 {'on' if tf32 else 'off'}",
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check fastcnn against PyTorch on the same CUDA device, then time them in turn.",
    )
    result.add_argument("--rows", default="", metavar="REGEX", help="only workloads whose name it matches")
    result.add_argument("--repeat", type=int, default=7, metavar="N", help="rounds of each row (default 7)")
    result.add_argument("--tf32", action="store_true", help="let PyTorch use TF32")
    result.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit code is 1 if a row failed."""
    command = parser()
    arguments = command.parse_args(argv)
    try:
        wanted = re.compile(arguments.rows)
    except re.error as error:
        command.error(f"--rows: {arguments.rows!r} is no regular expression: {error}")
    chosen = [workload for workload in WORKLOADS.values() if wanted.search(workload.name)]
    if not chosen:
        command.error(f"--rows: {arguments.rows!r} matches no workload")
    if arguments.repeat < 1:
        command.error(f"--repeat: {arguments.repeat} is below 1")
    wait, device = _both(command, arguments.tf32)
    print(f"{device}\n\n{HEAD}", flush=True)
    found = []
    for workload in chosen:
        found.append(_measured(workload, wait, arguments.repeat))
        print(found[-1].line(), flush=True)
    trained = [row.ratio.median for row in found if row.ratio is not None and row.name.startswith("train/")]
    if trained:
        print(f"\nTraining steps, geometric mean: {measure.geometric_mean(trained):.2f}")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"device": device, "rows": [asdict(row) for row in found]}, indent=1)
        )
    return int(any(row.failed is not None for row in found))


if __name__ == "__main__":
    sys.exit(main())
