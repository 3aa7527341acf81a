"""A new process: imports, and the first training step with an empty and with a full kernel cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.start import FASTCNN, seconds


class Imports:
    """In new processes."""

    def timeraw_fastcnn(self) -> str:
        """The package alone."""
        return "import fastcnn"

    def timeraw_layers(self) -> str:
        """All that a training script needs."""
        return "import fastcnn.nn, fastcnn.optim, fastcnn.models"


class FirstStep:
    """From the start of the interpreter to the end of the emotion network's first step."""

    unit = "seconds"
    timeout = 600

    def setup_cache(self) -> dict[str, Any]:
        """Take the step in a process that has to compile everything; later ones find it in the cache."""
        cache = Path.cwd() / "kernels"
        return {"cache": cache, "cold": seconds(FASTCNN, cache)}

    setup_cache.timeout = 600  # type: ignore[attr-defined]

    def track_cold(self, first: dict[str, Any]) -> float:
        """With an empty kernel cache."""
        return first["cold"]

    def track_cached(self, first: dict[str, Any]) -> float:
        """With a full one: the best of three."""
        return min(seconds(FASTCNN, first["cache"]) for _ in range(3))
