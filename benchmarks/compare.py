"""``python -m benchmarks.compare``: fastcnn side by side with other libraries, row by row."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from . import machine, peers, report, rows
from .peers import OURS
from .shapes import WORKLOADS, Workload

_QUICK = {"rounds": 3, "seconds": 0.005, "memory": False}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Check fastcnn against other libraries, then time them in turn, row by row.",
    )
    result.add_argument("--rows", default="", metavar="REGEX", help="only workloads whose name it matches")
    result.add_argument("--threads", type=int, metavar="N", help="threads of every side (default: all cores)")
    result.add_argument("--repeat", type=int, metavar="N", help="rounds of each row (default 15)")
    result.add_argument(
        "--peers",
        metavar="A,B",
        help=f"out of {', '.join(peers.NAMES)}; none for fastcnn alone (default: those installed, "
        "without torch-compile)",
    )
    result.add_argument("--quick", action="store_true", help="few short rounds and no memory: a trial run")
    result.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    result.add_argument(
        "--every", action="store_true", help="a line for every side, not the best peer's only"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    result.add_argument("--markdown", type=Path, metavar="FILE", help="write the table")
    result.add_argument("--png", type=Path, metavar="FILE", help="write a bar chart")
    result.add_argument("--list", action="store_true", help="list the workloads and end")
    return result


def _chosen(pattern: str, command: argparse.ArgumentParser) -> list[Workload]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        command.error(f"--rows: {pattern!r} is no regular expression: {error}")
    found = [workload for workload in WORKLOADS.values() if wanted.search(workload.name)]
    if not found:
        command.error(f"--rows: {pattern!r} matches no workload; --list shows them all")
    return found


def _libraries(wanted: str | None, command: argparse.ArgumentParser) -> dict[str, ModuleType]:
    """fastcnn, then the peers: those asked for, or the default ones that are installed."""
    names = (
        peers.DEFAULT
        if wanted is None
        else tuple(name for name in wanted.split(",") if name not in ("", "none"))
    )
    libraries = {OURS: peers.load(OURS)}
    for name in names:
        if name not in peers.NAMES:
            command.error(f"--peers: {name!r} is none of {', '.join(peers.NAMES)}")
        library = peers.load(name)
        if library is None and wanted is not None:
            command.error(f"--peers: {name} is not installed")
        libraries[name] = library
    return {name: library for name, library in libraries.items() if library is not None}


def _options(arguments: argparse.Namespace, command: argparse.ArgumentParser) -> rows.Options:
    import fastcnn

    threads = arguments.threads if arguments.threads is not None else fastcnn.get_num_threads()
    try:
        fastcnn.set_num_threads(threads)
    except ValueError as error:
        command.error(f"--threads: {error}")
    options = rows.Options(threads)
    if arguments.quick:
        options = options._replace(**_QUICK)
    if arguments.repeat is not None:
        if arguments.repeat < 1:
            command.error(f"--repeat: {arguments.repeat} is below 1")
        options = options._replace(rounds=arguments.repeat)
    return options._replace(memory=options.memory and not arguments.no_memory)


def _check_files(arguments: argparse.Namespace, command: argparse.ArgumentParser) -> None:
    """Minutes of measuring must not end in an error that could have been seen before."""
    for name in ("json", "markdown", "png"):
        path = getattr(arguments, name)
        if path is not None and not path.resolve().parent.is_dir():
            command.error(f"--{name}: there is no directory {path.resolve().parent}")
    if arguments.png is not None and importlib.util.find_spec("matplotlib") is None:
        command.error("--png: needs matplotlib (pip install matplotlib)")


def _commit() -> str:
    arguments = ["git", "describe", "--always", "--dirty"]
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _measure(
    chosen: Sequence[Workload],
    libraries: dict[str, ModuleType],
    options: rows.Options,
    peaks: machine.Peaks,
) -> tuple[list[rows.Row], bool]:
    """All rows, and whether they were broken off by Ctrl-C."""
    found: list[rows.Row] = []
    try:
        for number, workload in enumerate(chosen, 1):
            row = rows.compare(workload, libraries, options)
            found.append(row)
            line = [cell for cell in report.cells(row, peaks, row.best()) if cell]
            print(f"[{number}/{len(chosen)}] " + "  ".join(line), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted: the rows so far follow", file=sys.stderr)
        return found, True
    return found, False


def _write(run: report.Run, arguments: argparse.Namespace) -> None:
    text = report.markdown(run, arguments.every)
    print(text, end="")
    if arguments.markdown is not None:
        arguments.markdown.write_text(text)
    if arguments.json is not None:
        arguments.json.write_text(report.as_json(run))
    if arguments.png is not None:
        report.chart(run, arguments.png)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit code is 1 if a row failed, 130 after Ctrl-C."""
    command = parser()
    arguments = command.parse_args(argv)
    chosen = _chosen(arguments.rows, command)
    if arguments.list:
        print("\n".join(workload.name for workload in chosen))
        return 0
    _check_files(arguments, command)
    options = _options(arguments, command)
    libraries = _libraries(arguments.peers, command)
    for library in libraries.values():
        library.set_threads(options.threads)
    peaks = machine.peaks(options.threads, arguments.quick)
    found, interrupted = _measure(chosen, libraries, options, peaks)
    if not interrupted:
        peaks = peaks.or_better(machine.peaks(options.threads, arguments.quick))
    settings = {
        **options._asdict(),
        "rows": arguments.rows,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    versions = {name: library.version() for name, library in libraries.items()}
    _write(report.Run(found, peaks, machine.describe(), versions, settings), arguments)
    if interrupted:
        return 130
    return int(any(row.failed is not None for row in found))


if __name__ == "__main__":
    sys.exit(main())
