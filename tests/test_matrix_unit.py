"""Products on the matrix unit: as accurate as vectors, the same bits on any team, infinity and NaN as ever.

What packs the parts of numbers is tested wherever vectors are as wide as the unit's; the rest where it is.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
from parity import error

from fastcnn.kernels import cpu, reference
from fastcnn.kernels.cpu import (
    convolution,
    direct,
    matrix_unit,
    pooled_convolution,
    simd,
    split,
    split_direct,
    split_grid,
    split_linear,
    split_pointwise,
    split_weights,
)
from fastcnn.kernels.cpu.epilogue import DEAD, NO_EPILOGUE, Epilogue
from fastcnn.kernels.cpu.matrix_unit import PANEL_WORDS, PARTS, ROW_WORDS, SIDE, TERMS
from fastcnn.kernels.cpu.vectors import pointer
from fastcnn.kernels.cpu.workspace import NOWHERE
from fastcnn.kernels.threads import Recording, parallel

with_unit = pytest.mark.skipif(not matrix_unit.is_there(), reason="the processor has no matrix unit")
with_wide_vectors = pytest.mark.skipif(simd.VECTOR_BITS != 512, reason="vectors are narrower than the unit's")

# The largest error, in units of the largest result, for standard normal numbers. That of direct convolution
# on vectors is below 3e-6.
BOUND = 2e-6
F32 = np.float32


# ------------------------------------------------------------------ parts of numbers


@parallel
def _pack_rows(part, parts, a, rows, depth, tame, packed, finite):
    finite[0] = split.pack_rows(
        pointer(a), 0, depth, rows, depth, tame, pointer(packed), 0, ROW_WORDS, rows * ROW_WORDS
    )


@parallel
def _pack_columns(part, parts, a, rows, depth, tame, squares, packed, finite):
    finite[0] = split.pack_columns(
        a, 0, rows, rows, depth, tame, squares, packed, 0, ROW_WORDS, rows * ROW_WORDS
    )


@parallel
def _pack_panel(part, parts, b, depth, columns, tame, packed, finite):
    finite[0] = split.pack_panel(pointer(b), 0, columns, depth, columns, tame, pointer(packed), 0)


@parallel
def _pack_turned_panel(part, parts, b, depth, columns, tame, squares, packed, finite):
    finite[0] = split.pack_turned_panel(b, 0, depth, depth, columns, tame, squares, packed, 0)


@parallel
def _pack_pixels(part, parts, b, places, pixels, columns, tame, packed, finite):
    finite[0] = split.pack_pixels(
        pointer(b), 0, columns, pointer(places), pixels, columns, tame, pointer(packed), 0
    )


@parallel
def _pack_channels(part, parts, x, pixels, channels, tame, squares, packed, finite):
    finite[0] = split.pack_channels(
        x, 0, channels, pixels, channels, tame, squares, packed, 3, 4 * TERMS, TERMS
    )


def floats(halves):
    """What numbers of 16 bits are the upper halves of, in float64."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def parts_of_rows(packed, rows, depth):
    """(part, row, term) of what `pack_rows` wrote."""
    registers = -(-depth // TERMS)
    halves = packed[: registers * rows * ROW_WORDS].view(np.uint16).reshape(registers, rows, PARTS, TERMS)
    return floats(halves).transpose(2, 1, 0, 3).reshape(PARTS, rows, -1)


def parts_of_panel(packed, depth, columns):
    """(part, term, column) of what `pack_panel` wrote."""
    registers = -(-depth // TERMS)
    halves = packed[: registers * PANEL_WORDS].view(np.uint16).reshape(registers, PARTS, 2, SIDE, SIDE, 2)
    values = floats(halves).transpose(1, 0, 3, 5, 2, 4).reshape(PARTS, registers * TERMS, 2 * SIDE)
    return values[:, :, :columns]


def numbers(*shape):
    rng = np.random.default_rng(3)
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-60, 60, shape)).astype(F32)


def filled(size):
    """Words whose bits are a NaN's, and room for an answer."""
    return np.full(size, -1, np.int32), np.zeros(1, np.bool_)


def assert_parts(parts, x):
    """Exactly x in the first of the rows and columns, zeros behind; and each part far below the first."""
    whole = np.zeros(parts.shape[1:])
    whole[: x.shape[0], : x.shape[1]] = x
    assert np.array_equal(parts.sum(axis=0), whole)
    assert (np.abs(parts[1]) <= np.abs(parts[0]) * 2.0**-7).all()
    assert (np.abs(parts[2]) <= np.abs(parts[0]) * 2.0**-15).all()


@with_wide_vectors
@pytest.mark.parametrize(("rows", "depth"), [(1, 1), (5, 31), (16, 32), (17, 33), (33, 100)])
def test_rows_are_the_sum_of_their_parts(rows, depth):
    a = numbers(rows, depth)
    packed, finite = filled(-(-depth // TERMS) * rows * ROW_WORDS)
    _pack_rows(1, a.ravel(), rows, depth, False, packed, finite)
    assert finite[0]
    assert_parts(parts_of_rows(packed, rows, depth), a)
    again, finite = filled(packed.size)
    _pack_columns(1, a.T.ravel(), rows, depth, False, np.empty(split.SQUARES, F32), again, finite)
    assert finite[0]
    assert np.array_equal(packed, again)


@with_wide_vectors
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (31, 5), (32, 16), (33, 17), (70, 32)])
def test_panels_are_the_sum_of_their_parts(depth, columns):
    b = numbers(depth, columns)
    size = -(-depth // TERMS) * PANEL_WORDS
    packed, finite = filled(size)
    _pack_panel(1, b.ravel(), depth, columns, False, packed, finite)
    assert finite[0]
    assert_parts(parts_of_panel(packed, depth, columns), b)
    again, finite = filled(size)
    _pack_turned_panel(1, b.T.ravel(), depth, columns, False, np.empty(split.SQUARES, F32), again, finite)
    assert finite[0]
    assert np.array_equal(parts_of_panel(again, depth, columns), parts_of_panel(packed, depth, columns))
    # Pixels in another order, with some that are none.
    places = np.full(-(-(depth + 3) // TERMS) * TERMS, -1)
    places[3 : depth + 3] = np.arange(depth)[::-1]
    packed, finite = filled(places.size // TERMS * PANEL_WORDS)
    _pack_pixels(1, b.ravel(), places, depth + 3, columns, False, packed, finite)
    assert finite[0]
    assert_parts(
        parts_of_panel(packed, places.size, columns), np.concatenate([np.zeros((3, columns)), b[::-1]])
    )


@with_wide_vectors
@pytest.mark.parametrize(("pixels", "channels"), [(0, 3), (1, 1), (7, 16), (16, 9), (32, 16)])
def test_turned_pixels_are_the_sum_of_their_parts(pixels, channels):
    x = numbers(max(pixels, 1), channels)
    packed = np.full(3 + SIDE * 4 * TERMS, -1, np.int16)
    finite = np.zeros(1, np.bool_)
    _pack_channels(1, x.ravel(), pixels, channels, False, np.empty(split.SQUARES, F32), packed, finite)
    assert finite[0]
    rows = packed[3:].reshape(SIDE, 4, TERMS)
    assert_parts(floats(rows[:channels, :PARTS].view(np.uint16)).transpose(1, 0, 2), x[:pixels].T)
    assert (packed[:3] == -1).all()
    assert (rows[channels:] == -1).all()
    assert (rows[:, PARTS:] == -1).all()


@with_wide_vectors
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF])
def test_what_is_not_finite_is_noticed(bits):
    a = np.ones((2, 40), F32)
    a[1, 37] = np.array([bits], np.uint32).view(F32)[0]
    packed, finite = filled(2 * 2 * ROW_WORDS)
    _pack_rows(1, a.ravel(), 2, 40, False, packed, finite)
    assert not finite[0]
    # One part at least says so itself.
    assert not np.isfinite(parts_of_rows(packed, 2, 40)[:, 1, 37]).all()
    assert np.isfinite(parts_of_rows(packed, 2, 40)[:, 0]).all()
    _pack_rows(1, a.ravel(), 2, 40, True, packed, finite)
    a[1, 37] = 0
    assert_parts(parts_of_rows(packed, 2, 40), a)


@with_wide_vectors
def test_six_products_of_parts_are_a_product():
    a, b = numbers(1, 4096), numbers(1, 4096)
    packed, finite = filled(4096 // TERMS * ROW_WORDS)
    parts = []
    for values in (a, b):
        _pack_rows(1, values.ravel(), 1, 4096, False, packed, finite)
        parts.append(parts_of_rows(packed, 1, 4096)[:, 0])
    product = sum(parts[0][i] * parts[1][j] for i in range(PARTS) for j in range(PARTS - i))
    exact = a[0].astype(np.float64) * b[0]
    assert (np.abs(product - exact) <= np.abs(exact) * 2.0**-22).all()
    assert np.sqrt(np.mean(((product - exact) / exact) ** 2)) < 2.0**-24


# ------------------------------------------------------------------ the unit


def in_a_process(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_the_environment_can_refuse_it():
    code = "from fastcnn.kernels.cpu import matrix_unit; print(matrix_unit.is_there())"
    assert in_a_process(code, FASTCNN_MATRIX_UNIT="0").stdout == "False\n"
    assert in_a_process(code, FASTCNN_VECTOR_BITS="256").stdout == "False\n"
    assert (
        "FASTCNN_MATRIX_UNIT: 'yes' is neither 0 nor 1"
        in in_a_process(code, FASTCNN_MATRIX_UNIT="yes").stderr
    )


# ------------------------------------------------------------------ matrices

# Rows, terms and columns: also terms cut into pieces, and rows so few that the transpose is computed.
PRODUCTS = [
    (1, 1, 1),
    (32, 32, 32),
    (37, 70, 45),
    (5, 600, 17),
    (300, 40, 9),
    (13, 1100, 100),
    (600, 33, 40),
    (20, 2100, 50),
    (40, 4500, 70),
    (11, 90, 700),
    (34, 530, 301),
    (70, 700, 33),
    (300, 800, 64),
]
every_product = pytest.mark.parametrize("sizes", PRODUCTS)


def multiply(a, b, bias, c, turned_a=False, turned_b=False, accumulate=False):
    """C (+)= bias + A B by `split_linear`, each factor stored as it is or turned."""
    rows, depth = a.shape
    columns = b.shape[1]
    a_strides, b_strides = ((1, rows) if turned_a else (depth, 1)), ((1, depth) if turned_b else (columns, 1))
    a, b = np.ascontiguousarray(a.T if turned_a else a), np.ascontiguousarray(b.T if turned_b else b)
    split_linear.product(a, a_strides, b, b_strides, depth, bias, c, accumulate)
    return c


@with_unit
@every_product
def test_matrix_product(sizes, team, scratch):
    rng = np.random.default_rng(4)
    rows, depth, columns = sizes
    a, b, bias, before = (
        rng.standard_normal(shape).astype(F32)
        for shape in ((rows, depth), (depth, columns), (columns,), (rows, columns))
    )
    expected = a.astype(np.float64) @ b
    sizes_of_terms = np.abs(a).astype(np.float64) @ np.abs(b)
    for turned in ((False, False), (False, True), (True, False)):
        results = []
        for count in (1, 2):
            team(count)
            y = multiply(a, b, bias, np.full((rows, columns), np.nan, F32), *turned)
            assert (np.abs(y - (expected + bias)) <= 1e-6 * (sizes_of_terms + np.abs(bias))).all()
            added = multiply(a, b, bias[:0], before.copy(), *turned, accumulate=True)
            assert (np.abs(added - (expected + before)) <= 1e-6 * (sizes_of_terms + np.abs(before))).all()
            plain = multiply(a, b, bias[:0], np.full((rows, columns), np.nan, F32), *turned)
            assert (np.abs(plain - expected) <= 1e-6 * sizes_of_terms).all()
            results.append(y.tobytes() + added.tobytes() + plain.tobytes())
        assert results[0] == results[1]
    scratch.check(sizes)


@with_unit
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize(("depth", "columns"), [(700, 70), (2600, 70), (90, 700)])
def test_infinity_and_nan_go_where_they_go_in_numpy(depth, columns, turned):
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((50, depth)).astype(F32), rng.standard_normal((depth, columns)).astype(F32)
    # Sums are of the same size for all depths.
    a *= np.sqrt(700 / max(depth, 700))
    a[3, -30], a[40, 2], a[41, 5] = np.inf, np.nan, -np.inf
    b[-30, 7], b[5, 9], b[-1, 66], b[0, 1] = 0, 0, np.inf, -np.inf
    y = multiply(a, b, b[0, :0], np.empty((50, columns), F32), *turned)
    with np.errstate(invalid="ignore"):
        expected = a.astype(np.float64) @ b
    finite = np.isfinite(expected)
    assert not finite.all()
    assert np.array_equal(y[~finite], expected[~finite], equal_nan=True)
    np.testing.assert_allclose(y[finite], expected[finite], rtol=0, atol=1e-4)


@with_unit
def test_the_same_bits_beside_nan_on_any_team(team):
    """What is not finite takes two products: for the same rows, columns and filters on every team."""
    rng = np.random.default_rng(9)
    a, b = rng.standard_normal((200, 90)).astype(F32), rng.standard_normal((90, 200)).astype(F32)
    a[70, 3] = b[7, 130] = np.nan
    layer, x, _, _, dout, _ = arguments("many images")
    dout[3, 2, 1, 35] = x[7, 1, 1, 40] = np.inf
    results = []
    for count in (1, 2):
        team(count)
        y, dweight = multiply(a, b, b[0, :0], np.empty((200, 200), F32)), np.zeros((3, 3, 64, 40), F32)
        split_weights.add_weight_gradient(layer, dout, x, dweight)
        results.append(y.tobytes() + dweight.tobytes())
    assert results[0] == results[1]


@with_unit
def test_sums_that_overflow_are_infinite():
    a, b = np.full((64, 64), 3e38, F32), np.full((64, 64), 2, F32)
    b[:, 1::2] = -2
    y = multiply(a, b, b[0, :0], np.empty((64, 64), F32))
    assert (y[:, ::2] == np.inf).all()
    assert (y[:, 1::2] == -np.inf).all()


@with_unit
def test_large_linear_layers_are_taken_to_it(monkeypatch):
    rng = np.random.default_rng(6)
    x, weight, dout = (
        rng.standard_normal(shape).astype(F32) for shape in ((256, 300), (300, 200), (256, 200))
    )
    calls = []
    real = split_linear.product
    monkeypatch.setattr(split_linear, "product", lambda *args: (calls.append(args[0].shape), real(*args)))
    for ours, theirs in (
        (cpu.linear_forward(x, weight), x.astype(np.float64) @ weight),
        (cpu.linear_backward_input(dout, weight), dout.astype(np.float64) @ weight.T),
        (cpu.linear_backward_weight(dout, x), x.T.astype(np.float64) @ dout),
    ):
        assert error(ours, theirs) < BOUND
    assert len(calls) == 3
    cpu.linear_forward(x.astype(np.float64), weight.astype(np.float64))
    cpu.linear_forward(x[:20], weight)
    assert len(calls) == 3


# ------------------------------------------------------------------ convolution

# x, filters, kernel, padding, dilation, stride
CONVOLUTIONS = {
    "whole vectors": ((2, 8, 8, 64), 64, 3, 1, 1, 1),
    "edges everywhere": ((3, 5, 7, 40), 33, 3, 1, 1, 1),
    "five by five": ((1, 33, 9, 32), 70, 5, 2, 1, 1),
    "uneven padding": ((2, 6, 6, 35), 17, 3, ((0, 2), (1, 0)), 1, 1),
    "dilation": ((2, 11, 12, 32), 32, 3, 2, 2, 1),
    "one tap": ((4, 4, 4, 96), 48, 1, 0, 1, 1),
    "padded single tap": ((2, 4, 5, 33), 16, 1, ((1, 0), (0, 2)), 1, 1),
    "blocks of rows": ((1, 40, 41, 200), 20, 3, 1, 1, 1),
    "a kernel as large as the image": ((2, 7, 7, 24), 40, 7, 3, 1, 1),
    "one row of taps": ((3, 9, 4, 33), 31, (1, 3), (0, 1), 1, 1),
    "one column of taps": ((3, 9, 4, 33), 31, (4, 1), 0, 1, 1),
    "no padding": ((2, 6, 5, 64), 32, 3, 0, 1, 1),
    "more padding than kernel": ((2, 6, 5, 34), 32, 3, 5, 1, 1),
    "few channels": ((1, 3, 40, 5), 3, 3, 1, 1, 1),
    "many images": ((20, 9, 8, 64), 40, 3, 1, 1, 1),
    "one pixel": ((1, 1, 1, 20), 20, 1, 0, 1, 1),
    "stride": ((3, 9, 8, 40), 33, 3, 1, 1, 2),
    "stride of the kernel": ((2, 8, 8, 36), 20, 2, 0, 1, 2),
    "a stride that skips": ((2, 10, 11, 34), 20, 1, 0, 1, (2, 3)),
    "two strides": ((2, 13, 17, 33), 18, (5, 4), ((1, 2), (3, 0)), 1, (3, 2)),
    "stride and dilation": ((2, 15, 13, 32), 16, 3, 2, 2, 2),
    "stride and odd dilation": ((2, 15, 14, 32), 16, 3, 2, 3, 2),
    "stride, blocks of rows": ((1, 50, 51, 140), 20, 3, 1, 1, 2),
    "stride, many images": ((20, 12, 12, 48), 40, 3, 1, 1, 2),
    "a stride beyond the image": ((2, 3, 2, 32), 17, 3, 1, 1, 5),
}
every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS)


def arguments(case):
    shape, filters, kernel, padding, dilation, stride = CONVOLUTIONS[case]
    kernel = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    rng = np.random.default_rng(7)
    layer = direct.layer(shape, kernel, shape[3], filters, stride, padding, dilation, 1)
    x, weight, bias, dout = (
        rng.standard_normal(size).astype(F32)
        for size in (shape, (*kernel, shape[3], filters), filters, (shape[0], *layer.out_image, filters))
    )
    return layer, x, weight, bias, dout, {"padding": padding, "dilation": dilation, "stride": stride}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few rows, so that images are cut."""
    monkeypatch.setattr(split_grid, "_BLOCK_BYTES", 1)
    caches = split_direct._forward_job, split_direct._backward_jobs, split_weights._plan
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def assert_passes(case, team):
    layer, x, weight, bias, dout, settings = arguments(case)
    exact = [array.astype(np.float64) for array in (x, weight, bias, dout)]
    y = reference.conv2d_forward(*exact[:3], **settings)
    dx = reference.conv2d_backward_input(exact[3], exact[1], x.shape, **settings)
    dweight = reference.conv2d_backward_weight(exact[3], exact[0], weight.shape[:2], **settings)
    results = []
    for count in (1, 2):
        team(count)
        ours = [np.full(array.shape, np.nan, F32) for array in (y, y, dx)]
        split_direct.forward(layer, x, weight, bias, ours[0])
        split_direct.forward(layer, x, weight, None, ours[1])
        split_direct.backward_input(layer, dout, weight, ours[2])
        assert error(ours[2], dx) < BOUND
        ours.append(np.ones(weight.shape, F32))
        split_weights.add_weight_gradient(layer, dout, x, ours[3])
        assert error(ours[0], y) < BOUND
        assert error(ours[1], y - bias) < BOUND
        assert error(ours[3], dweight + 1) < BOUND
        results.append(b"".join(array.tobytes() for array in ours))
    assert results[0] == results[1]


@with_unit
@every_convolution
def test_all_passes(case, team, scratch):
    assert_passes(case, team)
    scratch.check(case)


@with_unit
@every_convolution
def test_all_passes_with_images_cut(case, team, scratch, small_blocks):
    assert_passes(case, team)
    scratch.check(case)


@with_unit
@pytest.mark.parametrize("pool_size", [1, 2, (3, 1)])
@pytest.mark.parametrize("case", ["whole vectors", "edges everywhere", "blocks of rows", "many images"])
def test_forward_ends_in_pooling(case, pool_size, team, scratch):
    layer, x, weight, bias, _, settings = arguments(case)
    for relu in (True, False):
        e = pooled_convolution._epilogue(layer, pool_size, relu, True)
        y = np.full((len(x), e.out_h, e.out_w, e.filters), np.nan, F32)
        argmax = np.full(y.shape, 99, np.uint8)
        team(1 + relu)
        split_direct.forward(layer, x, weight, bias, y, e, argmax)
        expected, where = reference.conv2d_pool_forward(x, weight, bias, pool_size, relu, **settings)
        np.testing.assert_allclose(y, expected, rtol=0, atol=BOUND * np.abs(expected).max())
        # Values that are nearly the same may change places.
        assert (argmax != where).mean() < 1e-3
    scratch.check(case)


@with_unit
@pytest.mark.parametrize(
    "case",
    [
        "whole vectors",
        "edges everywhere",
        "many images",
        "blocks of rows",
        "stride",
        "stride, blocks of rows",
    ],
)
def test_infinity_and_nan_go_where_they_go_in_the_reference(case, small_blocks):
    layer, x, weight, bias, dout, settings = arguments(case)
    x[0, 2, 3, 4], x[-1, 0, 0, 0] = np.inf, np.nan
    weight[1, 1, 3, 5] = -np.inf
    dout[0, 1, 2, 6] = np.inf
    exact = [array.astype(np.float64) for array in (x, weight, bias, dout)]
    with np.errstate(invalid="ignore"):
        expected = [
            reference.conv2d_forward(*exact[:3], **settings),
            reference.conv2d_backward_input(exact[3], exact[1], x.shape, **settings),
        ]
    y, dx = np.empty(dout.shape, F32), np.empty(x.shape, F32)
    split_direct.forward(layer, x, weight, bias, y)
    split_direct.backward_input(layer, dout, weight, dx)
    for ours, theirs in zip((y, dx), expected, strict=True):
        finite = np.isfinite(theirs)
        assert not finite.all()
        assert np.array_equal(ours[~finite], theirs[~finite], equal_nan=True)
        np.testing.assert_allclose(ours[finite], theirs[finite], rtol=0, atol=3e-4)


@with_unit
def test_infinity_and_nan_reach_the_weights_that_they_meet():
    layer, x, _, _, dout, settings = arguments("whole vectors")
    dout[1, 3, 4, 5] = np.nan
    x[0, 4, 4, 7] = np.inf
    dweight = np.zeros((3, 3, 64, 64), F32)
    split_weights.add_weight_gradient(layer, dout, x, dweight)
    rest = np.delete(np.delete(dweight, 5, axis=3), 7, axis=2)
    assert np.isnan(dweight[:, :, :, 5]).all()
    assert not np.isfinite(dweight[:, :, 7]).any()
    x[0, 4, 4, 7] = dout[1, 3, 4, 5] = 0
    expected = reference.conv2d_backward_weight(dout.astype(np.float64), x.astype(np.float64), 3, **settings)
    assert error(rest, np.delete(np.delete(expected, 5, axis=3), 7, axis=2)) < BOUND


@with_unit
@pytest.mark.parametrize("case", ["whole vectors", "stride", "stride and dilation"])
def test_the_gradient_where_infinity_meets_infinity(case, small_blocks):
    layer, x, _, _, dout, settings = arguments(case)
    x[0, 4, 4, 7] = -np.inf
    dout[0, 2, 2, 3] = dout[0, 1, 2, 5] = np.inf
    dweight = np.zeros((3, 3, x.shape[3], dout.shape[3]), F32)
    split_weights.add_weight_gradient(layer, dout, x, dweight)
    with np.errstate(invalid="ignore"):
        expected = reference.conv2d_backward_weight(
            dout.astype(np.float64), x.astype(np.float64), 3, **settings
        )
    finite = np.isfinite(expected)
    assert (expected[:, :, 7, 3] == -np.inf).any()
    assert np.array_equal(dweight[~finite], expected[~finite], equal_nan=True)
    assert error(dweight[finite], expected[finite]) < BOUND


@with_unit
@pytest.mark.parametrize(
    ("shape", "filters"),
    [
        ((2, 5, 7, 33), 40),
        ((3, 8, 8, 64), 64),
        ((1, 3, 3, 1100), 31),
        ((9, 6, 6, 70), 300),
        ((1, 1, 2, 2100), 90),
        ((2, 1, 1, 1), 1),
    ],
)
def test_filters_of_one_pixel(shape, filters, team, scratch):
    rng = np.random.default_rng(12)
    layer = direct.layer(shape, (1, 1), shape[3], filters, 1, 0, 1, 1)
    x, weight, bias, dout = (
        rng.standard_normal(size).astype(F32)
        for size in (shape, (1, 1, shape[3], filters), filters, (*shape[:3], filters))
    )
    exact = [array.astype(np.float64) for array in (x, weight, bias, dout)]
    y = reference.conv2d_forward(*exact[:3])
    positive = np.maximum(y, 0)
    dx = reference.conv2d_backward_input(exact[3], exact[1], shape)
    dweight = reference.conv2d_backward_weight(exact[3], exact[0], (1, 1))
    results = []
    for count in (1, 2):
        team(count)
        ours = [np.full(array.shape, np.nan, F32) for array in (y, y, y, y, dx)]
        argmax = np.full(y.shape, 99, np.uint8)
        split_pointwise.forward(layer, x, weight, bias, ours[0])
        split_pointwise.forward(layer, x, weight, None, ours[1])
        for keeps, result, where in ((True, ours[2], argmax), (False, ours[3], NOWHERE)):
            e = pooled_convolution._epilogue(layer, 1, True, keeps)
            split_pointwise.forward(layer, x, weight, bias, result, e, where)
        split_pointwise.backward_input(layer, dout, weight, ours[4])
        ours.append(np.ones(weight.shape, F32))
        split_pointwise.add_weight_gradient(layer, dout, x, ours[5])
        for got, expected in zip(ours, (y, y - bias, positive, positive, dx, dweight + 1), strict=True):
            assert error(got, expected) < BOUND
        assert np.array_equal(argmax, np.where(ours[0] > 0, 0, DEAD))
        results.append(b"".join(array.tobytes() for array in (*ours, argmax)))
    assert results[0] == results[1]
    scratch.check(shape)


@with_unit
def test_layers_of_one_pixel_are_taken_to_products(switch):
    dtype = np.dtype(F32)
    relu, pool = (
        Epilogue(pool_h=n, pool_w=n, relu=1, out_h=16 // n, out_w=16 // n, filters=96, keeps=1)
        for n in (1, 2)
    )

    def ways(stride=1, padding=0, groups=1, dtype=dtype, e=NO_EPILOGUE):
        layer = direct.layer((16, 16, 16, 96), (1, 1), 96 // groups, 96, stride, padding, 1, groups)
        return (
            convolution.forward_way(layer, 16, dtype, e, True) is split_pointwise.forward,
            convolution.input_way(layer, 16, dtype, True) is split_pointwise.backward_input,
            convolution._weight_way(layer, 16, dtype, True) is split_pointwise.add_weight_gradient,
        )

    assert all(ways())
    assert all(ways(e=relu))
    assert not ways(e=pool)[0]
    assert not ways(e=relu._replace(relu=0))[0]
    for others in ({"stride": 2}, {"padding": 1}, {"groups": 2}, {"dtype": np.dtype(np.float64)}):
        assert not any(ways(**others))


@with_unit
def test_threads_have_equal_shares():
    """Of 49 half blocks of rows one thread would have four of seven tasks."""
    strides = (512, 1), (512, 1), (512, 1)
    for threads in (1, 2):
        plan = split_linear._plan(1568, 512, 512, *strides, False, threads)
        share = -(-plan.tasks // threads) * plan.sizes.block_rows
        assert share <= 1.05 * 1568 / threads
    assert split_linear._plan(1568, 512, 512, *strides, False, 1).sizes.block_rows == 224


@with_unit
def test_layers_without_winograd_are_taken_to_it(switch):
    layer = direct.layer((16, 16, 16, 64), (3, 3), 64, 64, 1, 1, 1, 1)
    dtype = np.dtype(F32)
    switch(False)
    assert convolution.forward_way(layer, 16, dtype, NO_EPILOGUE, False) is split_direct.forward
    assert convolution.input_way(layer, 16, dtype, False) is split_direct.backward_input
    assert convolution._weight_way(layer, 16, dtype, False) is split_weights.add_weight_gradient
    assert convolution.forward_way(layer, 16, np.dtype(np.float64), NO_EPILOGUE, False) is direct.forward
    strided = direct.layer((16, 16, 16, 64), (3, 3), 64, 128, 2, 1, 1, 1)
    assert convolution.forward_way(strided, 16, dtype, NO_EPILOGUE, False) is split_direct.forward
    assert convolution.input_way(strided, 16, dtype, False) is split_direct.backward_input
    grouped = direct.layer((16, 16, 16, 64), (3, 3), 32, 64, 1, 1, 1, 2)
    assert convolution.forward_way(grouped, 16, dtype, NO_EPILOGUE, False) is direct.forward


@with_unit
def test_played_again_on_other_numbers(switch):
    switch(False)
    rng = np.random.default_rng(8)
    x, weight, dout = (
        rng.standard_normal(shape).astype(F32) for shape in ((8, 16, 16, 64), (3, 3, 64, 64), (8, 16, 16, 64))
    )

    def passes():
        return (
            cpu.conv2d_forward(x, weight, padding=1),
            cpu.conv2d_backward_input(dout, weight, x.shape, padding=1),
            cpu.conv2d_backward_weight(dout, x, 3, padding=1),
            cpu.linear_forward(x.reshape(512, -1), weight.reshape(256, -1)),
        )

    with Recording(calls=True) as jobs:
        results = passes()
    for array in (x, weight, dout):
        array[...] = rng.standard_normal(array.shape)
    jobs.play()
    for ours, theirs in zip(results, passes(), strict=True):
        assert ours.tobytes() == theirs.tobytes()
