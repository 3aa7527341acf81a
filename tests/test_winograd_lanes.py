"""Winograd's algorithm for few filters, or channels: exact to the documented bound, where it is wanted."""

import numpy as np
import pytest
from parity import error

from fastcnn.kernels import checks, cpu, reference
from fastcnn.kernels.cpu import direct, pooled_convolution, simd, winograd_lanes, winograd_lanes_weights
from fastcnn.kernels.cpu.epilogue import DEAD
from fastcnn.kernels.cpu.winograd_points import TILE, matrices

# The largest error, in units of the largest result, for standard normal images and weights.
BOUND = 2e-5
ASYMMETRIC = ((0, 3), (2, 1))
# x, filters, kernel, padding
CASES = {
    "5 x 5": ((33, 16, 20, 3), 10, (5, 5), 0),
    "7 x 7": ((17, 18, 15, 3), 10, (7, 7), 0),
    "3 x 3": ((40, 14, 14, 10), 10, (3, 3), 1),
    "8 x 8": ((16, 9, 12, 2), 3, (8, 8), 2),
    "6 x 4": ((20, 13, 11, 5), 7, (6, 4), ASYMMETRIC),
    "3 x 5": ((20, 11, 13, 4), 6, (3, 5), ASYMMETRIC),
    "less than a tile": ((18, 5, 6, 3), 5, (4, 4), 0),
    "few images": ((3, 12, 9, 4), 9, (5, 5), 2),
    "one filter": ((35, 10, 10, 1), 1, (3, 3), 1),
    "padding beyond the filter": ((16, 5, 4, 2), 3, (3, 3), 5),
    "several bands": ((2, 60, 70, 6), 4, (7, 7), 3),
    "few channels and filters": ((33, 16, 20, 3), 3, (5, 5), 0),
    "filters that fill vectors": ((33, 13, 12, 7), 32, (5, 5), 2),
    "more filters than two vectors": ((20, 9, 10, 11), 37, (3, 3), 1),
    "more filters than a vector, cut": ((17, 11, 10, 5), 24, (7, 7), ASYMMETRIC),
    "as many filters as lanes, and more": ((16, 9, 9, 3), 19, (5, 5), 1),
}
every_case = pytest.mark.parametrize("case", CASES)


def arguments(case):
    shape, filters, kernel, padding = CASES[case]
    rng = np.random.default_rng(5)
    x, weight, bias = (
        rng.standard_normal(size).astype(np.float32)
        for size in (shape, (*kernel, shape[3], filters), filters)
    )
    return direct.layer(shape, kernel, shape[3], filters, 1, padding, 1, 1), x, weight, bias, padding


@pytest.mark.parametrize("exact", [False, True], ids=["with the point 1", "exact"])
@pytest.mark.parametrize("size", winograd_lanes.SIZES)
def test_transforms_convolve(size, exact):
    inputs, outputs, filters = matrices(size, exact)
    rng = np.random.default_rng(0)
    d, g = rng.standard_normal(size), rng.standard_normal(size + 1 - TILE)
    np.testing.assert_allclose(outputs @ ((filters @ g) * (inputs @ d)), np.correlate(d, g), rtol=1e-10)


@every_case
def test_forward(case, team):
    layer, x, weight, bias, padding = arguments(case)
    exact = (array.astype(np.float64) for array in (x, weight, bias))
    expected = reference.conv2d_forward(*exact, padding=padding)
    results = []
    for count in (1, 2):
        team(count)
        y = np.full(expected.shape, np.nan, np.float32)
        winograd_lanes.forward(layer, x, weight, bias, y)
        assert error(y, expected) < BOUND
        results.append(y.tobytes())
    assert results[0] == results[1]
    winograd_lanes.forward(layer, x, weight, None, y)
    assert error(y, expected - bias) < BOUND


def windows(outputs, e):
    """The outputs by pooled pixel, and by pixel of its window on the last axis."""
    outputs = outputs[:, : e.out_h * e.pool_h, : e.out_w * e.pool_w]
    split = outputs.reshape(-1, e.out_h, e.pool_h, e.out_w, e.pool_w, e.filters).transpose(0, 1, 3, 5, 2, 4)
    return split.reshape(*split.shape[:4], -1)


@every_case
def test_gradient_to_the_input(case):
    layer, x, weight, _, padding = arguments(case)
    if np.any(np.max(checks.padding2d(padding), axis=1) >= weight.shape[:2]):
        pytest.skip("pixels of the padding alone")
    dout = np.random.default_rng(6).standard_normal((len(x), *layer.out_image, layer.filters), np.float32)
    exact = dout.astype(np.float64), weight.astype(np.float64)
    dx = np.full_like(x, np.nan)
    winograd_lanes.backward_input(layer, dout, weight, dx)
    assert error(dx, reference.conv2d_backward_input(*exact, x.shape, padding=padding)) < BOUND


@pytest.mark.parametrize("pool_size", [1, 2, (1, 2), (2, 4)])
@every_case
def test_pooled(case, pool_size):
    layer, x, weight, bias, padding = arguments(case)
    if np.any(np.array(layer.out_image) < pool_size):
        pytest.skip("windows larger than the image")
    exact = (array.astype(np.float64) for array in (x, weight, bias))
    outputs = reference.conv2d_forward(*exact, padding=padding)
    tolerance = BOUND * np.abs(outputs).max()
    for relu, keeps in ((True, True), (False, True), (True, False)):
        e = pooled_convolution._epilogue(layer, pool_size, relu, keeps)
        largest = windows(outputs, e).max(axis=-1)
        y, argmax = np.full(largest.shape, np.nan, np.float32), np.full(largest.shape, 99, np.uint8)
        winograd_lanes.forward(layer, x, weight, bias, y, e, argmax)
        np.testing.assert_allclose(y, np.maximum(largest, 0) if relu else largest, rtol=0, atol=tolerance)
        if not keeps:
            assert (argmax == 99).all()
            continue
        dead = argmax == DEAD
        assert np.array_equal(dead, relu & (y <= 0))
        taken = np.take_along_axis(windows(outputs, e), np.where(dead, 0, argmax)[..., None], axis=-1)
        # The first of several, but for those that are nearly the same.
        assert (dead | (taken[..., 0] >= largest - 2 * tolerance)).all()


@every_case
def test_gradient_to_the_weights_is_added(case, team):
    layer, x, weight, _, padding = arguments(case)
    dout = np.random.default_rng(6).standard_normal((len(x), *layer.out_image, layer.filters), np.float32)
    exact = dout.astype(np.float64), x.astype(np.float64)
    expected = reference.conv2d_backward_weight(*exact, weight.shape[:2], padding=padding)
    results = []
    for count in (1, 2):
        team(count)
        dweight = np.ones_like(weight)
        winograd_lanes_weights.add_weight_gradient(layer, dout, x, dweight)
        assert error(dweight - 1, expected) < BOUND
        results.append(dweight.tobytes())
    assert results[0] == results[1]


def test_nan_in_an_image_reaches_the_gradients_of_its_channel():
    layer, x, weight, _, _ = arguments("7 x 7")
    dout = np.ones((len(x), *layer.out_image, layer.filters), np.float32)
    x[3, 9, 9, 1] = np.nan
    dweight = np.zeros_like(weight)
    winograd_lanes_weights.add_weight_gradient(layer, dout, x, dweight)
    assert np.isnan(dweight[:, :, 1]).all()
    assert np.isfinite(np.delete(dweight, 1, axis=2)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_tiles_that_see_them_and_no_others(poison):
    layer, x, weight, bias, _ = arguments("7 x 7")
    x[5, 8, 10, 1] = poison
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_lanes.forward(layer, x, weight, bias, y)
    assert np.isnan(y[5, 2:9, 4:9]).all()
    assert np.isfinite(np.delete(y, 5, axis=0)).all()


def test_nan_in_the_weights_reaches_its_filter():
    layer, x, weight, bias, _ = arguments("5 x 5")
    weight[1, 2, 0, 4] = np.nan
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_lanes.forward(layer, x, weight, bias, y)
    assert np.array_equal(np.isnan(y).all(axis=(0, 1, 2)), np.arange(10) == 4)
    assert np.isnan(y).any(axis=(0, 1, 2)).sum() == 1


@pytest.mark.skipif(simd.VECTOR_BITS < 256, reason="vectors of four images are filled as well by filters")
def test_public_functions_use_it_only_when_switched_on(switch):
    layer, x, weight, bias, _ = arguments("few channels and filters")
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_lanes.forward(layer, x, weight, bias, y)
    e = pooled_convolution._epilogue(layer, 2, True, False)
    pooled = np.empty((len(x), e.out_h, e.out_w, e.filters), np.float32)
    winograd_lanes.forward(layer, x, weight, bias, pooled, e)
    dx = np.empty_like(x)
    winograd_lanes.backward_input(layer, y, weight, dx)
    for enabled in (True, False):
        switch(enabled)
        assert np.array_equal(cpu.conv2d_backward_input(y, weight, x.shape), dx) is enabled
        assert np.array_equal(cpu.conv2d_forward(x, weight, bias), y) is enabled
        assert np.array_equal(cpu.conv2d_pool_forward(x, weight, bias, 2)[0], pooled) is enabled


@pytest.mark.skipif(simd.VECTOR_BITS < 256, reason="vectors of four images are filled as well by filters")
def test_the_weights_gradient_uses_it_only_when_switched_on(switch):
    """Of a layer where it is the fastest whether vectors are multiplied at full width or not."""
    layer = direct.layer((32, 48, 48, 7), 5, None, 7, 1, 2, 1, 1)
    rng = np.random.default_rng(6)
    x, dout = (rng.standard_normal((32, 48, 48, 7)).astype(np.float32) for _ in range(2))
    dweight = np.zeros((5, 5, 7, 7), np.float32)
    winograd_lanes_weights.add_weight_gradient(layer, dout, x, dweight)
    for enabled in (True, False):
        switch(enabled)
        assert np.array_equal(cpu.conv2d_backward_weight(dout, x, 5, 1, 2), dweight) is enabled


UNFIT = {
    # x, filters, kernel, stride, dilation, groups
    "stride 2": ((64, 20, 20, 3), 10, 5, 2, 1, 1),
    "dilated": ((64, 20, 20, 3), 10, 5, 1, 2, 1),
    "groups": ((64, 20, 20, 4), 10, 5, 1, 1, 2),
    "1 x 1": ((64, 20, 20, 3), 10, 1, 1, 1, 1),
    "9 x 9": ((64, 20, 20, 3), 10, 9, 1, 1, 1),
    "few images": ((3, 20, 20, 3), 10, 5, 1, 1, 1),
    "tiles of one output": ((64, 5, 5, 3), 10, 5, 1, 1, 1),
}


@pytest.mark.parametrize("case", UNFIT)
def test_not_used_where_it_is_no_use(case):
    shape, filters, kernel, stride, dilation, groups = UNFIT[case]
    layer = direct.layer(shape, kernel, None, filters, stride, 0, dilation, groups)
    assert not winograd_lanes.suits_forward(layer, shape[0], np.dtype(np.float32))
    assert not winograd_lanes.suits_input(layer, shape[0], np.dtype(np.float32))
    assert not winograd_lanes_weights.suits(layer, shape[0], np.dtype(np.float32))


@pytest.mark.skipif(simd.VECTOR_BITS < 256, reason="vectors of four images are filled as well by filters")
def test_used_where_images_fill_vectors_in_float32_alone():
    layer = direct.layer((64, 20, 20, 3), 5, 3, 3, 1, 0, 1, 1)
    assert winograd_lanes.suits_forward(layer, 64, np.dtype(np.float32))
    assert not winograd_lanes.suits_forward(layer, 64, np.dtype(np.float64))
    many = direct.layer((64, 28, 28, 16), 5, 16, 7, 1, 2, 1, 1)
    assert winograd_lanes_weights.suits(many, 64, np.dtype(np.float32))
    assert not winograd_lanes_weights.suits(many, 64, np.dtype(np.float64))
    thirds = pooled_convolution._epilogue(layer, 3, True, True)
    assert not winograd_lanes.suits_forward(layer, 64, np.dtype(np.float32), thirds)


@pytest.mark.skipif(simd.VECTOR_BITS < 512, reason="what is many depends on the vectors")
@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "forward", "weights"),
    [
        pytest.param(6, 16, 5, True, True, id="5 x 5"),
        pytest.param(3, 64, 5, True, False, id="many filters"),
        pytest.param(10, 20, 3, True, False, id="3 x 3, most of a vector of channels"),
        pytest.param(8, 20, 3, False, False, id="3 x 3, half a vector of channels"),
        pytest.param(10, 32, 7, True, False, id="cut"),
        pytest.param(16, 16, 5, False, False, id="channels that fill vectors"),
    ],
)
def test_used_for_filters_that_fill_vectors_if_channels_do_not(channels, filters, kernel, forward, weights):
    layer = direct.layer((64, 24, 24, channels), kernel, None, filters, 1, kernel // 2, 1, 1)
    turned = direct.layer((64, 24, 24, filters), kernel, None, channels, 1, kernel // 2, 1, 1)
    dtype = np.dtype(np.float32)
    assert winograd_lanes.suits_forward(layer, 64, dtype) == forward
    assert winograd_lanes.suits_input(turned, 64, dtype) == forward
    assert winograd_lanes_weights.suits(layer, 64, dtype) == weights
