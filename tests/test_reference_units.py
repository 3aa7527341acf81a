"""The reference's other kernels against numbers worked out by hand and published ones."""

import math

import numpy as np
import pytest

from fastcnn.kernels import reference as ref
from fastcnn.kernels.reference.stream import normal, splitmix64, uniform

NAN, INF = np.nan, np.inf


def array(*values, dtype=np.float64):
    return np.array(values, dtype)


# Activations


def test_relu():
    y = ref.relu_forward(array(-2, 0, 3, NAN, -INF, INF))
    np.testing.assert_array_equal(y, [0, 0, 3, NAN, 0, INF])
    np.testing.assert_array_equal(ref.relu_backward(array(1, 2, 3), array(0, 0.5, 3)), [0, 2, 3])


def test_relu_backward_gives_zero_even_for_an_infinite_gradient():
    np.testing.assert_array_equal(ref.relu_backward(array(INF, NAN, 5), array(0, 0, NAN)), [0, 0, 5])


def test_leaky_relu():
    np.testing.assert_array_equal(ref.leaky_relu_forward(array(-2, 0, 3, NAN), 0.5), [-1, 0, 3, NAN])
    np.testing.assert_array_equal(ref.leaky_relu_backward(array(8, 8, 8), array(-2, 0, 3), 0.5), [4, 4, 8])
    np.testing.assert_array_equal(ref.leaky_relu_forward(array(-100)), [-1])


def test_prelu_with_one_slope_and_one_a_channel():
    x, dout = array([-1, -2], [3, -4]), array([1, 10], [100, 1000])
    np.testing.assert_array_equal(ref.prelu_forward(x, array(0.5)), [[-0.5, -1], [3, -2]])
    np.testing.assert_array_equal(ref.prelu_forward(x, array(0.5, 2)), [[-0.5, -4], [3, -8]])
    dx, dweight = ref.prelu_backward(dout, x, array(0.5))
    np.testing.assert_array_equal(dx, [[0.5, 5], [100, 500]])
    np.testing.assert_array_equal(dweight, [-1 - 20 - 4000])
    dx, dweight = ref.prelu_backward(dout, x, array(0.5, 2))
    np.testing.assert_array_equal(dx, [[0.5, 20], [100, 2000]])
    np.testing.assert_array_equal(dweight, [-1, -20 - 4000])


# Batch normalization


def test_batch_norm_in_training():
    # Mean 3, variance ((-2)**2 + 2**2) / 2 = 4; eps makes it 6.25, so inv_std is 1 / 2.5.
    running_mean, running_var = array(1), array(1)
    y, mean, inv_std = ref.batch_norm_forward(
        array([1], [5]), array(10), array(100), running_mean, running_var, True, momentum=0.25, eps=2.25
    )
    np.testing.assert_allclose(y, [[92], [108]], rtol=1e-15)
    np.testing.assert_allclose([mean, inv_std], [[3], [0.4]], rtol=1e-15)
    np.testing.assert_allclose(running_mean, [0.75 * 1 + 0.25 * 3])
    np.testing.assert_allclose(running_var, [0.75 * 1 + 0.25 * 8])


def test_batch_norm_outside_training_uses_and_keeps_the_running_statistics():
    running_mean, running_var = array(2), array(9)
    y, mean, inv_std = ref.batch_norm_forward(
        array([5], [-1]), None, None, running_mean, running_var, False, eps=0.0
    )
    np.testing.assert_allclose(y, [[1], [-1]])
    np.testing.assert_allclose([mean, inv_std], [[2], [1 / 3]])
    assert (running_mean.item(), running_var.item()) == (2, 9)


def test_batch_norm_takes_statistics_over_images_rows_and_columns():
    x = np.arange(24.0).reshape(2, 2, 3, 2)
    y, mean, inv_std = ref.batch_norm_forward(x, None, None, None, None, True, eps=0.0)
    np.testing.assert_allclose(mean, [11, 12])
    # 12 numbers 2 apart have the variance 2**2 * (12**2 - 1) / 12.
    np.testing.assert_allclose(inv_std, [(143 / 3) ** -0.5] * 2)
    np.testing.assert_allclose(y.mean(axis=(0, 1, 2)), [0, 0], atol=1e-15)


def test_batch_norm_backward():
    # x_hat = (-1, 0, 1), dbias = 6, dweight = 2, dx = 0.5 * 10 * (dout - 2 - x_hat * 2 / 3).
    dout, x = array([1], [2], [3]), array([-1], [1], [3])
    dx, dweight, dbias = ref.batch_norm_backward(dout, x, array(10), array(1), array(0.5), True)
    np.testing.assert_allclose(dx, [[5 * (-1 + 2 / 3)], [0], [5 * (1 - 2 / 3)]], rtol=1e-14)
    np.testing.assert_allclose([dweight, dbias], [[2], [6]])
    dx, dweight, dbias = ref.batch_norm_backward(dout, x, None, array(1), array(0.5), False)
    np.testing.assert_allclose(dx, [[0.5], [1], [1.5]])
    np.testing.assert_allclose([dweight, dbias], [[2], [6]])


def test_batch_norm_of_an_empty_batch_leaves_the_running_statistics_alone():
    running_mean, running_var = array(2), array(9)
    y, mean, inv_std = ref.batch_norm_forward(
        np.zeros((0, 1)), None, None, running_mean, running_var, True, eps=0.25
    )
    assert y.shape == (0, 1)
    assert (mean.item(), inv_std.item()) == (0, 2)
    assert (running_mean.item(), running_var.item()) == (2, 9)


# Random numbers and dropout


def test_splitmix64_gives_its_published_numbers():
    # The first outputs from the state 1234567, as Vigna's splitmix64.c and Rosetta Code have them. State k
    # is the seed plus k times the golden gamma.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * gamma) % 2**64 for k in range(5)], np.uint64)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(states).tolist() == expected


def splitmix64_in_integers(z):
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**53 + 1, 2**63, 2**64 - 2])
def test_uniform_wraps_around(seed):
    expected = [(splitmix64_in_integers((seed + i) % 2**64) >> 40) / 2**24 for i in range(5)]
    assert uniform(seed, 5).tolist() == expected
    np.testing.assert_array_equal(np.float32(expected), expected)


def test_uniform_and_normal_have_their_moments():
    u, g = uniform(7, 100_000), normal(8, 100_000)
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_allclose([u.mean(), u.var()], [1 / 2, 1 / 12], atol=0.005)
    np.testing.assert_allclose([g.mean(), g.var(), (g**3).mean(), (g**4).mean()], [0, 1, 0, 3], atol=0.1)


def test_dropout_drops_by_its_stream():
    u = [(splitmix64_in_integers(42 + i) >> 40) / 2**24 for i in range(6)]
    x = np.arange(1.0, 7.0).reshape(2, 3)
    expected = [0 if u[i] < 0.5 else 2 * (i + 1) for i in range(6)]
    assert 0 < expected.count(0) < 6
    np.testing.assert_array_equal(ref.dropout_forward(x, 0.5, 42).ravel(), expected)
    np.testing.assert_array_equal(ref.dropout_backward(x, 0.5, 42).ravel(), expected)


def test_dropout_keeps_the_mean_and_knows_its_ends():
    x = np.full(100_000, 3.0)
    y = ref.dropout_forward(x, 0.3, 1)
    assert set(np.unique(y)) == {0, 3 / 0.7}
    np.testing.assert_allclose(y.mean(), 3, rtol=0.01)
    np.testing.assert_array_equal(ref.dropout_forward(x, 0.0, 1), x)
    np.testing.assert_array_equal(ref.dropout_forward(array(1, NAN, INF), 1.0, 1), [0, 0, 0])


# Softmax and losses

LOGS = np.log([[1, 2, 5], [4, 4, 2]])  # softmax: 1/8, 2/8, 5/8 and 4/10, 4/10, 2/10


def test_softmax():
    np.testing.assert_allclose(ref.softmax(LOGS), [[0.125, 0.25, 0.625], [0.4, 0.4, 0.2]], rtol=1e-15)
    np.testing.assert_allclose(ref.log_softmax(LOGS), np.log([[0.125, 0.25, 0.625], [0.4, 0.4, 0.2]]))
    np.testing.assert_array_equal(ref.softmax(array(1e30, 1e30)), [0.5, 0.5])
    np.testing.assert_allclose(ref.log_softmax(array(-1000, 0)), [-1000, 0])
    np.testing.assert_allclose(ref.softmax(array(-INF, 0)), [0, 1])


def test_softmax_backward():
    # sum(dout * y) = 0.25, so dx = y * (dout - 0.25).
    dx = ref.softmax_backward(array(0, 1, 0), array(0.125, 0.25, 0.625))
    np.testing.assert_allclose(dx, [-0.03125, 0.1875, -0.15625])
    dx = ref.log_softmax_backward(array(1, 1, 2), np.log([0.125, 0.25, 0.625]))
    np.testing.assert_allclose(dx, [0.5, 0, -0.5], atol=1e-15)


def test_cross_entropy():
    losses, weights = ref.softmax_cross_entropy(LOGS, np.array([1, 0]))
    np.testing.assert_allclose(losses, [math.log(4), math.log(2.5)])
    np.testing.assert_array_equal(weights, [1, 1])
    dx = ref.softmax_cross_entropy_backward(array(1, 10), LOGS, np.array([1, 0]))
    np.testing.assert_allclose(dx, [[0.125, -0.75, 0.625], [-6, 4, 2]])


def test_cross_entropy_with_class_weights_and_an_ignored_row():
    target, weight = np.array([2, -100]), array(1, 2, 3)
    losses, weights = ref.softmax_cross_entropy(LOGS, target, weight)
    np.testing.assert_allclose(losses, [3 * math.log(1.6), 0])
    np.testing.assert_array_equal(weights, [3, 0])
    dx = ref.softmax_cross_entropy_backward(array(1, 1), LOGS, target, weight)
    np.testing.assert_allclose(dx, [[0.375, 0.75, -1.125], [0, 0, 0]])


def test_cross_entropy_with_label_smoothing():
    # Smoothing 0.3 over 3 classes gives the label 0.7 + 0.1 and the others 0.1 each.
    losses, _ = ref.softmax_cross_entropy(LOGS[:1], np.array([1]), label_smoothing=0.3)
    expected = 0.1 * math.log(8) + 0.8 * math.log(4) + 0.1 * math.log(1.6)
    np.testing.assert_allclose(losses, [expected])
    dx = ref.softmax_cross_entropy_backward(array(2), LOGS[:1], np.array([1]), label_smoothing=0.3)
    np.testing.assert_allclose(dx, 2 * array([0.125 - 0.1, 0.25 - 0.8, 0.625 - 0.1]))


def test_an_ignored_label_may_be_a_class():
    losses, weights = ref.softmax_cross_entropy(LOGS, np.array([1, 0]), ignore_index=0, label_smoothing=0.3)
    assert losses[1] == weights[1] == 0
    assert losses[0] > 0


def test_cross_entropy_with_target_probabilities():
    target = array([0.5, 0.5, 0], [0, 0, 1])
    losses = ref.soft_cross_entropy(LOGS, target)
    np.testing.assert_allclose(losses, [0.5 * math.log(8) + 0.5 * math.log(4), math.log(5)])
    losses = ref.soft_cross_entropy(LOGS, target, weight=array(2, 4, 6))
    np.testing.assert_allclose(losses, [math.log(8) + 2 * math.log(4), 6 * math.log(5)])
    # q = (1, 2, 0), softmax * 3 - q.
    dx = ref.soft_cross_entropy_backward(array(1, 0), LOGS, target, weight=array(2, 4, 6))
    np.testing.assert_allclose(dx, [[-0.625, -1.25, 1.875], [0, 0, 0]])


# Optimizers


def test_sgd_without_momentum():
    param, grad = array(1, 2), array(10, -10)
    ref.sgd_update(param, grad, None, lr=0.1)
    np.testing.assert_allclose(param, [0, 3])
    ref.sgd_update(param, grad, None, lr=0.1, weight_decay=2.0)
    np.testing.assert_allclose(param, [0 - 0.1 * 10, 3 - 0.1 * (-10 + 2 * 3)])


def test_sgd_with_momentum_and_dampening():
    param, velocity = array(1), array(NAN)
    ref.sgd_update(param, array(2), velocity, lr=0.5, momentum=0.5, dampening=0.75, first=True)
    assert (velocity.item(), param.item()) == (2, 0)
    ref.sgd_update(param, array(4), velocity, lr=0.5, momentum=0.5, dampening=0.75)
    assert (velocity.item(), param.item()) == (2, -1)


def test_sgd_with_nesterov_momentum():
    # v = 1, step 1 + 0.5 * 1; then v = 0.5 + 1, step 1 + 0.5 * 1.5.
    param, velocity = array(0), array(0)
    ref.sgd_update(param, array(1), velocity, lr=1.0, momentum=0.5, nesterov=True, first=True)
    assert (velocity.item(), param.item()) == (1, -1.5)
    ref.sgd_update(param, array(1), velocity, lr=1.0, momentum=0.5, nesterov=True)
    assert (velocity.item(), param.item()) == (1.5, -3.25)


def test_adam():
    # The first step is lr * sign(grad). The second has m = 0.5 + 2 and v = 0.75 + 4, over 0.75 and 0.4375.
    param, exp_avg, exp_avg_sq = array(5), array(0), array(0)
    ref.adam_update(param, array(2), exp_avg, exp_avg_sq, 1, lr=1.0, beta1=0.5, beta2=0.75, eps=0.0)
    np.testing.assert_allclose([param, exp_avg, exp_avg_sq], [[4], [1], [1]])
    ref.adam_update(param, array(4), exp_avg, exp_avg_sq, 2, lr=1.0, beta1=0.5, beta2=0.75, eps=1.0)
    np.testing.assert_allclose([exp_avg, exp_avg_sq], [[2.5], [4.75]])
    np.testing.assert_allclose(param, [4 - (2.5 / 0.75) / (math.sqrt(4.75 / 0.4375) + 1)])


def test_adam_and_adamw_decay_weights_differently():
    for decoupled, expected in ((False, 10 - 1), (True, 10 - 0.5 * 10 - 1)):
        param, exp_avg, exp_avg_sq = array(10), array(0), array(0)
        ref.adam_update(
            param, array(2), exp_avg, exp_avg_sq, 1, 1.0, eps=0.0, weight_decay=0.5, decoupled=decoupled
        )
        np.testing.assert_allclose(param, [expected])
        np.testing.assert_allclose(exp_avg, [0.1 * (2 if decoupled else 7)])


# Batches

IMAGES = np.array([[[[0], [51]], [[102], [255]]], [[[10], [20]], [[30], [40]]]], np.uint8)
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)


def augment(image, row, seed=0, scale=ONE, shift=ZERO):
    params = np.array([row], np.float32)
    out = ref.augment_batch(image[None, :, :, None], np.array([0]), scale, shift, params, seed)
    return out[0, :, :, 0]


def test_gather_batch():
    out = ref.gather_batch(IMAGES, np.array([1, 0, 1]), np.float32([0.5]), np.float32([-1]))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out[0], out[2])
    np.testing.assert_array_equal(out[:2, :, :, 0], [[[4, 9], [14, 19]], [[-1, 24.5], [50, 126.5]]])


def test_augmentation_that_changes_nothing_is_gather_batch():
    params = np.tile(np.float32([0, 0, 0, 0, 1, 0, 0, 0, 0]), (2, 1))
    index, scale, shift = np.array([1, 0]), np.float32([0.25]), np.float32([3])
    out = ref.augment_batch(IMAGES, index, scale, shift, params, 5)
    np.testing.assert_allclose(out, ref.gather_batch(IMAGES, index, scale, shift), rtol=1e-6)


COUNT = np.arange(1, 7, dtype=np.float32).reshape(2, 3) / 8


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 0), [[3, 2, 1], [6, 5, 4]]),
        ((0, 1, 0, 0, 1, 0, 0, 0, 0), [[0, 0, 0], [1, 2, 3]]),
        ((0, 0, -2, 0, 1, 0, 0, 0, 0), [[3, 0, 0], [6, 0, 0]]),
        ((1, -1, 1, 0, 1, 0, 0, 0, 0), [[0, 6, 5], [0, 0, 0]]),
        ((0, 9, 0, 0, 1, 0, 0, 0, 0), [[0, 0, 0], [0, 0, 0]]),
        ((0, 0, 0, 0.25, 1, 0, 0, 0, 0), [[3, 4, 5], [6, 7, 8]]),
        ((0, 0, 0, 0.5, 1, 0, 0, 0, 0), [[5, 6, 7], [8, 8, 8]]),
        ((0, 0, 0, -0.25, 1, 0, 0, 0, 0), [[0, 0, 1], [2, 3, 4]]),
        ((0, 0, 0, 0, 0, 0, 0, 0, 0), [[3.5, 3.5, 3.5], [3.5, 3.5, 3.5]]),
        ((0, 0, 0, 0, 2, 0, 0, 0, 0), [[0, 0.5, 2.5], [4.5, 6.5, 8]]),
        ((0, 1, 0, 0, 0.5, 0, 0, 0, 0), [[0.5, 0.5, 0.5], [1, 1.5, 2]]),
        ((0, 0, 0, 0.25, 1, 0, 0, 1, 2), [[3, 0, 0], [6, 0, 0]]),
        ((0, 0, 0, 0, 1, 0, -1, -1, 2), [[0, 2, 3], [4, 5, 6]]),
        ((0, 0, 0, 0, 1, 0, 1, 2, 9), [[1, 2, 3], [4, 5, 0]]),
        ((0, 0, 0, 0, 1, 0, -3, -3, 2), [[1, 2, 3], [4, 5, 6]]),
    ],
)
def test_augmentation(row, expected):
    np.testing.assert_allclose(augment(COUNT, row), np.array(expected) / 8, atol=1e-7)


def test_augmentation_scales_and_shifts_after_clipping():
    out = augment(COUNT, (0, 0, 0, 9, 1, 0, 0, 0, 1), scale=np.float32([2]), shift=np.float32([-3]))
    np.testing.assert_array_equal(out, [[-3, -1, -1], [-1, -1, -1]])
    out = augment(np.full((1, 1), 51, np.uint8), (0, 0, 0, 0.4, 1, 0, 0, 0, 0), scale=np.float32([0.5]))
    np.testing.assert_allclose(out, [[0.5 * 0.6 * 255]], rtol=1e-6)


def test_contrast_takes_one_mean_over_all_channels():
    images = np.float32([0.25, 0.75]).reshape(1, 1, 1, 2)
    params = np.float32([[0, 0, 0, 0, 0.5, 0, 0, 0, 0]])
    out = ref.augment_batch(images, np.array([0]), np.ones(2, "f4"), np.zeros(2, "f4"), params, 0)
    np.testing.assert_array_equal(out.ravel(), [0.375, 0.625])


def test_augmentation_noise_follows_the_flat_index_of_the_batch():
    images = np.full((1, 1, 2, 1), 0.5, np.float32)
    params = np.float32([[0, 0, 0, 0, 1, 0.01, 0, 0, 0]] * 2)
    out = ref.augment_batch(images, np.array([0, 0]), ONE, ZERO, params, 2**64 - 3)
    expected = []
    for k in range(4):
        u, t = ((splitmix64_in_integers((2**64 - 3 + 2 * k + i) % 2**64) >> 40) / 2**24 for i in (0, 1))
        expected.append(0.5 + 0.01 * math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * t))
    np.testing.assert_allclose(out.ravel(), expected, rtol=1e-6)
