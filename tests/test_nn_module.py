"""Module, Sequential and Residual: registration, state, copies, repeated layers, modules of one's own."""

import copy
import pickle
from collections import OrderedDict

import numpy as np
import pytest

import fastcnn
from fastcnn import nn


def images(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def small():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)
    )


class Own(nn.Module):
    """A module with hand-written passes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(np.full((2, 1, 1), 1.5, np.float32))
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("calls", np.array(0))

    def forward(self, x):
        self.calls[...] += 1
        self.y = self.conv(x)
        return self.y * self.scale.data

    def backward(self, dout, input_grad=True):
        if self.scale.requires_grad:
            self.scale.grad += (dout * self.y).sum(axis=(0, 2, 3), keepdims=True)[0]
        return self.conv.backward(dout * self.scale.data, input_grad)


class TestRegistration:
    def test_attributes_become_parameters_buffers_and_children(self):
        own = Own()
        assert [name for name, _ in own.named_parameters()] == ["scale", "conv.weight", "conv.bias"]
        assert [name for name, _ in own.named_buffers()] == ["calls"]
        assert [name for name, _ in own.named_children()] == ["conv"]
        assert [name for name, _ in own.named_modules()] == ["", "conv"]
        assert list(own.state_dict()) == ["scale", "calls", "conv.weight", "conv.bias"]

    def test_replacing_and_deleting(self):
        own = Own()
        own.conv = nn.Identity()
        assert list(own.state_dict()) == ["scale", "calls"]
        own.scale = None
        assert list(own.parameters()) == []
        own.scale = nn.Parameter(np.ones(1))
        del own.calls
        assert list(own.state_dict()) == ["scale"]
        with pytest.raises(AttributeError):
            _ = own.calls

    @pytest.mark.parametrize(
        ("name", "value", "kind"),
        [("scale", 3.0, "Parameter"), ("conv", "x", "Module"), ("calls", [1], "NumPy array")],
    )
    def test_registered_names_keep_their_kind(self, name, value, kind):
        with pytest.raises(TypeError, match=f"{name}: expected a {kind}"):
            setattr(Own(), name, value)

    def test_assigning_before_init(self):
        class Early(nn.Module):
            def __init__(self):
                self.layer = nn.ReLU()

        with pytest.raises(AttributeError, match=r"super\(\).__init__"):
            Early()

    def test_names_of_modules(self):
        module = nn.Module()
        for bad in ("", "a.b", 3):
            with pytest.raises(KeyError):
                module.add_module(bad, nn.ReLU())
        with pytest.raises(KeyError, match="already exists"):
            module.add_module("train", nn.ReLU())
        with pytest.raises(KeyError, match="already exists"):
            module.register_buffer("training", np.zeros(1))
        with pytest.raises(TypeError):
            module.add_module("x", np.zeros(1))

    def test_buffers_that_are_not_saved(self):
        module = nn.Module()
        module.register_buffer("temporary", np.zeros(2), persistent=False)
        assert module.state_dict() == {}
        assert len(list(module.buffers())) == 1

    def test_passes_must_be_written(self):
        with pytest.raises(NotImplementedError, match="Module has no forward"):
            nn.Module()(1)
        with pytest.raises(NotImplementedError, match="Module has no backward"):
            nn.Module().backward(1)


class TestTree:
    def test_modes_reach_every_module(self):
        net = nn.Sequential(small(), nn.Residual(small()))
        assert net.eval() is net
        assert not any(module.training for module in net.modules())
        assert all(module.training for module in net.train().modules())

    def test_apply_goes_bottom_up(self):
        seen = []
        net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Flatten()))
        assert net.apply(lambda module: seen.append(type(module).__name__)) is net
        assert seen == ["ReLU", "Flatten", "Sequential", "Sequential"]

    def test_zero_grad(self):
        net = small()
        for parameter in net.parameters():
            parameter.grad += 1
        net.zero_grad()
        assert not any(parameter.grad.any() for parameter in net.parameters())

    def test_double_and_float(self):
        net = small()
        net(images(2, 1, 6, 6))
        before = net.state_dict()
        assert net.double() is net
        assert {array.dtype.name for array in net.state_dict().values()} == {"float64", "int64"}
        net(images(2, 1, 6, 6, dtype=np.float64))
        net.float().load_state_dict(before)
        for name, array in net.state_dict().items():
            np.testing.assert_array_equal(array, before[name])
            assert array.dtype == before[name].dtype

    def test_repr_is_pytorchs(self):
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.ReLU()))
        assert repr(net) == (
            "Sequential(\n  (0): Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))\n"
            "  (1): Sequential(\n    (0): ReLU()\n  )\n)"
        )


class TestStateDict:
    def test_holds_contiguous_copies_in_pytorchs_shapes(self):
        net = small()
        state = net.state_dict()
        assert state["0.weight"].shape == (2, 1, 3, 3)
        assert state["4.weight"].shape == (3, 32)
        assert state["1.num_batches_tracked"].shape == ()
        assert all(array.flags.c_contiguous and array.flags.owndata for array in state.values())
        state["0.weight"][...] = 7
        assert not (net[0].weight.data == 7).any()

    def test_round_trip(self):
        one, other = small(), small()
        one(images(4, 1, 6, 6))
        result = other.load_state_dict(one.state_dict())
        assert result == ([], [])
        x = images(2, 1, 6, 6, seed=1)
        np.testing.assert_array_equal(one.eval()(x), other.eval()(x))
        assert other[1].num_batches_tracked == 1

    def test_nothing_changes_unless_everything_fits(self):
        net = small()
        before = net.state_dict()
        bad = {name: array + 1 for name, array in before.items()}
        bad["4.weight"] = np.zeros((3, 31), np.float32)
        bad["4.bias"] = np.zeros(3, complex)
        del bad["1.running_mean"]
        bad["5.weight"] = np.zeros(1)
        with pytest.raises(RuntimeError) as error:
            net.load_state_dict(bad)
        for part in (
            "does not fit Sequential",
            "missing keys: 1.running_mean",
            "unexpected keys: 5.weight",
            "4.weight: shape (3, 31) is not the module's (3, 32)",
            "4.bias: dtype complex128",
        ):
            assert part in str(error.value)
        for name, array in net.state_dict().items():
            np.testing.assert_array_equal(array, before[name])

    def test_not_strict(self):
        net = small()
        bias = np.arange(3.0)
        result = net.load_state_dict({"4.bias": bias, "other": bias}, strict=False)
        assert result.unexpected_keys == ["other"]
        assert "0.weight" in result.missing_keys
        np.testing.assert_array_equal(net[4].bias.data, bias)
        with pytest.raises(RuntimeError, match="shape"):
            net.load_state_dict({"4.bias": np.zeros(4)}, strict=False)

    def test_takes_no_list(self):
        with pytest.raises(TypeError, match="state_dict: expected a dict, got list"):
            small().load_state_dict([1])


class TestCopies:
    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    @pytest.mark.parametrize("make", [small, lambda: nn.Sequential(Own(), nn.Residual(nn.ReLU()))])
    def test_copies_work_and_stand_alone(self, twin, make):
        net = make().eval()
        x = images(2, 1, 6, 6)
        y = net(x).copy()
        net.config = {"name": "x"}
        other = twin(net)
        assert other.config == {"name": "x"}
        with pytest.raises(RuntimeError, match="backward needs a forward"):
            other.backward(y)
        np.testing.assert_array_equal(other(x), y)
        for parameter in other.parameters():
            parameter.data[...] = 0
        np.testing.assert_array_equal(net(x), y)


class TestSequential:
    def test_list_interface(self):
        layers = [nn.ReLU(), nn.Flatten(), nn.Identity()]
        net = nn.Sequential(*layers)
        assert len(net) == 3
        assert list(net) == layers
        assert net[-1] is layers[2]
        assert isinstance(net[1:], nn.Sequential)
        assert list(net[::2]) == [layers[0], layers[2]]
        added = nn.Linear(2, 2)
        assert net.append(added) is net
        assert net[3] is added
        net[1] = nn.Identity()
        assert isinstance(net[1], nn.Identity)
        net.insert(0, layers[1])
        assert [type(layer).__name__ for layer in net] == [
            "Flatten",
            "ReLU",
            "Identity",
            "Identity",
            "Linear",
        ]
        del net[1:4]
        assert list(net.state_dict()) == ["1.weight", "1.bias"]
        net.extend([nn.Linear(2, 3)])
        assert len(net.parameters()) == 4

    def test_names(self):
        net = nn.Sequential(OrderedDict([("first", nn.Linear(2, 3)), ("second", nn.ReLU())]))
        assert list(net.state_dict()) == ["first.weight", "first.bias"]
        assert net.first is net[0]

    def test_errors(self):
        net = nn.Sequential(nn.ReLU())
        with pytest.raises(TypeError, match="layers: 0 is a int, no Module"):
            nn.Sequential(3)
        with pytest.raises(IndexError, match="index: 1 is out of range for 1 layers"):
            net[1]
        with pytest.raises(TypeError, match="index"):
            net["a"]
        with pytest.raises(IndexError):
            net.insert(5, nn.ReLU())
        with pytest.raises(TypeError):
            net.insert(0, 5)

    def test_empty(self):
        x = images(2, 3)
        net = nn.Sequential()
        assert net(x) is x
        assert net.backward(x) is x

    def test_backward_needs_a_forward_each_time(self):
        net = small()
        dout = np.ones((2, 3), np.float32)
        with pytest.raises(RuntimeError, match="Sequential: backward needs a forward before it"):
            net.backward(dout)
        net(images(2, 1, 6, 6))
        net.backward(dout)
        with pytest.raises(RuntimeError, match="each forward serves one backward"):
            net.backward(dout)
        with fastcnn.no_grad():
            net(images(2, 1, 6, 6))
        with pytest.raises(RuntimeError, match="no_grad"):
            net.backward(dout)

    def test_gradients_accumulate(self):
        net, x, dout = small().eval(), images(2, 1, 6, 6), images(2, 3)
        net(x)
        net.backward(dout)
        once = [parameter.grad.copy() for parameter in net.parameters()]
        net(x)
        net.backward(dout)
        for parameter, grad in zip(net.parameters(), once, strict=True):
            np.testing.assert_allclose(parameter.grad, 2 * grad, rtol=1e-6)

    def test_without_input_gradient_the_parameters_get_the_same(self):
        x, dout = images(2, 1, 6, 6), images(2, 3)
        net = nn.Sequential(nn.Identity(), nn.ReLU(), *small())
        net(x)
        assert net.backward(dout).shape == x.shape
        full = [parameter.grad.copy() for parameter in net.parameters()]
        net.zero_grad()
        net(x)
        assert net.backward(dout, input_grad=False) is None
        for parameter, grad in zip(net.parameters(), full, strict=True):
            np.testing.assert_array_equal(parameter.grad, grad)

    def test_without_input_gradient_none_is_computed_before_the_first_parameters(self, monkeypatch):
        net = nn.Sequential(nn.ReLU(), nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(1, 1, 2)))
        net(images(1, 1, 4, 4))
        monkeypatch.setattr(nn.ReLU, "backward", None)
        monkeypatch.setattr(nn.MaxPool2d, "backward", None)
        monkeypatch.setattr("fastcnn.kernels.cpu.conv2d_backward_input", None)
        assert net.backward(np.ones((1, 1, 1, 1), np.float32), input_grad=False) is None
        assert net[1][1].bias.grad == 1

    def test_backward_stops_at_the_first_layer_that_is_trained(self, monkeypatch):
        net = small()
        net[0].requires_grad_(False)
        net[1].requires_grad_(False)
        net(images(2, 1, 6, 6))
        monkeypatch.setattr(nn.Conv2d, "backward", None)
        monkeypatch.setattr(nn.BatchNorm2d, "backward", None)
        monkeypatch.setattr(nn.ReLU, "backward", None)
        assert net.backward(np.ones((2, 3), np.float32), input_grad=False) is None
        assert net[4].weight.grad.any()
        assert all(layer._saved is None for layer in net)

    def test_nothing_to_train(self):
        net = small().requires_grad_(False)
        net(images(2, 1, 6, 6))
        assert net.backward(np.ones((2, 3), np.float32), input_grad=False) is None
        assert not any(parameter.grad.any() for parameter in net.parameters())
        net(images(2, 1, 6, 6))
        assert net.backward(np.ones((2, 3), np.float32)).shape == (2, 1, 6, 6)
        assert not any(parameter.grad.any() for parameter in net.parameters())

    def test_output_shape(self):
        assert small().output_shape((1, 6, 6)) == (3,)
        with pytest.raises(NotImplementedError, match="Own has no output_shape"):
            nn.Sequential(Own()).output_shape((1, 6, 6))


def numerical(net, x, dout, values, step=1e-6):
    """Central differences of sum(net(x) * dout) with respect to each of `values`, in place."""
    grad = np.zeros(values.shape)
    for index in np.ndindex(*values.shape):
        kept = values[index]
        results = []
        for sign in (1, -1):
            values[index] = kept + sign * step
            results.append(float((net(x) * dout).sum()))
        values[index] = kept
        grad[index] = (results[0] - results[1]) / (2 * step)
    return grad


def check_gradients(net, x, dout):
    net.zero_grad()
    net(x)
    dx = net.backward(dout)
    np.testing.assert_allclose(dx, numerical(net, x, dout, x), rtol=1e-6, atol=1e-7)
    for name, parameter in net.named_parameters():
        expected = numerical(net, x, dout, parameter.data)
        np.testing.assert_allclose(parameter.grad, expected, rtol=1e-6, atol=1e-7, err_msg=name)


class TestRepeatedLayers:
    """One module in several places: each backward pass finds what its own forward pass kept."""

    def test_in_a_sequential(self):
        act, conv = nn.LeakyReLU(0.1), nn.Conv2d(2, 2, 3, padding=1)
        net = nn.Sequential(conv, act, conv, act, nn.Conv2d(2, 1, 3)).double()
        check_gradients(net, images(1, 2, 4, 4, dtype=float), images(1, 1, 2, 2, dtype=float))

    def test_a_whole_block(self):
        block = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
        net = nn.Sequential(block, nn.Linear(3, 3), block, nn.Sequential(block)).double()
        check_gradients(net, images(2, 3, dtype=float), images(2, 3, dtype=float))

    def test_in_a_residual(self):
        layer = nn.Linear(3, 3)
        net = nn.Residual(nn.Sequential(layer, nn.LeakyReLU(0.3)), shortcut=layer, activation=layer).double()
        check_gradients(net, images(2, 3, dtype=float), images(2, 3, dtype=float))

    def test_after_append(self):
        layer = nn.Linear(3, 3)
        net = nn.Sequential(layer, nn.LeakyReLU(0.2)).append(layer).double()
        check_gradients(net, images(2, 3, dtype=float), images(2, 3, dtype=float))


class TestResidual:
    @pytest.mark.parametrize("shortcut", [None, lambda: nn.Conv2d(2, 2, 1)])
    @pytest.mark.parametrize("activation", [None, lambda: nn.LeakyReLU(0.1), lambda: nn.PReLU(2)])
    def test_gradients(self, shortcut, activation):
        body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(3, 2, 3, padding=1))
        net = nn.Residual(body, shortcut and shortcut(), activation and activation()).double()
        check_gradients(net, images(1, 2, 4, 4, dtype=float), images(1, 2, 4, 4, dtype=float))

    def test_without_input_gradient(self):
        net = nn.Residual(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.PReLU())
        x = images(2, 1, 3, 3)
        net(x)
        net.backward(x)
        full = [parameter.grad.copy() for parameter in net.parameters()]
        net.zero_grad()
        net(x)
        assert net.backward(x, input_grad=False) is None
        for parameter, grad in zip(net.parameters(), full, strict=True):
            np.testing.assert_array_equal(parameter.grad, grad)
        net.body.requires_grad_(False)
        net.shortcut.requires_grad_(False)
        net.zero_grad()
        net(x)
        assert net.backward(x, input_grad=False) is None
        np.testing.assert_array_equal(net.activation.weight.grad, full[-1])

    def test_keys_and_shape(self):
        net = nn.Residual(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Conv2d(2, 2, 1), nn.ReLU())
        assert list(net.state_dict()) == ["body.weight", "shortcut.weight", "shortcut.bias"]
        assert net.output_shape((2, 5, 5)) == (2, 5, 5)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match="shortcut: float32"):
            nn.Residual(nn.Conv2d(2, 3, 3, padding=1))(images(1, 2, 4, 4))

    def test_arguments(self):
        with pytest.raises(TypeError, match="body"):
            nn.Residual(None)
        with pytest.raises(TypeError, match="shortcut: int is no Module"):
            nn.Residual(nn.ReLU(), 3)


class TestOwnModule:
    def test_trains_inside_a_sequential(self):
        net = nn.Sequential(Own(), nn.LeakyReLU(), nn.Flatten(), nn.Linear(2 * 2 * 2, 2)).double()
        check_gradients(net, images(2, 1, 4, 4, dtype=float), images(2, 2, dtype=float))
        opt = fastcnn.optim.SGD(net.parameters(), lr=0.1)
        assert len(opt._flats[0].segments) == 1
        before = net.state_dict()
        opt.step()
        assert not np.array_equal(net.state_dict()["0.scale"], before["0.scale"])
        assert net[0].calls > 0

    def test_gathers_late(self):
        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = [nn.Linear(2, 2) for _ in range(3)]
                for i, layer in enumerate(self.layers):
                    self.add_module(f"layer{i}", layer)

        assert len(fastcnn.optim.SGD(Late().parameters())._flats[0].segments) == 1
