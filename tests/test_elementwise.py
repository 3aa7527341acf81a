"""Results written around the caches are those written through them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from fastcnn.kernels import cpu
from fastcnn.kernels.cpu import elementwise

# Channels that fill vectors, that don't, and that make long rows; pixels that leave a ragged row.
SHAPES = [(3, 7, 5, 64), (2, 9, 11, 10), (2, 3, 5, 1000), (1, 5, 3, 37), (2, 40, 40, 3)]


def _aligned(shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(size + 64, 255, np.uint8)
    return np.ndarray(shape, dtype, raw, -raw.ctypes.data % 64)


def _calls(x, dout):
    channels = np.linspace(0.1, 2, x.shape[-1]).astype(x.dtype)
    one = np.full(1, 0.25, x.dtype)
    return [
        lambda out: cpu.relu_forward(x, out=out),
        lambda out: cpu.relu_backward(dout, x, out=out),
        lambda out: cpu.leaky_relu_forward(x, 0.1, out=out),
        lambda out: cpu.leaky_relu_backward(dout, x, 0.1, out=out),
        lambda out: cpu.prelu_forward(x, one, out=out),
        lambda out: cpu.prelu_forward(x, channels, out=out),
        lambda out: cpu.prelu_backward(dout, x, one, out=out),
        lambda out: cpu.prelu_backward(dout, x, channels, out=out),
        lambda out: cpu.batch_norm_forward(x, channels, channels, channels, channels, False, out=out),
        lambda out: cpu.batch_norm_backward(dout, x, channels, channels, channels, True, out=out),
        lambda out: cpu.batch_norm_backward(dout, x, channels, channels, channels, False, out=out),
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_around_the_caches(monkeypatch, shape, dtype):
    monkeypatch.setattr(elementwise, "_FITS", 0)
    rng = np.random.default_rng(0)
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    for call in _calls(x, dout):
        results = []
        for cache in (1 << 40, 0):
            monkeypatch.setattr(elementwise, "cache_bytes", lambda level, cache=cache: cache)
            out = _aligned(shape, dtype)
            call(out)
            results.append(out)
        np.testing.assert_array_equal(*results)


def test_an_output_that_is_not_aligned_is_written_through_the_caches(monkeypatch):
    monkeypatch.setattr(elementwise, "_FITS", 0)
    monkeypatch.setattr(elementwise, "cache_bytes", lambda level: 0)
    out = _aligned(5001, np.float32)[1:]
    x = np.linspace(-1, 1, 5000, dtype=np.float32)
    np.testing.assert_array_equal(cpu.relu_forward(x, out=out), x.clip(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 50, 50, 7), (4, 28, 28, 33), (5, 64, 64, 1)])
def test_batch_norm_in_one_job_has_the_bits_of_several(team, shape, dtype):
    rng = np.random.default_rng(1)
    x, dout = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(shape[-1]).astype(dtype) for _ in range(2))
    results = []
    for threads in (1, 2):
        team(threads)
        running = np.zeros(shape[-1], dtype), np.ones(shape[-1], dtype)
        forward = cpu.batch_norm_forward(x, weight, bias, *running, True)
        backward = cpu.batch_norm_backward(dout, x, weight, *forward[1:], True)
        evaluated = cpu.batch_norm_forward(x, weight, bias, *running, False)
        results.append([*forward, *running, *backward, *evaluated])
    for one, several in zip(*results, strict=True):
        np.testing.assert_array_equal(several, one)
