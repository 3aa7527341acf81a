"""CrossEntropyLoss against the formula, and its gradient against central differences."""

import numpy as np
import pytest

import fastcnn
from fastcnn import nn


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def log_p(x, axis=1):
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def check_gradient(loss_fn, x, target, dout=None):
    loss_fn(x, target)
    dx = loss_fn.backward() if dout is None else loss_fn.backward(dout)
    assert dx.shape == x.shape
    expected = np.empty(x.shape)
    for index in np.ndindex(*x.shape):
        values = []
        for step in (1e-6, -1e-6):
            moved = x.copy()
            moved[index] += step
            values.append(np.sum(loss_fn(moved, target) * (1.0 if dout is None else dout)))
        expected[index] = (values[0] - values[1]) / 2e-6
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-8)


def test_is_a_float_and_the_mean_of_minus_log_softmax():
    x, y = draw(5, 4), np.array([0, 3, 1, 1, 2])
    loss = nn.CrossEntropyLoss()(x, y)
    assert type(loss) is float
    assert loss == pytest.approx(-log_p(x)[np.arange(5), y].mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, np.array([0.5, 2.0, 0.0, 1.0])])
def test_gradients(reduction, smoothing, weight):
    loss_fn = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
    x, y = draw(5, 4), np.array([0, 3, 1, 1, 2])
    check_gradient(loss_fn, x, y)
    y[1] = -100
    check_gradient(loss_fn, x, y)
    check_gradient(loss_fn, x, np.exp(log_p(draw(5, 4, seed=1))))


def test_one_number_for_each_sample():
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    x, y = draw(3, 4), np.array([0, 3, 1])
    losses = loss_fn(x, y)
    np.testing.assert_allclose(losses, -log_p(x)[np.arange(3), y])
    check_gradient(loss_fn, x, y, dout=np.array([1.0, -2.0, 0.5]))


def test_images_of_labels():
    x, y = draw(2, 3, 4, 5), np.random.default_rng(0).integers(0, 3, (2, 4, 5))
    expected = -np.take_along_axis(log_p(x), y[:, None], 1)[:, 0]
    assert nn.CrossEntropyLoss()(x, y) == pytest.approx(expected.mean())
    np.testing.assert_allclose(nn.CrossEntropyLoss(reduction="none")(x, y), expected)
    check_gradient(nn.CrossEntropyLoss(), x[:, :, :2, :2], y[:, :2, :2])
    probabilities = np.exp(log_p(draw(2, 3, 4, 5, seed=2)))
    assert nn.CrossEntropyLoss()(x, probabilities) == pytest.approx(-(probabilities * log_p(x)).sum(1).mean())


def test_one_sample():
    x = draw(4)
    assert nn.CrossEntropyLoss()(x, np.array(2)) == pytest.approx(-log_p(x, 0)[2])
    assert nn.CrossEntropyLoss()(x, 2) == pytest.approx(-log_p(x, 0)[2])
    check_gradient(nn.CrossEntropyLoss(), x, np.array(2))


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_one_hot_targets(dtype):
    x, y = draw(5, 4), np.array([0, 3, 1, 1, 2])
    assert nn.CrossEntropyLoss()(x, np.eye(4)[y].astype(dtype)) == pytest.approx(nn.CrossEntropyLoss()(x, y))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, ">i4"])
def test_any_int_labels(dtype):
    x, y = draw(5, 4), np.array([0, 3, 1, 1, 2])
    assert nn.CrossEntropyLoss()(x, y.astype(dtype)) == nn.CrossEntropyLoss()(x, y)


def test_all_ignored():
    loss_fn = nn.CrossEntropyLoss(ignore_index=1)
    assert np.isnan(loss_fn(draw(2, 3), np.array([1, 1])))
    assert not loss_fn.backward().any()


def test_no_label_is_ignored_among_probabilities():
    x = draw(3, 4)
    with pytest.raises(ValueError, match=r"ignore_index: 2 .*\(3, 4\)"):
        nn.CrossEntropyLoss(ignore_index=2)(x, np.full((3, 4), 0.25))
    assert np.isfinite(nn.CrossEntropyLoss(ignore_index=-1)(x, np.full((3, 4), 0.25)))


def test_scaled_gradient():
    loss_fn, x, y = nn.CrossEntropyLoss(), draw(3, 4), np.array([0, 3, 1])
    loss_fn(x, y)
    dx = loss_fn.backward().copy()
    loss_fn(x, y)
    np.testing.assert_allclose(loss_fn.backward(2.0), 2 * dx)


def test_nan_is_not_hidden():
    x = draw(3, 4)
    x[1, 2] = np.nan
    loss_fn = nn.CrossEntropyLoss()
    assert np.isnan(loss_fn(x, np.array([0, 1, 2])))
    assert np.isnan(loss_fn.backward()[1]).all()


def test_weight_is_a_buffer():
    loss_fn = nn.CrossEntropyLoss(np.ones(3))
    assert list(loss_fn.state_dict()) == ["weight"]
    loss_fn(draw(2, 3).astype(np.float32), np.array([0, 1]))


@pytest.mark.parametrize(
    ("x", "target", "error", "message"),
    [
        ([[1.0]], [0], TypeError, "input: expected a NumPy array"),
        (np.zeros((2, 3), int), np.zeros(2, int), TypeError, "input: dtype int64"),
        (np.zeros((2, 3)), np.array([0, 3]), ValueError, "target: label 3 is not between 0 and 2"),
        (np.zeros((2, 3)), np.array([0, -1]), ValueError, "target: label -1 is not between 0 and 2"),
        (np.zeros((2, 3)), np.zeros(2), TypeError, "target: class indices must be ints"),
        (np.zeros((2, 3)), np.zeros(3, int), ValueError, r"target: shape \(3,\) is neither \(2,\)"),
        (np.zeros((2, 3)), np.zeros((2, 3), "U1"), TypeError, "target: expected probabilities"),
        (np.zeros((0, 3)), np.zeros(0, int), ValueError, "input: the mean of no samples is undefined"),
        (np.zeros(()), np.zeros(()), ValueError, "input: expected"),
    ],
)
def test_bad_calls(x, target, error, message):
    with pytest.raises(error, match=message):
        nn.CrossEntropyLoss()(x, target)


def test_bad_arguments():
    with pytest.raises(ValueError, match="reduction: 'median'"):
        nn.CrossEntropyLoss(reduction="median")
    with pytest.raises(ValueError, match="label_smoothing: 2"):
        nn.CrossEntropyLoss(label_smoothing=2)
    with pytest.raises(TypeError, match="weight: dtype int64"):
        nn.CrossEntropyLoss(np.ones(3, int))
    with pytest.raises(ValueError, match="weight: 2 factors are not the input's 3 classes"):
        nn.CrossEntropyLoss(np.ones(2))(draw(2, 3), np.array([0, 1]))


def test_backward_checks():
    loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(RuntimeError, match="CrossEntropyLoss: backward needs a forward"):
        loss_fn.backward()
    with fastcnn.no_grad():
        loss_fn(draw(2, 3), np.array([0, 1]))
    with pytest.raises(RuntimeError, match="no_grad"):
        loss_fn.backward()
    loss_fn(draw(2, 3), np.array([0, 1]))
    with pytest.raises(ValueError, match="dout: shape"):
        loss_fn.backward(np.ones(2))
    with pytest.raises(TypeError, match="dout"):
        loss_fn.backward("x")
    assert loss_fn.backward(input_grad=False) is None


def test_the_sum_over_no_samples_is_zero():
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    assert loss_fn(np.zeros((0, 3)), np.zeros(0, int)) == 0
    assert loss_fn.backward().shape == (0, 3)
