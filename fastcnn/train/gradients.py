"""The norm of all gradients, to check and to clip them by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..nn.parameter import Parameter, flat, runs


def _flat(parameters: Sequence[Parameter]) -> list[NDArray]:
    """All gradients, as the few long arrays in which they lie."""
    return [flat(parameters[first:last])[1] for first, last in runs(parameters)]


def all_finite(parameters: Sequence[Parameter]) -> bool:
    """Whether no gradient holds NaN or infinity."""
    grads = _flat(parameters)
    # One pass without a temporary. Only a sum of squares that is not finite needs the exact question.
    if all(math.isfinite(np.vdot(grad, grad)) for grad in grads):
        return True
    return all(np.isfinite(grad).all() for grad in grads)


def gradient_norm(parameters: Sequence[Parameter]) -> float:
    """Euclidean norm of all gradients together, summed in float64 in an order that depends on no thread."""
    squares = [np.einsum("i,i->", grad, grad, dtype=np.float64) for grad in _flat(parameters)]
    return math.sqrt(math.fsum(squares))


def clip_gradients(parameters: Sequence[Parameter], max_norm: float) -> float:
    """Scale all gradients in place by ``min(1, max_norm / (norm + 1e-6))``, as PyTorch's clip_grad_norm_.

    Returns
    -------
    float
        The norm before.
    """
    norm = gradient_norm(parameters)
    scale = max_norm / (norm + 1e-6)
    if scale < 1.0:
        for grad in _flat(parameters):
            grad *= scale
    return norm
