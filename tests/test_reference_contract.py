"""What every reference kernel promises: its input's dtype, untouched inputs, empty batches, clear errors."""

import ast
from pathlib import Path

import numpy as np
import pytest

from fastcnn.kernels import reference as ref

IMAGES = (2, 5, 6, 4)
PADDING = ((1, 0), (0, 1))


def floats(dtype, *shapes, n=2):
    """Standard normal arrays; a leading axis of 2 becomes `n` images or rows."""
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    return [a[:n] if a.ndim > 1 and len(a) == 2 else a for a in arrays]


def labels(n):
    return np.array([2, 0])[:n]


def calls(dtype, n=2):
    """Arguments for every function, in `dtype`, for a batch of n (0 to 2)."""
    x, weight, bias, dout = floats(dtype, IMAGES, (3, 3, 2, 6), (6,), (2, 4, 5, 6), n=n)
    conv = (1, PADDING, 1, 2)
    x_shape = (n, *IMAGES[1:])
    cols = ref.im2col(x, 3, 1, PADDING)
    pooled, argmax = ref.max_pool2d_forward(x, 2, 1, PADDING, 1)
    rows, matrix, vector = floats(dtype, (2, 3), (3, 5), (5,), n=n)
    d_rows, d_losses = floats(dtype, (2, 5), (2, 1), n=n)
    d_losses = d_losses[:, 0]
    slopes, positive = floats(dtype, (4,))[0], np.array([0.5, 1, 2, 3], dtype)
    norm = (x, x, slopes, slopes, positive, True)
    quarters = np.full((n, *(size // 2 for size in IMAGES[1:3]), IMAGES[3]), 1, np.uint8)
    d_halves = np.ones(quarters.shape, dtype)
    d_pool = dout[:, :2, :2]
    chosen = np.full(d_pool.shape, 1, np.uint8)
    soft = np.full((n, 5), 0.2, dtype)
    how = {"weight": np.arange(1, 6).astype(dtype), "label_smoothing": 0.1}
    return {
        "im2col": ((x, 3, 1, PADDING), {}),
        "col2im": ((cols, x_shape, 3, 1, PADDING), {}),
        "conv2d_forward": ((x, weight, bias, *conv), {}),
        "conv2d_backward_input": ((dout, weight, x_shape, *conv), {}),
        "conv2d_backward_weight": ((dout, x, 3, *conv), {}),
        "conv2d_backward_bias": ((dout,), {}),
        "conv2d_pool_forward": ((x, weight, bias, 2, True, *conv), {}),
        "conv2d_pool_backward_input": ((d_pool, chosen, weight, x_shape, 2, *conv), {}),
        "conv2d_pool_backward_weight": ((d_pool, chosen, x, 3, 2, *conv), {}),
        "max_pool2d_forward": ((x, 2, 1, PADDING), {}),
        "max_pool2d_backward": ((pooled, argmax, x_shape, 2, 1, PADDING), {}),
        "avg_pool2d_forward": ((x, 2, 1, PADDING), {}),
        "avg_pool2d_backward": ((pooled, x_shape, 2, 1, PADDING), {}),
        "adaptive_avg_pool2d_forward": ((x, (2, 5)), {}),
        "adaptive_avg_pool2d_backward": ((x, (n, 7, 9, 4)), {}),
        "global_avg_pool2d_forward": ((x,), {}),
        "global_avg_pool2d_backward": ((x[:, 0, 0], x_shape), {}),
        "linear_forward": ((rows, matrix, vector), {}),
        "linear_backward_input": ((d_rows, matrix), {}),
        "linear_backward_weight": ((d_rows, rows), {}),
        "relu_forward": ((x,), {}),
        "relu_backward": ((x, x), {}),
        "leaky_relu_forward": ((x,), {}),
        "leaky_relu_backward": ((x, x), {}),
        "prelu_forward": ((x, slopes), {}),
        "prelu_backward": ((x, x, slopes), {}),
        "batch_norm_forward": ((x, slopes, slopes, slopes, positive, False), {}),
        "batch_norm_backward": (norm, {}),
        "batch_norm_pool_forward": ((x, slopes, slopes, slopes, positive, False, 2), {}),
        "batch_norm_pool_backward": ((d_halves, quarters, x, slopes, slopes, positive, True, 2), {}),
        "dropout_forward": ((x, 0.5, 1), {}),
        "dropout_backward": ((x, 0.5, 1), {}),
        "softmax": ((rows,), {}),
        "log_softmax": ((rows,), {}),
        "softmax_backward": ((rows, rows), {}),
        "log_softmax_backward": ((rows, rows), {}),
        "softmax_cross_entropy": ((d_rows, labels(n)), how),
        "softmax_cross_entropy_backward": ((d_losses, d_rows, labels(n)), how),
        "soft_cross_entropy": ((d_rows, soft), how),
        "soft_cross_entropy_backward": ((d_losses, d_rows, soft), how),
    }


BATCHES = ("gather_batch", "augment_batch")
UPDATES = ("sgd_update", "adam_update")
NAMES = sorted(calls(np.float64))


def call(name, dtype, n=2):
    args, kwargs = calls(dtype, n)[name]
    result = getattr(ref, name)(*args, **kwargs)
    return result if isinstance(result, tuple) else (result,)


def test_the_table_holds_every_kernel():
    assert sorted([*NAMES, *BATCHES, *UPDATES]) == ref.__all__


@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept_and_float32_is_float64_rounded(name):
    for single, double in zip(call(name, np.float32), call(name, np.float64), strict=True):
        if single.dtype == np.uint8:
            np.testing.assert_array_equal(single, double)
            continue
        assert (single.dtype, double.dtype) == (np.float32, np.float64)
        assert single.shape == double.shape
        np.testing.assert_allclose(single, double, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_may_be_read_only_and_of_any_strides(name):
    expected = call(name, np.float64)
    args, kwargs = calls(np.float64)[name]

    def awkward(value):
        if not isinstance(value, np.ndarray):
            return value
        spread = np.zeros((*value.shape, 2), value.dtype)[..., 0]
        spread[...] = value
        spread.flags.writeable = False
        return spread

    result = getattr(ref, name)(*map(awkward, args), **{k: awkward(v) for k, v in kwargs.items()})
    for a, b in zip(result if isinstance(result, tuple) else (result,), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_none_gives_empty_results_or_zero_gradients(name):
    for empty, full in zip(call(name, np.float32, 0), call(name, np.float32), strict=True):
        assert empty.dtype == full.dtype
        if name in ("batch_norm_forward", "batch_norm_pool_forward") and empty.ndim == 1:
            continue
        if empty.size:
            assert empty.shape == full.shape
            np.testing.assert_array_equal(empty, np.zeros(full.shape))
        else:
            assert empty.shape[1:] == full.shape[1:] or name in ("im2col", "global_avg_pool2d_forward")


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes_are_refused(name):
    args, kwargs = calls(np.float64)[name]
    args = [a.astype(np.float16) if getattr(a, "dtype", None) == np.float64 else a for a in args]
    with pytest.raises(TypeError, match="float16"):
        getattr(ref, name)(*args, **kwargs)


def test_nothing_but_numpy_is_imported():
    for path in Path(ref.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module in ("__future__", "collections.abc", "typing"), path
                assert node.level < 2, path
            elif isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"numpy", "math"}, path


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_updates_change_only_what_they_own(dtype):
    param, grad, velocity, square = (np.full(3, v, dtype) for v in (1, 2, 3, 4))
    ref.sgd_update(param, grad, velocity, 0.1, momentum=0.5)
    ref.adam_update(param, grad, velocity, square, 1, 0.1)
    np.testing.assert_array_equal(grad, [2, 2, 2])
    assert param.dtype == velocity.dtype == square.dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_batches(dtype):
    images = np.arange(24).reshape(2, 3, 4, 1).astype(dtype)
    images.flags.writeable = False
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    params = np.tile(np.float32([1, 1, 1, 0.1, 0.9, 0.1, 0, 0, 2]), (3, 1))
    for count in (3, 0):
        index = np.array([1, 0, 1])[:count]
        for out in (
            ref.gather_batch(images, index, one, zero),
            ref.augment_batch(images, index, one, zero, params[:count], 2**64 - 1),
        ):
            assert out.dtype == np.float32
            assert out.shape == (count, 3, 4, 1)


X = np.zeros((1, 3, 3, 4))
W = np.zeros((2, 2, 4, 6))
ROWS = np.zeros((2, 3))
ONES = np.ones(1, np.float32)
PIXELS = np.zeros((2, 3, 3, 1), np.uint8)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (r"kernel_size: 4 .* spans 4 pixels", lambda: ref.im2col(X, 4)),
        (r"kernel_size: 2 with dilation 3 spans 4", lambda: ref.conv2d_forward(X, W, dilation=3)),
        (r"cols: shape", lambda: ref.col2im(np.zeros((4, 15)), X.shape, 2)),
        (r"x: expected \(N, H, W, C\)", lambda: ref.conv2d_forward(X[0], W)),
        (r"weight: shape", lambda: ref.conv2d_forward(X[..., :3], W)),
        (r"weight: shape", lambda: ref.conv2d_forward(X, W, groups=2)),
        (r"groups: 2 does not divide", lambda: ref.conv2d_forward(X, W[:, :, :2, :5], groups=2)),
        (
            r"groups: 3 does not divide 4",
            lambda: ref.conv2d_backward_weight(X[:, :2, :2, :3], X, 2, groups=3),
        ),
        (r"bias: shape", lambda: ref.conv2d_forward(X, W, np.zeros(5))),
        (r"dout: shape", lambda: ref.conv2d_backward_input(X, W, X.shape)),
        (r"dout: shape", lambda: ref.conv2d_backward_weight(X, X, 2)),
        (r"stride: 0 is below 1", lambda: ref.im2col(X, 2, stride=0)),
        (r"padding: -1 is below 0", lambda: ref.im2col(X, 2, padding=-1)),
        (r"padding: 2 is more than half", lambda: ref.max_pool2d_forward(X, 3, padding=2)),
        (r"padding: .* is more than half", lambda: ref.avg_pool2d_forward(X, 3, padding=((0, 2), (0, 0)))),
        (r"kernel_size: 4", lambda: ref.max_pool2d_forward(X, 4)),
        (r"pixels", lambda: ref.max_pool2d_forward(X[:, :0], 2, padding=1)),
        (r"dout: shape", lambda: ref.max_pool2d_backward(X, np.zeros(X.shape, np.uint8), X.shape, 2)),
        (r"dout: shape", lambda: ref.max_pool2d_backward(X[:, :1], X[:, :1], (1, 4, 4, 4), 2)),
        (r"argmax: shape", lambda: ref.max_pool2d_backward(X[:, :1, :1], X[:, :1], X.shape, 2)),
        (r"divisor_override: must not be 0", lambda: ref.avg_pool2d_forward(X, 2, divisor_override=0)),
        (r"output_size: 0 is below 1", lambda: ref.adaptive_avg_pool2d_forward(X, 0)),
        (r"no pixels", lambda: ref.adaptive_avg_pool2d_forward(X[:, :0], 1)),
        (r"no pixels", lambda: ref.global_avg_pool2d_forward(X[:, :0])),
        (r"weight: shape \(3,\) is neither", lambda: ref.prelu_forward(X, np.zeros(3))),
        (
            r"x: shape \(1, 3\) has one value per channel",
            lambda: ref.batch_norm_forward(ROWS[:1], None, None, None, None, True),
        ),
        (r"running_mean", lambda: ref.batch_norm_forward(ROWS, None, None, None, None, False)),
        (r"p: 1.5 is not in", lambda: ref.dropout_forward(ROWS, 1.5, 0)),
        (r"seed: -1 is not in", lambda: ref.dropout_forward(ROWS, 0.5, -1)),
        (r"target: 3 is no class", lambda: ref.softmax_cross_entropy(ROWS, np.array([0, 3]))),
        (r"target: -1 is no class", lambda: ref.softmax_cross_entropy(ROWS, np.array([-1, 0]))),
        (r"label_smoothing: 2", lambda: ref.soft_cross_entropy(ROWS, ROWS, label_smoothing=2)),
        (r"velocity: needed", lambda: ref.sgd_update(ONES, ONES, None, 0.1, momentum=0.9)),
        (r"step: 0 is below 1", lambda: ref.adam_update(ONES, ONES, ONES, ONES, 0, 0.1)),
        (r"index: 2 is not in \[0, 2\)", lambda: ref.gather_batch(PIXELS, np.array([2]), ONES, ONES)),
        (r"params: shape", lambda: ref.augment_batch(PIXELS, np.array([1]), ONES, ONES, ROWS, 0)),
    ],
)
def test_impossible_arguments(match, call):
    with pytest.raises(ValueError, match=match):
        call()
