"""Inverted dropout whose mask is a function of its seed, so that backward regenerates it.

Source: Srivastava et al., Dropout, JMLR 15, 2014 (scaled in training, its section 10).
"""

from __future__ import annotations

import math
import operator

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count
from .pieces import blocks, span_elements

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)

# A random number is the upper 24 bits of a hash: float32 holds every multiple of 2**-24 in [0, 1).
RANDOM_BITS = 24


@kernel
def random_bits(counter):
    """The upper 24 bits of splitmix64's output from the state `counter`, a uint64.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; Vigna's splitmix64.c.
    """
    z = counter + _INCREMENT
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return (z ^ (z >> np.uint64(31))) >> np.uint64(64 - RANDOM_BITS)


def seed64(seed: int) -> np.uint64:
    """`seed` as kernels take it."""
    try:
        value = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed: expected an int, got {seed!r}") from None
    if not 0 <= value < 2**64:
        raise ValueError(f"seed: {value} is not in [0, 2**64)")
    return np.uint64(value)


@parallel
def _dropout(part, parts, x, threshold, scale, seed, y):
    keep_out_of_line()
    lo, hi = span_elements(part, parts, x.size)
    source, target = x[lo:hi], y[lo:hi]
    zero = x.dtype.type(0)
    first = seed[0] + np.uint64(lo)
    for i in range(source.size):
        dropped = random_bits(first + np.uint64(i)) < threshold
        target[i] = zero if dropped else source[i] * scale


def _run(name: str, x: np.ndarray, p: float, seed: int, out: np.ndarray | None) -> np.ndarray:
    x = checks.floating(name, x)
    if not 0 <= p <= 1:
        raise ValueError(f"p: {p} is not in [0, 1]")
    key = seed if isinstance(seed, np.ndarray) and seed.dtype == np.uint64 else np.array(seed64(seed))
    y = checks.output("out", out, x.shape, x.dtype)
    # The numbers are whole multiples of 2**-24: u < p is bits < ceil(p * 2**24).
    threshold = np.uint64(math.ceil(p * 2**RANDOM_BITS))
    scale = x.dtype.type(1 / (1 - p) if p < 1 else 0)
    _dropout(
        part_count(blocks(x.size), x.size), x.reshape(-1), threshold, scale, key.reshape(1), y.reshape(-1)
    )
    return y


def dropout_forward(x: np.ndarray, p: float, seed: int, *, out: np.ndarray | None = None) -> np.ndarray:
    """Set elements to zero with probability p and multiply the others by 1 / (1 - p).

    Element i, in C order, is dropped if ``u_i < p``, where
    ``u_i = (splitmix64(seed + i) >> 40) * 2**-24``.

    Parameters
    ----------
    x : float32 or float64 array of any shape
    p : float in [0, 1]
        1 gives zeros.
    seed : int in [0, 2**64)
        Or a uint64 array without axes, from which a recorded call reads it anew.
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, or `p` or `seed` is out of range.
    """
    return _run("x", x, p, seed, out)


def dropout_backward(dout: np.ndarray, p: float, seed: int, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `dropout_forward`: the same mask and factor, applied to dout.

    Parameters
    ----------
    dout : float32 or float64 array of any shape
    p, seed
        Those of the forward call.
    out : array of dout's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of dout's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, or `p` or `seed` is out of range.
    """
    return _run("dout", dout, p, seed, out)
