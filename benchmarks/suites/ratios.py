"""How many times faster than PyTorch's best: interleaved in one process; a slow machine slows both."""

from __future__ import annotations

from benchmarks.peers import OURS
from benchmarks.rows import Options, compare
from benchmarks.shapes import MODELS, WORKLOADS

from .common import library

_OPERATIONS = (
    "conv-forward/first-1-3x3-32",
    "conv-forward/32-3x3-64",
    "conv-input/32-3x3-64",
    "conv-weight/32-3x3-64",
    "conv-forward/128-3x3-128",
    "conv-forward/depthwise-64-3x3",
    "max-pool-forward/48-2x2-32",
    "max-pool-backward/48-2x2-32",
    "batch-norm-forward/26-10",
    "adam/10M",
)


class AgainstTorch:
    """PyTorch's time by fastcnn's; skipped where PyTorch is not installed."""

    params = (
        *(f"{op}/{model}" for op in ("train", "infer-1", "infer-256") for model in MODELS),
        *_OPERATIONS,
    )
    param_names = ("workload",)
    unit = "times"
    timeout = 300

    def setup(self, name: str) -> None:
        """Load both."""
        self.libraries = {peer: library(peer) for peer in (OURS, "torch")}

    def track_ratio(self, name: str) -> float:
        """The median over pairs, PyTorch in its better memory format."""
        import fastcnn

        threads = fastcnn.get_num_threads()
        for peer in self.libraries.values():
            peer.set_threads(threads)
        options = Options(threads, rounds=5, seconds=0.02, memory=False)
        row = compare(WORKLOADS[name], self.libraries, options)
        best = row.best("torch")
        if best is None or best.ratio is None:
            raise RuntimeError(f"{name}: {row.failed or 'PyTorch did not run'}")
        return best.ratio.median
