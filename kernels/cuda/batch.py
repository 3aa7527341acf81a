"""Batches for training: chosen images, normalized, and (in training only) lightly augmented."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda, float64

from ..cpu import batch as cpu
from ..cpu.batch import IMAGE_DTYPES
from ..cpu.dropout import seed64
from . import checks
from .arrays import DeviceArray
from .jit import THREADS, device_function, kernel
from .random import normal
from .twin import twin_of

_IMAGES = ("uint8", "float32")
# A grid's second axis goes no further.
_MOST_IMAGES = 65535
# Shifts and cutouts become integers.
_HUGE = np.float32(1e9)
_ZERO, _ONE, _NAN = np.float32(0), np.float32(1), np.float32(np.nan)


def _images(images: Any) -> DeviceArray:
    images = checks.array("images", images)
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images: dtype {images.dtype} is neither uint8 nor float32")
    if images.ndim != 4:
        raise ValueError(f"images: expected (n, H, W, C), got shape {images.shape}")
    return images


def _per_channel(name: str, values: Any, channels: int) -> DeviceArray:
    values = checks.floating(name, values, 1, np.dtype(np.float32))
    return checks.same_shape(name, values, (channels,))


@kernel("T[:, ::1], int64[::1], float32[::1], float32[::1], float32[:, ::1]", floats=_IMAGES)
def _gather(images, index, scale, shift, out):
    count, size = images.shape
    for b in range(cuda.blockIdx.y, index.size, cuda.gridDim.y):
        chosen = index[b]
        inside = chosen >= 0 and chosen < count
        for k in range(cuda.grid(1), size, cuda.gridsize(1)):
            c = k % scale.size
            out[b, k] = np.float32(images[chosen, k]) * scale[c] + shift[c] if inside else _NAN


@twin_of(cpu.gather_batch)
def gather_batch(images: Any, index: Any, scale: Any, shift: Any, *, out: Any = None) -> DeviceArray:
    """An index that is no image raises nothing here: the image is NaN."""
    images = _images(images)
    n, h, w, c = images.shape
    index = checks.integers("index", index)
    scale, shift = _per_channel("scale", scale, c), _per_channel("shift", shift, c)
    batch = checks.output("out", out, (len(index), h, w, c), np.float32)
    if batch.size:
        size = h * w * c
        grid = -(-size // THREADS), min(len(index), _MOST_IMAGES)
        _gather.launch(
            grid, THREADS, images.reshape(n, size), index, scale, shift, batch.reshape(len(index), size)
        )
    return batch


@device_function
def _placed(image, white, flip, dy, dx, channels, k):
    """Element k of an image over `white`, mirrored if `flip`, moved by (dy, dx), 0 in the gap it leaves."""
    height, row = image.shape
    i, rest = k // row - dy, k % row
    j, c = rest // channels - dx, rest % channels
    width = row // channels
    if i < 0 or i >= height or j < 0 or j >= width:
        return _ZERO
    if flip:
        j = width - 1 - j
    return np.float32(image[i, j * channels + c]) / white


@device_function
def _block_sum(partial, value):
    """The sum of `value` over a block of THREADS threads, in every thread."""
    thread = cuda.threadIdx.x
    partial[thread] = value
    cuda.syncthreads()
    step = THREADS // 2
    while step:
        if thread < step:
            partial[thread] += partial[thread + step]
        cuda.syncthreads()
        step //= 2
    return partial[0]


@device_function
def _is_cut_out(p, row, column):
    y0, x0, size = int(p[6]), int(p[7]), int(p[8])
    return y0 <= row and row < y0 + size and x0 <= column and column < x0 + size


@device_function
def _is_usable(p):
    """Whether no parameter is huge or NaN."""
    usable = True
    for k in range(9):
        usable = usable and abs(p[k]) < _HUGE
    return usable


@kernel(
    "T[:, :, ::1], int64[::1], float32[::1], float32[::1], float32[:, ::1], uint64, float32, float32[:, ::1]",
    floats=_IMAGES,
)
def _augment(images, index, scale, shift, params, seed, white, out):
    """A block for each image of the batch; steps as `augment_batch` numbers them."""
    partial = cuda.shared.array(THREADS, float64)
    b = cuda.blockIdx.x
    p, target, chosen, channels = params[b], out[b], index[b], scale.size
    if chosen < 0 or chosen >= images.shape[0] or not _is_usable(p):
        for k in range(cuda.threadIdx.x, target.size, THREADS):
            target[k] = _NAN
        return
    image, row = images[chosen], images.shape[2]
    flip, dy, dx = p[0] != 0, int(p[1]), int(p[2])
    total = 0.0
    for k in range(cuda.threadIdx.x, target.size, THREADS):
        total += _placed(image, white, flip, dy, dx, channels, k)
    mean = np.float32(_block_sum(partial, total) / target.size)
    brightness, contrast, noise = p[3], p[4], p[5]
    for k in range(cuda.threadIdx.x, target.size, THREADS):
        value = mean + contrast * (_placed(image, white, flip, dy, dx, channels, k) - mean) + brightness
        if noise != 0:
            value += noise * normal(seed, np.uint64(b * target.size + k))
        if _is_cut_out(p, k // row, k % row // channels):
            value = _ZERO
        # NaN is neither below nor above.
        value = _ZERO if value < _ZERO else value
        value = _ONE if value > _ONE else value
        c = k % channels
        target[k] = value * white * scale[c] + shift[c]


@twin_of(cpu.augment_batch)
def augment_batch(
    images: Any, index: Any, scale: Any, shift: Any, params: Any, seed: int, *, out: Any = None
) -> DeviceArray:
    """An index that is no image, or a parameter that is huge or not finite, raises nothing here: the
    image is NaN."""
    images = _images(images)
    n, h, w, c = images.shape
    index = checks.integers("index", index)
    scale, shift = _per_channel("scale", scale, c), _per_channel("shift", shift, c)
    params = checks.floating("params", params, 2, np.dtype(np.float32))
    checks.same_shape("params", params, (len(index), 9))
    batch = checks.output("out", out, (len(index), h, w, c), np.float32)
    key = seed64(seed)
    if batch.size:
        white = 255 if images.dtype == np.uint8 else 1
        lines, rows = images.reshape(n, h, w * c), batch.reshape(len(index), h * w * c)
        _augment.launch(len(index), THREADS, lines, index, scale, shift, params, key, white, rows)
    return batch
