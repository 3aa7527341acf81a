"""ReLU, LeakyReLU and PReLU."""

from __future__ import annotations

import numpy as np

from .shapes import require_shape, wide


def relu_forward(x: np.ndarray) -> np.ndarray:
    """``y = max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : ndarray, float32 or float64, any shape

    Returns
    -------
    ndarray, dtype and shape of `x`
    """
    return np.maximum(wide("x", x), 0).astype(x.dtype)


def relu_backward(dout: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Gradient of `relu_forward` from its output: 0 where y <= 0, else dout (also where y is NaN).

    Parameters
    ----------
    dout : ndarray, float32 or float64, any shape
    y : ndarray, shape of `dout`
        The forward call's output; its input gives the same.

    Returns
    -------
    ndarray, dtype and shape of `dout`

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    require_shape("dout", dout, y.shape)
    return np.where(wide("y", y) <= 0, 0, wide("dout", dout)).astype(dout.dtype)


def leaky_relu_forward(x: np.ndarray, negative_slope: float = 0.01) -> np.ndarray:
    """``y = x`` where x > 0, else ``negative_slope * x``.

    Parameters
    ----------
    x : ndarray, float32 or float64, any shape
    negative_slope : float

    Returns
    -------
    ndarray, dtype and shape of `x`
    """
    x64 = wide("x", x)
    return np.where(x64 > 0, x64, negative_slope * x64).astype(x.dtype)


def leaky_relu_backward(dout: np.ndarray, x: np.ndarray, negative_slope: float = 0.01) -> np.ndarray:
    """Gradient of `leaky_relu_forward`: dout where x > 0, else ``negative_slope * dout``.

    Parameters
    ----------
    dout : ndarray, float32 or float64, any shape
    x : ndarray, shape of `dout`
        The forward call's input.
    negative_slope : float

    Returns
    -------
    ndarray, dtype and shape of `dout`

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    require_shape("dout", dout, x.shape)
    dout64 = wide("dout", dout)
    return np.where(wide("x", x) > 0, dout64, negative_slope * dout64).astype(dout.dtype)


def prelu_forward(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``y = x`` where x > 0, else ``weight * x``: a LeakyReLU that learns its slope.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (..., C)
    weight : ndarray, shape (1,) or (C,)
        One slope for all, or one for each channel.

    Returns
    -------
    ndarray, dtype and shape of `x`

    Raises
    ------
    ValueError
        If `weight` has another shape.

    References
    ----------
    He, Zhang, Ren, Sun: Delving Deep into Rectifiers, arXiv:1502.01852, section 2.1.
    """
    _require_slopes(weight, x)
    x64 = wide("x", x)
    return np.where(x64 > 0, x64, wide("weight", weight) * x64).astype(x.dtype)


def prelu_backward(dout: np.ndarray, x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `prelu_forward`.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (..., C)
    x : ndarray, shape of `dout`
        The forward call's input.
    weight : ndarray, shape (1,) or (C,)

    Returns
    -------
    dx : ndarray, dtype and shape of `dout`
        dout where x > 0, else ``weight * dout``.
    dweight : ndarray, dtype of `dout`, shape of `weight`
        Sum of ``x * dout`` over the elements that share the slope and have not x > 0.

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    require_shape("dout", dout, x.shape)
    _require_slopes(weight, x)
    dout64, x64 = wide("dout", dout), wide("x", x)
    dx = np.where(x64 > 0, dout64, wide("weight", weight) * dout64)
    of_slope = np.where(x64 > 0, 0, x64 * dout64)
    shared = tuple(range(x.ndim)) if weight.size == 1 else tuple(range(x.ndim - 1))
    dweight = of_slope.sum(axis=shared).reshape(weight.shape)
    return dx.astype(dout.dtype), dweight.astype(dout.dtype)


def _require_slopes(weight: np.ndarray, x: np.ndarray) -> None:
    if weight.shape not in ((1,), x.shape[-1:]):
        raise ValueError(
            f"weight: shape {weight.shape} is neither (1,) nor {x.shape[-1:]}, the channels of x"
        )
