"""2-D convolution (cross-correlation, as in every deep-learning library) and its three gradients.

All four functions are the same sum. With zeros outside the image, f a filter of group g and c the
channels of that group,

    y[n, i, j, f] = bias[f] + sum over kh, kw, c of
        x[n, i * stride + kh * dilation - top, j * stride + kw * dilation - left, c] * weight[kh, kw, c, f]

so each tap (kh, kw) adds the product of a shifted, strided slice of the image with one matrix a group. A
gradient is the same loop with the product's other factor moved to the left.

See Dumoulin and Visin: A guide to convolution arithmetic for deep learning, arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .shapes import Padding, Pads, Pair, image_shape, pads, pair, require_shape, wide, window_count


class _Geometry(NamedTuple):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pad: Pads
    output: tuple[int, int]

    def taps(self) -> Iterator[tuple[tuple[int, int], tuple[slice, slice, slice]]]:
        """Each tap (kh, kw) with the slices of the padded image that it sees from all output positions."""
        for tap in np.ndindex(*self.kernel):
            rows, columns = (
                slice(k * dilation, k * dilation + (size - 1) * stride + 1, stride)
                for k, dilation, stride, size in zip(
                    tap, self.dilation, self.stride, self.output, strict=True
                )
            )
            yield tap, (slice(None), rows, columns)


def _geometry(
    x_shape: Sequence[int], kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> _Geometry:
    _, h, w, _ = image_shape("x_shape", x_shape)
    kernel_h, kernel_w = pair("kernel_size", kernel_size)
    stride_h, stride_w = pair("stride", stride)
    dilation_h, dilation_w = pair("dilation", dilation)
    pad = pads(padding)
    ho = window_count(h, pad[0], kernel_h, stride_h, dilation_h)
    wo = window_count(w, pad[1], kernel_w, stride_w, dilation_w)
    return _Geometry((kernel_h, kernel_w), (stride_h, stride_w), (dilation_h, dilation_w), pad, (ho, wo))


def _groups(c: int, f: int, groups: int) -> list[tuple[slice, slice]]:
    """The channels and the filters of each group."""
    if groups < 1 or c % groups or f % groups:
        raise ValueError(f"groups: {groups} does not divide {c} channels and {f} filters")
    channels, filters = c // groups, f // groups
    return [
        (slice(g * channels, (g + 1) * channels), slice(g * filters, (g + 1) * filters))
        for g in range(groups)
    ]


def _require_weight(weight: np.ndarray, c: int, groups: int) -> None:
    if weight.ndim != 4 or weight.shape[2] * groups != c:
        raise ValueError(
            f"weight: shape {weight.shape} is not (kH, kW, C / groups, F) for {c} channels in {groups} groups"
        )


def conv2d_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> np.ndarray:
    """Convolve images with filters; the formula is the module's.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (N, H, W, C)
    weight : ndarray, shape (kH, kW, C / groups, F)
    bias : ndarray, shape (F,), optional
    stride, dilation : int or pair of int
    padding : int, (height, width) or ((top, bottom), (left, right))
    groups : int
        Channels and filters are cut into this many runs; filters see the channels of their own run only.

    Returns
    -------
    ndarray, dtype of `x`, shape (N, Ho, Wo, F)

    Raises
    ------
    ValueError
        If the kernel does not fit into the padded image, `groups` divides C or F not, or shapes disagree.
    """
    n, _, _, c = image_shape("x", np.shape(x))
    _require_weight(weight, c, groups)
    f = weight.shape[3]
    geometry = _geometry(x.shape, weight.shape[:2], stride, padding, dilation)
    padded = np.pad(wide("x", x), ((0, 0), *geometry.pad, (0, 0)))
    weight64 = wide("weight", weight)
    y = np.zeros((n, *geometry.output, f))
    for (kh, kw), window in geometry.taps():
        pixels = padded[window]
        for channels, filters in _groups(c, f, groups):
            y[..., filters] += pixels[..., channels] @ weight64[kh, kw][:, filters]
    if bias is not None:
        require_shape("bias", bias, (f,))
        y += wide("bias", bias)
    return y.astype(x.dtype)


def conv2d_backward_input(
    dout: np.ndarray,
    weight: np.ndarray,
    x_shape: Sequence[int],
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> np.ndarray:
    """Gradient of `conv2d_forward` to its images: every product hands dout * weight to the pixel it read.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, Ho, Wo, F)
    weight : ndarray, shape (kH, kW, C / groups, F)
    x_shape : (N, H, W, C)
    stride, padding, dilation, groups
        Those of the forward call.

    Returns
    -------
    ndarray, dtype of `dout`, shape (N, H, W, C)

    Raises
    ------
    ValueError
        If the shapes are not those of a forward call.
    """
    n, h, w, c = image_shape("x_shape", x_shape)
    _require_weight(weight, c, groups)
    f = weight.shape[3]
    geometry = _geometry(x_shape, weight.shape[:2], stride, padding, dilation)
    require_shape("dout", dout, (n, *geometry.output, f))
    dout64, weight64 = wide("dout", dout), wide("weight", weight)
    (top, bottom), (left, right) = geometry.pad
    padded = np.zeros((n, top + h + bottom, left + w + right, c))
    for (kh, kw), window in geometry.taps():
        for channels, filters in _groups(c, f, groups):
            padded[window][..., channels] += dout64[..., filters] @ weight64[kh, kw][:, filters].T
    return padded[:, top : top + h, left : left + w].astype(dout.dtype)


def conv2d_backward_weight(
    dout: np.ndarray,
    x: np.ndarray,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> np.ndarray:
    """Gradient of `conv2d_forward` to its filters: for each tap the pixels it saw, times dout.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (N, Ho, Wo, F)
    x : ndarray, shape (N, H, W, C)
    kernel_size : int or pair of int
    stride, padding, dilation, groups
        Those of the forward call.

    Returns
    -------
    ndarray, dtype of `dout`, shape (kH, kW, C / groups, F)
        Summed over the batch.

    Raises
    ------
    ValueError
        If the shapes are not those of a forward call.
    """
    n, _, _, c = image_shape("x", np.shape(x))
    f = dout.shape[-1]
    geometry = _geometry(x.shape, kernel_size, stride, padding, dilation)
    require_shape("dout", dout, (n, *geometry.output, f))
    dout64 = wide("dout", dout)
    padded = np.pad(wide("x", x), ((0, 0), *geometry.pad, (0, 0)))
    group_slices = _groups(c, f, groups)
    dweight = np.zeros((*geometry.kernel, c // groups, f))
    for (kh, kw), window in geometry.taps():
        pixels = padded[window]
        for channels, filters in group_slices:
            dweight[kh, kw][:, filters] = np.tensordot(
                pixels[..., channels], dout64[..., filters], axes=([0, 1, 2], [0, 1, 2])
            )
    return dweight.astype(dout.dtype)


def conv2d_backward_bias(dout: np.ndarray) -> np.ndarray:
    """Gradient to a bias that was added along the last axis: dout summed over all other axes.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (..., F)

    Returns
    -------
    ndarray, dtype of `dout`, shape (F,)
    """
    return wide("dout", dout).sum(axis=tuple(range(dout.ndim - 1))).astype(dout.dtype)
