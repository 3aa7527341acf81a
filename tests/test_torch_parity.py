"""The same weights in PyTorch: same outputs, same gradients, and ten equal training steps of each model."""

import numpy as np
import pytest

import fastcnn
from fastcnn import models, nn, optim

torch = pytest.importorskip("torch")

INPUTS = {
    "emotion": (1, 48, 48),
    "cifar-small": (3, 32, 32),
    "cifar-batchnorm": (3, 32, 32),
    "chapter9": (1, 28, 28),
    "mnist-prelu": (1, 28, 28),
    "resnet9": (3, 32, 32),
}


class TorchResidual(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.body = to_torch(layer.body)
        self.shortcut = None if layer.shortcut is None else to_torch(layer.shortcut)
        self.activation = None if layer.activation is None else to_torch(layer.activation)

    def forward(self, x):
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.activation is None else self.activation(y)


def to_torch(layer):
    """PyTorch's module of the same name and arguments; state is copied by the caller through state_dict."""
    name = type(layer).__name__
    if isinstance(layer, nn.Sequential):
        return torch.nn.Sequential(*[to_torch(child) for child in layer])
    if name == "Residual":
        return TorchResidual(layer)
    arguments = {
        "Conv2d": lambda m: {
            "in_channels": m.in_channels,
            "out_channels": m.out_channels,
            "kernel_size": m.kernel_size,
            "stride": m.stride,
            "padding": m.padding,
            "dilation": m.dilation,
            "groups": m.groups,
            "bias": m.bias is not None,
        },
        "Linear": lambda m: {
            "in_features": m.in_features,
            "out_features": m.out_features,
            "bias": m.bias is not None,
        },
        "BatchNorm1d": lambda m: {"num_features": m.num_features, "eps": m.eps, "momentum": m.momentum},
        "BatchNorm2d": lambda m: {"num_features": m.num_features, "eps": m.eps, "momentum": m.momentum},
        "MaxPool2d": lambda m: {"kernel_size": m.kernel_size, "stride": m.stride, "padding": m.padding},
        "AvgPool2d": lambda m: {"kernel_size": m.kernel_size, "stride": m.stride, "padding": m.padding},
        "AdaptiveAvgPool2d": lambda m: {"output_size": m.output_size},
        "LeakyReLU": lambda m: {"negative_slope": m.negative_slope},
        "PReLU": lambda m: {"num_parameters": m.weight.size},
        "Dropout": lambda m: {"p": 0.0},
    }.get(name, lambda m: {})(layer)
    return getattr(torch.nn, name)(**arguments)


def twins(name, seed=0):
    """A named model without dropout, and PyTorch's with the same state."""
    net = models.create(name, input_shape=INPUTS[name], num_classes=7, seed=seed)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    peer = to_torch(net)
    peer.load_state_dict({key: torch.tensor(value) for key, value in net.state_dict().items()})
    return net, peer


def batch(name, size, dtype=np.float32, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((size, *INPUTS[name])).astype(dtype)
    return x, rng.integers(0, 7, size)


@pytest.mark.parametrize("name", models.names())
def test_models_cover_every_name(name):
    assert name in INPUTS


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients(name, training):
    net, peer = twins(name)
    net.double().train(training)
    peer.double().train(training)
    x, y = batch(name, 5, np.float64)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits = net(x)
    loss = loss_fn(logits, y)
    dx = net.backward(loss_fn.backward())

    xt = torch.tensor(x, requires_grad=True)
    expected = peer(xt)
    peer_loss = torch.nn.functional.cross_entropy(expected, torch.tensor(y), label_smoothing=0.1)
    peer_loss.backward()
    np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    assert loss == pytest.approx(peer_loss.item(), rel=1e-10)
    np.testing.assert_allclose(dx, xt.grad.numpy(), rtol=1e-7, atol=1e-10)
    for (key, ours), (_, theirs) in zip(net.named_parameters(), peer.named_parameters(), strict=True):
        scale = max(theirs.grad.abs().max().item(), 1e-3)
        np.testing.assert_allclose(ours.grad, theirs.grad.numpy(), atol=1e-9 * scale, rtol=1e-7, err_msg=key)
    for (key, ours), (_, theirs) in zip(net.state_dict().items(), peer.state_dict().items(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-9, atol=1e-12, err_msg=key)


OPTIMIZERS = {
    "sgd": (
        lambda p: optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-3),
        lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-3),
    ),
    "adam": (lambda p: optim.Adam(p, lr=1e-3), lambda p: torch.optim.Adam(p, lr=1e-3)),
    "adamw": (
        lambda p: optim.AdamW(p, lr=1e-3, weight_decay=0.05),
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
    ),
}


# One optimiser is enough for the slowest model.
TRAININGS = [(name, kind) for name in INPUTS for kind in OPTIMIZERS if name != "resnet9" or kind == "sgd"]


@pytest.mark.parametrize(("name", "kind"), TRAININGS)
def test_ten_training_steps(name, kind):
    """In float64, so that Adam's normalised steps don't amplify the rounding of tiny gradients."""
    net, peer = twins(name)
    net.double().train()
    peer.double().train()
    ours, theirs = (make(m.parameters()) for make, m in zip(OPTIMIZERS[kind], (net, peer), strict=True))
    loss_fn = nn.CrossEntropyLoss()
    for step in range(10):
        x, y = batch(name, 4 if name == "resnet9" else 8, np.float64, seed=step)
        loss = loss_fn(net(x), y)
        net.backward(loss_fn.backward(), input_grad=False)
        ours.step()
        ours.zero_grad()
        peer_loss = torch.nn.functional.cross_entropy(peer(torch.tensor(x)), torch.tensor(y))
        theirs.zero_grad()
        peer_loss.backward()
        theirs.step()
        assert loss == pytest.approx(peer_loss.item(), rel=1e-6), f"step {step}"
    for key, value in peer.state_dict().items():
        np.testing.assert_allclose(net.state_dict()[key], value.numpy(), rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", models.names())
def test_float32_training_steps_stay_close(name):
    net, peer = twins(name)
    # Faster, this one's loss explodes within ten steps, and every rounding error with it.
    lr = 1e-4 if name == "resnet9" else 0.01
    ours = optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    theirs = torch.optim.SGD(peer.parameters(), lr=lr, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    for step in range(10):
        x, y = batch(name, 4 if name == "resnet9" else 16, seed=step)
        loss = loss_fn(net(x), y)
        net.backward(loss_fn.backward(), input_grad=False)
        ours.step()
        ours.zero_grad()
        peer_loss = torch.nn.functional.cross_entropy(peer(torch.tensor(x)), torch.tensor(y))
        theirs.zero_grad()
        peer_loss.backward()
        theirs.step()
        assert loss == pytest.approx(peer_loss.item(), rel=2e-2, abs=2e-3), f"step {step}"


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 5, "padding": "valid", "stride": 2},
        {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2},
        {"kernel_size": 3, "groups": 6, "padding": 1, "bias": False},
        {"kernel_size": 1, "stride": 3},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
def test_convolution_arguments(arguments):
    fastcnn.manual_seed(0)
    layer = nn.Conv2d(6, 12, **arguments).double()
    peer = torch.nn.Conv2d(6, 12, **arguments).double()
    peer.load_state_dict({key: torch.tensor(value) for key, value in layer.state_dict().items()})
    rng = np.random.default_rng(0)
    for shape in [(3, 6, 11, 13), (6, 9, 10)]:
        x = rng.standard_normal(shape)
        y = layer(x)
        dout = rng.standard_normal(y.shape)
        layer.zero_grad()
        dx = layer.backward(dout)
        xt = torch.tensor(x, requires_grad=True)
        peer.zero_grad()
        expected = peer(xt)
        expected.backward(torch.tensor(dout))
        np.testing.assert_allclose(y, expected.detach().numpy(), atol=1e-12)
        np.testing.assert_allclose(dx, xt.grad.numpy(), atol=1e-12)
        np.testing.assert_allclose(layer.weight.grad, peer.weight.grad.numpy(), atol=1e-11)
        if layer.bias is not None:
            np.testing.assert_allclose(layer.bias.grad, peer.bias.grad.numpy(), atol=1e-11)


def test_default_initialisation_has_pytorchs_bounds():
    """PyTorch draws both from U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    fastcnn.manual_seed(0)
    for layer, fan_in in [(nn.Conv2d(8, 64, 3, groups=2), 36), (nn.Linear(100, 200), 100)]:
        bound = fan_in**-0.5
        for parameter in (layer.weight, layer.bias):
            values = parameter.data
            assert np.abs(values).max() <= bound
            assert np.abs(values).max() > 0.9 * bound
            assert abs(values.mean()) < 0.2 * bound
