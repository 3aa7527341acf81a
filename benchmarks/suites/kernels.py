"""Each kernel on each of its shapes."""

from __future__ import annotations

from benchmarks.peers.networks import MODEL_OPS
from benchmarks.shapes import WORKLOADS

from .common import Timed, prepared


class Kernels(Timed):
    """One call, into buffers that exist."""

    params = tuple(name for name, workload in WORKLOADS.items() if workload.op not in MODEL_OPS)
    param_names = ("workload",)

    def setup(self, name: str) -> None:
        """Compile and check, once a process."""
        self.run = prepared(name)

    def time_kernel(self, name: str) -> None:
        """The call."""
        self.run()
