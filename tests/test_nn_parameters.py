"""Parameters: what they show, how they live in memory, and the flat arrays that a model's share."""

import copy
import pickle

import numpy as np
import pytest

from fastcnn import nn
from fastcnn.nn.parameter import consolidate, flat, layout_version, runs


def in_one_run(parameters):
    return runs(parameters) == [(0, len(parameters))]


def mlp():
    return nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))


def test_shows_pytorchs_axes_and_lives_in_the_kernels_order():
    values = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    parameter = nn.Parameter(values, order=(2, 3, 1, 0))
    assert parameter.shape == (2, 3, 4, 5)
    assert parameter.memory.shape == (4, 5, 3, 2)
    assert parameter.memory.flags.c_contiguous
    assert parameter.memory.ctypes.data % 64 == 0
    np.testing.assert_array_equal(parameter.data, values)
    np.testing.assert_array_equal(parameter.memory, values.transpose(2, 3, 1, 0))
    parameter.memory[1, 2, 0, 1] = -1
    assert parameter.data[1, 0, 1, 2] == -1
    parameter.grad_memory[3, 0, 2, 1] = 7
    assert parameter.grad[1, 2, 3, 0] == 7


def test_describes_itself():
    parameter = nn.Parameter(np.ones((2, 3), np.float32), requires_grad=False)
    assert (parameter.size, parameter.ndim, parameter.numel(), len(parameter)) == (6, 2, 6, 2)
    assert parameter.dtype == np.float32
    assert "Parameter containing" in repr(parameter)
    assert "requires_grad=False" in repr(parameter)
    np.testing.assert_array_equal(np.asarray(parameter), np.ones((2, 3)))
    assert np.asarray(parameter, np.float64).dtype == np.float64


def test_copies_its_initial_values():
    values = np.ones(3, np.float32)
    parameter = nn.Parameter(values)
    values[:] = 2
    np.testing.assert_array_equal(parameter.data, 1)


def test_assignment_copies_in():
    parameter = nn.Parameter(np.zeros((2, 3), np.float32), order=(1, 0))
    before = parameter.data
    parameter.data = np.arange(6, dtype=np.float64).reshape(2, 3)
    assert parameter.data is before
    np.testing.assert_array_equal(before, [[0, 1, 2], [3, 4, 5]])
    parameter.grad = np.ones((2, 3), np.float16)
    parameter.grad += 1
    parameter.data *= 2
    np.testing.assert_array_equal(parameter.grad, 2)
    np.testing.assert_array_equal(before, [[0, 2, 4], [6, 8, 10]])
    parameter.grad = None
    np.testing.assert_array_equal(parameter.grad, 0)


@pytest.mark.parametrize("name", ["data", "grad"])
def test_assignment_checks(name):
    parameter = nn.Parameter(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=rf"{name}: shape \(3, 2\) is not the parameter's \(2, 3\)"):
        setattr(parameter, name, np.zeros((3, 2), np.float32))
    with pytest.raises(TypeError, match=f"{name}: dtype int"):
        setattr(parameter, name, np.zeros((2, 3), int))


@pytest.mark.parametrize("bad", [np.zeros(3, int), np.zeros(3, np.float16), [1, 2], np.zeros(3, complex)])
def test_only_float32_and_float64(bad):
    with pytest.raises(TypeError, match="data: dtype"):
        nn.Parameter(bad)


@pytest.mark.parametrize("order", [(0,), (0, 0), (1, 2)])
def test_order_must_be_a_permutation(order):
    with pytest.raises(ValueError, match="order"):
        nn.Parameter(np.zeros((2, 3)), order=order)


def test_sequential_gathers_parameters_and_gradients_in_two_flat_arrays():
    first, last = nn.Linear(5, 3), nn.Linear(3, 2)
    first.weight.grad = np.full((3, 5), 4.0)
    values = [p.data.copy() for p in (first.weight, first.bias, last.weight, last.bias)]
    net = nn.Sequential(first, nn.ReLU(), last)
    parameters = net.parameters()
    assert in_one_run(parameters)
    for parameter, value in zip(parameters, values, strict=True):
        np.testing.assert_array_equal(parameter.data, value)
        assert parameter.memory.ctypes.data % 64 == 0
        assert parameter.grad_memory.ctypes.data % 64 == 0
    np.testing.assert_array_equal(first.weight.grad, 4)
    data, grad = flat(parameters)
    assert data.size == 16 * 4  # 15, 3, 6 and 2 values, each in whole lines of 16
    assert np.shares_memory(data, first.weight.data)
    assert np.count_nonzero(data) == sum(np.count_nonzero(value) for value in values)
    grad.fill(3)
    np.testing.assert_array_equal(last.bias.grad, 3)


def test_nested_containers_end_in_one_store():
    net = nn.Sequential(mlp(), nn.Residual(mlp(), nn.Linear(5, 2)), nn.Linear(2, 2))
    assert in_one_run(net.parameters())
    assert in_one_run(net[0].parameters())
    assert in_one_run(net.parameters())


def test_asking_for_the_parameters_of_a_part_moves_nothing():
    net = nn.Sequential(mlp(), nn.Linear(2, 2), mlp())
    version = layout_version()
    net[0].parameters()
    net[1:].parameters()
    net[2][0].parameters()
    assert layout_version() == version


def test_two_models_that_share_a_part_do_not_take_it_from_each_other():
    encoder = mlp()
    one, other = nn.Sequential(encoder, nn.Linear(2, 2)), nn.Sequential(nn.Linear(5, 5), encoder)
    for net in (one, other):
        net.parameters()
    version = layout_version()
    for net in (one, other, one, other):
        net.parameters()
    assert layout_version() == version
    assert in_one_run(other.parameters())
    assert len(runs(one.parameters())) == 2
    one.zero_grad()
    encoder[0].weight.grad += 1
    one[1].bias.grad += 1
    one.zero_grad()
    assert not any(parameter.grad.any() for parameter in one.parameters())


def test_a_module_of_ones_own_is_gathered_when_its_parameters_are_asked_for():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(np.ones(3, np.float32))
            self.one, self.two = mlp(), nn.Linear(2, 2)

    own = Own()
    assert in_one_run(own.parameters())
    assert [name for name, _ in own.named_parameters()][:2] == ["scale", "one.0.weight"]


def test_tied_parameters_appear_once():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.weight = first.weight
    net = nn.Sequential(first, nn.ReLU(), last)
    assert len(net.parameters()) == 3
    assert in_one_run(net.parameters())
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    first.weight.data[...] = 5
    np.testing.assert_array_equal(last.weight.data, 5)
    net[2].bias = net[0].bias
    assert len(net.parameters()) == 2
    assert in_one_run(net.parameters())
    twin = copy.deepcopy(net)
    assert twin[0].weight is twin[2].weight
    assert pickle.loads(pickle.dumps(net))[0].bias is not net[0].bias


def test_parameters_of_two_dtypes_stay_apart():
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=np.float64))
    assert [p.dtype.name for p in mixed.parameters()] == ["float32"] * 2 + ["float64"] * 2
    mixed.float()
    assert in_one_run(mixed.parameters())
    consolidate([])


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_share_nothing_and_are_gathered_too(twin):
    net = mlp()
    net[0].weight.grad[...] = 1
    net[0].bias.requires_grad = False
    other = twin(net)
    assert in_one_run(other.parameters())
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        np.testing.assert_array_equal(ours.data, theirs.data)
        assert not np.shares_memory(ours.data, theirs.data)
        assert not np.shares_memory(ours.grad, theirs.grad)
        assert ours.requires_grad == theirs.requires_grad
    other[0].weight.data[...] = 9
    assert not (net[0].weight.data == 9).any()


def test_a_copied_layer_does_not_carry_its_model():
    net = nn.Sequential(nn.Linear(1000, 100), nn.Linear(100, 2))
    assert len(pickle.dumps(net[1])) < 5000


def test_freezing_moves_the_version():
    parameter = nn.Parameter(np.zeros(2))
    version = layout_version()
    parameter.requires_grad = False
    assert layout_version() > version


def test_empty_and_scalar_parameters():
    scalar, empty = nn.Parameter(np.array(2.0)), nn.Parameter(np.zeros((0, 3)))
    consolidate([scalar, empty])
    assert scalar.data.shape == ()
    assert scalar.data == 2
    assert empty.data.shape == (0, 3)
