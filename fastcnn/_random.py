"""The random generator that initialises parameters and seeds dropout where no other is given."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np


class _Override(threading.local):
    generator: np.random.Generator | None = None


_default = np.random.default_rng(0)
_override = _Override()


def default_generator() -> np.random.Generator:
    """The generator in use: seeded with 0 at the start of the process, and anew by `manual_seed`."""
    return _override.generator or _default


def manual_seed(seed: int) -> np.random.Generator:
    """Start the default generator afresh from `seed`, and return it.

    The generator stays the same object, so that whoever holds it follows.

    Raises
    ------
    TypeError, ValueError
        If `seed` is no int, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if seed < 0:
        raise ValueError(f"seed: {seed} is negative")
    _default.bit_generator.state = np.random.default_rng(int(seed)).bit_generator.state
    return _default


@contextlib.contextmanager
def using(generator: np.random.Generator) -> Iterator[None]:
    """Make `generator` this thread's default for a while; the common one is not advanced."""
    before = _override.generator
    _override.generator = generator
    try:
        yield
    finally:
        _override.generator = before


def draw_seed() -> int:
    """A seed for a counter-based kernel, in [0, 2**64), from the default generator."""
    return int(default_generator().integers(0, 2**64, dtype=np.uint64))
