"""What the functions of the reference do alike with their arguments: floats, pairs, padding, output sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias, cast

import numpy as np

Pair: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
Pads: TypeAlias = tuple[tuple[int, int], tuple[int, int]]


def wide(name: str, array: np.ndarray) -> np.ndarray:
    """A float64 copy of a float32 or float64 array.

    The reference computes in float64 and rounds once, at the end, to the dtype of its input.
    """
    array = np.asarray(array)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: dtype {array.dtype} is neither float32 nor float64")
    return array.astype(np.float64)


def require_shape(name: str, array: np.ndarray, shape: Sequence[int]) -> None:
    """Raise a ValueError unless `array` has `shape`."""
    if array.shape != tuple(shape):
        raise ValueError(f"{name}: shape {array.shape} is not {tuple(shape)}")


def image_shape(name: str, shape: Sequence[int]) -> tuple[int, int, int, int]:
    """`shape` as (N, H, W, C)."""
    if len(shape) != 4:
        raise ValueError(f"{name}: expected (N, H, W, C), got {tuple(shape)}")
    n, h, w, c = shape
    return n, h, w, c


def pair(name: str, value: Pair, minimum: int = 1) -> tuple[int, int]:
    """An int, or two, as (height, width)."""
    height, width = (value, value) if isinstance(value, int | np.integer) else value
    if min(height, width) < minimum:
        raise ValueError(f"{name}: {value!r} is below {minimum}")
    return int(height), int(width)


def pads(padding: Padding) -> Pads:
    """An int, (height, width), or ((top, bottom), (left, right)), as the last."""
    if np.ndim(padding) == 2:
        rows, columns = cast(Sequence[Sequence[int]], padding)
        return pair("padding", rows, minimum=0), pair("padding", columns, minimum=0)
    height, width = pair("padding", cast(Pair, padding), minimum=0)
    return (height, height), (width, width)


def fitting_windows(
    size: int, pad: tuple[int, int], kernel: int, stride: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """Number of windows along one axis: floor((size + pad - dilation * (kernel - 1) - 1) / stride) + 1.

    `ceil_mode` rounds up, but drops a last window that would start beyond the input and the padding
    before it. Not positive where no window fits.
    """
    before, after = pad
    room = size + before + after - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def window_count(
    size: int, pad: tuple[int, int], kernel: int, stride: int, dilation: int = 1, ceil_mode: bool = False
) -> int:
    """`fitting_windows`, or a ValueError if there is none or no pixel."""
    count = fitting_windows(size, pad, kernel, stride, dilation, ceil_mode)
    if size < 1 or count < 1:
        raise ValueError(
            f"kernel_size: {kernel} with dilation {dilation} spans {dilation * (kernel - 1) + 1} pixels, "
            f"the padded input has {size + sum(pad)} ({size} of them image)"
        )
    return count
