"""Batches for training: chosen images, normalized, and (in training only) lightly augmented."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .shapes import image_shape, require_shape
from .stream import normal


def _chosen(images: np.ndarray, index: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``images[index]`` in float64, after checking all four arguments."""
    count, _, _, c = image_shape("images", images.shape)
    if images.dtype not in (np.uint8, np.float32):
        raise TypeError(f"images: dtype {images.dtype} is neither uint8 nor float32")
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"index: expected integers with 1 axis, got {index.dtype} {index.shape}")
    wrong = index[(index < 0) | (index >= count)]
    if wrong.size:
        raise ValueError(f"index: {wrong[0]} is not in [0, {count})")
    require_shape("scale", scale, (c,))
    require_shape("shift", shift, (c,))
    return images[index].astype(np.float64)


def gather_batch(images: np.ndarray, index: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """``out[b, ..., c] = images[index[b], ..., c] * scale[c] + shift[c]``.

    Parameters
    ----------
    images : ndarray, uint8 or float32, shape (n, H, W, C)
    index : ndarray, int64, shape (B,)
    scale, shift : ndarray, float32, shape (C,)

    Returns
    -------
    ndarray, float32, shape (B, H, W, C)

    Raises
    ------
    TypeError
        If `images` is neither uint8 nor float32.
    ValueError
        If an index is out of range or shapes disagree.
    """
    return (_chosen(images, index, scale, shift) * scale + shift).astype(np.float32)


def augment_batch(
    images: np.ndarray,
    index: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    params: np.ndarray,
    seed: int,
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
       ``sqrt(-2 * log(1 - u)) * cos(2 * pi * t)``, where u is ``(splitmix64(seed + 2 * k) >> 40) * 2**-24``
       and t the same of ``seed + 2 * k + 1``;
    6. cutout: 0 in rows y0 to y0 + size - 1 and columns x0 to x0 + size - 1, as far as they are in the image;
    7. clip to [0, 1];
    8. ``out = v * scale[c] * (255 for uint8 images, else 1) + shift[c]``, as in `gather_batch`.

    Parameters
    ----------
    images : ndarray, uint8 or float32, shape (n, H, W, C)
    index : ndarray, int64, shape (B,)
    scale, shift : ndarray, float32, shape (C,)
    params : ndarray, float32, shape (B, 9)
        Rows of (flip, dy, dx, brightness, contrast, noise, y0, x0, size); (0, 0, 0, 0, 1, 0, 0, 0, 0) changes
        nothing.
    seed : int in [0, 2**64)

    Returns
    -------
    ndarray, float32, shape (B, H, W, C)

    Raises
    ------
    TypeError
        If `images` is neither uint8 nor float32.
    ValueError
        If an index or the seed is out of range or shapes disagree.
    """
    batch = _chosen(images, index, scale, shift)
    require_shape("params", params, (len(index), 9))
    white = 255 if images.dtype == np.uint8 else 1
    noise = normal(seed, batch.size).reshape(batch.shape)
    for b, row in enumerate(params.tolist()):
        batch[b] = _augmented(batch[b] / white, noise[b], row)
    return (batch.clip(0, 1) * scale * white + shift).astype(np.float32)


def _augmented(image: np.ndarray, normal_noise: np.ndarray, row: Sequence[float]) -> np.ndarray:
    """Steps 1 to 6 of `augment_batch` for one image (H, W, C)."""
    flip, dy, dx, brightness, contrast, noise, y0, x0, size = row
    if flip:
        image = image[:, ::-1]
    image = _shifted(image, int(dy), int(dx))
    mean = image.mean()
    image = mean + contrast * (image - mean)
    image = image + brightness + noise * normal_noise
    rows, columns = (slice(max(int(start), 0), max(int(start + size), 0)) for start in (y0, x0))
    image[rows, columns] = 0
    return image


def _shifted(image: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """``out[i, j] = image[i - dy, j - dx]``, 0 where that is outside."""
    h, w, _ = image.shape
    rows = np.array([i for i in range(h) if 0 <= i - dy < h], int)
    columns = np.array([j for j in range(w) if 0 <= j - dx < w], int)
    out = np.zeros_like(image)
    out[np.ix_(rows, columns)] = image[np.ix_(rows - dy, columns - dx)]
    return out
