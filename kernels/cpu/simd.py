"""The host's vectors: how many bits, how many registers, and the tile that fits them; and its caches."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np


def _vector_bits() -> int:
    """Width of the host's widest vectors; ``FASTCNN_VECTOR_BITS`` forces another."""
    forced = os.environ.get("FASTCNN_VECTOR_BITS", "")
    if forced:
        if forced not in ("128", "256", "512"):
            raise ValueError(f"FASTCNN_VECTOR_BITS: {forced!r} is none of 128, 256, 512")
        return int(forced)
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 512
    return 256 if features.get("avx2") else 128


VECTOR_BITS = _vector_bits()

# Whether two such vectors are multiplied and added in each cycle, as nearly everywhere. Zen 4 takes two
# cycles for that with 512 bits, so that sparing products is worth more there.
FULL_WIDTH = VECTOR_BITS < 512 or llvm.get_host_cpu_name() != "znver4"

# Rows and vectors of C that one tile keeps in registers. 8 x 2 accumulators leave room for two vectors of B
# among the 32 registers of AVX-512 and NEON; AVX2 has 16, so that a taller tile would spill.
TILE_VECTORS = 2
TILE_ROWS = 6 if VECTOR_BITS == 256 else 8


@cache
def lanes(dtype: np.dtype | type) -> int:
    """Elements of `dtype` in one vector."""
    return VECTOR_BITS // (8 * np.dtype(dtype).itemsize)


@cache
def panel_width(dtype: np.dtype | type) -> int:
    """Columns of C that one tile computes."""
    return TILE_VECTORS * lanes(dtype)


# By level, where the system doesn't tell.
_USUAL_CACHES = {1: 32 << 10, 3: 32 << 20}


@cache
def cache_bytes(level: int) -> int:
    """Size of the data cache of level 1, the first, or 3, the last."""
    for each in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            found, kind, size = (
                each.joinpath(name).read_text().strip() for name in ("level", "type", "size")
            )
            if found == str(level) and kind != "Instruction":
                return int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return _USUAL_CACHES[level]
