"""Batches for training: chosen images, normalized, and (in training only) lightly augmented.

These kernels use one thread: they run in the loader's, beside the training step.
"""

from __future__ import annotations

import numpy as np

from .. import checks
from ..jit import entry, kernel
from .dropout import seed64
from .gaussian import BLOCK, add_noise
from .pieces import fill, row_width
from .workspace import scratch

IMAGE_DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))

# Shifts and cutouts become integers.
_HUGE = 1e9


@entry
def _gather(images, index, scale, shift, out):
    for b in range(index.size):
        source, target = images[index[b]], out[b]
        for start in range(0, source.size, scale.size):
            end = min(start + scale.size, source.size)
            pixels, values = source[start:end], target[start:end]
            for k in range(pixels.size):
                values[k] = np.float32(pixels[k]) * scale[k] + shift[k]


@entry
def _first_outside(index, count):
    for b in range(index.size):
        if index[b] < 0 or index[b] >= count:
            return b
    return -1


def _images(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype.newbyteorder("=") not in IMAGE_DTYPES:
        raise TypeError(f"images: dtype {images.dtype} is neither uint8 nor float32")
    if images.ndim != 4:
        raise ValueError(f"images: expected (n, H, W, C), got shape {images.shape}")
    return checks.contiguous(images)


def _index(index: np.ndarray, count: int) -> np.ndarray:
    index = np.asarray(index)
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"index: dtype {index.dtype} is no integer")
    if index.ndim != 1:
        raise ValueError(f"index: expected 1 axis, got shape {index.shape}")
    index = checks.contiguous(index.astype(np.int64, copy=False))
    outside = _first_outside(index, count)
    if outside >= 0:
        raise ValueError(f"index: {index[outside]} at {outside} is not in [0, {count})")
    return index


def _per_channel(name: str, values: np.ndarray, channels: int) -> np.ndarray:
    values = checks.floating(name, values, 1, np.dtype(np.float32))
    return checks.same_shape(name, values, (channels,))


def _along_row(use: str, values: np.ndarray) -> np.ndarray:
    """One value for each channel, repeated along a row of pixels."""
    row = scratch(use, row_width(values.size), values.dtype)
    row.reshape(-1, values.size)[...] = values
    return row


def gather_batch(
    images: np.ndarray,
    index: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """``out[b, ..., c] = images[index[b], ..., c] * scale[c] + shift[c]``.

    Parameters
    ----------
    images : (n, H, W, C) uint8 or float32
    index : (B,) int64
    scale, shift : (C,) float32
    out : (B, H, W, C) float32, optional
        Overwritten with the result.

    Returns
    -------
    (B, H, W, C) float32 array

    Raises
    ------
    TypeError
        If `images` is neither uint8 nor float32, or other dtypes don't fit.
    ValueError
        If an index is out of range, or shapes don't fit.
    """
    images = _images(images)
    n, h, w, c = images.shape
    index = _index(index, n)
    scale, shift = _per_channel("scale", scale, c), _per_channel("shift", shift, c)
    batch = checks.output("out", out, (len(index), h, w, c), np.float32)
    if batch.size:
        rows = _along_row("scale", scale), _along_row("shift", shift)
        _gather(images.reshape(n, h * w * c), index, *rows, batch.reshape(len(index), h * w * c))
    return batch


@kernel
def _place(image, white, flip, dy, dx, channels, target):
    """Write an image over `white`, mirrored if `flip` and moved by (dy, dx), 0 where it leaves a gap.

    Returns the mean of what it wrote.
    """
    height, row = image.shape
    width = row // channels
    total = 0.0
    for i in range(height):
        line = target[i]
        if i - dy < 0 or i - dy >= height:
            fill(line, 0)
            continue
        source = image[i - dy]
        for j in range(width):
            w = width - 1 - (j - dx) if flip else j - dx
            for c in range(channels):
                inside = 0 <= w < width
                value = np.float32(source[w * channels + c]) / white if inside else np.float32(0)
                line[j * channels + c] = value
                total += np.float64(value)
    return np.float32(total / image.size)


@kernel
def _cut_out(target, y0, x0, size, channels):
    height, row = target.shape
    for i in range(max(y0, 0), min(y0 + size, height)):
        first, last = max(x0 * channels, 0), min((x0 + size) * channels, row)
        if first < last:
            fill(target[i, first:last], 0)


@kernel
def _finish(values, white, scale, shift):
    """Clip to [0, 1], where NaN stays NaN, and normalize."""
    zero, one = np.float32(0), np.float32(1)
    for start in range(0, values.size, scale.size):
        row = values[start : min(start + scale.size, values.size)]
        for k in range(row.size):
            value = zero if row[k] < zero else row[k]
            value = one if value > one else value
            row[k] = value * white * scale[k] + shift[k]


@entry
def _augment(images, index, scale, shift, params, seed, white, channels, uniform, out):
    for b in range(index.size):
        p = params[b]
        target = out[b]
        values = target.reshape(target.size)
        mean = _place(images[index[b]], white, p[0] != 0, int(p[1]), int(p[2]), channels, target)
        brightness, contrast, noise = p[3], p[4], p[5]
        for k in range(values.size):
            values[k] = mean + contrast * (values[k] - mean) + brightness
        if noise != 0:
            add_noise(values, noise, b * values.size, seed, uniform)
        _cut_out(target, int(p[6]), int(p[7]), int(p[8]), channels)
        _finish(values, white, scale, shift)


def augment_batch(
    images: np.ndarray,
    index: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    params: np.ndarray,
    seed: int,
    *,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Choose images, change each as its row of `params` says, clip to [0, 1] and normalize.

    The changes work on values v whose range is [0, 1]: float32 images as they are, uint8 images over 255.
    In this order:

    1. flip: mirror left and right;
    2. shift: ``v[i, j] = v[i - dy, j - dx]``, 0 where that is outside;
    3. contrast: ``v = mean + contrast * (v - mean)``, the mean taken over the pixels and channels of the
       image as step 2 left it;
    4. brightness: ``v = v + brightness``;
    5. noise: ``v = v + noise * g[k]``, k the flat index into the batch and g[k] the standard normal
       ``sqrt(-2 * log(1 - u)) * cos(2 * pi * t)``, where u and t are
       ``(splitmix64(seed + 2 * k) >> 40) * 2**-24`` and the same of ``seed + 2 * k + 1``;
    6. cutout: 0 in rows y0 to y0 + size - 1 and columns x0 to x0 + size - 1, as far as they are in the image;
    7. clip to [0, 1];
    8. ``out = v * scale[c] * (255 for uint8 images, else 1) + shift[c]``, as in `gather_batch`.

    Parameters
    ----------
    images : (n, H, W, C) uint8 or float32
    index : (B,) int64
    scale, shift : (C,) float32
    params : (B, 9) float32
        Rows of (flip, dy, dx, brightness, contrast, noise, y0, x0, size); (0, 0, 0, 0, 1, 0, 0, 0, 0) changes
        nothing.
    seed : int in [0, 2**64)
    out : (B, H, W, C) float32, optional
        Overwritten with the result.

    Returns
    -------
    (B, H, W, C) float32 array

    Raises
    ------
    TypeError
        If `images` is neither uint8 nor float32, or other dtypes don't fit.
    ValueError
        If an index or the seed is out of range, a parameter is huge or not finite, or shapes don't fit.
    """
    images = _images(images)
    n, h, w, c = images.shape
    index = _index(index, n)
    scale, shift = _per_channel("scale", scale, c), _per_channel("shift", shift, c)
    params = checks.floating("params", params, 2, np.dtype(np.float32))
    checks.same_shape("params", params, (len(index), 9))
    if not (np.abs(params) < _HUGE).all():
        raise ValueError(f"params: every number must be finite and below {_HUGE:g} in size")
    batch = checks.output("out", out, (len(index), h, w, c), np.float32)
    key = seed64(seed)
    if batch.size:
        rows = _along_row("scale", scale), _along_row("shift", shift)
        white = np.float32(255 if images.dtype == np.uint8 else 1)
        lines = images.reshape(n, h, w * c), batch.reshape(len(index), h, w * c)
        uniform = scratch("uniform", 2 * BLOCK, np.float32).reshape(2, BLOCK)
        _augment(lines[0], index, *rows, params, key, white, c, uniform, lines[1])
    return batch
