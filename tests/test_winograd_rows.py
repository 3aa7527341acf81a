"""Winograd's algorithm along rows: exact to the documented bound, at every edge, only where it is wanted."""

import numpy as np
import pytest
from parity import error

from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import (
    direct,
    elementwise,
    pooled_convolution,
    simd,
    winograd_rows,
    winograd_rows_weights,
)
from fastcnn.kernels.cpu.epilogue import DEAD

# The largest error, in units of the largest result, for standard normal images and weights.
BOUND = 5e-6
LANES = simd.lanes(np.float32)
ASYMMETRIC = ((0, 3), (2, 1))
# x, filters, rows of the kernel, padding
CASES = {
    "one channel": ((3, 12, 12, 1), 2 * LANES, 3, 1),
    "three channels": ((2, 10, 11, 3), LANES, 3, 1),
    "the last filters twice": ((2, 9, 8, 2), LANES + 3, 3, 1),
    "one row of the kernel": ((2, 5, 9, 4), LANES, 1, 0),
    "five rows": ((2, 11, 10, 2), LANES + 1, 5, ((2, 2), (1, 1))),
    "as wide as a tile": ((2, 7, 6, 3), LANES, 3, 0),
    "wider by one": ((1, 6, 7, 3), LANES, 3, 0),
    "one row of the result": ((1, 3, 9, 2), LANES, 3, 0),
    "uneven padding": ((2, 8, 9, 5), LANES, 3, ASYMMETRIC),
    "padding beyond the filter": ((1, 5, 4, 2), LANES, 3, 5),
    "the last band's rows twice": ((1, 37, 20, 2), LANES, 3, 1),
    "wide rows": ((1, 9, 300, 7), LANES, 3, 1),
}
every_case = pytest.mark.parametrize("case", CASES)


def arguments(case):
    shape, filters, kernel_h, padding = CASES[case]
    rng = np.random.default_rng(5)
    x, weight, bias = (
        rng.standard_normal(size).astype(np.float32)
        for size in (shape, (kernel_h, 3, shape[3], filters), filters)
    )
    return direct.layer(shape, (kernel_h, 3), shape[3], filters, 1, padding, 1, 1), x, weight, bias, padding


def exact(*arrays):
    return (array.astype(np.float64) for array in arrays)


@every_case
def test_forward(case, team):
    layer, x, weight, bias, padding = arguments(case)
    expected = reference.conv2d_forward(*exact(x, weight, bias), padding=padding)
    results = []
    for count in (1, 2):
        team(count)
        y = np.full(expected.shape, np.nan, np.float32)
        winograd_rows.forward(layer, x, weight, bias, y)
        assert error(y, expected) < BOUND
        results.append(y.tobytes())
    assert results[0] == results[1]
    winograd_rows.forward(layer, x, weight, None, y)
    assert error(y, expected - bias) < BOUND


@every_case
def test_same_result_around_the_caches(case, monkeypatch):
    layer, x, weight, bias, _ = arguments(case)
    memory = np.empty(len(x) * layer.out_image[0] * layer.out_image[1] * layer.filters + LANES, np.float32)
    first = -memory.ctypes.data % (4 * LANES) // 4
    y = memory[first : first + memory.size - LANES].reshape(len(x), *layer.out_image, layer.filters)
    e = pooled_convolution._epilogue(layer, 1, True, True)
    results = []
    for size in (1 << 30, 0):
        monkeypatch.setattr(elementwise, "cache_bytes", lambda level, size=size: size)
        argmax = np.full(y.shape, 99, np.uint8)
        y.fill(np.nan)
        winograd_rows.forward(layer, x, weight, bias, y)
        plain = y.tobytes()
        winograd_rows.forward(layer, x, weight, bias, y, e, argmax)
        results.append((plain, y.tobytes(), argmax.tobytes()))
    assert results[0] == results[1]


def windows(outputs, e):
    """The outputs by pooled pixel, and by pixel of its window on the last axis."""
    outputs = outputs[:, : e.out_h * e.pool_h, : e.out_w * e.pool_w]
    split = outputs.reshape(-1, e.out_h, e.pool_h, e.out_w, e.pool_w, e.filters).transpose(0, 1, 3, 5, 2, 4)
    return split.reshape(*split.shape[:4], -1)


@pytest.mark.parametrize("pool_size", [1, 2])
@every_case
def test_pooled(case, pool_size, team):
    layer, x, weight, bias, padding = arguments(case)
    if layer.out_image[0] < pool_size:
        pytest.skip("windows larger than the image")
    outputs = reference.conv2d_forward(*exact(x, weight, bias), padding=padding)
    tolerance = BOUND * np.abs(outputs).max()
    for relu, keeps in ((True, True), (False, True), (True, False), (False, False)):
        e = pooled_convolution._epilogue(layer, pool_size, relu, keeps)
        largest = windows(outputs, e).max(axis=-1)
        y, argmax = np.full(largest.shape, np.nan, np.float32), np.full(largest.shape, 99, np.uint8)
        team(1 + keeps)
        winograd_rows.forward(layer, x, weight, bias, y, e, argmax)
        np.testing.assert_allclose(y, np.maximum(largest, 0) if relu else largest, rtol=0, atol=tolerance)
        if not keeps:
            assert (argmax == 99).all()
            continue
        dead = argmax == DEAD
        assert np.array_equal(dead, relu & (y <= 0))
        taken = np.take_along_axis(windows(outputs, e), np.where(dead, 0, argmax)[..., None], axis=-1)
        # The first of several, but for those that are nearly the same.
        assert (dead | (taken[..., 0] >= largest - 2 * tolerance)).all()


def test_ties_and_nan_are_pooled_as_in_the_reference():
    layer, x, weight, bias, _ = arguments("three channels")
    x.fill(1)
    x[0, 3, 4, 1] = np.nan
    for relu in (True, False):
        e = pooled_convolution._epilogue(layer, 2, relu, True)
        y = np.empty((len(x), e.out_h, e.out_w, e.filters), np.float32)
        argmax = np.empty(y.shape, np.uint8)
        # Without weights all of a window's values are the bias.
        winograd_rows.forward(layer, x, np.zeros_like(weight), bias, y, e, argmax)
        seen = np.isnan(y)
        assert seen[0, 1:3, 1:3].all()
        assert not seen[1].any()
        assert np.array_equal(
            y[~seen], np.broadcast_to(np.maximum(bias, 0) if relu else bias, y.shape)[~seen]
        )
        assert (argmax[~seen & (y > 0)] == 0).all()
        assert (argmax[seen] == DEAD).all() == relu


@every_case
def test_gradient_to_the_input_of_a_layer_of_few_filters(case, team):
    mirrored, dout, weight, _, _ = arguments(case)
    layer = mirrored.exchanged
    if layer is None:
        pytest.skip("more padding than a convolution takes back")
    weight = np.ascontiguousarray(weight.transpose(0, 1, 3, 2))
    padding = layer.rows.padding, layer.columns.padding
    shape = (len(dout), *layer.image, layer.channels)
    expected = reference.conv2d_backward_input(*exact(dout, weight), shape, padding=padding)
    results = []
    for count in (1, 2):
        team(count)
        dx = np.full(shape, np.nan, np.float32)
        winograd_rows.backward_input(layer, dout, weight, dx)
        assert error(dx, expected) < BOUND
        results.append(dx.tobytes())
    assert results[0] == results[1]


def test_gradient_to_the_input_is_taken_here_for_few_filters():
    for filters, suits in ((1, False), (2, True), (15, True), (40, False)):
        layer = direct.layer((8, 32, 32, 4 * LANES), (3, 3), 4 * LANES, filters, 1, 1, 1, 1)
        assert winograd_rows.suits_input(layer, 8, np.dtype(np.float32)) == suits
        assert not winograd_rows.suits_input(layer, 8, np.dtype(np.float64))
    strided = direct.layer((8, 32, 32, 4 * LANES), (3, 3), 4 * LANES, 3, 2, 1, 1, 1)
    assert not winograd_rows.suits_input(strided, 8, np.dtype(np.float32))


@every_case
def test_gradient_to_the_weights_is_added(case, team):
    layer, x, weight, _, padding = arguments(case)
    dout = np.random.default_rng(6).standard_normal((len(x), *layer.out_image, layer.filters), np.float32)
    expected = reference.conv2d_backward_weight(*exact(dout, x), weight.shape[:2], padding=padding)
    results = []
    for count in (1, 2):
        team(count)
        dweight = np.ones_like(weight)
        winograd_rows_weights.add_weight_gradient(layer, dout, x, dweight)
        assert error(dweight - 1, expected) < BOUND
        results.append(dweight.tobytes())
    assert results[0] == results[1]


@pytest.mark.parametrize("pool_size", [1, 2])
@every_case
def test_gradients_behind_pooling_are_added(case, pool_size, team):
    layer, x, weight, bias, padding = arguments(case)
    if layer.out_image[0] < pool_size:
        pytest.skip("windows larger than the image")
    e = pooled_convolution._epilogue(layer, pool_size, True, True)
    y, argmax = reference.conv2d_pool_forward(x, weight, bias, pool_size, True, padding=padding)
    # What no window has is no gradient either.
    argmax[0, 0, 0, :3] = 4, 77, 254
    dout = np.random.default_rng(6).standard_normal(y.shape, np.float32)
    known = np.where(argmax < pool_size**2, argmax, DEAD).astype(np.uint8)
    expected = reference.conv2d_pool_backward_weight(
        *exact(dout), known, *exact(x), weight.shape[:2], pool_size, padding=padding
    )
    results = []
    for count in (1, 2):
        team(count)
        dweight, dbias = np.ones_like(weight), np.ones_like(bias)
        winograd_rows_weights.add_weight_gradient(layer, dout, x, dweight, e, argmax, dbias)
        assert error(dweight - 1, expected[0]) < BOUND
        assert error(dbias - 1, expected[1]) < BOUND
        results.append(dweight.tobytes() + dbias.tobytes())
    assert results[0] == results[1]


def test_nan_in_an_image_or_a_gradient_reaches_its_weights():
    layer, x, weight, _, _ = arguments("three channels")
    dout = np.ones((len(x), *layer.out_image, layer.filters), np.float32)
    for image, gradient, seen in ((x, None, np.index_exp[:, :, 1]), (None, dout, np.index_exp[..., 3])):
        images, gradients = x.copy(), dout.copy()
        if image is not None:
            images[1, 5, 5, 1] = np.nan
        if gradient is not None:
            gradients[0, 5, 9, 3] = np.nan
        dweight = np.zeros_like(weight)
        winograd_rows_weights.add_weight_gradient(layer, gradients, images, dweight)
        assert np.isnan(dweight[seen]).all()
        dweight[seen] = 0
        assert np.isfinite(dweight).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_tiles_that_see_them_and_no_others(poison):
    layer, x, weight, bias, _ = arguments("one channel")
    x[1, 5, 6, 0] = poison
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_rows.forward(layer, x, weight, bias, y)
    finite = np.isfinite(y)
    assert not finite[1, 4:7, 5:8].any()
    finite[1, 4:7, 4:8] = True
    assert finite.all()


def test_nan_in_the_weights_reaches_its_filter():
    layer, x, weight, bias, _ = arguments("three channels")
    weight[1, 2, 0, 3] = np.nan
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_rows.forward(layer, x, weight, bias, y)
    assert np.isnan(y[..., 3]).all()
    assert np.isfinite(np.delete(y, 3, axis=3)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_infinite_bias(value):
    layer, x, weight, bias, _ = arguments("three channels")
    bias[2] = value
    y = np.empty((len(x), *layer.out_image, layer.filters), np.float32)
    winograd_rows.forward(layer, x, weight, bias, y)
    assert (y[..., 2] == value).all()
    assert np.isfinite(np.delete(y, 2, axis=3)).all()


def test_public_functions_use_it_only_when_switched_on(switch):
    images = 3  # that fill no vector of any width, or vectors of images would take them
    rng = np.random.default_rng(7)
    x = rng.standard_normal((images, 32, 32, 3), np.float32)
    weight = rng.standard_normal((3, 3, 3, 4 * LANES), np.float32)
    layer = direct.layer(x.shape, (3, 3), 3, 4 * LANES, 1, 1, 1, 1)
    y = np.empty((images, 32, 32, 4 * LANES), np.float32)
    winograd_rows.forward(layer, x, weight, None, y)
    e = pooled_convolution._epilogue(layer, 2, True, False)
    pooled = np.empty((images, 16, 16, 4 * LANES), np.float32)
    winograd_rows.forward(layer, x, weight, None, pooled, e)
    dweight = np.zeros_like(weight)
    winograd_rows_weights.add_weight_gradient(layer, y, x, dweight)
    keeps = e._replace(keeps=1)
    argmax = np.empty(pooled.shape, np.uint8)
    winograd_rows.forward(layer, x, weight, None, pooled, keeps, argmax)
    dpooled, dbias = np.zeros_like(weight), np.zeros(4 * LANES, np.float32)
    winograd_rows_weights.add_weight_gradient(layer, pooled, x, dpooled, keeps, argmax, dbias)
    for enabled in (True, False):
        switch(enabled)
        behind, _ = cpu.conv2d_pool_backward_weight(pooled, argmax, x, 3, 2, padding=1)
        pools = winograd_rows_weights.suits_pooled(layer, images, x.dtype, keeps)
        assert np.array_equal(behind, dpooled) is pools
        # With vectors of 256 bits it takes as long as the direct way.
        suits = winograd_rows_weights.suits(layer, images, x.dtype)
        assert suits <= enabled
        assert np.array_equal(cpu.conv2d_backward_weight(y, x, 3, padding=1), dweight) is suits
        assert np.array_equal(cpu.conv2d_forward(x, weight, padding=1), y) is enabled
        assert np.array_equal(cpu.conv2d_pool_forward(x, weight, None, 2, padding=1)[0], pooled) is enabled


UNFIT = {
    # x, filters, kernel, stride, dilation, groups, dtype
    "stride 2": ((64, 20, 20, 3), LANES, 3, 2, 1, 1, np.float32),
    "dilated": ((64, 20, 20, 3), LANES, 3, 1, 2, 1, np.float32),
    "groups": ((64, 20, 20, 4), LANES, 3, 1, 1, 2, np.float32),
    "5 x 5": ((64, 20, 20, 3), LANES, 5, 1, 1, 1, np.float32),
    "rows of three": ((64, 20, 5, 3), LANES, 3, 1, 1, 1, np.float32),
    "rows of a tile and one": ((64, 20, 7, 3), LANES, 3, 1, 1, 1, np.float32),
    "few filters": ((64, 20, 20, 3), LANES - 1, 3, 1, 1, 1, np.float32),
    "no channels": ((64, 20, 20, 0), LANES, 3, 1, 1, 1, np.float32),
    "many channels": ((64, 20, 20, 32), LANES, 3, 1, 1, 1, np.float32),
    "float64": ((64, 20, 20, 3), LANES, 3, 1, 1, 1, np.float64),
}


@pytest.mark.parametrize("case", UNFIT)
def test_not_used_where_it_is_no_use(case):
    shape, filters, kernel, stride, dilation, groups, dtype = UNFIT[case]
    layer = direct.layer(shape, kernel, None, filters, stride, 0, dilation, groups)
    assert not winograd_rows.suits(layer, shape[0], np.dtype(dtype))
    assert not winograd_rows_weights.suits(layer, shape[0], np.dtype(dtype))


def test_used_where_windows_are_known():
    layer = direct.layer((64, 20, 20, 3), 3, None, 4 * LANES, 1, 1, 1, 1)
    fits = {
        size: winograd_rows.suits(
            layer, 64, np.dtype(np.float32), pooled_convolution._epilogue(layer, size, True, True)
        )
        for size in (1, 2, 3, (1, 2))
    }
    assert fits == {1: True, 2: True, 3: False, (1, 2): False}
    assert winograd_rows.suits(layer, 64, np.dtype(np.float32))
