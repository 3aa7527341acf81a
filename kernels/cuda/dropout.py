"""Inverted dropout whose mask is a function of its seed, so that backward regenerates it.

Source: Srivastava et al., Dropout, JMLR 15, 2014 (scaled in training, its section 10).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from ..cpu import dropout as cpu
from ..cpu.dropout import RANDOM_BITS, seed64
from . import checks
from .arrays import DeviceArray
from .elementwise import CHUNK, chunks
from .jit import THREADS, device_function, kernel
from .random import random_bits
from .twin import twin_of


@device_function
def _kept(value, i, threshold, scale, zero, seed):
    return zero if random_bits(seed + np.uint64(i)) < threshold else value * scale


@kernel("T[::1], uint64, T, T, uint64, T[::1]")
def _dropout(x, threshold, scale, zero, seed, y):
    i = cuda.blockIdx.x * CHUNK + cuda.threadIdx.x
    j, k, m = i + THREADS, i + 2 * THREADS, i + 3 * THREADS
    if m < y.size:
        a, b, c, d = x[i], x[j], x[k], x[m]
        y[i] = _kept(a, i, threshold, scale, zero, seed)
        y[j] = _kept(b, j, threshold, scale, zero, seed)
        y[k] = _kept(c, k, threshold, scale, zero, seed)
        y[m] = _kept(d, m, threshold, scale, zero, seed)
    else:
        for n in range(i, y.size, THREADS):
            y[n] = _kept(x[n], n, threshold, scale, zero, seed)


def _run(name: str, x: Any, p: float, seed: int, out: Any) -> DeviceArray:
    x = checks.floating(name, x)
    if not 0 <= p <= 1:
        raise ValueError(f"p: {p} is not in [0, 1]")
    key = seed64(seed)
    y = checks.output("out", out, x.shape, x.dtype)
    if x.size:
        # The numbers are whole multiples of 2**-24: u < p is bits < ceil(p * 2**24).
        threshold = math.ceil(p * 2**RANDOM_BITS)
        scale = 1 / (1 - p) if p < 1 else 0
        _dropout.launch(chunks(x.size), THREADS, x.reshape(-1), threshold, scale, 0, key, y.reshape(-1))
    return y


@twin_of(cpu.dropout_forward)
def dropout_forward(x: Any, p: float, seed: int, *, out: Any = None) -> DeviceArray:
    return _run("x", x, p, seed, out)


@twin_of(cpu.dropout_backward)
def dropout_backward(dout: Any, p: float, seed: int, *, out: Any = None) -> DeviceArray:
    return _run("dout", dout, p, seed, out)
