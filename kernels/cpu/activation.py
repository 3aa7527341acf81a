"""ReLU, LeakyReLU and PReLU, with their gradients: one pass over memory each."""

from __future__ import annotations

import numpy as np

from .. import checks
from .elementwise import channelwise, elementwise
from .moments import AHEAD, ColumnSums
from .pieces import add_up
from .vectors import keep_in_line, like, load, prefetch_vector, select, store, store_around, wide


@elementwise
def _relu(sources, at, mask, zero):
    x = load(sources[0], at, mask)
    return select(x <= like(x, zero), like(x, zero), x)


def relu_forward(x: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """``y = max(x, 0)``; NaN stays NaN.

    Parameters
    ----------
    x : float32 or float64 array of any shape
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    x = checks.floating("x", x)
    y = checks.output("out", out, x.shape, x.dtype)
    _relu(y, x.dtype.type(0), x)
    return y


@elementwise
def _relu_backward(sources, at, mask, zero):
    dout, y = load(sources[0], at, mask), load(sources[1], at, mask)
    return select(y <= like(y, zero), like(y, zero), dout)


def relu_backward(dout: np.ndarray, y: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Gradient of `relu_forward` from its output: 0 where y <= 0, else dout (also where y is NaN).

    Parameters
    ----------
    dout : float32 or float64 array of any shape
    y : array of dout's shape
        The forward call's output; its input gives the same.
    out : array of dout's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of dout's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    dout, y = _alike(dout, "y", y)
    dx = checks.output("out", out, dout.shape, dout.dtype)
    _relu_backward(dx, y.dtype.type(0), dout, y)
    return dx


def _alike(dout: np.ndarray, name: str, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dout and the array `name` of the forward call, of the same dtype and shape."""
    array = checks.floating(name, array)
    return checks.same_shape("dout", checks.floating("dout", dout, None, array.dtype), array.shape), array


@elementwise
def _leaky_relu(sources, at, mask, slope):
    x = load(sources[0], at, mask)
    return select(x > like(x, 0), x, like(x, slope) * x)


def leaky_relu_forward(
    x: np.ndarray, negative_slope: float = 0.01, *, out: np.ndarray | None = None
) -> np.ndarray:
    """``y = x`` where x > 0, else ``negative_slope * x``.

    Parameters
    ----------
    x : float32 or float64 array of any shape
    negative_slope : float
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    x = checks.floating("x", x)
    y = checks.output("out", out, x.shape, x.dtype)
    _leaky_relu(y, x.dtype.type(negative_slope), x)
    return y


@elementwise
def _leaky_relu_backward(sources, at, mask, slope):
    dout, x = load(sources[0], at, mask), load(sources[1], at, mask)
    return select(x > like(x, 0), dout, like(x, slope) * dout)


def leaky_relu_backward(
    dout: np.ndarray, x: np.ndarray, negative_slope: float = 0.01, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Gradient of `leaky_relu_forward`: dout where x > 0, else ``negative_slope * dout``.

    Parameters
    ----------
    dout : float32 or float64 array of any shape
    x : array of dout's shape
        The forward call's input.
    negative_slope : float
    out : array of dout's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of dout's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    dout, x = _alike(dout, "x", x)
    dx = checks.output("out", out, dout.shape, dout.dtype)
    _leaky_relu_backward(dx, x.dtype.type(negative_slope), dout, x)
    return dx


@channelwise(1)
def _prelu(sources, at, mask, slopes):
    x = load(sources[0], at, mask)
    return select(x > like(x, 0), x, slopes[0] * x)


def _slopes(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    weight = checks.floating("weight", weight, 1, x.dtype)
    if not x.ndim:
        raise ValueError("x: expected (..., C), got a scalar")
    slopes = weight.shape
    if slopes != (1,) and slopes != x.shape[-1:]:
        raise ValueError(f"weight: shape {slopes} is neither (1,) nor {x.shape[-1:]}, the channels of x")
    return weight


def prelu_forward(x: np.ndarray, weight: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """``y = x`` where x > 0, else ``weight * x``: a LeakyReLU that learns its slope.

    Parameters
    ----------
    x : (..., C) float32 or float64
    weight : (1,) or (C,)
        One slope for all, or one for each channel.
    out : array of x's shape, optional
        Overwritten with the result.

    Returns
    -------
    array of x's dtype and shape

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.

    References
    ----------
    He, Zhang, Ren, Sun: Delving Deep into Rectifiers, arXiv:1502.01852, section 2.1.
    """
    x = checks.floating("x", x)
    weight = _slopes(x, weight)
    y = checks.output("out", out, x.shape, x.dtype)
    if x.size:
        _prelu(y, weight[np.newaxis], x)
    return y


@ColumnSums
def _prelu_backward(arrays, start, rows, width, table, sums, k, mask, around):
    """Of dout * x where not x > 0; dx is written on the way."""
    keep_in_line()
    dout, x, dx = arrays
    slope, total = load(table, k, mask), load(sums, k, mask)
    for row in range(rows):
        at = start + row * width + k
        prefetch_vector(dout, at + AHEAD, mask)
        prefetch_vector(x, at + AHEAD, mask)
        gradient, value = load(dout, at, mask), load(x, at, mask)
        positive = value > like(value, 0)
        change = select(positive, gradient, slope * gradient)
        if around:
            store_around(change, dx, at)
        else:
            store(change, dx, at, mask)
        total = total + wide(select(positive, like(value, 0), gradient * value))
    store(total, sums, k, mask)


def prelu_backward(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    *,
    out: np.ndarray | None = None,
    out_dweight: np.ndarray | None = None,
    accumulate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of `prelu_forward`.

    Parameters
    ----------
    dout : (..., C) float32 or float64
    x : array of dout's shape
        The forward call's input.
    weight : (1,) or (C,)
    out : array of dout's shape, optional
        Overwritten with dx.
    out_dweight : array of weight's shape, optional
        Overwritten with dweight, or added to if `accumulate` is true.

    Returns
    -------
    dx : array of dout's dtype and shape
        dout where x > 0, else ``weight * dout``.
    dweight : array of dout's dtype and weight's shape
        Sum of ``x * dout`` over the elements that share the slope and have not x > 0.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    dout, x = _alike(dout, "x", x)
    weight = _slopes(x, weight)
    dx = checks.output("out", out, dout.shape, dout.dtype)
    dweight = checks.output("out_dweight", out_dweight, weight.shape, dout.dtype)
    sums = _prelu_backward(weight, 1, dout, x, dx)
    add_up(1, sums, dweight, int(accumulate and out_dweight is not None))
    return dx, dweight
