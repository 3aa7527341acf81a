"""The linear layer's product and its gradients. Its bias gradient is `conv2d_backward_bias`."""

from __future__ import annotations

import numpy as np

from .shapes import require_shape, wide


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """``y = x @ weight + bias``.

    Parameters
    ----------
    x : ndarray, float32 or float64, shape (M, K)
    weight : ndarray, shape (K, N)
    bias : ndarray, shape (N,), optional

    Returns
    -------
    ndarray, dtype of `x`, shape (M, N)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    y = wide("x", x) @ wide("weight", weight)
    if bias is not None:
        require_shape("bias", bias, weight.shape[1:])
        y += wide("bias", bias)
    return y.astype(x.dtype)


def linear_backward_input(dout: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Gradient to the input: ``dout @ weight.T``.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (M, N)
    weight : ndarray, shape (K, N)

    Returns
    -------
    ndarray, dtype of `dout`, shape (M, K)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    return (wide("dout", dout) @ wide("weight", weight).T).astype(dout.dtype)


def linear_backward_weight(dout: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gradient to the weight, summed over the batch: ``x.T @ dout``.

    Parameters
    ----------
    dout : ndarray, float32 or float64, shape (M, N)
    x : ndarray, shape (M, K)

    Returns
    -------
    ndarray, dtype of `dout`, shape (K, N)

    Raises
    ------
    ValueError
        If the shapes disagree.
    """
    return (wide("x", x).T @ wide("dout", dout)).astype(dout.dtype)
