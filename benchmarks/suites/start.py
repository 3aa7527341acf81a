"""A new process: imports, and the first training step with an empty and with a full kernel cache."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_FIRST_STEP = """
import numpy as np
from fastcnn import models, nn, optim
net = models.create("emotion", input_shape=(1, 48, 48), num_classes=7, seed=0)
optimizer = optim.Adam(net.parameters(), lr=1e-3)
loss_fn = nn.CrossEntropyLoss()
rng = np.random.default_rng(0)
x, y = rng.random((64, 1, 48, 48), np.float32), rng.integers(0, 7, 64)
loss_fn(net(x), y)
net.backward(loss_fn.backward(), input_grad=False)
optimizer.step()
"""


def _first_step(cache: Path) -> float:
    """Seconds of a process that imports fastcnn and does one step of the emotion network."""
    environment = {**os.environ, "FASTCNN_CACHE_DIR": str(cache)}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", _FIRST_STEP], env=environment, check=True)
    return time.perf_counter() - begin


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
        return {"cache": cache, "cold": _first_step(cache)}

    setup_cache.timeout = 600  # type: ignore[attr-defined]

    def track_cold(self, first: dict[str, Any]) -> float:
        """With an empty kernel cache."""
        return first["cold"]

    def track_cached(self, first: dict[str, Any]) -> float:
        """With a full one: the best of three."""
        return min(_first_step(first["cache"]) for _ in range(3))
