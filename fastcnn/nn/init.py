"""Initial values: He, Xavier, PyTorch's defaults, and constants.

Each function overwrites a Parameter or an array in place and returns it. Fans come from the shape that
PyTorch shows: (out, in) or (F, C / groups, kH, kW). Values are drawn in that order, in float64, so that a
seed gives the same network in every dtype and memory layout.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np

from .._random import default_generator
from .parameter import Parameter

Target = TypeVar("Target", Parameter, np.ndarray)


def fans(target: Parameter | np.ndarray) -> tuple[int, int]:
    """Inputs that feed one output, and outputs that one input feeds.

    He et al., "Delving deep into rectifiers" (2015), section 2.2, call them n_l and n-hat_l.

    Raises
    ------
    ValueError
        If `target` has fewer than two axes.
    """
    shape = target.shape
    if len(shape) < 2:
        raise ValueError(f"target: fans need two axes or more, got shape {shape}")
    field = math.prod(shape[2:])
    return shape[1] * field, shape[0] * field


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor by which an activation must be made up for; `param` is leaky_relu's slope (0.01).

    Raises
    ------
    ValueError
        If the activation is unknown.
    """
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2 / (1 + slope**2))
    gains = {
        "linear": 1.0,
        "conv2d": 1.0,
        "sigmoid": 1.0,
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "selu": 3 / 4,
    }
    if nonlinearity not in gains:
        raise ValueError(f"nonlinearity: {nonlinearity!r} is none of leaky_relu, {', '.join(gains)}")
    return gains[nonlinearity]


def _values(target: Parameter | np.ndarray) -> np.ndarray:
    return target.data if isinstance(target, Parameter) else target


def constant_(target: Target, value: float) -> Target:
    """Fill with `value`."""
    _values(target)[...] = value
    return target


def zeros_(target: Target) -> Target:
    """Fill with zeros."""
    return constant_(target, 0.0)


def ones_(target: Target) -> Target:
    """Fill with ones."""
    return constant_(target, 1.0)


def uniform_(
    target: Target, a: float = 0.0, b: float = 1.0, generator: np.random.Generator | None = None
) -> Target:
    """Draw from U[a, b)."""
    _values(target)[...] = (generator or default_generator()).uniform(a, b, target.shape)
    return target


def normal_(
    target: Target, mean: float = 0.0, std: float = 1.0, generator: np.random.Generator | None = None
) -> Target:
    """Draw from N(mean, std^2)."""
    _values(target)[...] = (generator or default_generator()).normal(mean, std, target.shape)
    return target


def xavier_uniform_(
    target: Target, gain: float = 1.0, generator: np.random.Generator | None = None
) -> Target:
    """Draw from U(-b, b), b = gain * sqrt(6 / (fan_in + fan_out)): Glorot & Bengio (2010), equation 16."""
    bound = gain * math.sqrt(6 / sum(fans(target)))
    return uniform_(target, -bound, bound, generator)


def xavier_normal_(target: Target, gain: float = 1.0, generator: np.random.Generator | None = None) -> Target:
    """Draw from N(0, s^2), s = gain * sqrt(2 / (fan_in + fan_out)): Glorot & Bengio (2010)."""
    return normal_(target, 0.0, gain * math.sqrt(2 / sum(fans(target))), generator)


def _kaiming_std(target: Parameter | np.ndarray, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode: {mode!r} is neither 'fan_in' nor 'fan_out'")
    fan_in, fan_out = fans(target)
    return calculate_gain(nonlinearity, a) / math.sqrt(fan_in if mode == "fan_in" else fan_out)


def kaiming_uniform_(
    target: Target,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: np.random.Generator | None = None,
) -> Target:
    """Draw from U(-b, b), b = gain * sqrt(3 / fan); `a` is leaky_relu's slope. He et al. (2015)."""
    bound = math.sqrt(3) * _kaiming_std(target, a, mode, nonlinearity)
    return uniform_(target, -bound, bound, generator)


def kaiming_normal_(
    target: Target,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: np.random.Generator | None = None,
) -> Target:
    """Draw from N(0, s^2), s = gain / sqrt(fan); `a` is leaky_relu's slope. He et al. (2015), equation 10."""
    return normal_(target, 0.0, _kaiming_std(target, a, mode, nonlinearity), generator)


def default_(weight: Parameter, bias: Parameter | None) -> None:
    """PyTorch's initial values of Conv2d and Linear: both from U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fans(weight)[0])
    uniform_(weight, -bound, bound)
    if bias is not None:
        uniform_(bias, -bound, bound)
