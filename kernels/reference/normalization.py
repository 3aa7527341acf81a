"""Batch normalization over all axes but the last, alone or with ReLU and max-pooling; and the gradients.

Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2 and the gradients of section 3.
"""

from __future__ import annotations

import numpy as np

from .pooling import max_pool2d_backward, max_pool2d_forward
from .shapes import Pair, pair, require_shape, wide

# In place of an offset in the window: ReLU let nothing pass.
_DEAD = 255


def batch_norm_forward(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``y = (x - mean) * inv_std * weight + bias`` for each channel, with ``inv_std = 1 / sqrt(var + eps)``.

    In training, mean and (biased) variance are the batch's, and the running statistics move towards them *in
    place*: ``r = (1 - momentum) * r + momentum * batch``, with the unbiased variance. Otherwise they are the
    running ones. An empty batch gives mean 0 and variance 0 and leaves the running statistics alone.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (..., C), 2 axes or more
    weight, bias : ndarray, shape (C,), or None for 1 and 0
    running_mean, running_var : ndarray, shape (C,)
        Updated in place in training, where they may be None.
    training : bool
    momentum, eps : float

    Returns
    -------
    y : ndarray, dtype and shape of `x`
    mean, inv_std : ndarray, dtype of `x`, shape (C,)
        What x was normalized with; `batch_norm_backward` needs them.

    Raises
    ------
    ValueError
        If shapes disagree, running statistics are missing outside training, or a channel has a single value
        in training, where its variance is unknown.
    """
    channels = _channels(x, weight)
    for name, array in (("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if array is not None:
            require_shape(name, array, channels)
    x64 = wide("x", x).reshape(-1, *channels)
    count = len(x64)
    if training:
        if count == 1:
            raise ValueError(f"x: shape {x.shape} has one value per channel, training needs more")
        mean = x64.mean(axis=0) if count else np.zeros(channels)
        var = x64.var(axis=0) if count else np.zeros(channels)
        if count and running_mean is not None:
            running_mean[...] = (1 - momentum) * running_mean + momentum * mean
        if count and running_var is not None:
            running_var[...] = (1 - momentum) * running_var + momentum * var * count / (count - 1)
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: needed where training is False")
        mean, var = wide("running_mean", running_mean), wide("running_var", running_var)
    inv_std = 1 / np.sqrt(var + eps)
    y = (x64 - mean) * inv_std
    if weight is not None:
        y *= wide("weight", weight)
    if bias is not None:
        y += wide("bias", bias)
    return y.reshape(x.shape).astype(x.dtype), mean.astype(x.dtype), inv_std.astype(x.dtype)


def batch_norm_backward(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    inv_std: np.ndarray,
    training: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batch_norm_forward`.

    With ``x_hat = (x - mean) * inv_std``, sums and means over all axes but the last::

        dbias   = sum(dout)
        dweight = sum(dout * x_hat)
        dx      = weight * inv_std * (dout - mean(dout) - x_hat * mean(dout * x_hat))     in training
        dx      = weight * inv_std * dout                                                 otherwise

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (..., C)
    x : ndarray, shape of `dout`
        The forward call's input.
    weight : ndarray, shape (C,), or None
    mean, inv_std : ndarray, shape (C,)
        From the forward call.
    training : bool
        That of the forward call.

    Returns
    -------
    dx : ndarray, dtype and shape of `dout`
    dweight, dbias : ndarray, dtype of `dout`, shape (C,)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    channels = _channels(x, weight)
    require_shape("dout", dout, x.shape)
    require_shape("mean", mean, channels)
    require_shape("inv_std", inv_std, channels)
    dout64 = wide("dout", dout).reshape(-1, *channels)
    inv_std64 = wide("inv_std", inv_std)
    x_hat = (wide("x", x).reshape(-1, *channels) - wide("mean", mean)) * inv_std64
    dbias = dout64.sum(axis=0)
    dweight = (dout64 * x_hat).sum(axis=0)
    dx = dout64
    if training:
        count = max(len(x_hat), 1)
        dx = dout64 - dbias / count - x_hat * dweight / count
    dx = dx * inv_std64
    if weight is not None:
        dx = dx * wide("weight", weight)
    return dx.reshape(x.shape).astype(dout.dtype), dweight.astype(dout.dtype), dbias.astype(dout.dtype)


def batch_norm_pool_forward(
    x: np.ndarray,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    training: bool,
    pool_size: Pair = 1,
    relu: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`batch_norm_forward`, ReLU if `relu` is true, and `max_pool2d_forward` with windows of `pool_size`.

    Returns
    -------
    y : ndarray, dtype of `x`, shape (N, H // height, W // width, C)
    argmax : ndarray, uint8, shape of y
        Offset kh * width + kw within the window, or 255 where `relu` is true and the largest value is not
        above 0.
    mean, inv_std : ndarray, dtype of `x`, shape (C,)

    Raises
    ------
    ValueError
        As `batch_norm_forward` and `max_pool2d_forward`, and if a window has more than 255 pixels.
    """
    _check_pool(x, pool_size)
    z, mean, inv_std = batch_norm_forward(x, weight, bias, running_mean, running_var, training, momentum, eps)
    y, argmax = max_pool2d_forward(z, pool_size)
    if relu:
        argmax[~(y > 0)] = _DEAD
        y[y <= 0] = 0
    return y, argmax, mean, inv_std


def batch_norm_pool_backward(
    dout: np.ndarray,
    argmax: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    inv_std: np.ndarray,
    training: bool,
    pool_size: Pair = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `batch_norm_pool_forward`: each window's gradient goes to its largest pixel, and through
    `batch_norm_backward`.

    Returns
    -------
    dx : ndarray, dtype and shape of `x`
    dweight, dbias : ndarray, dtype of `x`, shape (C,)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    _check_pool(x, pool_size)
    require_shape("dout", dout, max_pool2d_forward(x, pool_size)[0].shape)
    require_shape("argmax", argmax, dout.shape)
    dead = argmax == _DEAD
    living = np.where(dead, 0, dout).astype(dout.dtype)
    dz = max_pool2d_backward(living, np.where(dead, 0, argmax), x.shape, pool_size)
    return batch_norm_backward(dz, x, weight, mean, inv_std, training)


def _check_pool(x: np.ndarray, pool_size: Pair) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, H, W, C), got shape {x.shape}")
    height, width = pair("pool_size", pool_size)
    if height * width > _DEAD:
        raise ValueError(f"pool_size: {pool_size!r} has more than {_DEAD} pixels")
    if height > x.shape[1] or width > x.shape[2]:
        raise ValueError(f"pool_size: {pool_size!r} is larger than images of shape {x.shape}")


def _channels(x: np.ndarray, weight: np.ndarray | None) -> tuple[int]:
    """(C,), after checking that x has a channel axis and `weight` fits it."""
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., C) with 2 axes or more, got shape {x.shape}")
    channels = (x.shape[-1],)
    if weight is not None:
        require_shape("weight", weight, channels)
    return channels
