"""Lists of the gradients behind max-pooling against lists made in Python."""

import numba
import numpy as np
import pytest

from fastcnn.kernels.cpu import lists
from fastcnn.kernels.cpu.epilogue import DEAD
from fastcnn.kernels.cpu.simd import lanes

FILTERS = (1, 7, 16, 21, 64)
PIXELS = (1, 5, 16, 35)
WINDOWS = ((2, 2), (1, 3), (3, 2), (5, 5), (15, 17))


@numba.njit
def _by_filter(*arguments):
    lists.sort_by_filter(*arguments)


@numba.njit
def _by_pixel(*arguments):
    lists.sort_by_pixel(*arguments)


def _pooled(filters, pixels, area, dtype):
    """Gradients, one of them NaN, and codes, some of them of no pixel; the last end with their array."""
    rng = np.random.default_rng(filters * 100 + pixels)
    dout = rng.standard_normal((pixels, filters)).astype(dtype)
    dout[pixels // 2, filters // 2] = np.nan
    codes = rng.integers(0, area + 1, dout.shape).astype(np.uint8)
    codes[codes == area] = DEAD
    return dout, codes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("filters", FILTERS)
def test_by_filter(filters, pixels, window, dtype):
    height, width = window
    skipped, line, column = 3, 1000, 7
    dout, codes = _pooled(filters, pixels + skipped, height * width, dtype)
    room = pixels + lanes(dtype)
    bases = np.zeros(room, np.int32)
    bases[:pixels] = 10_000 * np.arange(pixels)
    values, offsets = np.empty(filters * room, dtype), np.empty(filters * room, np.int32)
    lengths, sums = np.full(filters, 99), np.arange(filters, dtype=dtype)
    geometry = lists.geometry(height, width, line, column)
    _by_filter(
        dout.ravel(),
        codes.ravel(),
        skipped * filters,
        pixels,
        filters,
        geometry,
        bases,
        values,
        offsets,
        room,
        lengths,
        sums,
    )
    dout, codes = dout[skipped:], codes[skipped:]
    for f in range(filters):
        alive = np.flatnonzero(codes[:, f] < height * width)
        row, inside = np.divmod(codes[alive, f].astype(int), width)
        assert lengths[f] == alive.size
        entries = slice(f * room, f * room + alive.size)
        np.testing.assert_array_equal(values[entries], dout[alive, f])
        np.testing.assert_array_equal(offsets[entries], 10_000 * alive + row * line + inside * column)
        expected = f + dout[alive, f].sum(dtype=np.float64)
        np.testing.assert_allclose(sums[f], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("area", [height * width for height, width in WINDOWS])
@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("filters", FILTERS)
def test_by_pixel(filters, pixels, area, dtype):
    skipped, run = 2, 48
    dout, codes = _pooled(filters, pixels + skipped, area, dtype)
    room = filters + lanes(dtype)
    values, offsets = np.empty(pixels * area * room, dtype), np.empty(pixels * area * room, np.int32)
    lengths = np.full(pixels * area, 99)
    _by_pixel(
        dout.ravel(),
        codes.ravel(),
        skipped * filters,
        pixels,
        filters,
        area,
        run,
        values,
        offsets,
        room,
        lengths,
    )
    for k in range(pixels * area):
        j, q = divmod(k, area)
        mine = np.flatnonzero(codes[skipped + j] == q)
        assert lengths[k] == mine.size
        entries = slice(k * room, k * room + mine.size)
        np.testing.assert_array_equal(values[entries], dout[skipped + j, mine])
        np.testing.assert_array_equal(offsets[entries], mine * run)
