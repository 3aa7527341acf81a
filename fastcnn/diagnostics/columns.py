"""A convolution against its textbook form: the matrix of patches times the matrix of weights.

With ``cols = im2col(x)``, whose rows are output pixels in the order (n, i, j), and `W_col` the weights with
a column for each filter:

    y = cols @ W_col + b        dcols = dout @ W_col^T        dx = col2im(dcols)

`im2col` and `col2im` are taken from `kernels`, by default those of ``fastcnn.kernels.cpu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .fixed import FixedFunction
from .report import CheckRow

Geometry = tuple[Any, Any, Any, Any]


def check_row_order(layer: Any, x: np.ndarray, *, kernels: Any = None, tolerance: float = 1e-9) -> CheckRow:
    """Compare ``im2col(x) @ W_col + b`` with the layer's output, flattened in the order (n, i, j).

    Rows in another order, such as (i, j, n), make a forward pass that mixes the images of a batch.

    Parameters
    ----------
    layer : Conv2d
        In double precision.
    x : ndarray of float64, (N, C, H, W)
        The layer's input.
    kernels : module, optional
        Where `im2col` is taken from.
    tolerance : float
        Largest error, relative to the largest output, that passes.

    Returns
    -------
    CheckRow
        Of kind ``ROW``.
    """
    kernels = kernels or _cpu()
    x = np.asarray(x, np.float64)
    with FixedFunction(layer) as function:
        y = function(x)
    rows = y.transpose(0, 2, 3, 1).reshape(-1, y.shape[1])
    cols = kernels.im2col(_nhwc(x), *_geometry(layer))
    expected = _times_weight(cols, layer)
    if layer.bias is not None:
        expected = expected + layer.bias.data
    return _compare("ROW", function.name, rows, expected, tolerance)


def check_dx_path(
    layer: Any, x: np.ndarray, *, kernels: Any = None, rng: Any = 0, tolerance: float = 1e-9
) -> CheckRow:
    """Compare ``col2im(dout @ W_col^T)`` with the input gradient that ``backward`` returns.

    Parameters are those of `check_row_order`; `rng` draws `dout`.

    Returns
    -------
    CheckRow
        Of kind ``DX``.
    """
    kernels = kernels or _cpu()
    x = np.asarray(x, np.float64)
    with FixedFunction(layer) as function:
        shape = function(x).shape
        dout = np.random.default_rng(rng).standard_normal(shape)
        dx = function.backward(x, dout)
    rows = dout.transpose(0, 2, 3, 1).reshape(-1, shape[1])
    dcols = _times_weight_transposed(rows, layer)
    expected = kernels.col2im(dcols, _nhwc(x).shape, *_geometry(layer))
    return _compare("DX", function.name, _nhwc(dx), expected, tolerance)


def check_adjoint(
    layer: Any, x: np.ndarray, *, kernels: Any = None, rng: Any = 0, tolerance: float = 1e-9
) -> CheckRow:
    """Compare <im2col(x), R> with <x, col2im(R)> for a random R: col2im is the adjoint of im2col.

    Parameters are those of `check_row_order`; `layer` gives the geometry, `rng` draws R.

    Returns
    -------
    CheckRow
        Of kind ``ADJ``.
    """
    kernels = kernels or _cpu()
    x = _nhwc(np.asarray(x, np.float64))
    geometry = _geometry(layer)
    cols = kernels.im2col(x, *geometry)
    r = np.random.default_rng(rng).standard_normal(cols.shape)
    left = np.vdot(cols, r)
    right = np.vdot(x, kernels.col2im(r, x.shape, *geometry))
    scale = float(np.linalg.norm(cols))
    error = abs(float(left - right))
    ok = bool(error <= tolerance * max(scale, 1.0))
    return CheckRow("ADJ", type(layer).__name__, ok, error, tested=1)


def _cpu() -> Any:
    from fastcnn.kernels import cpu

    return cpu


def _nhwc(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def _geometry(layer: Any) -> Geometry:
    """(kernel_size, stride, padding, dilation) of a layer, the padding as numbers."""
    padding = layer.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        spans = [d * (k - 1) for k, d in zip(_pair(layer.kernel_size), _pair(layer.dilation), strict=True)]
        padding = tuple((span // 2, span - span // 2) for span in spans)
    return layer.kernel_size, layer.stride, padding, layer.dilation


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if np.ndim(value) == 0 else tuple(value)


def _weight_columns(layer: Any) -> np.ndarray:
    """The weights (F, C / groups, kH, kW) as (groups, kH * kW, C / groups, F / groups)."""
    weight = np.asarray(layer.weight.data)
    filters, channels, height, width = weight.shape
    grouped = weight.reshape(layer.groups, filters // layer.groups, channels, height * width)
    return grouped.transpose(0, 3, 2, 1)


def _times_weight(cols: np.ndarray, layer: Any) -> np.ndarray:
    """cols @ W_col, (M, kH * kW * C) to (M, F), group by group."""
    w = _weight_columns(layer)
    groups, taps, channels, filters = w.shape
    grouped = cols.reshape(-1, taps, groups, channels)
    parts = [
        grouped[:, :, g].reshape(-1, taps * channels) @ w[g].reshape(taps * channels, filters)
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


def _times_weight_transposed(dout: np.ndarray, layer: Any) -> np.ndarray:
    """dout @ W_col^T, (M, F) to (M, kH * kW * C), group by group."""
    w = _weight_columns(layer)
    groups, taps, channels, filters = w.shape
    grouped = dout.reshape(-1, groups, filters)
    parts = [
        (grouped[:, g] @ w[g].reshape(taps * channels, filters).T).reshape(-1, taps, 1, channels)
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=2).reshape(len(dout), -1)


def _compare(kind: str, name: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> CheckRow:
    """A row that passes where the arrays agree; other shapes are an infinite error."""
    if actual.shape != expected.shape:
        return CheckRow(kind, name, ok=False, max_err=np.inf)
    error = float(np.max(np.abs(actual - expected), initial=0.0))
    scale = float(np.max(np.abs(expected), initial=0.0))
    return CheckRow(kind, name, bool(error <= tolerance * max(scale, 1.0)), error, tested=actual.size)
