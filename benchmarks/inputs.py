"""Arrays for each workload, from generators of their own: the same for all sides."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from .shapes import Conv, Flat, Images, Linear, Model, Pool, Scores, Workload
from .work import output_image

Arrays = dict[str, np.ndarray]

# What each operation reads.
_READS: dict[str, tuple[str, ...]] = {
    "conv-forward": ("x", "weight", "bias"),
    "conv-input": ("dout", "weight"),
    "conv-weight": ("dout", "x"),
    "max-pool-forward": ("x",),
    "max-pool-backward": ("x", "dout"),
    "avg-pool-forward": ("x",),
    "avg-pool-backward": ("dout",),
    "batch-norm-forward": ("x", "weight", "bias"),
    "batch-norm-backward": ("x", "dout", "weight"),
    "batch-norm-inference": ("x", "weight", "bias", "mean", "var"),
    "relu-forward": ("x",),
    "relu-backward": ("x", "dout"),
    "leaky-relu-forward": ("x",),
    "leaky-relu-backward": ("x", "dout"),
    "prelu-forward": ("x", "slope"),
    "prelu-backward": ("x", "dout", "slope"),
    "dropout-forward": ("x",),
    "im2col": ("x",),
    "col2im": ("cols",),
    "linear-forward": ("x", "weight", "bias"),
    "linear-input": ("dout", "weight"),
    "linear-weight": ("dout", "x"),
    "cross-entropy": ("x", "target"),
    "adam": ("param", "grad"),
    "train": ("x", "target"),
    "infer-1": ("x",),
    "infer-256": ("x",),
}


def build(workload: Workload) -> Arrays:
    """The arrays that `workload` reads, images as (N, H, W, C) and weights as (kH, kW, C / groups, F)."""
    arrays = {}
    for name in _READS[workload.op]:
        rng = np.random.default_rng(zlib.crc32(f"{workload.name} {name}".encode()))
        arrays[name] = aligned(_array(rng, name, workload.shape))
    return arrays


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` in memory that begins at a cache line, as that of every side's own tensors does."""
    line = 64
    raw = np.empty(array.nbytes + line, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, raw, -raw.ctypes.data % line)
    copy[...] = array
    return copy


def _array(rng: np.random.Generator, name: str, s: Any) -> np.ndarray:
    if name == "target":
        return rng.integers(0, s.classes, s.n)
    if name == "slope":
        return np.full(1, 0.25, np.float32)
    if name == "var":
        return 1 + rng.random(s.c, np.float32)
    shape = _shapes(s)[name]
    array = rng.standard_normal(shape, np.float32)
    if name == "weight" and len(shape) > 1:
        # Outputs of about the size of the inputs.
        array *= np.float32(np.prod(shape[:-1]) ** -0.5)
    elif name == "param":
        # Of the size of Adam's steps, so that a comparison sees them.
        array *= np.float32(1e-3)
    elif name in ("weight", "bias", "mean"):
        array *= np.float32(0.1)
        array += np.float32(name == "weight")
    return array


def _shapes(s: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that operations on `s` read."""
    if isinstance(s, Conv):
        ho, wo = output_image(s)
        return {
            "x": (s.n, s.h, s.w, s.c),
            "weight": (s.kernel, s.kernel, s.c // s.groups, s.f),
            "bias": (s.f,),
            "dout": (s.n, ho, wo, s.f),
            "cols": (s.n * ho * wo, s.kernel**2 * s.c),
        }
    if isinstance(s, Pool):
        return {"x": (s.n, s.h, s.w, s.c), "dout": (s.n, *output_image(s), s.c)}
    if isinstance(s, Images):
        return {"x": tuple(s), "dout": tuple(s), **dict.fromkeys(("weight", "bias", "mean"), (s.c,))}
    if isinstance(s, Linear):
        return {
            "x": (s.n, s.inputs),
            "weight": (s.inputs, s.outputs),
            "bias": (s.outputs,),
            "dout": (s.n, s.outputs),
        }
    if isinstance(s, Scores):
        return {"x": (s.n, s.classes)}
    if isinstance(s, Flat):
        return {"param": (s.size,), "grad": (s.size,)}
    assert isinstance(s, Model)
    return {"x": (s.n, s.h, s.w, s.c)}
