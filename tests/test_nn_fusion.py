"""Runs of layers in one pass do what the layers do one by one."""

import copy
import pickle

import numpy as np
import pytest

import fastcnn
from fastcnn import models, nn
from fastcnn.nn import fusion


@pytest.fixture(autouse=True)
def fusion_on():
    fastcnn.set_fusion(True)
    yield
    fastcnn.set_fusion(True)


def runs(net):
    """Names of what `net` computes in one pass, a dash for layers by themselves."""
    return [
        "-" if run is None else type(run).__name__
        for _, _, run in fusion.fuse(list(net), lambda layer: False)
    ]


def passes(net, x, input_grad=True, training=True):
    """All that a forward and a backward pass computes and changes, and an evaluation."""
    net = copy.deepcopy(net).train(training)
    fastcnn.manual_seed(5)
    y = net(x)
    dout = np.random.default_rng(1).standard_normal(y.shape).astype(y.dtype)
    dx = net.backward(dout, input_grad=input_grad)
    gradients = {f"{name}.grad": p.grad.copy() for name, p in net.named_parameters()}
    with fastcnn.no_grad():
        running = net.eval()(x)
    results = {"y": y, "running": running, **gradients, **net.state_dict()}
    return results if dx is None else {"dx": dx, **results}


def assert_same(fused, plain, tolerance):
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        scale = max(1.0, float(np.abs(expected).max(initial=0)))
        np.testing.assert_allclose(fused[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)


def check(net, x, **how):
    fused = passes(net, x, **how)
    fastcnn.set_fusion(False)
    plain = passes(net, x, **how)
    fastcnn.set_fusion(True)
    assert_same(fused, plain, 1e-10 if x.dtype == np.float64 else 1e-4)


BLOCKS = {
    "conv relu pool": (lambda: [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)], ["ConvPool"]),
    "conv pool relu": (lambda: [nn.Conv2d(3, 8, 3), nn.MaxPool2d((2, 3)), nn.ReLU()], ["ConvPool"]),
    "conv relu": (lambda: [nn.Conv2d(3, 40, 3, padding=1), nn.ReLU()], ["ConvPool"]),
    "conv pool": (lambda: [nn.Conv2d(3, 8, 5, bias=False), nn.MaxPool2d(2)], ["ConvPool"]),
    "wide": (
        lambda: [nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 33, 3), nn.ReLU(), nn.MaxPool2d(2)],
        ["ConvPool", "ConvPool"],
    ),
    "groups": (lambda: [nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(2)], ["ConvPool"]),
    "prelu": (lambda: [nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.MaxPool2d(2)], ["Later"]),
    "leaky": (lambda: [nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.MaxPool2d(2)], ["Later"]),
    "norm relu pool": (
        lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)],
        ["ConvNorm"],
    ),
    "conv norm relu": (
        lambda: [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()],
        ["ConvNorm"],
    ),
    "conv norm pool": (lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2)], ["ConvNorm"]),
    "conv untracked norm": (
        lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()],
        ["ConvNorm"],
    ),
    "conv norm leaky pool": (
        lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.MaxPool2d(2)],
        ["-", "Later"],
    ),
    "conv norm": (lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)], ["-", "-"]),
    "norm leaky pool": (lambda: [nn.BatchNorm2d(3), nn.LeakyReLU(), nn.MaxPool2d(2)], ["Later"]),
    "norm relu": (lambda: [nn.BatchNorm2d(3, affine=False), nn.ReLU()], ["NormPool"]),
    "norm pool": (lambda: [nn.BatchNorm2d(3, momentum=None), nn.MaxPool2d(2)], ["NormPool"]),
    "untracked norm": (lambda: [nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU()], ["NormPool"]),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_does_what_its_layers_do(name, dtype):
    build, expected = BLOCKS[name]
    fastcnn.manual_seed(3)
    net = nn.Sequential(*build())
    net = net.double() if dtype == np.float64 else net
    assert runs(net) == expected
    x = np.random.default_rng(0).standard_normal((4, 3, 13, 15)).astype(dtype)
    check(net, x)
    check(net, x, input_grad=False)
    check(net, x, training=False)


@pytest.mark.parametrize("name", models.names())
def test_a_model_does_what_its_layers_do(name):
    shape = (3, 32, 32)
    net = models.create(name, shape, 10, seed=1).double()
    check(net, np.random.default_rng(0).standard_normal((3, *shape)))


def normalised(**conv):
    """Conv2d, BatchNorm2d, ReLU and MaxPool2d that have seen some images, to be evaluated."""
    rng = np.random.default_rng(2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, **conv), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    for array in (net[1].weight.data, net[1].bias.data, net[1].running_mean):
        array[...] = rng.standard_normal(8)
    net[1].running_var[...] = rng.uniform(0.1, 3, 8)
    return net


@fastcnn.no_grad()
def evaluated(net, x):
    """With runs and without."""
    fused = net(x)
    fastcnn.set_fusion(False)
    plain = net(x)
    fastcnn.set_fusion(True)
    return fused, plain


@pytest.mark.parametrize("conv", [{}, {"bias": False}, {"stride": 2, "padding": 1}])
@pytest.mark.parametrize("images", [1, 40])
def test_statistics_that_are_folded_into_the_weights(conv, images):
    net = normalised(**conv)
    x = np.random.default_rng(0).standard_normal((images, 3, 12, 14)).astype(np.float32)
    fused, plain = evaluated(net, x)
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)
    net[1].running_var[3] = np.nan
    net[0].weight.data[5] = np.nan
    x[0, :, :6] = np.nan
    fused, plain = evaluated(net, x)
    np.testing.assert_allclose(fused, plain, rtol=1e-4, atol=1e-5)
    assert np.isnan(fused[:, 3]).all()


def test_when_statistics_are_folded():
    net = normalised()
    (*_, run), *_ = net._runs(list(net))
    x = np.zeros((1, 3, 12, 14), np.float32)
    assert not run._folds(x), "gradients"
    with fastcnn.no_grad():
        assert run._folds(x)
        assert not run._folds(x[:, :, :4, :4]), "fewer pixels than weights"
        assert not run._folds(x[0])
        net[1].train()
        assert not run._folds(x)
        net[1].eval()
        net[1].eps = 0
        assert not run._folds(x)


def test_errors_of_layers_that_are_folded():
    net = normalised()
    x = np.zeros((1, 3, 12, 14), np.float32)
    wrong = {
        "channels, the layer takes 3": x[:, :2],
        "expected 4 axes": x[0],
        "float64 differs": x.astype(np.float64),
        "expected a NumPy array": x.tolist(),
        "kernel_size": x[:, :, :2],
    }
    for message, input in wrong.items():
        with fastcnn.no_grad(), pytest.raises((TypeError, ValueError), match=message):
            net(input)
    net[1].running_mean = net[1].running_mean.astype(np.float64)
    with fastcnn.no_grad(), pytest.raises(TypeError, match="float64"):
        net(x)


@pytest.mark.parametrize("slope", [0.0, -0.5, np.nan])
def test_slopes_that_are_not_above_zero_keep_their_place(slope):
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.PReLU(6), nn.MaxPool2d(2)).double()
    net[1].weight.data[2] = slope
    x = np.random.default_rng(0).standard_normal((2, 2, 9, 9))
    fused = passes(net, x)
    fastcnn.set_fusion(False)
    plain = passes(net, x)
    for name, expected in plain.items():
        np.testing.assert_allclose(fused[name], expected, rtol=1e-10, atol=1e-12, err_msg=name)


class Shifted(nn.ReLU):
    def forward(self, input):
        return super().forward(input - 1)


APART = {
    "overlapping windows": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2)],
    "padded windows": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, padding=1)],
    "dilated windows": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, dilation=2)],
    "ceil_mode": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, ceil_mode=True)],
    "indices": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True)],
    "huge windows": [nn.Conv2d(3, 4, 3), nn.MaxPool2d(16)],
    "average": [nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)],
    "a subclass": [nn.Conv2d(3, 4, 3), Shifted()],
    "reflected padding": [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()],
    "dropout between": [nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU()],
}


@pytest.mark.parametrize("name", APART)
def test_what_does_not_fuse(name):
    assert set(runs(APART[name])) == {"-"}


def test_layers_that_serve_twice_stay_apart():
    conv, relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
    net = nn.Sequential(conv, relu, conv, relu, nn.Conv2d(4, 4, 1), nn.MaxPool2d(2)).double()
    assert [run for *_, run in net._runs(list(net))][:4] == [None] * 4
    check(net, np.random.default_rng(0).standard_normal((2, 4, 6, 6)))


def test_a_network_within_a_network_that_serves_twice():
    inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    check(nn.Sequential(inner, inner).double(), np.random.default_rng(0).standard_normal((2, 4, 6, 6)))


def test_a_layer_that_comes_to_serve_twice_later():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
    net = nn.Sequential(conv, nn.ReLU(), inner, nn.Residual(inner[0]))
    inner.append(conv)
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    results = []
    for of in (net, copy.deepcopy(net)):
        y = of(x)
        results.append([y, of.backward(y), *(parameter.grad for parameter in of.parameters())])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_changed_layer_is_noticed():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 9)).astype(np.float32)
    assert net(x).shape == (1, 4, 3, 3)
    net[2].ceil_mode = True
    assert net(x).shape == (1, 4, 4, 4)
    net[1].forward = lambda input: input * 0
    assert not net(x).any()


def test_a_frozen_layer_within_a_run_gets_no_gradient():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(), nn.MaxPool2d(2)).double()
    net[0].requires_grad_(False)
    x = np.random.default_rng(0).standard_normal((2, 2, 8, 8))
    check(net, x, input_grad=False)
    y = net(x)
    net.backward(np.ones_like(y), input_grad=False)
    assert not net[0].weight.grad.any()
    assert net[1].weight.grad.any()


def test_one_image_without_batch():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    check(net, np.random.default_rng(0).standard_normal((2, 9, 9)))


def test_a_wrong_gradient_leaves_the_forward_pass_in_place():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    y = net(np.ones((1, 2, 5, 5), np.float32))
    with pytest.raises(ValueError, match="dout: shape"):
        net.backward(np.ones((1, 4, 9, 9), np.float32))
    assert net.backward(np.ones_like(y)).shape == (1, 2, 5, 5)
    with pytest.raises(RuntimeError, match="backward needs a forward"):
        net.backward(np.ones_like(y))


def test_windows_larger_than_the_image_are_refused_as_by_the_layer():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(9))
    with pytest.raises(ValueError, match="kernel_size: 9"):
        net(np.ones((1, 2, 5, 5), np.float32))


def test_a_pickle_and_a_copy_run():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = np.random.default_rng(0).standard_normal((2, 2, 9, 9)).astype(np.float32)
    expected = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        np.testing.assert_array_equal(twin(x), expected)
        twin[0].weight.data[...] = 0
        assert (twin(x) == np.maximum(twin[0].bias.data, 0).reshape(4, 1, 1)).all()


def test_the_switch():
    assert fastcnn.get_fusion()
    fastcnn.set_fusion(False)
    assert not fastcnn.get_fusion()
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU())
    y = net(np.ones((1, 2, 5, 5), np.float32))
    dout = np.ones_like(y)
    for layer in reversed(list(net)):
        dout = layer.backward(dout)
    assert dout.shape == (1, 2, 5, 5)
    with pytest.raises(TypeError, match="enabled: expected a bool"):
        fastcnn.set_fusion("yes")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [(3, 4, 5, 6), (2, 16, 33, 32)])
def test_a_skip_connection_ends_in_relu(size, dtype):
    """In one pass or two, the bits are the same: of NaN, infinity and both zeros, and of the gradients."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(size).astype(dtype)
    x[rng.random(size) < 0.1] = -0.0
    for value in (np.nan, np.inf, -np.inf):
        x.flat[rng.integers(x.size)] = value
    dout = rng.standard_normal(size).astype(dtype)
    net = nn.Residual(nn.LeakyReLU(0.5), activation=nn.ReLU())
    results = []
    for fuses in (True, False):
        fastcnn.set_fusion(fuses)
        y = net(x)
        results.append((y, net.backward(dout)))
    fastcnn.set_fusion(True)
    for fused, plain in zip(*results, strict=True):
        assert fused.tobytes() == plain.tobytes()
    assert np.isnan(results[0][0]).any()


def test_a_skip_connection_with_a_relu_of_ones_own():
    """What replaces its forward pass is called."""
    called = []
    relu = nn.ReLU()
    relu.forward = lambda input: called.append(input.shape) or input
    nn.Residual(nn.Identity(), activation=relu)(np.ones((2, 3), np.float32))
    assert called == [(2, 3)]
