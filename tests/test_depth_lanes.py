"""Convolutions of few results: right at every edge, on any number of threads, used where they are faster."""

import numpy as np
import pytest
from parity import assert_same_bits, error

import fastcnn
from fastcnn.kernels import reference
from fastcnn.kernels.cpu import convolution, depth_lanes, direct, pooled_convolution, simd
from fastcnn.kernels.cpu.epilogue import NO_EPILOGUE

DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}
CASES = {
    # x, filters, kernel, how
    "whole vectors": ((2, 12, 13, 32), 1, (3, 3), {"padding": 1}),
    "one element more": ((1, 11, 13, 33), 2, (3, 3), {"padding": 1}),
    "less than a vector": ((2, 9, 12, 5), 3, (1, 2), {}),
    "one channel": ((1, 9, 12, 1), 4, (5, 3), {"padding": 2}),
    "read in place": ((3, 40, 17, 20), 4, (2, 3), {}),
    "1 x 1": ((2, 17, 40, 70), 3, (1, 1), {}),
    "fewer pixels than a vector": ((1, 4, 5, 40), 1, (3, 3), {}),
    "one pixel": ((1, 1, 1, 7), 3, (3, 3), {"padding": 1}),
    "strided": ((2, 21, 18, 24), 3, (4, 3), {"stride": (2, 3), "padding": ((1, 0), (2, 1))}),
    "dilated rows": ((1, 15, 16, 24), 2, (3, 3), {"padding": 2, "dilation": (2, 1)}),
    "dilated columns": ((2, 12, 20, 19), 1, (3, 3), {"padding": 3, "dilation": (1, 3)}),
    "more padding than kernel": ((1, 4, 5, 20), 3, (2, 2), {"padding": 3}),
    "five results": ((2, 9, 11, 33), 5, (3, 3), {"padding": 1}),
    "six results, strided": ((2, 13, 12, 20), 6, (3, 3), {"stride": 2, "padding": 1}),
    "seven results": ((1, 8, 9, 40), 7, (1, 1), {}),
    "eight results, dilated": ((2, 10, 11, 17), 8, (3, 2), {"padding": 2, "dilation": 2}),
    "blocks of rows": ((2, 70, 33, 16), 3, (3, 3), {"padding": 1}),
    "more weights than are near": ((1, 3, 4, 31), 8, (6, 6), {"padding": 4, "dilation": (1, 2)}),
    "nine results": ((2, 9, 11, 33), 9, (3, 3), {"padding": 1}),
    "ten results, strided": ((2, 13, 12, 20), 10, (3, 3), {"stride": 2, "padding": 1}),
    "nineteen results, dilated": ((1, 10, 11, 17), 19, (2, 3), {"padding": 2, "dilation": 2}),
    "twelve results of one pixel": ((1, 3, 3, 16), 12, (3, 3), {}),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
WITHOUT_STRIDE = [case for case, (*_, how) in CASES.items() if how.get("stride", 1) == 1]
EVERY_DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])
BOUNDS = {np.float32: 1e-6, np.float64: 1e-15}


def arguments(case, dtype):
    x_shape, filters, kernel, _ = CASES[case]
    rng = np.random.default_rng(3)
    shapes = x_shape, (*kernel, x_shape[3], filters), (filters,)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def layer_of(x_shape, filters, kernel, how):
    return direct.layer(x_shape, kernel, x_shape[3], filters, *({**DEFAULTS, **how}.values()), 1)


def exact(*arrays):
    return (array.astype(np.float64) for array in arrays)


@EVERY_DTYPE
@EVERY_CASE
def test_forward(case, dtype):
    x, weight, bias = arguments(case, dtype)
    how = CASES[case][3]
    expected = reference.conv2d_forward(*exact(x, weight, bias), **how)
    y = np.full(expected.shape, np.nan, dtype)
    depth_lanes.forward(layer_of(*CASES[case]), x, weight, bias, y)
    assert error(y, expected) < BOUNDS[dtype]
    depth_lanes.forward(layer_of(*CASES[case]), x, weight, None, y)
    assert error(y, expected - bias) < BOUNDS[dtype]


@EVERY_DTYPE
@pytest.mark.parametrize("case", WITHOUT_STRIDE)
def test_backward_input(case, dtype):
    """The layers' other way round: from few filters back to few channels."""
    x_shape, channels, kernel, how = CASES[case]
    x_shape, filters = (*x_shape[:3], channels), x_shape[3]
    layer = layer_of(x_shape, filters, kernel, how)
    rng = np.random.default_rng(4)
    dout = rng.standard_normal((x_shape[0], *layer.out_image, filters)).astype(dtype)
    weight = rng.standard_normal((*kernel, channels, filters)).astype(dtype)
    dx = np.full(x_shape, np.nan, dtype)
    depth_lanes.backward_input(layer, dout, weight, dx)
    assert error(dx, reference.conv2d_backward_input(*exact(dout, weight), x_shape, **how)) < BOUNDS[dtype]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2, (3, 2)])
@pytest.mark.parametrize(
    "case",
    [
        "whole vectors",
        "one element more",
        "strided",
        "blocks of rows",
        "five results",
        "seven results",
        "more weights than are near",
        "ten results, strided",
    ],
)
def test_pooled_forward(case, pool, relu):
    x, weight, bias = arguments(case, np.float32)
    expected, where = reference.conv2d_pool_forward(*exact(x, weight, bias), pool, relu, **CASES[case][3])
    layer = layer_of(*CASES[case])
    y, argmax = np.full(expected.shape, np.nan, np.float32), np.empty(where.shape, np.uint8)
    e = pooled_convolution._epilogue(layer, pool, relu, True)
    depth_lanes.forward(layer, x, weight, bias, y, e, argmax)
    assert error(y, expected) < 1e-6
    np.testing.assert_array_equal(argmax, where)


@EVERY_CASE
def test_bits_do_not_depend_on_threads(case, team, monkeypatch):
    monkeypatch.setattr(depth_lanes, "MULTIPLY_ADDS_PER_BYTE", 1e-6)
    x, weight, bias = arguments(case, np.float32)
    layer = layer_of(*CASES[case])
    shape = reference.conv2d_forward(x, weight, bias, **CASES[case][3]).shape
    results = []
    for threads in (1, 2, 2):
        team(threads)
        results.append(np.full(shape, np.nan, np.float32))
        depth_lanes.forward(layer, x, weight, bias, results[-1])
    for result in results[1:]:
        assert_same_bits([result], results[:1], case)


def test_a_pixel_that_is_no_number_reaches_its_windows_alone():
    """The last vector of a row of taps reads no further than the row, whatever lies there."""
    x, weight, bias = arguments("one element more", np.float32)
    layer = layer_of(*CASES["one element more"])
    y = np.empty((1, 11, 13, 2), np.float32)
    x[0, 5, 6] = np.nan
    depth_lanes.forward(layer, x, weight, bias, y)
    windows = np.zeros(y.shape, bool)
    windows[0, 4:7, 5:8] = True
    np.testing.assert_array_equal(np.isnan(y), windows)


def way_of(x_shape, filters, kernel, how, dtype=np.float32):
    layer = layer_of(x_shape, filters, kernel, how)
    return convolution.forward_way(layer, x_shape[0], np.dtype(dtype), NO_EPILOGUE, fastcnn.get_winograd())


wide = pytest.mark.skipif(simd.VECTOR_BITS < 256, reason="few results leave few lanes empty")


@wide
@pytest.mark.parametrize(
    ("x_shape", "filters", "kernel", "used"),
    [
        pytest.param((1, 64, 64, 64), 3, (3, 3), True, id="a decoder's last layer"),
        pytest.param((16, 64, 64, 64), 3, (3, 3), True, id="a batch of it"),
        pytest.param((4, 32, 32, 256), 1, (1, 1), True, id="a map of one value"),
        pytest.param((4, 32, 32, 16), 4, (1, 1), False, id="sums too short"),
        pytest.param((1, 8, 8, 20), 1, (1, 1), False, id="too little work"),
        pytest.param((4, 32, 32, 64), 16, (3, 3), False, id="filters that fill vectors"),
    ],
)
def test_where_it_is_used(x_shape, filters, kernel, used):
    assert (way_of(x_shape, filters, kernel, {}) is depth_lanes.forward) == used


def test_panels_leave_their_neighbours_alone():
    """Each pixel's results are written in pieces: nothing before, between or behind them is touched."""
    x, weight, bias = arguments("ten results, strided", np.float32)
    layer = layer_of(*CASES["ten results, strided"])
    memory = np.full((4, *layer.out_image, 10), 7, np.float32)
    depth_lanes.forward(layer, x, weight, bias, memory[1:3])
    assert (memory[[0, 3]] == 7).all()


@pytest.mark.skipif(simd.VECTOR_BITS < 512, reason="eight results leave no lanes empty")
@pytest.mark.parametrize(
    ("x_shape", "filters", "kernel", "used"),
    [
        pytest.param((1, 32, 32, 128), 8, (5, 5), True, id="one image"),
        pytest.param((64, 14, 14, 64), 8, (3, 3), True, id="many channels"),
        pytest.param((64, 14, 14, 32), 8, (3, 3), False, id="images in lanes, and Winograd"),
        pytest.param((64, 14, 14, 64), 8, (5, 5), False, id="the same with large filters"),
        pytest.param((8, 28, 28, 64), 10, (3, 3), True, id="ten results, too few images for the lanes"),
        pytest.param((64, 28, 28, 64), 10, (3, 3), False, id="ten results, enough images"),
        pytest.param((1, 8, 8, 64), 10, (3, 3), False, id="ten results, few pixels"),
        pytest.param((8, 28, 28, 64), 13, (3, 3), False, id="most of a vector"),
        pytest.param((4, 28, 28, 1024), 10, (1, 1), False, id="ten results, one tap"),
    ],
)
def test_where_more_results_use_it(x_shape, filters, kernel, used):
    assert (way_of(x_shape, filters, kernel, {}) is depth_lanes.forward) == used


@wide
@pytest.mark.parametrize(
    ("channels", "filters", "how", "used"),
    [(1, 32, {}, True), (3, 64, {}, True), (3, 64, {"stride": 2}, False), (16, 64, {}, False)],
)
def test_where_the_gradient_to_the_input_uses_it(channels, filters, how, used):
    layer = layer_of((64, 32, 32, channels), filters, (3, 3), how)
    way = convolution.input_way(layer, 64, np.dtype(np.float32), fastcnn.get_winograd())
    assert (way is depth_lanes.backward_input) == used
