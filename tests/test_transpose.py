"""Copies between channels-first and channels-last memory."""

import numpy as np
import pytest

from fastcnn.kernels import threads
from fastcnn.kernels.cpu import transpose

SHAPES = [
    (64, 12, 12, 64),
    (2, 33, 31, 3),
    (5, 30, 30, 1),
    (1, 17, 16, 16),
    (3, 15, 7, 17),
    (1, 8, 8, 100),
    (2, 70, 33),
    (1, 9, 5, 10, 11),
    (2, 1, 1, 4096),
    (2, 70, 70, 4),
    (40, 2, 3, 17),
    *((3, 19, 37, few) for few in (2, 4, 5, 6, 7, 8, 9)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_both_ways(shape, dtype):
    stored = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    shown = np.moveaxis(stored, -1, 1)
    first = np.full(shown.shape, np.nan, dtype)
    transpose.copy(shown, first)
    assert np.array_equal(first, shown)
    last = np.full(shape, np.nan, dtype)
    first.flags.writeable = False
    transpose.copy(np.moveaxis(first, 1, -1), last)
    assert np.array_equal(last, stored)


def test_copies_what_is_no_transposition():
    array = np.arange(2 * 40 * 9 * 8, dtype=np.float32).reshape(2, 40, 9, 8)
    for other in (array[:, ::2], array[..., ::-1], array.astype(np.int64), array.transpose(3, 0, 1, 2)):
        out = np.empty(other.shape, other.dtype)
        transpose.copy(other, out)
        assert np.array_equal(out, other)


def test_threads_do_not_matter():
    array = np.random.default_rng(0).standard_normal((9, 40, 33, 20)).astype(np.float32).transpose(0, 3, 1, 2)
    before = threads.get_num_threads()
    try:
        for count in {1, before}:
            threads.set_num_threads(count)
            out = np.empty(array.shape, np.float32)
            transpose.copy(array, out)
            assert np.array_equal(out, array)
    finally:
        threads.set_num_threads(before)
