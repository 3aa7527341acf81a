"""``fastcnn info``."""

from __future__ import annotations

import os
import platform
from typing import Any

from . import text
from .options import Json, Threads, use_threads
from .output import Output, guarded
from .waiting import short_path


@guarded
def info(threads: Threads = None, json: Json = False) -> None:
    """Show versions, machine, threads and networks."""
    import llvmlite
    import numba
    import numpy as np

    import fastcnn
    from fastcnn import models
    from fastcnn.kernels.cpu.simd import VECTOR_BITS
    from fastcnn.kernels.jit import cache_directory

    out = Output(json)
    used = use_threads(threads)
    cache = cache_directory()
    files = [path for path in cache.parent.glob("*/*") if path.is_file()]
    found: dict[str, Any] = {
        "fastcnn": fastcnn.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "platform": platform.platform(),
        "cpu": llvmlite.binding.get_host_cpu_name(),
        "vector_bits": VECTOR_BITS,
        "cores": os.cpu_count(),
        "threads": used,
        "most_threads": numba.config.NUMBA_NUM_THREADS,
        # Not one of Numba's: see fastcnn.kernels.threads.
        "threading_layer": "own",
        "cache": str(cache),
        "cached_kernels": len(list(cache.glob("*.nbc"))),
        "cache_bytes": sum(path.stat().st_size for path in files),
        "models": list(models.names()),
    }
    rows = [
        ["fastcnn", found["fastcnn"]],
        ["Python", f"{found['python']}, NumPy {np.__version__}, Numba {numba.__version__}"],
        ["machine", f"{found['platform']}"],
        ["CPU", f"{found['cpu']}, {found['cores']} cores, vectors of {VECTOR_BITS} bits"],
        ["threads", f"{used} of {found['most_threads']}, in a team of fastcnn's own"],
        [
            "kernel cache",
            f"{short_path(cache.parent)}, {text.size(found['cache_bytes'])}, "
            f"{text.counted(found['cached_kernels'], 'kernel')} of this version",
        ],
        ["networks", ", ".join(found["models"])],
    ]
    out.say(text.table(rows))
    out.result(found)
