"""Batch normalization over all axes but the last, alone or with ReLU and max-pooling; and the gradients.

Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2 and the gradients of section 3. Memory is read
once for the sums and once for the result. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .. import checks
from ..threads import between_jobs
from . import normalized
from .elementwise import channelwise
from .moments import batch_moments, gradient_sums, merged
from .vectors import load, multiply_add


def _channels_last(x: np.ndarray) -> np.ndarray:
    x = checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., C) with 2 axes or more, got shape {x.shape}")
    return x


def _vector(name: str, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """An array with one value for each channel of x."""
    return checks.same_shape(name, checks.floating(name, values, 1, x.dtype), x.shape[-1:])


# Overflow ends in inf or NaN, as everywhere in these kernels, and not in a warning of NumPy's.
_quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")


@_quiet
def batch_norm_forward(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: np.ndarray | None = None,
    out_mean: np.ndarray | None = None,
    out_inv_std: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``y = (x - mean) * inv_std * weight + bias``, a channel at a time; ``inv_std = 1 / sqrt(var + eps)``.

    In training, mean and (biased) variance are the batch's, and the running statistics move towards them *in
    place*: ``r = (1 - momentum) * r + momentum * batch``, with the unbiased variance. Otherwise they are the
    running ones. An empty batch gives mean 0 and variance 0 and leaves the running statistics alone.

    Parameters
    ----------
    x : (..., C) float32 or float64, 2 axes or more
    weight, bias : (C,), or None for 1 and 0
    running_mean, running_var : (C,)
        Updated in place in training, where they may be None.
    training : bool
    momentum, eps : float
    out : array of x's shape, optional
        Overwritten with y.
    out_mean, out_inv_std : (C,), optional
        Overwritten with mean and inv_std.

    Returns
    -------
    y : array of x's dtype and shape
    mean, inv_std : (C,) arrays of x's dtype
        What x was normalized with; `batch_norm_backward` needs them.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, running statistics are missing outside training, or a channel has a
        single value in training, where its variance is unknown.
    """
    x = _channels_last(x)
    y = checks.output("out", out, x.shape, x.dtype)
    affine = _affine(x, weight, bias)
    mean = checks.output("out_mean", out_mean, x.shape[-1:], x.dtype)
    inv_std = checks.output("out_inv_std", out_inv_std, x.shape[-1:], x.dtype)
    _statistics(x, running_mean, running_var, training, momentum, eps, mean, inv_std)
    if y.size:
        _normalize(y, (mean, _scaled(inv_std, affine[0]), affine[1]), x)
    return y, mean, inv_std


@channelwise
def _normalize(sources, at, mask, values):
    mean, scale, bias = values
    return multiply_add(load(sources[0], at, mask) - mean, scale, bias)


def _affine(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> tuple:
    """weight and bias, or what stands for them."""
    return (
        1 if weight is None else _vector("weight", weight, x),
        0 if bias is None else _vector("bias", bias, x),
    )


def _statistics(
    x: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    training: bool,
    momentum: float,
    eps: float,
    mean: np.ndarray,
    inv_std: np.ndarray,
) -> None:
    """Overwrite mean and inv_std, and in training move the running statistics."""
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            _vector(name, running, x)
            if training and not running.flags.writeable:
                raise ValueError(f"{name}: must be writable, training updates it in place")
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: needed where training is False")
        between_jobs(_write_statistics, running_mean, running_var, eps, mean, inv_std)
        return
    channels = x.shape[-1]
    count = x.size // channels if channels else 0
    if count == 1:
        raise ValueError(f"x: shape {x.shape} has one value per channel, training needs more")
    if count:
        moving = running_mean, running_var
        between_jobs(_take_statistics, batch_moments(x), count, moving, momentum, eps, mean, inv_std)
    else:
        _write_statistics(np.zeros(channels), np.zeros(channels), eps, mean, inv_std)


def _take_statistics(
    slabs: np.ndarray,
    count: int,
    running: tuple[np.ndarray | None, np.ndarray | None],
    momentum: float,
    eps: float,
    mean: np.ndarray,
    inv_std: np.ndarray,
) -> None:
    batch_mean, squares = merged(slabs, mean.size)
    for array, batch in zip(running, (batch_mean, squares / (count - 1)), strict=True):
        if array is not None:
            array[...] = (1 - momentum) * array + momentum * batch
    _write_statistics(batch_mean, squares / count, eps, mean, inv_std)


def _write_statistics(
    batch_mean: np.ndarray, batch_var: np.ndarray, eps: float, mean: np.ndarray, inv_std: np.ndarray
) -> None:
    mean[...] = batch_mean
    inv_std[...] = 1 / np.sqrt(batch_var.astype(np.float64) + eps)


def _scaled(inv_std: np.ndarray, factor: np.ndarray | float) -> np.ndarray:
    scale = np.empty_like(inv_std)
    between_jobs(np.multiply, inv_std, factor, scale)
    return scale


@_quiet
def batch_norm_backward(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    inv_std: np.ndarray,
    training: bool,
    *,
    out: np.ndarray | None = None,
    out_dweight: np.ndarray | None = None,
    out_dbias: np.ndarray | None = None,
    accumulate: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batch_norm_forward`.

    With ``x_hat = (x - mean) * inv_std``, sums and means over all axes but the last::

        dbias   = sum(dout)
        dweight = sum(dout * x_hat)
        dx      = weight * inv_std * (dout - mean(dout) - x_hat * mean(dout * x_hat))     in training
        dx      = weight * inv_std * dout                                                 otherwise

    Parameters
    ----------
    dout : (..., C) float32 or float64
    x : array of dout's shape
        The forward call's input.
    weight : (C,), or None
    mean, inv_std : (C,)
        From the forward call.
    training : bool
        That of the forward call.
    out : array of dout's shape, optional
        Overwritten with dx.
    out_dweight, out_dbias : (C,), optional
        Overwritten with dweight and dbias, or added to if `accumulate` is true.

    Returns
    -------
    dx : array of dout's dtype and shape
    dweight, dbias : (C,) arrays of dout's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit.
    """
    x = _channels_last(x)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, x.dtype), x.shape)
    dx = checks.output("out", out, x.shape, x.dtype)
    given = weight, mean, inv_std

    def back(spread: list[np.ndarray | float]) -> None:
        if training:
            _spread(dx, spread, dout, x)
        else:
            _scale(dx, spread[:1], dout)

    sums = (out_dweight, out_dbias), accumulate
    return dx, *_gradients(x, given, lambda center: gradient_sums(dout, x, center), back, *sums)


@channelwise
def _spread(sources, at, mask, values):
    scale, mean, shift, slope = values
    dout, x = load(sources[0], at, mask), load(sources[1], at, mask)
    return multiply_add(x - mean, slope, shift) + dout * scale


@channelwise
def _scale(sources, at, mask, values):
    return load(sources[0], at, mask) * values[0]


def _gradients(
    x: np.ndarray,
    given: tuple,
    sums: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    back: Callable[[list[np.ndarray | float]], None],
    out: tuple[np.ndarray | None, np.ndarray | None],
    accumulate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `sums` and `back`; returns dweight and dbias. `given` holds weight, mean and inv_std."""
    factor = 1 if given[0] is None else _vector("weight", given[0], x)
    mean, inv_std = _vector("mean", given[1], x), _vector("inv_std", given[2], x)
    channels = x.shape[-1]
    dweight = checks.output("out_dweight", out[0], (channels,), x.dtype)
    dbias = checks.output("out_dbias", out[1], (channels,), x.dtype)
    total, product = np.zeros((2, channels))
    if x.size:
        total, product = sums(mean)
        spread = np.empty((4, channels))
        between_jobs(_write_spread, mean, inv_std, factor, total, product, x.size // channels, spread)
        back(list(spread))
    for array, target, result in ((out[0], dweight, product), (out[1], dbias, total)):
        between_jobs(_give, result, target, accumulate and array is not None)
    return dweight, dbias


def _write_spread(
    mean: np.ndarray,
    inv_std: np.ndarray,
    factor: np.ndarray | float,
    total: np.ndarray,
    product: np.ndarray,
    count: int,
    spread: np.ndarray,
) -> None:
    """The values for `_spread`, from the sums of dout and of dout * (x - mean), which become dweight."""
    inv_std = inv_std.astype(np.float64)
    scale = inv_std * factor
    spread[...] = scale, mean, -scale * total / count, -scale * product * inv_std**2 / count
    product *= inv_std


def _give(result: np.ndarray, target: np.ndarray, accumulate: bool) -> None:
    target[...] = target + result if accumulate else result


def _pool(x: np.ndarray, pool_size: int | Sequence[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The window, and the shape of the result."""
    pool = checks.pair("pool_size", pool_size, 1)
    if pool[0] * pool[1] > normalized.DEAD:
        raise ValueError(f"pool_size: {pool_size!r} has more than {normalized.DEAD} pixels")
    n, h, w, c = x.shape
    if pool[0] > h or pool[1] > w:
        raise ValueError(f"pool_size: {pool_size!r} is larger than images of {h} x {w}")
    return pool, (n, h // pool[0], w // pool[1], c)


@_quiet
def batch_norm_pool_forward(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    training: bool,
    pool_size: int | Sequence[int] = 1,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: np.ndarray | None = None,
    out_argmax: np.ndarray | None = None,
    out_mean: np.ndarray | None = None,
    out_inv_std: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`batch_norm_forward`, ReLU if `relu` is true, and max-pooling, in one pass after the statistics.

    Windows touch and don't overlap; rows and columns that don't fill one are dropped. Of equal values the
    first of a window wins (row by row), and NaN over everything, the last NaN of a window over its others.

    Parameters
    ----------
    x : (N, H, W, C) float32 or float64
    weight, bias : (C,), or None for 1 and 0
    running_mean, running_var : (C,)
        Updated in place in training, where they may be None.
    training : bool
    pool_size : int or (height, width)
        1 doesn't pool.
    relu : bool
    momentum, eps : float
    out, out_argmax : (N, H // height, W // width, C), optional
        Overwritten with y and argmax.
    out_mean, out_inv_std : (C,), optional
        Overwritten with mean and inv_std.

    Returns
    -------
    y : (N, H // height, W // width, C) array of x's dtype
    argmax : uint8 array of y's shape
        Offset kh * width + kw within the window, or 255 where `relu` is true and the largest value is not
        above 0: its gradient is zero.
    mean, inv_std : (C,) arrays of x's dtype
        What x was normalized with; `batch_norm_pool_backward` needs them.

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes don't fit, a window is larger than the images or has more than 255 pixels, running
        statistics are missing outside training, or a channel has a single value in training.
    """
    x = checks.floating("x", x, 4)
    pool, shape = _pool(x, pool_size)
    y = checks.output("out", out, shape, x.dtype)
    argmax = checks.output("out_argmax", out_argmax, shape, np.uint8)
    g = normalized.geometry(x.shape, pool, bool(relu), x.dtype)
    affine = _affine(x, weight, bias)
    mean = checks.output("out_mean", out_mean, x.shape[-1:], x.dtype)
    inv_std = checks.output("out_inv_std", out_inv_std, x.shape[-1:], x.dtype)
    _statistics(x, running_mean, running_var, training, momentum, eps, mean, inv_std)
    if y.size:
        values: list[np.ndarray | float] = [mean, _scaled(inv_std, affine[0]), affine[1]]
        rows = normalized.table("normalize", values, g, x.shape[-1], x.dtype)
        normalized.run_forward(x, y, argmax, rows, g)
    return y, argmax, mean, inv_std


@_quiet
def batch_norm_pool_backward(
    dout: np.ndarray,
    argmax: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    inv_std: np.ndarray,
    training: bool,
    pool_size: int | Sequence[int] = 1,
    *,
    out: np.ndarray | None = None,
    out_dweight: np.ndarray | None = None,
    out_dbias: np.ndarray | None = None,
    accumulate: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batch_norm_pool_forward`: those of `batch_norm_backward`, dout scattered by argmax.

    Parameters
    ----------
    dout : (N, H // height, W // width, C) float32 or float64
    argmax : uint8 array of dout's shape
        From the forward call.
    x : (N, H, W, C)
        The forward call's input.
    weight : (C,), or None
    mean, inv_std : (C,)
        From the forward call.
    training, pool_size
        Those of the forward call.
    out : (N, H, W, C), optional
        Overwritten with dx.
    out_dweight, out_dbias : (C,), optional
        Overwritten with dweight and dbias, or added to if `accumulate` is true.

    Returns
    -------
    dx : (N, H, W, C) array of x's dtype
    dweight, dbias : (C,) arrays of x's dtype

    Raises
    ------
    TypeError, ValueError
        If dtypes or shapes are not those of a forward call.
    """
    x = checks.floating("x", x, 4)
    pool, shape = _pool(x, pool_size)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, x.dtype), shape)
    argmax = np.asarray(argmax)
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax: dtype {argmax.dtype} is not uint8")
    argmax = checks.contiguous(checks.same_shape("argmax", argmax, shape))
    g = normalized.geometry(x.shape, pool, False, x.dtype)
    dx = checks.output("out", out, x.shape, x.dtype)
    given = weight, mean, inv_std

    def back(spread: list[np.ndarray | float]) -> None:
        rows = normalized.table("normalize", spread, g, x.shape[-1], x.dtype)
        normalized.run_backward(dout, argmax, x, dx, rows, training, g)

    def total(center: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return normalized.run_sums(dout, argmax, x, center, g)

    return dx, *_gradients(x, given, total, back, (out_dweight, out_dbias), accumulate)
