"""torch.compile: the named networks only. It needs a C++ compiler, and minutes."""

from __future__ import annotations

import torch

from ..inputs import Arrays
from ..shapes import Workload
from . import Side, networks
from .pytorch import set_threads, version
from .pytorch_networks import infer, train

__all__ = ["prepare", "set_threads", "variants", "version"]


def variants(workload: Workload) -> tuple[str, ...]:
    """Networks only."""
    return ("torch.compile",) if workload.op in networks.MODEL_OPS else ()


def prepare(workload: Workload, arrays: Arrays, variant: str) -> Side:
    """See the package."""
    torch._dynamo.reset()
    build = train if workload.op == "train" else infer
    return build(workload.shape, arrays, torch.channels_last, compiled=True)
