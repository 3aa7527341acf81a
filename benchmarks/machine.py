"""What the machine can do at best: multiply-adds a second in registers, bytes a second from memory to memory.

Both are measured in the run whose rows are compared with them, on the same number of threads.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from fastcnn.kernels.cpu.simd import VECTOR_BITS
from fastcnn.kernels.jit import OPTIONS

# Independent sums: two units times a latency of four or five cycles need up to ten; AVX2 has 16 registers.
_CHAINS = 12
_LANES = VECTOR_BITS // 32
_I64 = ir.IntType(64)


@intrinsic
def _multiply_adds(typing_context, steps, factor, summand):
    """`steps` times ``sum = sum * factor + summand`` in each chain; returns something of all of them."""

    def codegen(context, builder, signature, arguments):
        steps, factor, summand = arguments
        vector = ir.VectorType(ir.FloatType(), _LANES)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32"
        )

        def broadcast(scalar):
            undefined = ir.Constant(vector, ir.Undefined)
            first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
            zeros = ir.Constant(ir.VectorType(ir.IntType(32), _LANES), None)
            return builder.shuffle_vector(first, undefined, zeros)

        factor, summand = broadcast(factor), broadcast(summand)
        entry = builder.block
        loop, end = builder.append_basic_block("loop"), builder.append_basic_block("end")
        builder.branch(loop)
        builder.position_at_end(loop)
        count = builder.phi(_I64)
        sums = [builder.phi(vector) for _ in range(_CHAINS)]
        new = [builder.call(fma, [total, factor, summand]) for total in sums]
        following = builder.add(count, ir.Constant(_I64, 1))
        count.add_incoming(ir.Constant(_I64, 0), entry)
        count.add_incoming(following, loop)
        for i, total in enumerate(sums):
            # Different starts, or the compiler would keep one chain only.
            total.add_incoming(ir.Constant(vector, [float(i)] * _LANES), entry)
            total.add_incoming(new[i], loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
        builder.position_at_end(end)
        whole = new[0]
        for total in new[1:]:
            whole = builder.fadd(whole, total)
        return builder.extract_element(whole, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64, types.float32, types.float32), codegen


@numba.njit(**OPTIONS)
def _chain(steps, factor, summand):
    return _multiply_adds(steps, factor, summand)


@numba.njit(**OPTIONS)
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


def _in_threads(pool: ThreadPoolExecutor, threads: int, work: Callable[[int], Any]) -> float:
    """Seconds until each of `threads` threads has done `work`; the kernels let Python's lock go."""
    begin = time.perf_counter()
    list(pool.map(work, range(threads)))
    return time.perf_counter() - begin


def fma_peak(threads: int, tries: int = 5, seconds: float = 0.05) -> float:
    """GFLOP/s of float32 multiply-adds that never leave the registers, the best of `tries`."""
    # x / 2 + 1 / 2 stays at 1: no overflow, no denormal number.
    half = np.float32(0.5)
    _chain(1, half, half)
    steps = 1 << 16
    while True:
        begin = time.perf_counter()
        _chain(steps, half, half)
        if time.perf_counter() - begin > seconds / 2:
            break
        steps *= 2
    with ThreadPoolExecutor(threads) as pool:
        best = min(_in_threads(pool, threads, lambda _: _chain(steps, half, half)) for _ in range(tries))
    return threads * steps * _CHAINS * _LANES * 2 / best / 1e9


def copy_bandwidth(threads: int, tries: int = 5, size: int | None = None) -> float:
    """GB/s, read plus written, of copying an array far beyond the last cache, the best of `tries`.

    By a plain compiled loop, and by the C library's memcpy, whose stores may pass by the caches: the faster
    one counts.
    """
    elements = (size or copy_size()) // 4
    source = np.ones(elements, np.float32)
    target = np.zeros(elements, np.float32)
    cuts = [elements * i // threads for i in range(threads + 1)]
    _copy(source[:1], target[:1])

    def by_loop(i: int) -> None:
        _copy(source[cuts[i] : cuts[i + 1]], target[cuts[i] : cuts[i + 1]])

    def by_library(i: int) -> None:
        np.copyto(target[cuts[i] : cuts[i + 1]], source[cuts[i] : cuts[i + 1]])

    with ThreadPoolExecutor(threads) as pool:
        best = min(_in_threads(pool, threads, way) for _ in range(tries) for way in (by_loop, by_library))
    return 2 * source.nbytes / best / 1e9


def copy_size() -> int:
    """Bytes of an array that no cache holds: four last caches, within reason."""
    return min(max(4 * last_cache(), 64 << 20), 512 << 20)


def last_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system doesn't say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 << 20)


class Peaks(NamedTuple):
    """GFLOP/s of multiply-adds in registers, and GB/s of copies between arrays in memory."""

    fma: float
    copy: float

    def or_better(self, other: Peaks) -> Peaks:
        """The larger of each: what slows a measurement is never the machine's limit."""
        return Peaks(max(self.fma, other.fma), max(self.copy, other.copy))


def peaks(threads: int, quick: bool = False) -> Peaks:
    """Both peaks."""
    if quick:
        return Peaks(fma_peak(threads, 2, 0.01), copy_bandwidth(threads, 2))
    return Peaks(fma_peak(threads), copy_bandwidth(threads))


def describe() -> dict[str, Any]:
    """The processor, its vectors and its last-level cache."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "vector_bits": VECTOR_BITS,
        "last_cache_mib": round(last_cache() / (1 << 20), 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
