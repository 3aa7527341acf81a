"""Memory of a training step."""

from __future__ import annotations

from benchmarks.shapes import MODELS

from .common import prepared


class Workspace:
    """What a training step holds beside parameters and images."""

    params = tuple(MODELS)
    param_names = ("model",)
    timeout = 300

    def setup(self, model: str) -> None:
        """Take a few steps."""
        self.run = prepared(f"train/{model}")

    def track_pooled_bytes(self, model: str) -> int:
        """Activations, gradients and what layers keep between the passes."""
        from fastcnn import _buffers

        _buffers.clear()
        for _ in range(3):
            self.run()
        return _buffers.stats()["bytes"]

    def track_scratch_bytes(self, model: str) -> int:
        """The kernels' own working memory."""
        from fastcnn.kernels.cpu import workspace

        self.run()
        return sum(buffer.nbytes for buffer in vars(workspace._local).values())

    def track_new_buffers(self, model: str) -> int:
        """Buffers that a step allocates once it is warm: none."""
        from fastcnn import _buffers

        before = _buffers.stats()["misses"]
        self.run()
        return _buffers.stats()["misses"] - before

    def peakmem_step(self, model: str) -> None:
        """All of the process."""
        self.run()

    track_pooled_bytes.unit = "bytes"  # type: ignore[attr-defined]
    track_scratch_bytes.unit = "bytes"  # type: ignore[attr-defined]
    track_new_buffers.unit = "buffers"  # type: ignore[attr-defined]
