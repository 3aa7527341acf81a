"""Convolution of few pixels: right at every edge, on any number of threads, and used where it is wanted."""

import numpy as np
import pytest
from ops import OPERATIONS
from parity import assert_close

import fastcnn
from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import convolution, direct, few_pixels
from fastcnn.kernels.cpu.epilogue import NO_EPILOGUE, Epilogue

CASES = [
    # x, filters, kernel, how
    pytest.param((1, 4, 4, 128), 64, (3, 3), {"padding": 1}, id="blocks and panels are whole"),
    pytest.param((1, 4, 4, 70), 96, (3, 3), {"padding": 1}, id="a last block of six channels"),
    pytest.param((1, 7, 5, 65), 33, (3, 3), {"padding": 1}, id="one channel and one filter more"),
    pytest.param((3, 3, 4, 9), 47, (3, 3), {"padding": 2}, id="some images, panels that overlap"),
    pytest.param((1, 1, 1, 200), 40, (3, 3), {"padding": 1}, id="taps that see only padding"),
    pytest.param((2, 6, 9, 16), 16, (5, 4), {"padding": ((0, 3), (2, 1)), "stride": (2, 1)}, id="strided"),
    pytest.param((1, 9, 8, 12), 20, (3, 2), {"padding": 2, "dilation": (2, 3)}, id="dilated"),
    pytest.param((5, 7, 7, 24), 24, (1, 1), {}, id="one tap"),
    pytest.param((1, 16, 16, 10), 10, (3, 3), {"padding": 1}, id="less than a vector of filters"),
    pytest.param((2, 3, 5, 8), 1, (2, 3), {}, id="one filter"),
    pytest.param((1, 8, 8, 1), 17, (3, 3), {"padding": 1}, id="one channel"),
    pytest.param(
        (150, 2, 2, 20), 33, (3, 3), {"padding": 1}, id="images of four pixels, three times as many"
    ),
    pytest.param((40, 1, 9, 16), 20, (3, 3), {"padding": 1}, id="one row of pixels, 28 images and then 12"),
    pytest.param((3, 10, 10, 9), 17, (3, 3), {"padding": 9, "dilation": 9}, id="an image at a time"),
]
EVERY_DTYPE = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def arguments(x_shape, filters, kernel, dtype):
    rng = np.random.default_rng(3)
    shapes = x_shape, (*kernel, x_shape[3], filters), (filters,)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def layer_of(x_shape, filters, kernel, **how):
    stride, padding, dilation = (how.get(key, default) for key, default in DEFAULTS.items())
    return direct.layer(x_shape, kernel, x_shape[3], filters, stride, padding, dilation, 1)


def ways(x_shape, filters, kernel, dtype, find=None, **how):
    layer, dtype = layer_of(x_shape, filters, kernel, **how), np.dtype(dtype)
    if find is None:
        return convolution.forward_way(layer, x_shape[0], dtype, NO_EPILOGUE, fastcnn.get_winograd())
    return find(layer, x_shape[0], dtype, fastcnn.get_winograd())


def gradients(x_shape, filters, kernel, dtype, how):
    """The layer, dout, x, the weights, and both gradients in float64."""
    x, weight, _ = arguments(x_shape, filters, kernel, dtype)
    layer = layer_of(x_shape, filters, kernel, **how)
    shape = x_shape[0], *layer.out_image, filters
    dout = np.random.default_rng(4).standard_normal(shape).astype(dtype)
    exact = [array.astype(np.float64) for array in (dout, x, weight)]
    to_input = reference.conv2d_backward_input(exact[0], exact[2], x_shape, **how)
    return layer, dout, x, weight, to_input, reference.conv2d_backward_weight(*exact[:2], kernel, **how)


def run_backward(layer, dout, x, weight, dweight):
    """The input's gradient, and the weights' added to `dweight`."""
    dx = np.full_like(x, np.nan)
    few_pixels.backward_input(layer, dout, weight, dx)
    few_pixels.add_weight_gradient(layer, dout, x, dweight)
    return dx, dweight


DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def assert_near(actual, expected, dtype):
    limit = (1e-5 if dtype == np.float32 else 1e-13) * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


@EVERY_DTYPE
@pytest.mark.parametrize(("x_shape", "filters", "kernel", "how"), CASES)
def test_forward_is_the_reference_s(x_shape, filters, kernel, how, dtype):
    assert ways(x_shape, filters, kernel, dtype, **how) is few_pixels.forward
    x, weight, bias = arguments(x_shape, filters, kernel, dtype)
    exact = [array.astype(np.float64) for array in (x, weight, bias)]
    out = np.full_like(reference.conv2d_forward(x, weight, bias, **how), np.nan)
    assert_near(
        cpu.conv2d_forward(x, weight, bias, **how, out=out), reference.conv2d_forward(*exact, **how), dtype
    )
    without = reference.conv2d_forward(*exact[:2], None, **how)
    assert_near(cpu.conv2d_forward(x, weight, **how), without, dtype)


BACKWARD = [
    *CASES,
    pytest.param((1, 2, 2, 70), 50, (3, 3), {"padding": 1}, id="so few that nothing is transposed"),
    pytest.param((4, 1, 1, 9), 17, (3, 3), {"padding": 1}, id="one pixel of each image"),
    pytest.param((2, 7, 8, 5), 9, (2, 2), {"stride": 3}, id="inputs that no output sees"),
    pytest.param((1, 9, 9, 3), 130, (3, 3), {"padding": 1}, id="three blocks of filters"),
]


@EVERY_DTYPE
@pytest.mark.parametrize(("x_shape", "filters", "kernel", "how"), BACKWARD)
def test_backward_is_the_reference_s(x_shape, filters, kernel, how, dtype):
    layer, dout, x, weight, to_input, to_weight = gradients(x_shape, filters, kernel, dtype, how)
    dx, dweight = run_backward(layer, dout, x, weight, np.ones_like(weight))
    assert_near(dx, to_input, dtype)
    assert_near(dweight, to_weight + 1, dtype)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2, (3, 2)])
@pytest.mark.parametrize(
    ("x_shape", "filters"),
    [
        pytest.param((1, 8, 8, 64), 64, id="whole"),
        pytest.param((3, 7, 5, 20), 35, id="a row and a column that fill no window"),
        pytest.param((2, 6, 6, 9), 5, id="less than a vector of filters"),
        pytest.param((40, 3, 2, 20), 35, id="parts of the batch"),
    ],
)
def test_pooled_forward_is_the_reference_s(x_shape, filters, pool, relu):
    x, weight, bias = arguments(x_shape, filters, (3, 3), np.float32)
    y, argmax = cpu.conv2d_pool_forward(x, weight, bias, pool, relu, padding=1)
    expected, where = reference.conv2d_pool_forward(
        *(array.astype(np.float64) for array in (x, weight, bias)), pool, relu, padding=1
    )
    assert_near(y, expected, np.float32)
    np.testing.assert_array_equal(argmax, where)
    alone, nothing = cpu.conv2d_pool_forward(x, weight, bias, pool, relu, padding=1, with_argmax=False)
    np.testing.assert_array_equal(alone, y)
    assert nothing is None


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "how"), CASES)
def test_bits_do_not_depend_on_threads(x_shape, filters, kernel, how, team, monkeypatch):
    # Every number of parts, however small the work.
    monkeypatch.setattr(few_pixels, "MULTIPLY_ADDS_PER_BYTE", 1e-6)
    x, weight, bias = arguments(x_shape, filters, kernel, np.float32)
    results = []
    for count in (1, 2):
        team(count)
        results.append(cpu.conv2d_forward(x, weight, bias, **how))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize(("x_shape", "filters", "kernel", "how"), BACKWARD)
def test_bits_of_gradients_do_not_depend_on_threads(x_shape, filters, kernel, how, team, monkeypatch):
    monkeypatch.setattr(few_pixels, "MULTIPLY_ADDS_PER_BYTE", 1e-6)
    layer, dout, x, weight, *_ = gradients(x_shape, filters, kernel, np.float32, how)
    results = []
    for count in (1, 2):
        team(count)
        results.append(run_backward(layer, dout, x, weight, np.zeros_like(weight)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("side", [2, 6])
def test_nan_in_gradients_reaches_what_sees_it_and_no_more(side):
    layer, dout, x, weight, *_ = gradients((1, side, side, 32), 48, (3, 3), np.float32, {"padding": 1})
    clean, _ = run_backward(layer, dout, x, weight, np.zeros_like(weight))
    dout[0, 0, 1, 7] = np.nan
    dx, dweight = run_backward(layer, dout, x, weight, np.zeros_like(weight))
    seen = np.zeros((side, side), bool)
    seen[:2, :3] = True
    assert np.isnan(dx[0, seen]).all()
    np.testing.assert_array_equal(dx[0, ~seen], clean[0, ~seen])
    assert np.isnan(dweight[1, 1, :, 7]).all()
    assert not np.isnan(np.delete(dweight, 7, axis=3)).any()


def test_nan_reaches_what_sees_it_and_no_more():
    x, weight, bias = arguments((1, 6, 6, 32), 48, (3, 3), np.float32)
    clean = cpu.conv2d_forward(x, weight, bias, padding=1)
    x[0, 1, 4, 7] = np.nan
    y = cpu.conv2d_forward(x, weight, bias, padding=1)
    seen = np.zeros((6, 6), bool)
    seen[0:3, 3:6] = True
    assert np.isnan(y[0, seen]).all()
    np.testing.assert_array_equal(y[0, ~seen], clean[0, ~seen])


def test_is_used_for_few_pixels_only():
    def way(side, channels=64, filters=64, images=1, kernel=3):
        return ways(
            (images, side, side, channels), filters, (kernel, kernel), np.float32, padding=kernel // 2
        )

    assert way(4, images=9) is few_pixels.forward
    assert way(12) is few_pixels.forward
    assert way(16, channels=16) is few_pixels.forward
    assert way(16, kernel=1) is few_pixels.forward
    assert way(16) is not few_pixels.forward
    assert way(17, kernel=1) is not few_pixels.forward
    assert way(9, channels=3) is not few_pixels.forward
    assert way(2, images=100) is few_pixels.forward
    assert way(2, images=100, kernel=1) is not few_pixels.forward
    assert way(2, images=100, channels=3) is not few_pixels.forward
    assert way(4, images=100) is not few_pixels.forward


def test_gradients_are_used_for_few_pixels_only():
    def way(find, x_shape, filters, kernel=3):
        return ways(x_shape, filters, (kernel, kernel), np.float32, find, padding=kernel // 2)

    for find, used in (
        (convolution.input_way, few_pixels.backward_input),
        (convolution._weight_way, few_pixels.add_weight_gradient),
    ):
        assert way(find, (1, 4, 4, 20), 20) is used
        assert way(find, (1, 16, 16, 20), 20, 1) is used
        assert way(find, (1, 17, 17, 20), 20, 1) is not used
        assert way(find, (1, 8, 8, 3), 3) is used
        assert way(find, (1, 9, 9, 3), 3, 5) is not used
        assert way(find, (100, 2, 2, 20), 20) is used
        assert way(find, (100, 2, 2, 20), 20, 1) is not used


def test_pooled_forward_uses_it_too():
    layer = layer_of((1, 8, 8, 32), 32, (3, 3), padding=1)
    e = Epilogue(pool_h=2, pool_w=2, relu=1, out_h=4, out_w=4, filters=32, keeps=1)
    way = convolution.forward_way(layer, 1, np.dtype(np.float32), e, fastcnn.get_winograd())
    assert way is few_pixels.forward


@pytest.fixture
def none_are_few(monkeypatch):
    ways = convolution.forward_way, convolution.input_way, convolution._weight_way
    for name in ("suits_forward", "suits_input", "suits_weight"):
        monkeypatch.setattr(few_pixels, name, lambda *arguments: False)
    for way in ways:
        way.cache_clear()
    yield
    for way in ways:
        way.cache_clear()


CONVOLUTIONS = ["conv2d_forward", "conv2d_pool_forward", "conv2d_backward_input", "conv2d_backward_weight"]


@EVERY_DTYPE
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_other_ways_do_the_same_rows(name, dtype, none_are_few):
    """The table's images are so small that few of its rows reach the direct way otherwise."""
    operation = next(operation for operation in OPERATIONS if operation.name == name)
    for case, arguments in operation.calls(dtype):
        actual = getattr(cpu, name)(**arguments)
        expected = getattr(reference, name)(**arguments)
        pairs = (actual, expected) if isinstance(actual, tuple) else ((actual,), (expected,))
        assert_close(operation, arguments, *pairs, case)
