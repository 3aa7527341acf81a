"""Batch normalization over all axes but the last, and its gradients.

Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2 and the gradients of section 3. Memory is read
once for the sums and once for the result. All sums are in float64.
"""

from __future__ import annotations

import numpy as np

from .. import checks
from ..jit import keep_out_of_line, kernel
from ..threads import parallel, part_count, span
from .pieces import fill, fold, piece_bounds, piece_count, row_width
from .workspace import scratch

# The rows whose mean and variance are taken together, in two passes, should stay in the first-level cache.
_BLOCK = 4096


@kernel
def _add_moments(x, total, squares, count, mean, spread):
    """Add a block of rows of x to running sums, and to sums of squared distances from their mean.

    Two sets of rows are merged by equations 2.1 of Chan, Golub and LeVeque: Updating formulae and a pairwise
    algorithm for computing sample variances, 1979. `mean` and `spread` are overwritten with the block's own.
    """
    width = total.size
    fill(mean, 0)
    fill(spread, 0)
    rows = x.size // width
    ragged = x.size - rows * width
    for start in range(0, x.size, width):
        row = x[start : min(start + width, x.size)]
        for k in range(row.size):
            mean[k] += row[k]
    for k in range(width):
        mean[k] /= max(rows + (k < ragged), 1)
    for start in range(0, x.size, width):
        row = x[start : min(start + width, x.size)]
        for k in range(row.size):
            distance = row[k] - mean[k]
            spread[k] += distance * distance
    for k in range(width):
        many = rows + (k < ragged)
        if many > 0:
            distance = mean[k] - total[k] / max(count[k], 1)
            squares[k] += spread[k] + distance * distance * (many * count[k] / (many + count[k]))
            total[k] += mean[k] * many
            count[k] += many


@parallel
def _moments(part, parts, x, slabs):
    keep_out_of_line()
    _, pieces, width = slabs.shape
    step = width * max(1, _BLOCK // width)
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        total, squares, count = slabs[0, piece], slabs[1, piece], slabs[2, piece]
        fill(total, 0)
        fill(squares, 0)
        fill(count, 0)
        first, last = piece_bounds(piece, pieces, x.size, width)
        for start in range(first, last, step):
            block = x[start : min(start + step, last)]
            _add_moments(block, total, squares, count, slabs[3, piece], slabs[4, piece])


@kernel
def _merge_moments(slabs, mean, squares):
    """Each channel's mean and sum of squared distances from it, over all pieces in a fixed order."""
    channels = mean.size
    _, pieces, width = slabs.shape
    for c in range(channels):
        total = count = squared = 0.0
        for piece in range(pieces):
            for k in range(c, width, channels):
                many = slabs[2, piece, k]
                if many > 0:
                    distance = slabs[0, piece, k] / many - total / max(count, 1.0)
                    squared += slabs[1, piece, k] + distance * distance * (many * count / (many + count))
                    total += slabs[0, piece, k]
                    count += many
        mean[c] = total / count
        squares[c] = squared


@parallel
def _normalize(part, parts, x, y, table):
    keep_out_of_line()
    mean, scale, bias = table[0], table[1], table[2]
    lo, hi = piece_bounds(part, parts, x.size, mean.size)
    for start in range(lo, hi, mean.size):
        end = min(start + mean.size, hi)
        source, target = x[start:end], y[start:end]
        for k in range(source.size):
            target[k] = (source[k] - mean[k]) * scale[k] + bias[k]


def _channels_last(x: np.ndarray) -> np.ndarray:
    x = checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., C) with 2 axes or more, got shape {x.shape}")
    return x


def _vector(name: str, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """An array with one value for each channel of x."""
    return checks.same_shape(name, checks.floating(name, values, 1, x.dtype), x.shape[-1:])


def _batch_moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squared distances from it, in float64, of a batch that is not empty."""
    channels = x.shape[-1]
    pieces, width = piece_count(x.size), row_width(channels)
    slabs = scratch("moments", 5 * pieces * width, np.float64).reshape(5, pieces, width)
    _moments(part_count(pieces, x.size), x.reshape(-1), slabs)
    mean, squares = np.empty((2, channels))
    _merge_moments(slabs, mean, squares)
    return mean, squares


def _spread(use: str, rows: list[np.ndarray | float], channels: int, dtype: np.dtype) -> np.ndarray:
    """A table with a row for each of `rows`, its values for the channels repeated along it."""
    width = row_width(channels)
    table = scratch(use, len(rows) * width, dtype).reshape(len(rows), width)
    for target, values in zip(table.reshape(len(rows), -1, channels), rows, strict=True):
        target[...] = values
    return table


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
    factor = 1 if weight is None else _vector("weight", weight, x)
    shift = 0 if bias is None else _vector("bias", bias, x)
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            _vector(name, running, x)
    channels = x.shape[-1]
    count = x.size // channels if channels else 0
    mean = checks.output("out_mean", out_mean, (channels,), x.dtype)
    inv_std = checks.output("out_inv_std", out_inv_std, (channels,), x.dtype)
    y = checks.output("out", out, x.shape, x.dtype)
    if training:
        if count == 1:
            raise ValueError(f"x: shape {x.shape} has one value per channel, training needs more")
        batch_mean, squares = _batch_moments(x) if count else np.zeros((2, channels))
        batch_var = squares / max(count, 1)
        if count:
            _move("running_mean", running_mean, momentum, batch_mean)
            _move("running_var", running_var, momentum, squares / (count - 1))
    else:
        if running_mean is None or running_var is None:
            raise ValueError("running_mean, running_var: needed where training is False")
        batch_mean, batch_var = running_mean, running_var.astype(np.float64)
    mean[...] = batch_mean
    inv_std[...] = 1 / np.sqrt(batch_var + eps)
    if count:
        table = _spread("normalize", [mean, inv_std * factor, shift], channels, x.dtype)
        parts = part_count(-(-x.size // table.shape[1]), x.size)
        _normalize(parts, x.reshape(-1), y.reshape(-1), table)
    return y, mean, inv_std


def _move(name: str, running: np.ndarray | None, momentum: float, batch: np.ndarray) -> None:
    if running is None:
        return
    if not running.flags.writeable:
        raise ValueError(f"{name}: must be writable, training updates it in place")
    running[...] = (1 - momentum) * running + momentum * batch


@parallel
def _products(part, parts, dout, x, mean, slabs):
    keep_out_of_line()
    _, pieces, width = slabs.shape
    lo, hi = span(part, parts, pieces)
    for piece in range(lo, hi):
        total, product = slabs[0, piece], slabs[1, piece]
        fill(total, 0)
        fill(product, 0)
        first, last = piece_bounds(piece, pieces, x.size, width)
        for start in range(first, last, width):
            end = min(start + width, last)
            gradient, source = dout[start:end], x[start:end]
            for k in range(source.size):
                total[k] += gradient[k]
                product[k] += gradient[k] * (source[k] - mean[k])


@parallel
def _normalize_backward(part, parts, dout, x, dx, table, training):
    """dx = (dout - shift - (x - mean) * slope) * scale; without the batch's statistics dx = dout * scale."""
    keep_out_of_line()
    scale, mean, shift, slope = table[0], table[1], table[2], table[3]
    lo, hi = piece_bounds(part, parts, x.size, scale.size)
    for start in range(lo, hi, scale.size):
        end = min(start + scale.size, hi)
        gradient, source, target = dout[start:end], x[start:end], dx[start:end]
        if training:
            for k in range(source.size):
                target[k] = (gradient[k] - shift[k] - (source[k] - mean[k]) * slope[k]) * scale[k]
        else:
            for k in range(source.size):
                target[k] = gradient[k] * scale[k]


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
    factor = 1 if weight is None else _vector("weight", weight, x)
    mean, inv_std = _vector("mean", mean, x), _vector("inv_std", inv_std, x).astype(np.float64)
    dout = checks.same_shape("dout", checks.floating("dout", dout, None, x.dtype), x.shape)
    channels = x.shape[-1]
    dx = checks.output("out", out, x.shape, x.dtype)
    dweight = checks.output("out_dweight", out_dweight, (channels,), x.dtype)
    dbias = checks.output("out_dbias", out_dbias, (channels,), x.dtype)
    total, product = np.zeros((2, channels))
    if x.size:
        pieces, width = piece_count(x.size), row_width(channels)
        slabs = scratch("products", 2 * pieces * width, np.float64).reshape(2, pieces, width)
        center = _spread("center", [mean], channels, np.dtype(np.float64))[0]
        _products(part_count(pieces, x.size), dout.reshape(-1), x.reshape(-1), center, slabs)
        fold(slabs[0], total, 0)
        fold(slabs[1], product, 0)
        count = x.size // channels
        rows = [inv_std * factor, mean, total / count, product * inv_std**2 / count]
        table = _spread("normalize", rows, channels, x.dtype)
        parts = part_count(-(-x.size // width), x.size)
        flat = dout.reshape(-1), x.reshape(-1), dx.reshape(-1)
        _normalize_backward(parts, *flat, table, int(bool(training)))
        product *= inv_std
    for given, target, result in ((out_dweight, dweight, product), (out_dbias, dbias, total)):
        target[...] = target + result if accumulate and given is not None else result
    return dx, dweight, dbias
