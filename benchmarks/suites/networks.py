"""Training steps and inference of the named networks."""

from __future__ import annotations

from benchmarks.shapes import MODELS

from .common import Timed, prepared


class Training(Timed):
    """Forward pass, backward pass and Adam on one batch."""

    params = tuple(MODELS)
    param_names = ("model",)

    def setup(self, model: str) -> None:
        """Compile and check, once a process."""
        self.run = prepared(f"train/{model}")

    def time_step(self, model: str) -> None:
        """One step."""
        self.run()


class Inference(Timed):
    """The forward pass in evaluation mode, without gradients."""

    params = (tuple(MODELS), (1, 256))
    param_names = ("model", "images")

    def setup(self, model: str, images: int) -> None:
        """Compile and check, once a process."""
        self.run = prepared(f"infer-{images}/{model}")

    def time_forward(self, model: str, images: int) -> None:
        """One pass."""
        self.run()
