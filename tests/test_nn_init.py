"""Initial values: fans from PyTorch's axes, the right spread, and seeds that decide everything."""

import math

import numpy as np
import pytest

import fastcnn
from fastcnn import nn
from fastcnn.nn import init


def test_fans_come_from_pytorchs_axes():
    """The emotion diary took a linear layer's fan-in from its outputs."""
    assert init.fans(nn.Linear(30, 7).weight) == (30, 7)
    assert init.fans(nn.Conv2d(6, 8, (3, 5)).weight) == (6 * 15, 8 * 15)
    assert init.fans(nn.Conv2d(6, 8, 3, groups=2).weight) == (3 * 9, 8 * 9)
    assert init.fans(np.zeros((8, 6, 3, 5))) == (90, 120)
    with pytest.raises(ValueError, match=r"target: fans need two axes or more, got shape \(3,\)"):
        init.fans(np.zeros(3))


@pytest.mark.parametrize(
    ("function", "arguments", "mean", "std"),
    [
        (init.kaiming_normal_, {"nonlinearity": "relu"}, 0, math.sqrt(2 / 400)),
        (init.kaiming_normal_, {"mode": "fan_out", "nonlinearity": "linear"}, 0, math.sqrt(1 / 300)),
        (init.kaiming_normal_, {"a": 0.5}, 0, math.sqrt(2 / 1.25 / 400)),
        (init.kaiming_uniform_, {"a": math.sqrt(5)}, 0, 1 / math.sqrt(3 * 400)),
        (init.xavier_normal_, {"gain": 2.0}, 0, 2 * math.sqrt(2 / 700)),
        (init.xavier_uniform_, {}, 0, math.sqrt(2 / 700)),
        (init.normal_, {"mean": 1.0, "std": 0.5}, 1, 0.5),
        (init.uniform_, {"a": -1.0, "b": 2.0}, 0.5, 3 / math.sqrt(12)),
    ],
)
@pytest.mark.parametrize("make", [lambda: np.zeros((300, 400)), lambda: nn.Linear(400, 300).double().weight])
def test_spread(function, arguments, mean, std, make):
    target = make()
    assert function(target, **arguments) is target
    values = np.asarray(target)
    assert values.std() == pytest.approx(std, rel=0.02)
    assert values.mean() == pytest.approx(mean, abs=0.02)


def test_constants():
    target = nn.Parameter(np.zeros((2, 3), np.float32), order=(1, 0))
    for function, value in ((init.ones_, 1), (init.zeros_, 0)):
        np.testing.assert_array_equal(function(target).data, value)
    np.testing.assert_array_equal(init.constant_(target, 2.5).data, 2.5)


@pytest.mark.parametrize(
    ("nonlinearity", "param", "gain"),
    [
        ("relu", None, math.sqrt(2)),
        ("leaky_relu", 0.5, math.sqrt(1.6)),
        ("tanh", None, 5 / 3),
        ("linear", None, 1),
    ],
)
def test_gains(nonlinearity, param, gain):
    assert init.calculate_gain(nonlinearity, param) == pytest.approx(gain)


def test_bad_arguments():
    with pytest.raises(ValueError, match="nonlinearity: 'swish'"):
        init.calculate_gain("swish")
    with pytest.raises(ValueError, match="mode: 'fan'"):
        init.kaiming_normal_(np.zeros((2, 2)), mode="fan")


@pytest.mark.parametrize("make", [lambda: nn.Linear(200, 50), lambda: nn.Conv2d(8, 50, 5)])
def test_pytorchs_defaults(make):
    layer = make()
    bound = 1 / math.sqrt(200)
    for values in (layer.weight.data, layer.bias.data):
        assert 0.9 * bound < abs(values).max() <= bound
    assert layer.weight.data.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_seed_gives_the_same_network_in_every_dtype_and_layout():
    fastcnn.manual_seed(3)
    one = nn.Conv2d(3, 4, 3)
    fastcnn.manual_seed(3)
    other = nn.Conv2d(3, 4, 3, dtype=np.float64)
    np.testing.assert_array_equal(one.weight.data, other.weight.data.astype(np.float32))
    plain = nn.Parameter(np.zeros((4, 3, 3, 3)))
    fastcnn.manual_seed(3)
    init.kaiming_uniform_(plain, a=math.sqrt(5))
    np.testing.assert_allclose(plain.data, other.weight.data)


def test_a_generator_of_ones_own():
    state = fastcnn.default_generator().bit_generator.state
    one = init.normal_(np.zeros(5), generator=np.random.default_rng(4))
    np.testing.assert_array_equal(one, np.random.default_rng(4).normal(0.0, 1.0, 5))
    assert fastcnn.default_generator().bit_generator.state == state
