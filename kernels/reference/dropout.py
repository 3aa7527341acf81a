"""Inverted dropout whose mask is a function of its seed, so that backward regenerates it.

Source: Srivastava et al., Dropout, JMLR 15, 2014 (scaled in training, its section 10).
"""

from __future__ import annotations

import numpy as np

from .shapes import wide
from .stream import uniform


def dropout_forward(x: np.ndarray, p: float, seed: int) -> np.ndarray:
    """Set elements to zero with probability p and multiply the others by 1 / (1 - p).

    Element i, in C order, is dropped if ``u_i < p``, where
    ``u_i = (splitmix64(seed + i) >> 40) * 2**-24``.

    Parameters
    ----------
    x : ndarray, float32 or float64, any shape
    p : float in [0, 1]
        1 gives zeros.
    seed : int in [0, 2**64)

    Returns
    -------
    ndarray, dtype and shape of `x`

    Raises
    ------
    ValueError
        If `p` or `seed` is out of range.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: {p} is not in [0, 1]")
    kept = (uniform(seed, x.size) >= p).reshape(x.shape)
    y = np.zeros(x.shape)
    y[kept] = wide("x", x)[kept] / (1 - p) if p < 1 else 0
    return y.astype(x.dtype)


def dropout_backward(dout: np.ndarray, p: float, seed: int) -> np.ndarray:
    """Gradient of `dropout_forward`: the same mask and factor, applied to dout.

    Parameters
    ----------
    dout : ndarray, float32 or float64, any shape
    p, seed
        Those of the forward call.

    Returns
    -------
    ndarray, dtype and shape of `dout`

    Raises
    ------
    ValueError
        If `p` or `seed` is out of range.
    """
    return dropout_forward(dout, p, seed)
