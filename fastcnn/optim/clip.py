"""Clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .._device import device_of, host
from ..nn.parameter import Parameter, flat, runs


def _largest(values: np.ndarray) -> float:
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def _sum_of_powers(values: np.ndarray, power: float) -> float:
    if power == 2:
        return device_of(values).sum_of_squares(values)
    powers = np.abs(host(values), dtype=np.float64)
    return float(np.power(powers, power, out=powers).sum())


def clip_grad_norm_(
    parameters: Parameter | Iterable[Parameter],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients by max_norm / (norm + 1e-6) where their common norm is larger than `max_norm`.

    Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), algorithm 1; the 1e-6 is
    PyTorch's.

    Parameters
    ----------
    parameters : Parameter, or a list of them
    max_norm : float
    norm_type : float
        p of the norm, a positive number or infinity. On a CUDA device, 2 is summed there, others on the host.
    error_if_nonfinite : bool
        Whether a norm that is NaN or infinite is an error. If not, a NaN makes all gradients NaN, as in
        PyTorch.

    Returns
    -------
    float
        The norm before clipping, of the gradients of all parameters that are trained.

    Raises
    ------
    ValueError
        If `max_norm` is negative or NaN, or `norm_type` not positive.
    RuntimeError
        If the norm is not finite and `error_if_nonfinite` is set.
    """
    if not max_norm >= 0:
        raise ValueError(f"max_norm: {max_norm} is negative or NaN")
    if not norm_type > 0:
        raise ValueError(f"norm_type: {norm_type} is not above 0")
    chosen = [parameters] if isinstance(parameters, Parameter) else list(parameters)
    trained = [parameter for parameter in chosen if parameter.requires_grad]
    grads = [flat(trained[first:last])[1] for first, last in runs(trained)]
    if math.isinf(norm_type):
        # np.max hands a NaN on, Python's max may not.
        norm = float(np.max([_largest(host(grad)) for grad in grads], initial=0.0))
    else:
        norm = sum(_sum_of_powers(grad, norm_type) for grad in grads) ** (1 / norm_type)
    if not math.isfinite(norm) and error_if_nonfinite:
        raise RuntimeError(f"parameters: the norm of the gradients is {norm}")
    factor = max_norm / (norm + 1e-6)
    if not factor >= 1:
        for grad in grads:
            device_of(grad).multiply(grad, factor, grad)
    return norm
