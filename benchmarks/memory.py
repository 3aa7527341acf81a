"""Peak memory of one side of a row, in a process of its own.

``python -m benchmarks.memory ROW PEER VARIANT THREADS`` prints a JSON object, in bytes: `peak`, the most that
the process ever held, libraries included, and `imported`, the most that it held before the arrays were made.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import inputs, peers
from .shapes import WORKLOADS

_RUNS = 3
_ROOT = Path(__file__).resolve().parents[1]


def peak_bytes() -> int:
    """The most memory that this process has held at once."""
    try:
        # ru_maxrss would start from what the parent held when it started this process.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(row: str, peer: str, variant: str, threads: int) -> dict[str, int]:
    """Run one side of a row a few times in this process."""
    library = peers.load(peer)
    if library is None:
        raise ModuleNotFoundError(f"{peer} is not installed")
    library.set_threads(threads)
    workload = WORKLOADS[row]
    imported = peak_bytes()
    side = library.prepare(workload, inputs.build(workload), variant)
    for _ in range(_RUNS):
        side.run()
    return {"imported": imported, "peak": peak_bytes()}


def in_child(row: str, peer: str, variant: str, threads: int) -> dict[str, Any] | None:
    """The same in a new process; None if that fails."""
    arguments = [sys.executable, "-m", "benchmarks.memory", row, peer, variant, str(threads)]
    done = subprocess.run(arguments, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print what `measure` says of the command line's row."""
    row, peer, variant, threads = sys.argv[1:]
    print(json.dumps(measure(row, peer, variant, int(threads))))


if __name__ == "__main__":
    main()
