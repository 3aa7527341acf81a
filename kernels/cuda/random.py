"""Random numbers by counting, the reference's own: number i of a seed is a hash of seed + i."""

from __future__ import annotations

import math

import numpy as np

from ..cpu.dropout import RANDOM_BITS
from .jit import device_function

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_UNIT = np.float32(2.0**-RANDOM_BITS)

# The series of sin(2 pi u) / u in u**2, which is exact to float32 for |u| up to 1/4.
_SINE = tuple(
    np.float32((-1) ** k * (2 * math.pi) ** (2 * k + 1) / math.factorial(2 * k + 1)) for k in range(7)
)


@device_function
def random_bits(counter):
    """The upper 24 bits of splitmix64's output from the state `counter`, a uint64.

    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; Vigna's splitmix64.c.
    """
    z = counter + _INCREMENT
    z = (z ^ (z >> np.uint64(30))) * _MULTIPLIER_1
    z = (z ^ (z >> np.uint64(27))) * _MULTIPLIER_2
    return (z ^ (z >> np.uint64(31))) >> np.uint64(64 - RANDOM_BITS)


@device_function
def uniform(counter):
    """The random bits as a float32 in [0, 1), which holds every multiple of 2**-24."""
    return np.float32(random_bits(counter)) * _UNIT


@device_function
def _cosine_of_turns(a):
    """cos(2 pi a) of a float32 in [0, 1); the library's takes a stack for arguments not met here."""
    # sin(2 pi u) of the distance u from the nearer quarter or three quarters.
    u = a - np.float32(0.75) if a > np.float32(0.5) else np.float32(0.25) - a
    square = u * u
    series = _SINE[6]
    for k in range(5, -1, -1):
        series = series * square + _SINE[k]
    return series * u


@device_function
def normal(seed, k):
    """Standard normal number k of a seed, by Box and Muller (1958), in float32; both are uint64."""
    counter = seed + np.uint64(2) * k
    radius = math.sqrt(np.float32(-2) * math.log(np.float32(1) - uniform(counter)))
    return radius * _cosine_of_turns(uniform(counter + np.uint64(1)))
