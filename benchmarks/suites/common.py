"""What the suites share: prepared runs, kept over the set-up that asv repeats before every timed call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from benchmarks import inputs, peers
from benchmarks.rows import against_reference
from benchmarks.shapes import WORKLOADS


def library(name: str) -> ModuleType:
    """fastcnn, or a peer; the benchmark is skipped where the peer is not installed."""
    found = peers.load(name)
    if found is None:
        raise NotImplementedError(f"{name} is not installed")
    return found


@cache
def prepared(name: str) -> Callable[[], Any]:
    """fastcnn's run of a workload: compared with the reference, compiled, its memory touched."""
    ours = library(peers.OURS)
    workload = WORKLOADS[name]
    against_reference(workload, ours)
    side = ours.prepare(workload, inputs.build(workload), ours.variants(workload)[0])
    for _ in range(2):
        side.run()
    return side.run


class Timed:
    """How asv samples: with a set-up each sample is one call, so that many samples are taken."""

    rounds = 2
    repeat = (5, 100, 1.0)
    warmup_time = 0.1
    timeout = 300
