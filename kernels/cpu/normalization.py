"""Batch normalization over all axes but the last, alone or with ReLU and max-pooling; and the gradients.

Source: Ioffe and Szegedy, arXiv:1502.03167, algorithms 1 and 2 and the gradients of section 3. Memory is read
once for the sums and once for the result. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from .. import checks
from ..jit import kernel
from ..threads import between_jobs, parallel, part_count
from . import normalized
from .elementwise import FEW, channelwise, passes_caches, table_sizes
from .moments import batch_moments, column_sizes, column_width, gradient_sums, merge, moments, products
from .pieces import blocks, fold, piece_count
from .vectors import load, multiply_add
from .workspace import NOTHING, scratch

# In place of weight, bias or running statistics that there are not.
_FLOAT64 = np.dtype(np.float64)


def _is_one_job(size: int) -> bool:
    """Whether all steps are done by one job, because each would have one part."""
    if size <= FEW:
        return size > 0
    return part_count(piece_count(size), size) == 1 and part_count(blocks(size), size) == 1


def _channels_last(x: np.ndarray) -> np.ndarray:
    x = checks.floating("x", x)
    if x.ndim < 2:
        raise ValueError(f"x: expected (..., C) with 2 axes or more, got shape {x.shape}")
    return x


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
    running = running_mean, running_var
    outputs = out_mean, out_inv_std
    if _is_one_job(x.size):
        mean, inv_std, _ = _statistics(x, (weight, bias), running, training, momentum, eps, outputs, y)
        return y, mean, inv_std
    mean, inv_std, rows = _statistics(x, (weight, bias), running, training, momentum, eps, outputs)
    if y.size:
        _normalize(y, rows, x)
    return y, mean, inv_std


@channelwise(3)
def _normalize(sources, at, mask, values):
    mean, scale, bias = values
    return multiply_add(load(sources[0], at, mask) - mean, scale, bias)


@kernel
def _write(c, batch_mean, var, eps, weight, bias, mean, inv_std, rows):
    """What the channel `c` is normalized with, and the values for `_normalize`."""
    mean[c] = batch_mean
    inv_std[c] = 1 / np.sqrt(var + eps)
    rows[0, c] = mean[c]
    rows[1, c] = inv_std[c] * weight[c] if weight.size else inv_std[c]
    rows[2, c] = bias[c] if bias.size else 0.0


@parallel
def _take_running(part, parts, running, eps, affine, mean, inv_std, rows):
    """Normalize with the running statistics."""
    for c in range(mean.size):
        _write(c, running[0][c], np.float64(running[1][c]), eps, *affine, mean, inv_std, rows)


@parallel
def _take_moments(part, parts, slabs, running, momentum, eps, affine, mean, inv_std, rows):
    """Normalize with the batch's statistics, towards which the running ones move."""
    running_mean, running_var = running
    # Their places in `rows` are overwritten channel by channel.
    merge(slabs, rows[0], rows[1], rows[2])
    for c in range(mean.size):
        count, squares = rows[2, c], rows[1, c]
        batch_mean = rows[0, c] / count
        if running_mean.size:
            running_mean[c] = (1 - momentum) * running_mean[c] + momentum * batch_mean
        if running_var.size:
            running_var[c] = (1 - momentum) * running_var[c] + momentum * (squares / (count - 1))
        _write(c, batch_mean, squares / count, eps, *affine, mean, inv_std, rows)


_moments, _by_moments, _by_running = moments.body, _take_moments.body, _take_running.body
_to_normal = _normalize.body


@parallel
def _forward_at_once(
    part,
    parts,
    training,
    x,
    y,
    running,
    momentum,
    eps,
    affine,
    mean,
    inv_std,
    pieces,
    width,
    memory,
    tables,
    period,
    around,
):
    """The statistics and the result."""
    sums = memory.size - 3 * mean.size
    rows = memory[sums:].reshape(3, mean.size)
    if training:
        slabs = memory[:sums].reshape(pieces, 3, width)
        _moments(0, 1, x, slabs, 1)
        _by_moments(0, 1, slabs, running, momentum, eps, affine, mean, inv_std, rows)
    else:
        _by_running(0, 1, running, eps, affine, mean, inv_std, rows)
    _to_normal(0, 1, y, rows, tables, period, around, (x,))


def _run_at_once(training, x, y, *given):
    """Overwrite all that a forward pass in one job results in."""
    dtype = x.dtype
    pieces, width, values, length, period = _sizes(x.size, x.shape[-1], dtype)
    memory, tables = scratch("moments", values, _FLOAT64), scratch("channels", (1, length), dtype)
    sizes = pieces, width, memory, tables, period, int(passes_caches(y, 2))
    _forward_at_once(1, training, x.ravel(), y.ravel(), *given, *sizes)


@lru_cache(maxsize=512)
def _sizes(size: int, channels: int, dtype: np.dtype) -> tuple[int, int, int, int, int]:
    """Pieces and width of the sums, float64 values and elements of tables that they take, and the period."""
    pieces, width, (period, length) = (
        piece_count(size),
        column_width(channels, dtype),
        table_sizes(channels, dtype),
    )
    return pieces, width, 3 * (pieces * width + channels), 3 * length, period


def _optional(name: str, values: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array with one value for each channel, or an empty one for None."""
    return NOTHING[dtype] if values is None else checks.fitting(name, values, shape, dtype)


def _statistics(
    x: np.ndarray,
    affine: tuple[np.ndarray | None, np.ndarray | None],
    running: tuple[np.ndarray | None, np.ndarray | None],
    training: bool,
    momentum: float,
    eps: float,
    out: tuple[np.ndarray | None, np.ndarray | None],
    result: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean and inv_std, and the values for `_normalize`; in training the running statistics move.

    A `result` is overwritten in the same job, and there are no such values.
    """
    shape, dtype = x.shape[-1:], x.dtype
    weight = _optional("weight", affine[0], shape, dtype)
    bias = _optional("bias", affine[1], shape, dtype)
    running_mean = _optional("running_mean", running[0], shape, dtype)
    running_var = _optional("running_var", running[1], shape, dtype)
    mean = checks.output("out_mean", out[0], shape, dtype)
    inv_std = checks.output("out_inv_std", out[1], shape, dtype)
    channels = shape[0]
    count = x.size // channels if channels else 0
    if training and count == 1:
        raise ValueError(f"x: shape {x.shape} has one value per channel, training needs more")
    if not training and (running[0] is None or running[1] is None):
        raise ValueError("running_mean, running_var: needed where training is False")
    # What is not as kernels take it, and was therefore copied.
    copies = []
    moving = running_mean, running_var
    if running_mean is not running[0] or running_var is not running[1]:
        copies = _copies(running, moving, training)
    for array, copy in copies:
        between_jobs(np.copyto, copy, array)
    settings = float(momentum), float(eps)
    results = (weight, bias), mean, inv_std
    rows = np.empty((3, channels)) if result is None else NOTHING[_FLOAT64]
    if result is not None:
        _run_at_once(bool(training), x, result, moving, *settings, *results)
    elif not training:
        _take_running(1, moving, float(eps), *results, rows)
    elif count:
        _take_moments(1, batch_moments(x), moving, *settings, *results, rows)
    else:
        zeros = np.zeros(channels, x.dtype)
        _take_running(1, (zeros, zeros), float(eps), *results, rows)
    for array, copy in copies if training else ():
        between_jobs(np.copyto, array, copy)
    return mean, inv_std, rows


def _copies(
    running: tuple[np.ndarray | None, ...], moving: tuple[np.ndarray, ...], training: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The running statistics that kernels can't take, and their copies."""
    copies = []
    for name, array, copy in zip(("running_mean", "running_var"), running, moving, strict=True):
        if array is None:
            continue
        if training and not array.flags.writeable:
            raise ValueError(f"{name}: must be writable, training updates it in place")
        if not np.may_share_memory(array, copy):
            copies.append((array, copy))
    return copies


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
    dout = checks.fitting("dout", dout, x.shape, x.dtype)
    dx = checks.output("out", out, x.shape, x.dtype)
    given = weight, mean, inv_std

    out_sums = out_dweight, out_dbias
    if training and _is_one_job(x.size):
        arrays, adds = _gradient_arrays(x, given, out_sums, accumulate)
        _run_back_at_once(dout, x, dx, arrays, adds)
        return dx, arrays[3], arrays[4]

    def back(spread: np.ndarray) -> None:
        if training:
            _spread(dx, spread, dout, x)
        else:
            _scale(dx, spread[:1], dout)

    def sums(center: np.ndarray) -> np.ndarray:
        return gradient_sums(dout, x, center)

    return dx, *_gradients(x, given, sums, back, out_sums, accumulate)


@channelwise(4)
def _spread(sources, at, mask, values):
    scale, mean, shift, slope = values
    dout, x = load(sources[0], at, mask), load(sources[1], at, mask)
    return multiply_add(x - mean, slope, shift) + dout * scale


@channelwise(1)
def _scale(sources, at, mask, values):
    return load(sources[0], at, mask) * values[0]


@parallel
def _take_sums(part, parts, slabs, count, weight, mean, inv_std, dweight, dbias, adds, spread):
    """The values for `_spread`, and dweight and dbias; `adds` tells to which of these to add."""
    width = slabs.shape[1] // 2
    # Sums of dout, and of dout * (x - mean), where the values that they make come.
    fold(slabs[:, :width], spread[2], 0)
    fold(slabs[:, width:], spread[3], 0)
    for c in range(mean.size):
        std = np.float64(inv_std[c])
        scale = std * weight[c] if weight.size else std
        # An empty sum is 0, whatever it is multiplied with.
        total, product = spread[2, c], spread[3, c] * std if count else 0.0
        dweight[c] = dweight[c] + product if adds[0] else product
        dbias[c] = dbias[c] + total if adds[1] else total
        spread[0, c], spread[1, c] = scale, mean[c]
        spread[2, c], spread[3, c] = -scale * total / count, -scale * product * std / count


_products, _by_sums, _to_gradient = products.body, _take_sums.body, _spread.body


@parallel
def _backward_at_once(part, parts, dout, x, dx, arrays, adds, pieces, width, memory, tables, period, around):
    """The sums and the gradient, in training."""
    weight, mean, inv_std, dweight, dbias = arrays
    sums = 2 * pieces * width
    slabs, spread = memory[:sums].reshape(pieces, 2 * width), memory[sums:].reshape(4, mean.size)
    _products(0, 1, (dout, x), mean, tables[:width].reshape(1, width), slabs, 0)
    count = x.size // mean.size
    _by_sums(0, 1, slabs, count, weight, mean, inv_std, dweight, dbias, adds, spread)
    of_channels = tables[width:].reshape(1, tables.size - width)
    _to_gradient(0, 1, dx, spread, of_channels, period, around, (dout, x))


def _run_back_at_once(
    dout: np.ndarray, x: np.ndarray, dx: np.ndarray, arrays: tuple[np.ndarray, ...], adds: tuple[int, int]
) -> None:
    """Overwrite all that a backward pass in training, in one job, results in."""
    channels, dtype = x.shape[-1], x.dtype
    pieces, width, _ = column_sizes(x.size, channels, dtype)
    period, length = table_sizes(channels, dtype)
    memory = scratch("column sums", 2 * pieces * width + 4 * channels, _FLOAT64)
    tables = scratch("columns", width + 4 * length, dtype)
    flat = dout.ravel(), x.ravel(), dx.ravel()
    sizes = pieces, width, memory, tables, period, int(passes_caches(dx, 3))
    _backward_at_once(1, *flat, arrays, adds, *sizes)


def _gradient_arrays(
    x: np.ndarray, given: tuple, out: tuple[np.ndarray | None, np.ndarray | None], accumulate: bool
) -> tuple[tuple[np.ndarray, ...], tuple[int, int]]:
    """weight, mean, inv_std, dweight and dbias, and whether to add to the last two."""
    shape, dtype = x.shape[-1:], x.dtype
    weight = _optional("weight", given[0], shape, dtype)
    mean = checks.fitting("mean", given[1], shape, dtype)
    inv_std = checks.fitting("inv_std", given[2], shape, dtype)
    dweight = checks.output("out_dweight", out[0], shape, dtype)
    dbias = checks.output("out_dbias", out[1], shape, dtype)
    adds = int(accumulate and out[0] is not None), int(accumulate and out[1] is not None)
    return (weight, mean, inv_std, dweight, dbias), adds


def _gradients(
    x: np.ndarray,
    given: tuple,
    sums: Callable[[np.ndarray], np.ndarray],
    back: Callable[[np.ndarray], None],
    out: tuple[np.ndarray | None, np.ndarray | None],
    accumulate: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Run `sums` and `back`; returns dweight and dbias. `given` holds weight, mean and inv_std."""
    arrays, adds = _gradient_arrays(x, given, out, accumulate)
    _, mean, _, dweight, dbias = arrays
    channels = mean.size
    count = x.size // max(channels, 1)
    slabs = sums(mean) if count else np.zeros((1, 2 * channels))
    spread = np.empty((4, channels))
    _take_sums(1, slabs, count, *arrays, adds, spread)
    if count:
        back(spread)
    return dweight, dbias


def _pool(x: np.ndarray, pool_size: int | Sequence[int]) -> tuple[tuple[int, int], tuple[int, ...]]:
    """The window, and the shape of the result."""
    pool = checks.pair("pool_size", pool_size, 1)
    if pool[0] * pool[1] > normalized.DEAD:
        raise ValueError(f"pool_size: {pool_size!r} has more than {normalized.DEAD} pixels")
    n, h, w, c = x.shape
    if pool[0] > h or pool[1] > w:
        raise ValueError(f"pool_size: {pool_size!r} is larger than images of {h} x {w}")
    return pool, (n, h // pool[0], w // pool[1], c)


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
    running = running_mean, running_var
    mean, inv_std, values = _statistics(
        x, (weight, bias), running, training, momentum, eps, (out_mean, out_inv_std)
    )
    if y.size:
        normalized.run_forward(x, y, argmax, normalized.table("normalize", values, g, x.dtype), g)
    return y, argmax, mean, inv_std


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
    dout = checks.fitting("dout", dout, shape, x.dtype)
    argmax = np.asarray(argmax)
    if argmax.dtype != np.uint8:
        raise TypeError(f"argmax: dtype {argmax.dtype} is not uint8")
    argmax = checks.contiguous(checks.same_shape("argmax", argmax, shape))
    g = normalized.geometry(x.shape, pool, False, x.dtype)
    dx = checks.output("out", out, x.shape, x.dtype)
    given = weight, mean, inv_std

    def back(spread: np.ndarray) -> None:
        rows = normalized.table("normalize", spread, g, x.dtype)
        normalized.run_backward(dout, argmax, x, dx, rows, training, g)

    def total(center: np.ndarray) -> np.ndarray:
        return normalized.run_sums(dout, argmax, x, center, g)

    return dx, *_gradients(x, given, total, back, (out_dweight, out_dbias), accumulate)
