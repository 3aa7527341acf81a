"""Max-pooling's gradient where windows overlap: every way it is written, and every edge."""

import numpy as np
import pytest
from guarded import before_a_gap

from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import elementwise, pool_pairs, simd

# kernel_size, stride, padding
SETTINGS = [
    pytest.param((3, 2, 0), id="pairs"),
    pytest.param((3, 2, 1), id="padded pairs"),
    pytest.param((3, 2, ((0, 1), (1, 0))), id="padded here and there"),
    pytest.param((3, 1, 1), id="stride 1"),
    pytest.param(((3, 2), (2, 1), 1), id="others"),
]


@pytest.fixture(params=["as it comes", "ahead", "around"])
def way(request, monkeypatch):
    """How results are written, whatever their size."""
    cache = {"as it comes": 1 << 40, "ahead": 1, "around": 0}[request.param]
    monkeypatch.setattr(simd, "cache_bytes", lambda level: cache)
    passed = 0 if request.param == "around" else 1 << 40
    monkeypatch.setattr(elementwise, "cache_bytes", lambda level: passed)
    monkeypatch.setattr(elementwise, "_FITS", 0)
    return request.param


def aligned(shape, dtype):
    """NaN in memory that begins at a cache line, as what is written around the caches must."""
    size = int(np.prod(shape))
    raw = np.empty(size * np.dtype(dtype).itemsize + 64, np.uint8)
    array = np.frombuffer(raw.data, dtype, size, -raw.ctypes.data % 64).reshape(shape)
    array[...] = np.nan
    return array


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [16, 21, 64, 80])
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_way_is_the_reference_s(way, settings, channels, dtype, team):
    """Images from one pixel on: no window, no pixel and no row of either is always there."""
    rng = np.random.default_rng(channels)
    for threads, height, width, ceil_mode in (
        (1, 1, 2, False),
        (2, 3, 3, False),
        (1, 4, 9, True),
        (1, 7, 6, False),
        (2, 8, 12, True),
        (1, 13, 5, True),
    ):
        team(threads)
        # Few different numbers: most windows have ties.
        x = rng.integers(-2, 3, (3, height, width, channels)).astype(dtype)
        try:
            y, argmax = reference.max_pool2d_forward(x, *settings, 1, ceil_mode)
        except ValueError:
            continue
        dout = rng.standard_normal(y.shape).astype(dtype)
        dout[rng.random(y.shape) < 0.1] = np.inf
        expected = reference.max_pool2d_backward(dout, argmax, x.shape, *settings)
        for out in (aligned(x.shape, dtype), before_a_gap(np.full(x.shape, np.nan, dtype))):
            given = before_a_gap(dout), before_a_gap(argmax)
            assert cpu.max_pool2d_backward(*given, x.shape, *settings, out=out) is out
            np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6, err_msg=str(x.shape))


def test_nan_reaches_its_pixel_only(way):
    x = np.random.default_rng(0).standard_normal((2, 9, 9, 32)).astype(np.float32)
    y, argmax = reference.max_pool2d_forward(x, 3, 2, 1)
    dout = np.ones_like(y)
    dout[1, 2, 3, 4] = np.nan
    dx = cpu.max_pool2d_backward(dout, argmax, x.shape, 3, 2, 1, out=aligned(x.shape, np.float32))
    np.testing.assert_array_equal(dx, reference.max_pool2d_backward(dout, argmax, x.shape, 3, 2, 1))
    assert np.isnan(dx).sum() == 1


def test_numbers_of_no_pixel_are_nobody_s():
    """As everywhere in pooling, a window whose number is none of its pixels gives its gradient to none."""
    argmax = np.full((1, 3, 3, 32), 9, np.uint8)
    dx = cpu.max_pool2d_backward(np.ones((1, 3, 3, 32), np.float32), argmax, (1, 7, 7, 32), 3, 2)
    assert not dx.any()


@pytest.mark.parametrize(
    ("channels", "settings", "taken"),
    [(16, (3, 2, 1), True), (15, (3, 2, 1), False), (64, (3, 1, 1), False), (64, (3, 2, 1, 2), False)],
)
def test_pairs_are_taken_where_they_pay(channels, settings, taken, monkeypatch):
    calls = []
    monkeypatch.setattr(simd, "lanes", lambda dtype: 16)
    monkeypatch.setattr(pool_pairs, "max_backward", lambda *arguments: calls.append(arguments))
    x = np.zeros((1, 9, 9, channels), np.float32)
    y, argmax = reference.max_pool2d_forward(x, *settings)
    cpu.max_pool2d_backward(y, argmax, x.shape, *settings)
    assert bool(calls) == taken
