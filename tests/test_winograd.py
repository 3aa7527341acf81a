"""Winograd's algorithm: exact to a documented bound, at every edge, and only where it is wanted."""

import numpy as np
import pytest
from parity import error

import fastcnn
from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import direct, pooled_convolution, simd, winograd, winograd_tiling, winograd_weights

# The largest error, in units of the largest result, for standard normal images and weights.
BOUND = 2e-5
BOUND_3X3 = 7e-6


CASES = [
    # x, filters, padding
    pytest.param((2, 8, 8, 32), 32, 1, id="whole tiles"),
    pytest.param((3, 7, 9, 48), 32, 1, id="cut tiles"),
    pytest.param((1, 16, 15, 32), 48, 0, id="no padding"),
    pytest.param((2, 9, 8, 32), 80, ((0, 2), (2, 1)), id="asymmetric"),
    pytest.param((2, 7, 6, 64), 32, 5, id="padding beyond the filter"),
    pytest.param((8, 4, 4, 32), 64, 1, id="a tile an image"),
    pytest.param((9, 3, 3, 32), 32, 1, id="less than a tile an image"),
    pytest.param((1, 3, 290, 32), 32, 2, id="long rows"),
    pytest.param((37, 4, 4, 160), 192, 1, id="many tiles"),
    pytest.param((3, 7, 8, 512), 512, 1, id="few tiles, many weights"),
    pytest.param((1, 2, 290, 176), 208, 1, id="few tiles, many weights, none in whole chunks or panels"),
    pytest.param((1, 53, 30, 192), 176, 1, id="a few tiles more"),
    pytest.param((2, 9, 8, 16), 48, 1, id="a vector of channels"),
    pytest.param((2, 9, 8, 33), 16, 1, id="a vector of filters"),
    pytest.param((2, 9, 8, 33), 49, 1, id="one more than whole vectors"),
    pytest.param((3, 8, 7, 63), 47, 0, id="one less than whole vectors"),
    pytest.param((2, 9, 8, 20), 27, 1, id="more than a vector, less than two"),
    pytest.param((2, 8, 7, 17), 31, 0, id="one more than a vector, one less than two"),
    pytest.param((20, 8, 9, 100), 130, 1, id="cut vectors in every square"),
    pytest.param((1, 2, 290, 195), 209, 1, id="few tiles, many weights, in cut vectors"),
]

OTHER_FILTERS = [
    # x, filters, padding, kernel, dilation
    pytest.param((3, 13, 15, 32), 48, 2, (3, 3), 2, id="dilated"),
    pytest.param((2, 11, 14, 33), 49, ((1, 2), (0, 3)), (3, 3), (2, 3), id="dilated by rows and columns"),
    pytest.param((2, 9, 30, 32), 32, 0, (3, 3), (1, 4), id="dilated along rows"),
    pytest.param((2, 3, 9, 32), 32, 5, (3, 3), 5, id="phases without pixels"),
    pytest.param((7, 12, 12, 256), 256, 2, (3, 3), 2, id="few tiles, many weights, dilated"),
    pytest.param((2, 16, 16, 32), 32, 2, (5, 5), 1, id="5 x 5"),
    pytest.param((2, 16, 16, 21), 18, 2, (5, 5), 1, id="5 x 5, between one vector and two"),
    pytest.param((3, 13, 11, 35), 41, ((0, 2), (3, 1)), (5, 5), 1, id="5 x 5, cut vectors"),
    pytest.param((4, 12, 13, 256), 160, 2, (5, 5), 1, id="5 x 5, few tiles, many weights"),
    pytest.param((40, 8, 9, 512), 32, 0, (5, 5), 1, id="5 x 5, many channels"),
    pytest.param((60, 20, 20, 16), 32, 2, (5, 5), 1, id="5 x 5, many pixels"),
    pytest.param((3, 9, 12, 32), 32, 0, (4, 4), 1, id="4 x 4"),
    pytest.param((2, 14, 14, 32), 32, 3, (7, 7), 1, id="7 x 7"),
    pytest.param((2, 12, 12, 128), 96, 3, (7, 7), 1, id="7 x 7, the most channels"),
    pytest.param((3, 18, 17, 48), 33, 4, (9, 10), 1, id="9 x 10"),
    pytest.param((3, 13, 14, 32), 48, 2, (5, 8), (1, 2), id="5 x 8, dilated"),
    pytest.param((3, 13, 14, 48), 33, 1, (3, 2), 1, id="3 x 2"),
]

GROUPED = [
    # x, filters, padding, kernel, dilation, groups
    pytest.param((3, 9, 10, 32), 32, 1, (3, 3), 1, 2, id="a vector a group"),
    pytest.param((2, 8, 7, 192), 224, 1, (3, 3), 1, 4, id="no whole panels"),
    pytest.param((2, 9, 8, 99), 60, ((0, 2), (2, 1)), (3, 3), 1, 3, id="cut vectors"),
    pytest.param((9, 8, 8, 1024), 1024, 1, (3, 3), 1, 32, id="many groups"),
    pytest.param((2, 3, 290, 51), 54, 1, (3, 3), 1, 3, id="long rows"),
    pytest.param((2, 11, 14, 66), 96, 2, (3, 3), (2, 1), 2, id="dilated"),
    pytest.param((3, 13, 11, 66), 70, 2, (5, 5), 1, 2, id="5 x 5"),
    pytest.param((3, 13, 11, 66), 70, (2, 1), (5, 3), 1, 2, id="5 x 3, filled up"),
    pytest.param((3, 13, 11, 64), 128, (1, 2), (4, 5), 1, 4, id="4 x 5, filled up"),
]


def arguments(x_shape, filters, padding, kernel=(3, 3), dilation=1, groups=1, dtype=np.float32):
    rng = np.random.default_rng(7)
    x = rng.standard_normal(x_shape)
    weight = rng.standard_normal((*kernel, x_shape[3] // groups, filters))
    bias = rng.standard_normal(filters)
    layer = direct.layer(x_shape, kernel, None, filters, 1, padding, dilation, groups)
    dout = rng.standard_normal((x_shape[0], *layer.out_image, filters))
    return layer, *(array.astype(dtype) for array in (x, weight, bias, dout))


def passes(layer, x, weight, bias, dout):
    """Results of all three, into arrays that hold NaN where these are overwritten."""
    y, dx, dweight = np.full_like(dout, np.nan), np.full_like(x, np.nan), np.zeros_like(weight)
    winograd.forward(layer, x, weight, bias, y)
    winograd.backward_input(layer, dout, weight, dx)
    winograd_weights.add_weight_gradient(layer, dout, x, dweight)
    return y, dx, dweight


@pytest.mark.parametrize(("x_shape", "filters", "padding"), CASES)
def test_error_is_within_the_documented_bound(x_shape, filters, padding):
    layer, *arrays = arguments(x_shape, filters, padding)
    y, dx, dweight = passes(layer, *arrays)
    x, weight, bias, dout = (array.astype(np.float64) for array in arrays)
    assert error(y, reference.conv2d_forward(x, weight, bias, padding=padding)) < BOUND_3X3
    assert error(dx, reference.conv2d_backward_input(dout, weight, x_shape, padding=padding)) < BOUND_3X3
    assert error(dweight, reference.conv2d_backward_weight(dout, x, 3, padding=padding)) < BOUND_3X3


@pytest.mark.parametrize(
    ("x_shape", "filters", "padding", "kernel", "dilation", "groups"),
    [
        *(pytest.param(*case.values, 1, id=case.id) for case in OTHER_FILTERS),
        *(pytest.param(*case.values, id=f"{case.id}, grouped") for case in GROUPED),
    ],
)
def test_error_of_others_is_within_their_bound(x_shape, filters, padding, kernel, dilation, groups):
    layer, *arrays = arguments(x_shape, filters, padding, kernel, dilation, groups)
    y, dx, dweight = passes(layer, *arrays)
    x, weight, bias, dout = (array.astype(np.float64) for array in arrays)
    how = {"padding": padding, "dilation": dilation, "groups": groups}
    assert error(y, reference.conv2d_forward(x, weight, bias, **how)) < BOUND
    assert error(dx, reference.conv2d_backward_input(dout, weight, x_shape, **how)) < BOUND
    assert error(dweight, reference.conv2d_backward_weight(dout, x, kernel, **how)) < BOUND


@pytest.mark.parametrize(
    ("x_shape", "filters", "padding", "kernel", "dilation", "groups"),
    [
        *(pytest.param(*case.values, (3, 3), 1, 1, id=case.id) for case in CASES),
        *(pytest.param(*case.values, 1, id=case.id) for case in OTHER_FILTERS),
        *(pytest.param(*case.values, id=f"{case.id}, grouped") for case in GROUPED),
    ],
)
def test_threads_do_not_change_a_bit(x_shape, filters, padding, kernel, dilation, groups, team):
    layer, *arrays = arguments(x_shape, filters, padding, kernel, dilation, groups)
    results = []
    for count in (1, 2):
        team(count)
        results.append([array.tobytes() for array in passes(layer, *arrays)])
    assert results[0] == results[1]


def test_public_functions_use_it_only_when_switched_on(switch):
    layer, x, weight, bias, dout = arguments((8, 8, 8, 32), 32, 1)
    expected = passes(layer, x, weight, bias, dout)
    for enabled in (True, False):
        switch(enabled)
        assert fastcnn.get_winograd() is enabled
        results = (
            cpu.conv2d_forward(x, weight, bias, padding=1),
            cpu.conv2d_backward_input(dout, weight, x.shape, padding=1),
            cpu.conv2d_backward_weight(dout, x, 3, padding=1),
        )
        for actual, winograds in zip(results, expected, strict=True):
            assert np.array_equal(actual, winograds) is enabled
            assert error(actual, winograds) < BOUND


def test_gradient_to_the_weights_is_added():
    _, x, _, _, dout = arguments((2, 8, 8, 32), 48, 1)
    once = cpu.conv2d_backward_weight(dout, x, 3, padding=1)
    out = np.ones_like(once)
    cpu.conv2d_backward_weight(dout, x, 3, padding=1, out=out, accumulate=True)
    assert np.array_equal(out, 1 + once)


def test_switch_takes_a_bool():
    with pytest.raises(TypeError, match="enabled: expected a bool, got 1"):
        fastcnn.set_winograd(1)


UNFIT = [
    # x, filters, kernel, stride, padding, dilation, groups
    pytest.param((8, 8, 8, 64), 64, 3, 2, 1, 1, 1, id="stride 2"),
    pytest.param((8, 8, 8, 64), 64, 3, 1, 4, 4, 1, id="dilated tiles of few pixels"),
    pytest.param((8, 8, 8, 96), 90, 3, 1, 1, 1, 6, id="groups of few filters"),
    pytest.param((8, 8, 8, 90), 96, 3, 1, 1, 1, 6, id="groups of few channels"),
    pytest.param((8, 16, 16, 64), 64, 7, 1, 3, 1, 2, id="groups and pieces"),
    pytest.param((8, 8, 8, 64), 64, 2, 1, 1, 1, 1, id="2 x 2"),
    pytest.param((8, 8, 8, 64), 64, 1, 1, 1, 1, 1, id="1 x 1"),
    pytest.param((8, 8, 8, 64), 64, (1, 7), 1, 3, 1, 1, id="1 x 7"),
    pytest.param((8, 8, 8, 129), 64, 7, 1, 3, 1, 1, id="7 x 7 of too many channels"),
    pytest.param((5, 8, 8, 64), 64, 5, 1, 2, 1, 1, id="5 x 5 of few tiles"),
    pytest.param((8, 8, 8, 15), 64, 3, 1, 1, 1, 1, id="few channels"),
    pytest.param((8, 8, 8, 64), 15, 3, 1, 1, 1, 1, id="few filters"),
    pytest.param((1, 8, 8, 64), 64, 3, 1, 1, 1, 1, id="few tiles"),
    pytest.param((99, 1, 8, 64), 64, 3, 1, 1, 1, 1, id="tiles of few pixels"),
    pytest.param((99, 3, 3, 64), 64, 3, 1, 0, 1, 1, id="tiles of one output"),
]


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "stride", "padding", "dilation", "groups"), UNFIT)
def test_not_used_where_it_is_no_use(x_shape, filters, kernel, stride, padding, dilation, groups):
    layer = direct.layer(x_shape, kernel, None, filters, stride, padding, dilation, groups)
    assert not winograd.suits(layer, x_shape[0], np.dtype(np.float32))


def test_float64_is_convolved_directly():
    layer = direct.layer((2, 8, 8, 32), 3, 32, 32, 1, 1, 1, 1)
    assert winograd.suits(layer, 2, np.dtype(np.float32))
    assert not winograd.suits(layer, 2, np.dtype(np.float64))


POOLED = [
    # x, filters, padding, pool_size
    pytest.param((3, 14, 14, 32), 48, 1, 2, id="2 x 2"),
    pytest.param((2, 24, 20, 32), 64, 1, (2, 3), id="rows of windows end inside of tiles"),
    pytest.param((5, 9, 11, 32), 32, 0, (4, 1), id="rows are dropped"),
    pytest.param((7, 5, 6, 64), 32, ((0, 1), (2, 1)), 2, id="asymmetric"),
    pytest.param((40, 4, 4, 32), 32, 1, 4, id="a window an image"),
    pytest.param((5, 8, 9, 32), 32, 1, 1, id="ReLU alone"),
    pytest.param((1, 30, 200, 32), 32, 1, 2, id="long rows"),
    pytest.param((5, 10, 12, 256), 144, 1, 2, id="few tiles, many weights"),
    pytest.param((3, 10, 12, 35), 70, 1, 2, id="cut vectors"),
    pytest.param((3, 12, 12, 32), 32, 1, 3, id="windows that tiles would cut"),
    pytest.param((1, 9, 270, 32), 32, 1, 2, id="rows that blocks would cut"),
]


@pytest.mark.parametrize(("x_shape", "filters", "padding", "pool_size"), POOLED)
def test_pooled_convolution_ends_in_the_same(x_shape, filters, padding, pool_size, team):
    _, x, weight, bias, _ = arguments(x_shape, filters, padding)
    exact = [array.astype(np.float64) for array in (x, weight, bias)]
    expected, expected_argmax = reference.conv2d_pool_forward(*exact, pool_size, padding=padding)
    results = []
    for threads_used in (1, 2):
        team(threads_used)
        y, argmax = cpu.conv2d_pool_forward(x, weight, bias, pool_size, padding=padding)
        results.append((y.tobytes(), argmax.tobytes()))
        assert error(y, expected) < BOUND
        assert np.mean(argmax != expected_argmax) < 1e-3  # where two pixels are nearly the same
    assert results[0] == results[1]


BY_TILES = ("sparse", "dense" if simd.FULL_WIDTH else "sparse")
POOLED_GRADIENTS = [
    # x, filters, pool_size, how the gradients of weights and input are done
    pytest.param((2, 9, 9, 32), 48, 2, ("sparse", "sparse"), id="sparse"),
    pytest.param((2, 8, 8, 32), 48, 2, BY_TILES, id="whole tiles"),
    pytest.param((2, 9, 9, 64), 128, 2, ("sparse", "dense"), id="many filters"),
    pytest.param((2, 8, 7, 256), 256, 2, ("dense", "dense"), id="more than the cache holds"),
    pytest.param((2, 9, 8, 32), 48, 1, ("dense", "dense"), id="ReLU alone"),
    pytest.param((1, 6, 6, 32), 48, 1, ("dense", "dense"), id="few tiles"),
]


@pytest.mark.parametrize(("x_shape", "filters", "pool_size", "ways"), POOLED_GRADIENTS)
def test_pooled_gradients_are_the_same_any_way(x_shape, filters, pool_size, ways):
    layer, x, weight, bias, _ = arguments(x_shape, filters, 1)
    e = pooled_convolution._epilogue(layer, pool_size, True, True)
    assert pooled_convolution._ways(layer, e, x_shape[0], x.dtype) == ways
    y, argmax = cpu.conv2d_pool_forward(x, weight, bias, pool_size, padding=1)
    dout = np.random.default_rng(8).standard_normal(y.shape).astype(np.float32)
    exact = (dout.astype(np.float64), argmax)
    dx = cpu.conv2d_pool_backward_input(dout, argmax, weight, x_shape, pool_size, padding=1)
    expected = reference.conv2d_pool_backward_input(
        *exact, weight.astype(np.float64), x_shape, pool_size, padding=1
    )
    assert error(dx, expected) < BOUND
    out = np.ones_like(weight), np.ones_like(bias)
    cpu.conv2d_pool_backward_weight(
        dout, argmax, x, 3, pool_size, padding=1, out=out[0], out_bias=out[1], accumulate=True
    )
    expected = reference.conv2d_pool_backward_weight(*exact, x.astype(np.float64), 3, pool_size, padding=1)
    for actual, gradient in zip(out, expected, strict=True):
        assert error(actual - 1, gradient) < BOUND


def test_nothing_beyond_channels_and_filters_is_seen():
    """Scratch holds NaN from a larger layer when a smaller one's vectors are not filled."""
    exact = arguments((2, 9, 8, 35), 41, 1)
    clean = [array.copy() for array in passes(*exact)]
    larger = arguments((2, 9, 8, 64), 64, 1)
    passes(larger[0], *(np.full_like(array, np.nan) for array in larger[1:]))
    for before, after in zip(clean, passes(*exact), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_infinity_reach_the_tiles_that_see_them_and_no_others(poison):
    layer, x, weight, bias, dout = arguments((2, 12, 12, 32), 32, 1)
    x[1, 5, 6, 3] = poison
    y = np.empty_like(dout)
    winograd.forward(layer, x, weight, bias, y)
    expected = np.zeros(y.shape, bool)
    expected[1, 4:8, 4:8] = True  # the only window with pixel (5, 6): rows and columns 3 to 8
    assert np.array_equal(np.isnan(y), expected)
    with np.errstate(invalid="ignore"):
        direct_result = reference.conv2d_forward(x, weight, bias, padding=1)
    assert np.all(expected | np.isfinite(direct_result))


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"), [((3, 3), 1, 1), ((3, 3), 2, 2), ((5, 5), 2, 1), ((7, 7), 3, 1)]
)
def test_nan_in_an_image_reaches_the_gradients_of_its_channel(kernel, padding, dilation):
    layer, x, weight, _, dout = arguments((2, 12, 12, 48), 32, padding, kernel, dilation)
    x[1, 5, 6, 40] = np.nan
    dweight = np.zeros_like(weight)
    winograd_weights.add_weight_gradient(layer, dout, x, dweight)
    assert np.isnan(dweight[:, :, 40]).all()
    assert np.isfinite(np.delete(dweight, 40, axis=2)).all()


@pytest.mark.parametrize(("padding", "kernel", "dilation"), [(2, (3, 3), 2), (2, (5, 5), 1), (3, (7, 7), 1)])
def test_nan_in_an_image_reaches_all_that_it_should(padding, kernel, dilation):
    layer, x, weight, bias, dout = arguments((2, 13, 12, 32), 32, padding, kernel, dilation)
    x[1, 5, 6, 3] = np.nan
    y = np.empty_like(dout)
    winograd.forward(layer, x, weight, bias, y)
    expected = np.isnan(reference.conv2d_forward(x, weight, bias, padding=padding, dilation=dilation))
    assert np.isnan(y[expected]).all()
    assert np.isfinite(y[0]).all()


def test_nan_in_the_weights_reaches_its_filter():
    layer, x, weight, bias, dout = arguments((2, 8, 8, 32), 48, 1)
    weight[1, 1, 5, 40] = np.nan
    y = np.empty_like(dout)
    winograd.forward(layer, x, weight, bias, y)
    assert np.array_equal(np.isnan(y).all(axis=(0, 1, 2)), np.arange(48) == 40)
    assert np.isnan(y).any(axis=(0, 1, 2)).sum() == 1


@pytest.mark.parametrize("tile_columns", [1, 2, 3, 5, 8, 56, 64, 65, 500])
def test_blocks_are_whole_rows_of_tiles_where_these_are_short(tile_columns):
    block = winograd_tiling.block_tiles(tile_columns, 10_000)
    assert 0 < block <= 64
    assert block % tile_columns == 0 or tile_columns > 64
    assert winograd_tiling.block_tiles(tile_columns, 3) == 3


def test_panels_are_whole_vectors_of_the_filters():
    """None begins before the first filter, and together they have all."""
    lanes, of = simd.lanes(np.float32), winograd_tiling.filters_of(arguments((1, 8, 8, 32), 32, 1)[0])
    for size in range(1, 100):
        assert winograd._fills_vectors(size) == (size >= max(lanes, winograd._FEWEST_CHANNELS))
        if not winograd._fills_vectors(size):
            continue
        g, _ = winograd_tiling.tiling((1, 8, 8, 32), (8, 8, size), (1, 1), of)
        seen = np.zeros(size, bool)
        for panel in range(-(-size // g.panel)):
            first, many = winograd_tiling.panel_filters.py_func(g, panel, lanes)
            assert first >= 0
            assert many % lanes == 0
            seen[first : first + many] = True
        assert seen.all()
