"""``python -m benchmarks.start``: a new process, from its start to the end of its first training step.

The emotion network, batch 64: with an empty kernel cache, with a warm-up of an empty cache in parallel
processes (which counts), with a full cache, and PyTorch's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

FASTCNN = """
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

WARMUP = """
from fastcnn.warmup import warmup
warmup("emotion", (1, 48, 48), 7, image_dtype=None)
"""

TORCH = """
import torch
from torch import nn
net = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 7),
)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
x, y = torch.rand(64, 1, 48, 48), torch.randint(0, 7, (64,))
nn.functional.cross_entropy(net(x), y).backward()
optimizer.step()
"""


def seconds(code: str, cache: Path) -> float:
    """How long a new process takes for `code`, with its kernel cache in `cache`."""
    environment = {**os.environ, "FASTCNN_CACHE_DIR": str(cache)}
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    return time.perf_counter() - begin


def measure(repeat: int, cold: bool = True) -> dict[str, float]:
    """Seconds by name: single figures for empty caches, else medians of `repeat` interleaved rounds."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder) / name for name in ("cold", "warmed")}
        if cold:
            figures["empty cache"] = seconds(FASTCNN, caches["cold"])
        begin = time.perf_counter()
        seconds(WARMUP, caches["warmed"])
        seconds(FASTCNN, caches["warmed"])
        figures["empty cache, warm-up first"] = time.perf_counter() - begin
        sides = {"full cache": FASTCNN}
        if importlib.util.find_spec("torch") is not None:
            sides["PyTorch"] = TORCH
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeat):
            for name, code in sides.items():
                times[name].append(seconds(code, caches["warmed"]))
    return figures | {name: statistics.median(values) for name, values in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table in Markdown."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.start", description="Time a new process' first training step."
    )
    command.add_argument("--repeat", type=int, default=5, metavar="N", help="rounds (default 5)")
    command.add_argument("--no-cold", action="store_true", help="leave out compiling in a single process")
    arguments = command.parse_args(argv)
    if arguments.repeat < 1:
        command.error(f"--repeat: {arguments.repeat} is below 1")
    figures = measure(arguments.repeat, not arguments.no_cold)
    print("| import and first training step | seconds |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
