"""Convolution, pooling and Adam as a JAX program writes them, on channels-last images."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..shapes import Conv

Pair = tuple[int, int]


def convolve(x: Any, weight: Any, s: Conv) -> Any:
    """(N, H, W, C) with (kH, kW, C / groups, F)."""
    pads = [(s.padding, s.padding)] * 2
    return correlate(x, weight, (s.stride, s.stride), pads, (s.dilation, s.dilation), s.groups)


def correlate(x: Any, weight: Any, stride: Pair, pads: Any, dilation: Pair, groups: int) -> Any:
    """The same with a padding for each side."""
    return lax.conv_general_dilated(
        x,
        weight,
        stride,
        pads,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _reduce(x: Any, start: Any, function: Any, kernel: Pair, stride: Pair, padding: Pair) -> Any:
    pads = ((0, 0), *((p, p) for p in padding), (0, 0))
    return lax.reduce_window(x, start, function, (1, *kernel, 1), (1, *stride, 1), pads)


def max_pool(x: Any, kernel: Pair, stride: Pair, padding: Pair) -> Any:
    """The largest of each window."""
    return _reduce(x, -jnp.inf, lax.max, kernel, stride, padding)


def average_pool(x: Any, kernel: Pair, stride: Pair, padding: Pair) -> Any:
    """The mean of each window, zeros of the padding included."""
    return _reduce(x, np.float32(0), lax.add, kernel, stride, padding) / np.prod(kernel)


def adam_step(param: Any, grad: Any, mean: Any, square: Any, step: Any, rate: float) -> tuple[Any, Any, Any]:
    """One step of Adam with PyTorch's defaults."""
    mean = 0.9 * mean + 0.1 * grad
    square = 0.999 * square + 0.001 * grad**2
    scale = rate / (1 - 0.9**step)
    return param - scale * mean / (jnp.sqrt(square / (1 - 0.999**step)) + 1e-8), mean, square
