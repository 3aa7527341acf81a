"""Max-pooling of 3x3 windows, which have a way of their own for plain numbers and one for all others."""

import numpy as np
import pytest

from fastcnn.kernels import cpu, reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 16, 21, 64])
@pytest.mark.parametrize("odd", [(), (np.nan,), (np.inf,), (-np.inf, np.inf), (np.nan, np.inf, -np.inf)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(2, 1, 1), (1, 1, 1), (3, 0, 1), (1, 0, 2)])
def test_ties_and_odd_numbers_are_as_in_the_reference(dtype, channels, odd, stride, padding, dilation):
    """Few different numbers, so that most windows have ties, zeros of both signs among them."""
    rng = np.random.default_rng(channels)
    x = rng.choice(np.array([-1, -0.0, 0.0, 1, 2]), (2, 9, 8, channels)).astype(dtype)
    for value in odd:
        x[rng.random(x.shape) < 0.02] = value
    settings = 3, stride, padding, dilation
    for result, expected in zip(
        cpu.max_pool2d_forward(x, *settings), reference.max_pool2d_forward(x, *settings), strict=True
    ):
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(np.signbit(result[result == 0]), np.signbit(expected[expected == 0]))
