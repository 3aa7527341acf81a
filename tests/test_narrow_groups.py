"""Grouped convolutions whose vectors reach over groups: right at edges, and used where they are faster."""

import numpy as np
import pytest
from parity import assert_same_bits, error

import fastcnn
from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import convolution, direct, narrow_groups, simd
from fastcnn.kernels.cpu.epilogue import NO_EPILOGUE

FLOAT32 = np.dtype(np.float32)
pytestmark = pytest.mark.skipif(simd.VECTOR_BITS < 256, reason="vectors are not permuted")

CASES = {
    # x, filters, kernel, stride, padding, dilation, groups
    "groups fill vectors": ((2, 12, 13, 32), 32, (3, 3), 1, 1, 1, 8),
    "a last vector of one group": ((1, 9, 11, 36), 36, (3, 3), 1, 1, 1, 9),
    "groups over the ends of vectors": ((2, 8, 9, 18), 27, (2, 3), 1, (1, 0), 1, 9),
    "less than a vector": ((2, 9, 8, 6), 6, (3, 3), 1, 1, 1, 3),
    "two filters of one channel": ((1, 10, 11, 20), 40, (3, 3), 1, 1, 1, 20),
    "strided": ((2, 13, 15, 24), 24, (3, 3), (2, 3), ((1, 0), (2, 1)), 1, 6),
    "dilated": ((1, 14, 12, 16), 16, (3, 2), 1, 2, (2, 3), 8),
    "read in place": ((2, 13, 9, 24), 24, (3, 3), 1, 0, 1, 6),
    "1 x 1": ((2, 7, 9, 32), 32, (1, 1), 1, 0, 1, 8),
    "blocks of rows": ((2, 60, 33, 16), 16, (3, 3), 1, 1, 1, 4),
    "three filters of one channel": ((1, 8, 9, 22), 66, (3, 3), 1, 1, 1, 22),
    "eight filters of one channel, strided": ((2, 9, 8, 5), 40, (5, 3), 2, 1, 1, 5),
    "more channels than filters": ((2, 7, 9, 36), 18, (3, 3), 1, 1, 1, 9),
    "three channels, a filter each": ((1, 7, 9, 33), 11, (3, 2), 1, 1, 1, 11),
    "as high as the images": ((2, 22, 19, 8), 16, (22, 1), 1, 0, 1, 8),
    "higher than the images": ((3, 4, 21, 16), 32, (9, 3), 1, (4, 1), 1, 16),
    "far apart": ((1, 5, 17, 16), 32, (4, 3), 1, (7, 3), (5, 3), 16),
}
BOUNDS = {np.float32: 1e-6, np.float64: 1e-15}


def layer_of(x_shape, filters, kernel, stride, padding, dilation, groups):
    channels = x_shape[3] // groups
    return direct.layer(x_shape, kernel, channels, filters, stride, padding, dilation, groups)


def arguments(case, dtype=np.float32):
    """The layer, x, weight, bias, dout; and the convolution's settings."""
    x_shape, filters, kernel, *settings = CASES[case]
    layer = layer_of(*CASES[case])
    rng = np.random.default_rng(3)
    shapes = (
        x_shape,
        (*kernel, x_shape[3] // settings[-1], filters),
        (filters,),
        (x_shape[0], *layer.out_image, filters),
    )
    return layer, [rng.standard_normal(shape).astype(dtype) for shape in shapes], settings


def exact(*arrays):
    return (array.astype(np.float64) for array in arrays)


def fitting(lanes):
    """The cases and dtypes of which a vector of results sees no more than a vector."""
    pairs = [
        (case, dtype)
        for case in CASES
        for dtype in BOUNDS
        if narrow_groups._fits(layer_of(*CASES[case]), np.dtype(dtype))
        and lanes(layer_of(*CASES[case]), np.dtype(dtype)) is not None
    ]
    return pytest.mark.parametrize(("case", "dtype"), pairs)


@fitting(narrow_groups._forward_lanes)
def test_forward(case, dtype, scratch):
    layer, (x, weight, bias, dout), settings = arguments(case, dtype)
    y = np.full_like(dout, np.nan)
    narrow_groups.forward(layer, x, weight, bias, y)
    expected = reference.conv2d_forward(*exact(x, weight, bias), *settings)
    assert error(y, expected) < BOUNDS[dtype]
    narrow_groups.forward(layer, x, weight, None, y)
    assert error(y, expected - bias) < BOUNDS[dtype]
    scratch.check(case)


@fitting(narrow_groups._input_lanes)
def test_backward_input(case, dtype, scratch):
    layer, (x, weight, _, dout), settings = arguments(case, dtype)
    dx = np.full_like(x, np.nan)
    narrow_groups.backward_input(layer, dout, weight, dx)
    expected = reference.conv2d_backward_input(*exact(dout, weight), x.shape, *settings)
    assert error(dx, expected) < BOUNDS[dtype]
    scratch.check(case)


@fitting(narrow_groups._forward_lanes)
def test_weight_gradient(case, dtype):
    layer, (x, weight, _, dout), settings = arguments(case, dtype)
    dweight = np.ones_like(weight)
    narrow_groups.add_weight_gradient(layer, dout, x, dweight)
    expected = reference.conv2d_backward_weight(*exact(dout, x), CASES[case][2], *settings)
    assert error(dweight, expected + 1) < 4 * BOUNDS[dtype]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", [1, 2, (3, 2)])
@pytest.mark.parametrize(
    "case",
    ["groups fill vectors", "a last vector of one group", "blocks of rows", "more channels than filters"],
)
def test_pooled(case, pool, relu):
    """Forward, and both gradients, as one operation."""
    _, (x, weight, bias, _), settings = arguments(case)
    kernel = CASES[case][2]
    y, argmax = cpu.conv2d_pool_forward(x, weight, bias, pool, relu, *settings)
    expected, where = reference.conv2d_pool_forward(*exact(x, weight, bias), pool, relu, *settings)
    assert error(y, expected) < 1e-6
    np.testing.assert_array_equal(argmax, where)
    dout = np.random.default_rng(4).standard_normal(y.shape).astype(np.float32)
    dx = cpu.conv2d_pool_backward_input(dout, argmax, weight, x.shape, pool, *settings)
    expected = reference.conv2d_pool_backward_input(
        *exact(dout), argmax, *exact(weight), x.shape, pool, *settings
    )
    assert error(dx, expected) < 1e-6
    actual = cpu.conv2d_pool_backward_weight(dout, argmax, x, kernel, pool, *settings)
    expected = reference.conv2d_pool_backward_weight(*exact(dout), argmax, *exact(x), kernel, pool, *settings)
    for ours, theirs in zip(actual, expected, strict=True):
        assert error(ours, theirs) < 4e-6


@fitting(narrow_groups._forward_lanes)
def test_bits_do_not_depend_on_threads(case, dtype, team, monkeypatch):
    monkeypatch.setattr(narrow_groups, "MULTIPLY_ADDS_PER_BYTE", 1e-6)
    layer, (x, weight, bias, dout), _ = arguments(case, dtype)
    results = []
    for threads in (1, 2, 2):
        team(threads)
        y, dweight = np.empty_like(dout), np.zeros_like(weight)
        narrow_groups.forward(layer, x, weight, bias, y)
        narrow_groups.add_weight_gradient(layer, dout, x, dweight)
        results.append((y, dweight))
    for result in results[1:]:
        assert_same_bits(result, results[0], case)


def test_what_is_no_number_stays_in_its_group():
    layer, (x, weight, bias, dout), _ = arguments("groups fill vectors")
    y = np.empty_like(dout)
    x[0, 5, 6, 17] = np.nan
    narrow_groups.forward(layer, x, weight, bias, y)
    reached = np.zeros(y.shape, bool)
    reached[0, 4:7, 5:8, 16:20] = True
    np.testing.assert_array_equal(np.isnan(y), reached)


@pytest.mark.parametrize(
    ("channels", "filters", "groups", "used"),
    [
        pytest.param(128, 128, 32, True, id="ResNeXt's 32 groups of four"),
        pytest.param(32, 64, 32, True, id="two filters of each channel"),
        pytest.param(64, 64, 2, False, id="groups that fill vectors"),
        pytest.param(64, 64, 64, False, id="depthwise"),
    ],
)
def test_where_it_is_used(channels, filters, groups, used):
    layer = layer_of((2, 14, 14, channels), filters, (3, 3), 1, 1, 1, groups)
    winograd = fastcnn.get_winograd()
    ways = (
        convolution.forward_way(layer, 2, FLOAT32, NO_EPILOGUE, winograd),
        convolution._weight_way(layer, 2, FLOAT32, winograd),
    )
    ours = narrow_groups.forward, narrow_groups.add_weight_gradient
    assert all((way is own) == used for way, own in zip(ways, ours, strict=True))
