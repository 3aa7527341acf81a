"""Direct convolution, forced on taps in the padding, and on blocks, tiles and units of every kind."""

import numpy as np
import pytest

import fastcnn
from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import direct, direct_weights
from fastcnn.kernels.cpu.epilogue import NO_EPILOGUE, Epilogue

CASES = {
    # x, filters, kernel, stride, padding, dilation, groups
    "3 x 3": ((2, 16, 16, 32), 40, (3, 3), 1, 1, 1, 1),
    "tiles of two rows": ((1, 13, 11, 16), 16, (5, 5), 1, 2, 1, 1),
    "7 x 7": ((1, 28, 28, 16), 17, (7, 7), 1, 3, 1, 1),
    "several blocks": ((1, 61, 37, 20), 33, (5, 3), 1, (2, 1), 1, 1),
    "blocks of one row": ((1, 9, 530, 16), 16, (7, 7), 1, 3, 1, 1),
    "a last block of its own": ((2, 47, 45, 16), 9, (3, 3), 1, ((0, 2), (2, 0)), 1, 1),
    "runs too short": ((2, 12, 13, 3), 16, (3, 3), 1, 1, 1, 1),
    "dilated": ((1, 17, 18, 32), 16, (3, 3), 1, 2, 2, 1),
    "dilated beyond the image": ((1, 5, 6, 32), 16, (3, 3), 1, 4, 4, 1),
    "strided": ((2, 23, 26, 32), 16, (5, 5), 2, 2, 1, 1),
    "dilated and strided": ((1, 19, 21, 32), 16, (3, 4), (2, 3), 3, (3, 2), 1),
    "kernel larger than the image": ((2, 2, 3, 32), 16, (5, 7), 1, (3, 3), 1, 1),
    "more padding than kernel": ((1, 3, 4, 40), 16, (2, 3), 1, ((4, 5), (6, 3)), 1, 1),
    "one row, far in the padding": ((1, 1, 3, 40), 16, (2, 2), 1, 3, 1, 1),
    "as high as the image": ((2, 13, 19, 32), 16, (13, 3), 1, (0, 1), 1, 1),
    "groups": ((2, 9, 10, 96), 48, (3, 3), 1, 1, 1, 3),
    "groups in units": ((2, 8, 9, 384), 160, (3, 3), 1, 1, 1, 2),
    "slices of groups": ((2, 8, 9, 256), 160, (5, 5), 1, 2, 1, 2),
    "slices of channels": ((2, 8, 9, 192), 160, (3, 3), 1, 1, 1, 1),
    "slices of the image in place": ((3, 9, 9, 192), 160, (3, 3), 2, 0, 1, 1),
    "tall tiles": ((2, 19, 17, 2), 72, (3, 3), 1, 1, 1, 1),
    "a lone tall tile": ((3, 21, 20, 1), 72, (3, 3), 1, 1, 1, 1),
    "points": ((3, 21, 26, 20), 80, (1, 1), 1, 0, 1, 1),
    "points of more channels than filters": ((2, 31, 20, 40), 16, (1, 1), 1, 0, 1, 1),
    "points apart": ((2, 33, 41, 24), 40, (1, 1), 2, 0, 1, 1),
}
every_case = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


class Problem:
    """A case's arrays and its layer."""

    def __init__(self, case, dtype):
        shape, filters, self.kernel, *windows, groups = CASES[case]
        self.windows = dict(zip(("stride", "padding", "dilation"), windows, strict=True), groups=groups)
        rng = np.random.default_rng(0)
        channels = shape[3] // groups
        self.x = rng.standard_normal(shape).astype(dtype)
        self.weight = rng.standard_normal((*self.kernel, channels, filters)).astype(dtype)
        self.y = reference.conv2d_forward(self.x, self.weight, None, **self.windows)
        self.dout = rng.standard_normal(self.y.shape).astype(dtype)
        self.layer = direct.layer(shape, self.kernel, channels, filters, *windows, groups)

    def forward(self, x, weight):
        y = np.full_like(self.y, 7)
        direct.forward(self.layer, x, weight, None, y)
        return y

    def input_gradient(self, dout, weight):
        dx = np.full_like(self.x, 7)
        direct.backward_input(self.layer, dout, weight, dx)
        return dx

    def weight_gradient(self, dout, x):
        dweight = np.zeros_like(self.weight)
        direct_weights.add_weight_gradient(self.layer, dout, x, dweight)
        return dweight


def assert_close(actual, expected):
    tolerance = 50 * np.finfo(expected.dtype).eps * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@every_case
@dtypes
def test_same_as_the_reference(case, dtype, scratch):
    of = Problem(case, dtype)
    assert_close(of.forward(of.x, of.weight), of.y)
    dx = reference.conv2d_backward_input(of.dout, of.weight, of.x.shape, **of.windows)
    assert_close(of.input_gradient(of.dout, of.weight), dx)
    dweight = reference.conv2d_backward_weight(of.dout, of.x, of.kernel, **of.windows)
    assert_close(of.weight_gradient(of.dout, of.x), dweight)
    scratch.check(case)


@every_case
def test_no_bit_depends_on_the_number_of_threads(case):
    of = Problem(case, np.float32)
    before = fastcnn.get_num_threads()
    results = []
    try:
        for threads in (1, before):
            fastcnn.set_num_threads(threads)
            results.append(
                (
                    of.forward(of.x, of.weight),
                    of.input_gradient(of.dout, of.weight),
                    of.weight_gradient(of.dout, of.x),
                )
            )
    finally:
        fastcnn.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        np.testing.assert_array_equal(one, several)


def poisoned(array):
    """The array with a NaN, and an array that is 1 there and else 0."""
    values, mark = array.copy(), np.zeros_like(array)
    values.reshape(-1)[array.size // 3] = np.nan
    mark.reshape(-1)[array.size // 3] = 1
    return values, mark


def assert_nan_between(actual, clean, least, most):
    """NaN where the image meets NaN, nowhere else than in the reference, and all else as it was."""
    assert np.isnan(actual[least]).all()
    assert np.isfinite(actual[~most]).all()
    finite = np.isfinite(actual)
    assert_close(actual[finite], clean[finite])


@every_case
def test_nan_reaches_all_that_it_meets_in_the_image(case):
    """Taps in the padding may be left out, or multiply its zeros."""
    of = Problem(case, np.float32)
    weight, mark = poisoned(of.weight)
    least = reference.conv2d_forward(np.ones_like(of.x), mark, None, **of.windows) > 0
    most = np.isnan(reference.conv2d_forward(of.x, weight, None, **of.windows))
    assert_nan_between(of.forward(of.x, weight), of.y, least, most)

    dout, mark = poisoned(of.dout)
    clean = reference.conv2d_backward_weight(of.dout, of.x, of.kernel, **of.windows)
    least = reference.conv2d_backward_weight(mark, np.ones_like(of.x), of.kernel, **of.windows) > 0
    most = np.isnan(reference.conv2d_backward_weight(dout, of.x, of.kernel, **of.windows))
    assert_nan_between(of.weight_gradient(dout, of.x), clean, least, most)

    x, _ = poisoned(of.x)
    expected = reference.conv2d_forward(x, of.weight, None, **of.windows)
    np.testing.assert_array_equal(np.isnan(of.forward(x, of.weight)), np.isnan(expected))
    expected = reference.conv2d_backward_weight(of.dout, x, of.kernel, **of.windows)
    np.testing.assert_array_equal(np.isnan(of.weight_gradient(of.dout, x)), np.isnan(expected))


@pytest.mark.parametrize(
    ("case", "units", "slices"),
    [("groups", 1, 1), ("groups in units", 2, 1), ("slices of groups", 4, 2), ("slices of channels", 2, 2)],
)
def test_sums_too_large_for_the_cache_are_cut(case, units, slices):
    of = Problem(case, np.float32)
    cut = direct_weights._plan(of.layer, NO_EPILOGUE, len(of.x), 32, 4)[1]
    assert (cut.units, cut.slices) == (units, slices)


@pytest.mark.parametrize("case", ["3 x 3", "groups", "slices of groups", "slices of channels"])
@dtypes
def test_pooled_gradients_in_units(case, dtype):
    of = Problem(case, dtype)
    pool = {"pool_size": 2, **of.windows}
    y, argmax = reference.conv2d_pool_forward(of.x, of.weight, None, relu=True, **pool)
    dout = np.random.default_rng(1).standard_normal(y.shape).astype(dtype)
    e = Epilogue(2, 2, 0, *y.shape[1:], 1)
    dweight, dbias = np.zeros_like(of.weight), np.zeros_like(dout[0, 0, 0])
    direct_weights.add_weight_gradient(of.layer, dout, of.x, dweight, e, argmax, dbias)
    expected = reference.conv2d_pool_backward_weight(dout, argmax, of.x, of.kernel, **pool)
    assert_close(dweight, expected[0])
    assert_close(dbias, expected[1])


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [1.0, True, (1.0, 1.0), (1, True)])
def test_what_equals_a_known_setting_is_still_refused(name, value):
    x, weight = np.ones((1, 5, 5, 3), np.float32), np.ones((3, 3, 3, 4), np.float32)
    cpu.conv2d_forward(x, weight, **{name: 1})
    cpu.conv2d_forward(x, weight, **{name: (1, 1)})
    with pytest.raises(TypeError, match=f"^{name}: expected an int"):
        cpu.conv2d_forward(x, weight, **{name: value})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_images_of_no_channels_give_the_bias(dtype):
    x, weight, bias = (
        np.zeros((2, 9, 9, 0), dtype),
        np.zeros((3, 3, 0, 16), dtype),
        np.arange(16, dtype=dtype),
    )
    expected = np.broadcast_to(bias, (2, 7, 7, 16))
    np.testing.assert_array_equal(cpu.conv2d_forward(x, weight, bias), expected)
    np.testing.assert_array_equal(cpu.conv2d_pool_forward(x, weight, bias, 7)[0], expected[:, :1, :1])
    assert cpu.conv2d_backward_input(expected, weight, x.shape).shape == x.shape
    assert cpu.conv2d_backward_weight(expected, x, 3).shape == weight.shape


@pytest.mark.parametrize("panels", [1, 2, 5])
@pytest.mark.parametrize("tiles", [1, 2, 7])
def test_inputs_and_gradients_share_what_tiles_fetch(panels, tiles):
    for fresh, size in ((0, 10), (1, 1000), (1000, 1), (300, 300), (64, 16), (16, 64)):
        turns = direct_weights._turns(fresh, size, panels, tiles)
        assert 0 <= turns <= panels * tiles
        if fresh == 0:
            assert turns == 0
        elif tiles > 1:
            assert 1 <= turns <= panels * (tiles - 1)
        else:
            assert turns == round(panels * fresh / (fresh + size) + 1e-9)


def test_all_that_is_fetched_is_shared_out():
    values = np.arange(100.0)
    parts = [direct.share.py_func(values, 10, 57, t, t + 1, 4) for t in range(4)]
    np.testing.assert_array_equal(np.concatenate(parts), values[10:67])
    # What lies before the images, in the padding, is not there; nor is anything behind them.
    np.testing.assert_array_equal(direct.share.py_func(values, -5, 8, 0, 1, 1), values[:8])
    np.testing.assert_array_equal(direct.share.py_func(values, 95, 57, 0, 1, 1), values[95:])
    assert direct.share.py_func(values, 100, 57, 0, 0, 0).size == 0
