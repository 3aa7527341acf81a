"""The algorithms for few channels or filters, each forced on shapes that it would not be chosen for too."""

import numpy as np
import pytest

from fastcnn.kernels import cpu, reference
from fastcnn.kernels import threads as team
from fastcnn.kernels.cpu import convolution, depthwise, direct, few_channels, image_lanes, pooled_convolution

ASYMMETRIC = ((0, 3), (2, 1))
# x, filters, kernel, stride, padding, dilation
CASES = {
    "7 x 7": ((37, 12, 14, 3), 10, (7, 7), 1, 0, 1),
    "few images": ((3, 12, 13, 3), 10, (5, 5), 1, 1, 1),
    "ten channels": ((33, 12, 12, 10), 10, (3, 3), 1, 0, 1),
    "one filter": ((64, 9, 8, 1), 1, (3, 3), 2, 1, 1),
    "dilated": ((20, 12, 13, 7), 15, (3, 2), (3, 2), ASYMMETRIC, (1, 3)),
    "stride beyond the kernel": ((20, 25, 14, 5), 3, (3, 2), (4, 5), ASYMMETRIC, (2, 1)),
    "1 x 1": ((16, 10, 9, 13), 6, (1, 1), 1, 1, 1),
    "dilated, wide": ((2, 20, 44, 2), 17, (3, 2), (3, 2), ASYMMETRIC, (1, 3)),
    "many filters": ((2, 24, 20, 3), 33, (5, 5), 2, 2, 1),
}
# A row of outputs is as long as a tile.
WIDE = ("7 x 7", "few images", "ten channels", "1 x 1", "dilated, wide", "many filters")
every_case = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class Problem:
    """A case's arrays, and what the reference makes of them."""

    def __init__(self, case, dtype):
        shape, filters, kernel, stride, padding, dilation = CASES[case]
        rng = np.random.default_rng(0)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        self.x = rng.standard_normal(shape).astype(dtype)
        self.weight = rng.standard_normal((*kernel, shape[3], filters)).astype(dtype)
        self.bias = rng.standard_normal(filters).astype(dtype)
        self.y = reference.conv2d_forward(self.x, self.weight, self.bias, **geometry)
        self.dout = rng.standard_normal(self.y.shape).astype(dtype)
        self.dx = reference.conv2d_backward_input(self.dout, self.weight, shape, **geometry)
        self.dweight = reference.conv2d_backward_weight(self.dout, self.x, kernel, **geometry)
        self.layer = direct.layer(shape, kernel, shape[3], filters, stride, padding, dilation, 1)


def assert_close(actual, expected):
    tolerance = 100 * np.finfo(expected.dtype).eps * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@dtypes
@every_case
def test_images_in_lanes_forward(case, dtype):
    problem = Problem(case, dtype)
    y = np.full_like(problem.y, np.nan)
    image_lanes.forward(problem.layer, problem.x, problem.weight, problem.bias, y)
    assert_close(y, problem.y)


@dtypes
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool_size", [1, 2, (1, 3)])
@every_case
def test_images_in_lanes_pooled(case, pool_size, relu, dtype):
    problem = Problem(case, dtype)
    *_, stride, padding, dilation = CASES[case]
    geometry = (stride, padding, dilation)
    expected, expected_argmax = reference.conv2d_pool_forward(
        problem.x, problem.weight, problem.bias, pool_size, relu, *geometry
    )
    for keeps in (True, False):
        e = pooled_convolution._epilogue(problem.layer, pool_size, relu, keeps)
        y, argmax = np.full_like(expected, np.nan), np.full(expected.shape, 99, np.uint8)
        image_lanes.forward(problem.layer, problem.x, problem.weight, problem.bias, y, e, argmax)
        assert_close(y, expected)
        assert np.mean(argmax != (expected_argmax if keeps else 99)) < 1e-3  # where two are nearly the same


@dtypes
@every_case
def test_images_in_lanes_backward_input(case, dtype):
    problem = Problem(case, dtype)
    # Inputs that no tap reaches are left alone.
    dx = np.zeros_like(problem.x)
    image_lanes.backward_input(problem.layer, problem.dout, problem.weight, dx)
    assert_close(dx, problem.dx)


@dtypes
@every_case
def test_images_in_lanes_backward_weight(case, dtype):
    problem = Problem(case, dtype)
    dweight = np.ones_like(problem.weight)
    image_lanes.add_weight_gradient(problem.layer, problem.dout, problem.x, dweight)
    assert_close(dweight, 1 + problem.dweight)


@dtypes
@pytest.mark.parametrize("case", WIDE)
def test_shares_of_the_gradient_to_few_channels(case, dtype):
    problem = Problem(case, dtype)
    dx = np.full_like(problem.x, np.nan)
    few_channels.backward_input(problem.layer, problem.dout, problem.weight, dx)
    assert_close(dx, problem.dx)


# x, filters, kernel, padding, dilation; stride 1
EXCHANGED = {
    "3 x 3": ((5, 24, 20, 32), 3, (3, 3), 1, 1),
    "one filter": ((3, 20, 24, 16), 1, (5, 5), 2, 1),
    "no multiples": ((20, 14, 13, 37), 5, (3, 2), 0, 1),
    "padding on some sides": ((4, 17, 19, 40), 7, (4, 3), ((0, 3), (2, 1)), 1),
    "dilated": ((4, 21, 20, 35), 9, (3, 3), ((6, 1), (0, 2)), (3, 1)),
    "1 x 1": ((6, 19, 18, 64), 3, (1, 1), 0, 1),
    "7 x 7": ((17, 18, 16, 48), 10, (7, 7), 3, 1),
}


@dtypes
@pytest.mark.parametrize("case", EXCHANGED)
def test_weights_of_few_filters_read_x_as_dout(case, dtype):
    shape, filters, kernel, padding, dilation = EXCHANGED[case]
    layer = direct.layer(shape, kernel, shape[3], filters, 1, padding, dilation, 1)
    way = convolution._weight_way(layer, shape[0], np.dtype(dtype), True)
    assert getattr(way, "func", None) is convolution._exchanged
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(dtype)
    dout = rng.standard_normal((shape[0], *layer.out_image, filters)).astype(dtype)
    expected = reference.conv2d_backward_weight(dout, x, kernel, 1, padding, dilation)
    dweight = np.ones_like(expected)
    cpu.conv2d_backward_weight(dout, x, kernel, 1, padding, dilation, out=dweight, accumulate=True)
    # Sums of some thousand products, those of Winograd's algorithm some times less exact.
    bound = 1000 * np.finfo(dtype).eps * np.abs(expected).max()
    np.testing.assert_allclose(dweight, 1 + expected, rtol=0, atol=bound)
    np.testing.assert_array_equal(
        cpu.conv2d_backward_weight(dout, x, kernel, 1, padding, dilation) + 1, dweight
    )


def test_weights_are_not_exchanged_where_that_cannot_be_or_does_not_pay():
    def exchanged(x_shape, filters, kernel=3, stride=1, padding=1, groups=1, allowed=True):
        layer = direct.layer(x_shape, kernel, None, filters, stride, padding, 1, groups)
        way = convolution._weight_way(layer, x_shape[0], np.dtype(np.float32), allowed)
        return getattr(way, "func", None) is convolution._exchanged

    assert exchanged((4, 32, 32, 64), 3)
    assert not exchanged((4, 32, 32, 64), 3, stride=2)
    assert not exchanged((4, 32, 32, 64), 4, groups=2)
    assert not exchanged((4, 32, 32, 64), 3, padding=3)
    assert not exchanged((4, 32, 32, 64), 3, allowed=False)
    assert not exchanged((4, 32, 32, 64), 64)
    assert not exchanged((4, 32, 32, 3), 64)
    assert not exchanged((1, 4, 4, 64), 3)


def test_nan_of_one_image_stays_in_it():
    problem = Problem("ten channels", np.float32)
    x = problem.x.copy()
    x[5] = np.nan
    y = np.empty_like(problem.y)
    image_lanes.forward(problem.layer, x, problem.weight, problem.bias, y)
    assert np.isnan(y[5]).all()
    assert_close(np.delete(y, 5, axis=0), np.delete(problem.y, 5, axis=0))
    pooled, argmax = cpu.conv2d_pool_forward(x, problem.weight, problem.bias, 2)
    assert np.isnan(pooled[5]).all()
    assert np.array_equal(
        argmax[5], reference.conv2d_pool_forward(x[5:6], problem.weight, problem.bias, 2)[1][0]
    )
    assert np.isfinite(np.delete(pooled, 5, axis=0)).all()


@pytest.fixture
def threads():
    before = team.get_num_threads()
    yield team.set_num_threads
    team.set_num_threads(before)


# x, filters, kernel, groups
LARGE = {
    "images in lanes": ((70, 20, 18, 3), 10, 5, 1),
    "shares": ((12, 40, 36, 3), 32, 5, 1),
    "depthwise": ((6, 20, 18, 40), 40, 3, 40),
}


@pytest.mark.parametrize("case", LARGE)
def test_threads_do_not_change_a_bit(case, threads):
    shape, filters, kernel, groups = LARGE[case]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    weight = rng.standard_normal((kernel, kernel, shape[3] // groups, filters), np.float32)

    def results():
        y = cpu.conv2d_forward(x, weight, groups=groups)
        pooled = cpu.conv2d_pool_forward(x, weight, pool_size=2, groups=groups)
        dx = cpu.conv2d_backward_input(y, weight, shape, groups=groups)
        return y, *pooled, dx, cpu.conv2d_backward_weight(y, x, kernel, groups=groups)

    threads(1)
    expected = results()
    for count in (1, 2, 2):
        threads(count)
        for ours, theirs in zip(results(), expected, strict=True):
            assert ours.tobytes() == theirs.tobytes()


def test_each_algorithm_is_chosen_where_it_pays():
    float32 = np.dtype(np.float32)
    few = direct.layer((512, 32, 32, 3), (7, 7), 3, 3, 1, 0, 1, 1)
    assert image_lanes.suits_forward(few, 512, float32)
    assert image_lanes.suits_input(few, 512, float32)
    assert image_lanes.suits_weight(few, 512, float32)
    assert not image_lanes.suits_forward(few, 1, float32)
    first = direct.layer((64, 32, 32, 1), (3, 3), 1, 64, 1, 1, 1, 1)
    assert few_channels.suits(first, float32)
    assert not image_lanes.suits_forward(first, 64, float32)
    wide = direct.layer((64, 32, 32, 64), (3, 3), 64, 64, 1, 1, 1, 1)
    assert not image_lanes.suits_forward(wide, 64, float32)
    assert not image_lanes.suits_input(wide, 64, float32)
    assert not image_lanes.suits_weight(wide, 64, float32)
    assert not few_channels.suits(wide, float32)
    assert not depthwise.fits(wide)
    assert depthwise.fits(direct.layer((1, 8, 8, 64), (3, 3), 1, 64, 1, 1, 1, 64))
