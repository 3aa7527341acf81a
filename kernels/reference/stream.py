"""Random numbers by counting: number i of a seed is a hash of seed + i, whatever was drawn before it."""

from __future__ import annotations

import numpy as np


def splitmix64(counter: np.ndarray) -> np.ndarray:
    """Hash every element of a uint64 array to 64 well-mixed bits; all arithmetic is modulo 2**64.

    References
    ----------
    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; Vigna's splitmix64.c,
    whose first output from state s this is.
    """
    z = counter + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(seed: int, count: int) -> np.ndarray:
    """Numbers 0 to count - 1 of a seed: float64 multiples of 2**-24 in [0, 1), which float32 holds exactly.

    Raises
    ------
    ValueError
        If the seed is not in [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed} is not in [0, 2**64)")
    counter = np.arange(count, dtype=np.uint64) + np.uint64(seed)
    return (splitmix64(counter) >> np.uint64(40)) * 2.0**-24


def normal(seed: int, count: int) -> np.ndarray:
    """Standard normal numbers 0 to count - 1 of a seed: number k from the uniform ones 2 * k and 2 * k + 1.

    ``sqrt(-2 * log(1 - u[2 * k])) * cos(2 * pi * u[2 * k + 1])`` (Box and Muller, 1958); 1 - u is never 0.

    Raises
    ------
    ValueError
        If the seed is not in [0, 2**64).
    """
    radius, angle = uniform(seed, 2 * count).reshape(count, 2).T
    return np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * np.pi * angle)
