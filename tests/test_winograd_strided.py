"""Strided convolution on folded images: exact to Winograd's documented bound, and only where it is wanted."""

import numpy as np
import pytest
from parity import error

import fastcnn
from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import direct, winograd_strided

# The largest error, in units of the largest result, for standard normal images and weights.
BOUND = 2e-5


CASES = [
    # x, filters, kernel, stride, padding
    pytest.param((2, 40, 44, 3), 64, 7, 2, 3, id="7 x 7, stride 2"),
    pytest.param((3, 41, 39, 3), 33, 7, 2, ((0, 3), (2, 1)), id="asymmetric, cut vectors"),
    pytest.param((2, 30, 32, 16), 32, 5, 2, 2, id="5 x 5, 16 channels"),
    pytest.param((2, 90, 70, 3), 48, 11, 4, 2, id="11 x 11, stride 4"),
    pytest.param((2, 40, 44, 3), 64, (7, 6), (2, 3), 1, id="other strides and sides"),
    pytest.param(
        (2, 30, 29, 5), 32, (5, 5), (1, 2), (1, 5), id="strides along rows, more padding than filter"
    ),
    pytest.param((1, 31, 30, 9), 32, 7, 3, 0, id="no padding, pixels beyond the last filter"),
]


def arguments(x_shape, filters, kernel, stride, padding):
    rng = np.random.default_rng(7)
    layer = direct.layer(x_shape, kernel, None, filters, stride, padding, 1, 1)
    sides = layer.rows.kernel, layer.columns.kernel
    x, bias = rng.standard_normal(x_shape), rng.standard_normal(filters)
    weight = rng.standard_normal((*sides, x_shape[3], filters))
    dout = rng.standard_normal((x_shape[0], *layer.out_image, filters))
    return layer, *(array.astype(np.float32) for array in (x, weight, bias, dout))


def passes(layer, x, weight, bias, dout):
    """Results of both, the first into an array that holds NaN."""
    y, dweight = np.full_like(dout, np.nan), np.zeros_like(weight)
    winograd_strided.forward(layer, x, weight, bias, y)
    winograd_strided.add_weight_gradient(layer, dout, x, dweight)
    return y, dweight


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "stride", "padding"), CASES)
def test_error_is_within_the_documented_bound(x_shape, filters, kernel, stride, padding):
    layer, *arrays = arguments(x_shape, filters, kernel, stride, padding)
    y, dweight = passes(layer, *arrays)
    x, weight, bias, dout = (array.astype(np.float64) for array in arrays)
    how = {"stride": stride, "padding": padding}
    assert error(y, reference.conv2d_forward(x, weight, bias, **how)) < BOUND
    assert error(dweight, reference.conv2d_backward_weight(dout, x, kernel, **how)) < BOUND


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "stride", "padding"), CASES[:2])
def test_neither_threads_nor_parts_of_the_batch_change_the_result(
    x_shape, filters, kernel, stride, padding, team, monkeypatch
):
    layer, *arrays = arguments(x_shape, filters, kernel, stride, padding)
    results = []
    for count in (1, 2):
        team(count)
        results.append([array.copy() for array in passes(layer, *arrays)])
    assert all(np.array_equal(one, two) for one, two in zip(*results, strict=True))
    monkeypatch.setattr(winograd_strided, "_FOLDED_BYTES", 1)
    y, dweight = passes(layer, *arrays)
    assert error(y, results[0][0]) < BOUND
    assert error(dweight, results[0][1]) < BOUND


def test_public_functions_use_it_only_when_winograd_is_on():
    layer, x, weight, bias, dout = arguments((2, 40, 44, 8), 64, 7, 2, 3)
    expected = passes(layer, x, weight, bias, dout)
    before = fastcnn.get_winograd()
    try:
        for enabled in (True, False):
            fastcnn.set_winograd(enabled)
            results = (
                cpu.conv2d_forward(x, weight, bias, 2, 3),
                cpu.conv2d_backward_weight(dout, x, 7, 2, 3),
            )
            for actual, winograds in zip(results, expected, strict=True):
                assert np.array_equal(actual, winograds) is enabled
                assert error(actual, winograds) < BOUND
    finally:
        fastcnn.set_winograd(before)


@pytest.mark.parametrize(("pool_size", "with_argmax"), [(2, True), (1, True), (2, False)])
def test_pooled_convolution_ends_in_the_same(pool_size, with_argmax, monkeypatch):
    _, x, weight, bias, _ = arguments((3, 40, 44, 3), 64, 7, 2, 3)
    # An image after the other.
    monkeypatch.setattr(winograd_strided, "_FOLDED_BYTES", 1)
    y, argmax = cpu.conv2d_pool_forward(x, weight, bias, pool_size, True, 2, 3, with_argmax=with_argmax)
    exact = [array.astype(np.float64) for array in (x, weight, bias)]
    expected, expected_argmax = reference.conv2d_pool_forward(*exact, pool_size, True, 2, 3)
    assert error(y, expected) < BOUND
    if with_argmax:
        assert np.mean(argmax != expected_argmax) < 1e-3  # where two pixels are nearly the same


UNFIT = [
    # x, filters, kernel, stride, dilation, groups
    pytest.param((4, 40, 40, 64), 64, 3, 2, 1, 1, id="3 x 3"),
    pytest.param((4, 40, 40, 64), 64, 7, 1, 1, 1, id="stride 1"),
    pytest.param((4, 40, 40, 64), 64, 2, 2, 1, 1, id="windows side by side"),
    pytest.param((4, 40, 40, 16), 64, 5, 2, 2, 1, id="dilated"),
    pytest.param((4, 40, 40, 32), 64, 5, 2, 1, 2, id="groups"),
    pytest.param((4, 40, 40, 16), 16, 5, 2, 1, 1, id="few filters"),
    pytest.param((4, 40, 40, 1), 64, 7, 2, 1, 1, id="one channel"),
    pytest.param((1, 16, 16, 16), 64, 5, 2, 1, 1, id="few tiles"),
]


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "stride", "dilation", "groups"), UNFIT)
def test_not_used_where_it_is_no_use(x_shape, filters, kernel, stride, dilation, groups):
    layer = direct.layer(x_shape, kernel, None, filters, stride, 1, dilation, groups)
    assert not winograd_strided.suits(layer, x_shape[0], np.dtype(np.float32))


def test_float64_is_convolved_directly():
    layer = direct.layer((2, 40, 44, 8), 7, 8, 64, 2, 3, 1, 1)
    assert winograd_strided.suits(layer, 2, np.dtype(np.float32))
    assert not winograd_strided.suits(layer, 2, np.dtype(np.float64))


def test_nan_reaches_all_that_it_should():
    layer, x, weight, bias, dout = arguments((2, 40, 44, 3), 64, 7, 2, 3)
    x[1, 5, 6, 1] = np.nan
    y, dweight = passes(layer, x, weight, bias, dout)
    expected = np.isnan(reference.conv2d_forward(x, weight, bias, 2, 3))
    assert np.isnan(y[expected]).all()
    assert np.isfinite(y[0]).all()
    assert np.isnan(dweight[np.isnan(reference.conv2d_backward_weight(dout, x, 7, 2, 3))]).all()
