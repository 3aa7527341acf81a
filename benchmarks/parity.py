"""Whether two sides computed the same."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

# Largest difference, as a share of the largest expected magnitude: float32 sums of up to 1e5 terms in another
# order, and Winograd's larger rounding errors.
TOLERANCE = 1e-4
# For the gradients of whole networks, root mean squares: where two inputs of a maximum differ by a rounding
# error, the sides may choose differently, which moves a single gradient to another place.
GRADIENT_TOLERANCE = 1e-2

GRADIENT = "gradient of "


class ParityError(Exception):
    """Two sides disagree; the message says where and by how much."""


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, scale: float = 1e-30) -> float:
    """Relative difference of two arrays, as the tolerances above define it.

    `scale` is the least magnitude (of gradients: norm) that counts as an expected one.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ParityError(f"{name} has shape {ours.shape}, not {theirs.shape}")
    if not ours.size:
        return 0.0
    distance = ours - theirs
    if name.startswith(GRADIENT):
        return float(np.linalg.norm(distance) / max(np.linalg.norm(theirs), scale))
    return float(np.abs(distance).max() / max(np.abs(theirs).max(), scale))


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """The largest relative difference of the arrays that both sides name.

    Raises
    ------
    ParityError
        If an array differs by more than its tolerance, has another shape or a NaN, or no name is shared.
    """
    shared = [name for name in ours if name in theirs]
    if not shared:
        raise ParityError("there is nothing to compare")
    largest = 0.0
    # Some gradients are zero but for rounding errors: that of a bias in front of BatchNorm.
    gradients = [float(np.linalg.norm(theirs[name])) for name in shared if name.startswith(GRADIENT)]
    least = 1e-3 * max(gradients, default=0.0) + 1e-30
    for name in shared:
        error = difference(name, ours[name], theirs[name], least if name.startswith(GRADIENT) else 1e-30)
        limit = GRADIENT_TOLERANCE if name.startswith(GRADIENT) else TOLERANCE
        if not error <= limit:
            raise ParityError(f"{name} differs by {error:.1e}, more than {limit:.0e}")
        largest = max(largest, error)
    return largest
