"""Settings that are assigned to a layer after its construction: checks, and PyTorch's results."""

import copy
import pickle

import numpy as np
import pytest

import fastcnn
from fastcnn import nn

torch = pytest.importorskip("torch")

IMAGES, ROWS = (2, 4, 9, 8), (5, 7)

# Each layer's class and arguments, the shape of its input, and what is assigned, one after the other.
CASES = {
    "stride": ("Conv2d", (4, 6, 3), IMAGES, [("stride", 2), ("stride", (1, 3)), ("stride", [2, 1])]),
    "padding": ("Conv2d", (4, 6, 3), IMAGES, [("padding", 1), ("padding", "same"), ("padding", (0, 2))]),
    "dilation": ("Conv2d", (4, 6, 3), IMAGES, [("dilation", 2), ("dilation", (1, 3)), ("padding", 3)]),
    "same": ("Conv2d", (4, 6, 3), IMAGES, [("padding", "same"), ("dilation", 2), ("dilation", (3, 1))]),
    "order": ("Conv2d", (4, 6, 3, 1, "same"), IMAGES, [("padding", 1), ("stride", 2)]),
    "max": ("MaxPool2d", (2,), IMAGES, [("kernel_size", 3), ("stride", 3), ("padding", 1), ("stride", None)]),
    "max-dilation": ("MaxPool2d", (3,), IMAGES, [("dilation", 2), ("ceil_mode", True), ("dilation", (1, 2))]),
    "average": ("AvgPool2d", (2,), IMAGES, [("kernel_size", (3, 2)), ("stride", 1), ("padding", 1)]),
    "divisor": ("AvgPool2d", (3, 2, 1), IMAGES, [("count_include_pad", False), ("divisor_override", 5)]),
    "adaptive": ("AdaptiveAvgPool2d", (2,), IMAGES, [("output_size", 3), ("output_size", (None, 1))]),
    "momentum": ("BatchNorm2d", (4,), IMAGES, [("momentum", 0.2), ("momentum", None), ("momentum", 1)]),
    "eps": ("BatchNorm2d", (4,), IMAGES, [("eps", 0.5), ("eps", np.float32(0.25))]),
    "tracking": ("BatchNorm2d", (4,), IMAGES, [("track_running_stats", v) for v in (False, True)]),
    "untracked": ("BatchNorm2d", (4, 1e-5, 0.1, True, False), IMAGES, [("track_running_stats", True)]),
    "slope": (
        "LeakyReLU",
        (),
        IMAGES,
        [("negative_slope", 0.3), ("negative_slope", -1), ("negative_slope", 0)],
    ),
    "dropout": ("Dropout", (0.0,), ROWS, [("p", 1), ("p", 0.0)]),
    "softmax": ("Softmax", (1,), ROWS, [("dim", 0), ("dim", -1)]),
    "flatten": ("Flatten", (), IMAGES, [("start_dim", 2), ("end_dim", -2), ("start_dim", 0)]),
    "unflatten": ("Unflatten", (1, (2, 2)), IMAGES, [("unflattened_size", (4, -1)), ("dim", 3)]),
}


def twins(case):
    """The layer, PyTorch's with the same state, and an input."""
    kind, arguments, shape, _ = CASES[case]
    ours, theirs = getattr(nn, kind)(*arguments).double(), getattr(torch.nn, kind)(*arguments).double()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    # Values all different: a tie's gradient goes to either.
    rng = np.random.default_rng(1)
    return ours, theirs, rng.permutation(np.prod(shape)).reshape(shape) / 100 - 1.0


def compare(run, ours, theirs, x):
    """Forward and backward of `run`, which ends in the layer `ours`, against PyTorch's."""
    images = torch.tensor(x, requires_grad=True)
    expected = theirs(images)
    y = run(x)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-9, atol=1e-9)
    dout = np.random.default_rng(2).standard_normal(y.shape)
    theirs.zero_grad()
    run.zero_grad()
    expected.backward(torch.tensor(dout))
    np.testing.assert_allclose(run.backward(dout), images.grad.numpy(), rtol=1e-8, atol=1e-9)
    for parameter, twin in zip(ours.parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(parameter.grad, twin.grad.numpy(), rtol=1e-8, atol=1e-9)
    for name, value in ours.state_dict().items():
        np.testing.assert_allclose(value, theirs.state_dict()[name].numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_next_pass_follows(case, training):
    ours, theirs, x = twins(case)
    net = nn.Sequential(ours).train(training)
    theirs.train(training)
    for name, value in CASES[case][-1]:
        # So often that the pass is recorded.
        for _ in range(4):
            compare(net, ours, theirs, x)
        setattr(ours, name, value)
        setattr(theirs, name, getattr(ours, name) if value is None else value)
    for _ in range(4):
        compare(net, ours, theirs, x)
    with fastcnn.no_grad():
        for _ in range(4):
            np.testing.assert_allclose(net(x), theirs(torch.tensor(x)).detach(), rtol=1e-9, atol=1e-9)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert repr(twin) == repr(ours)
        compare(twin, twin, copy.deepcopy(theirs), x)


def test_a_fused_run_follows():
    conv, pool = nn.Conv2d(4, 6, 3), nn.MaxPool2d(2)
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), pool).double()
    peer = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.MaxPool2d(2)
    ).double()
    peer.load_state_dict({name: torch.tensor(value) for name, value in net.state_dict().items()})
    x = np.random.default_rng(3).standard_normal((2, 4, 15, 14))
    changes = [
        (0, "padding", 1),
        (3, "stride", 1),
        (1, "momentum", 0.3),
        (3, "kernel_size", 3),
        (0, "stride", 2),
    ]
    for place, name, value in [*changes, (3, "stride", 3), (0, "dilation", 2)]:
        setattr(net[place], name, value)
        setattr(peer[place], name, value)
        for _ in range(4):
            compare(net, net, peer, x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing", 0.3),
        ("reduction", "sum"),
        ("ignore_index", 2),
        ("weight", np.array([0.5, 1, 2, 3, 1])),
    ],
)
def test_losses(name, value):
    ours, theirs = nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()
    setattr(ours, name, value)
    setattr(theirs, name, torch.tensor(value) if isinstance(value, np.ndarray) else value)
    x, y = np.random.default_rng(4).standard_normal((6, 5)), np.array([0, 1, 2, 3, 4, 2])
    scores = torch.tensor(x, requires_grad=True)
    expected = theirs(scores, torch.tensor(y))
    expected.backward()
    assert ours(x, y) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(ours.backward(), scores.grad.numpy(), rtol=1e-9, atol=1e-12)


WRONG = [
    (lambda: nn.Conv2d(4, 6, 3), "stride", 0, "stride: 0 is below 1"),
    (lambda: nn.Conv2d(4, 6, 3), "stride", (1, 2, 3), "stride: expected an int or two"),
    (lambda: nn.Conv2d(4, 6, 3), "kernel_size", 2.5, r"kernel_size: expected an int, got 2\.5"),
    (lambda: nn.Conv2d(4, 6, 3), "dilation", True, "dilation: expected an int, got True"),
    (lambda: nn.Conv2d(4, 6, 3), "padding", "full", "padding: 'full' is neither"),
    (lambda: nn.Conv2d(4, 6, 3), "padding_mode", "mirror", "padding_mode: 'mirror' is none of"),
    (lambda: nn.Conv2d(4, 6, 3), "groups", 0, "groups: 0 is below 1"),
    (lambda: nn.Conv2d(4, 6, 3), "in_channels", None, "in_channels: expected an int"),
    (lambda: nn.MaxPool2d(2), "kernel_size", 0, "kernel_size: 0 is below 1"),
    (lambda: nn.MaxPool2d(2), "padding", "same", "padding: expected an int"),
    (lambda: nn.AvgPool2d(2), "divisor_override", 0, "divisor_override: 0 divides nothing"),
    (lambda: nn.AdaptiveAvgPool2d(2), "output_size", 0, "output_size: 0 is below 1"),
    (lambda: nn.BatchNorm2d(3), "momentum", "0.1", "momentum: expected a number"),
    (lambda: nn.BatchNorm1d(3), "eps", None, "eps: expected a number"),
    (lambda: nn.Dropout(), "p", 1.5, r"p: 1\.5 is not between 0 and 1"),
    (lambda: nn.LeakyReLU(), "negative_slope", [0.1], "negative_slope: expected a number"),
    (lambda: nn.PReLU(), "num_parameters", 0, "num_parameters: 0 is below 1"),
    (lambda: nn.Softmax(1), "dim", 1.0, r"dim: expected an int, got 1\.0"),
    (lambda: nn.Linear(2, 3), "out_features", 0, "out_features: 0 is below 1"),
    (lambda: nn.Flatten(), "start_dim", "1", "start_dim: expected an int"),
    (lambda: nn.Unflatten(1, (2, 2)), "unflattened_size", (-1, -1), "unflattened_size: .* at most one"),
    (lambda: nn.CrossEntropyLoss(), "label_smoothing", 2, "label_smoothing: 2 is not between 0 and 1"),
    (lambda: nn.CrossEntropyLoss(), "reduction", None, "reduction: None is none of"),
    (lambda: nn.CrossEntropyLoss(), "weight", np.arange(3), "weight: dtype int64"),
    (lambda: nn.CrossEntropyLoss(), "ignore_index", 1.0, "ignore_index: expected an int"),
]


@pytest.mark.parametrize(("make", "name", "value", "message"), WRONG)
def test_a_wrong_value_changes_nothing(make, name, value, message):
    layer = make()
    before = repr(layer), getattr(layer, name)
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(layer, name, value)
    assert (repr(layer), getattr(layer, name)) == before


@pytest.mark.parametrize(
    ("layer", "name", "value", "message"),
    [
        (
            nn.Conv2d(3, 2, 3, padding="same"),
            "stride",
            2,
            r"padding: 'same' is not defined for stride \(2, 2\)",
        ),
        (nn.MaxPool2d(3, padding=1), "kernel_size", 1, r"padding: \(1, 1\) is more than half of kernel_size"),
        (nn.AvgPool2d(3), "padding", 2, r"padding: \(2, 2\) is more than half of kernel_size"),
    ],
)
def test_what_settings_must_be_together_is_told_by_the_pass(layer, name, value, message):
    x, net, before = np.zeros((1, 3, 6, 6), np.float32), nn.Sequential(layer, nn.ReLU()), getattr(layer, name)
    for _ in range(4):
        net(x)
    setattr(layer, name, value)
    for run in (layer, net, net):
        with pytest.raises(ValueError, match=message):
            run(x)
    setattr(layer, name, before)
    net(x)


@pytest.mark.parametrize(
    ("name", "value"), [("kernel_size", 2), ("groups", 2), ("out_channels", 3), ("in_channels", 2)]
)
def test_settings_that_do_not_fit_the_weights(name, value):
    layer, x = nn.Conv2d(4, 4, 3), np.zeros((1, 4, 6, 6), np.float32)
    setattr(layer, name, value)
    # Whichever argument of the kernel is found first.
    with pytest.raises(ValueError):
        layer(x)


def test_backward_needs_the_settings_of_its_forward():
    layer, x = nn.LeakyReLU(0.5), -np.ones((2, 3), np.float32)
    layer(x)
    layer.negative_slope = 0.25
    with pytest.raises(RuntimeError, match="backward needs a forward before it"):
        layer.backward(x)
    layer(x)
    np.testing.assert_array_equal(layer.backward(x), x / 4)


def test_values_are_copied():
    slope, sizes = np.array(0.5), [2, 2]
    leaky, pool = nn.LeakyReLU(slope), nn.MaxPool2d(2)
    pool.kernel_size = sizes
    slope[...], sizes[0] = 0.25, 3
    assert (leaky.negative_slope, pool.kernel_size) == (0.5, (2, 2))


def test_a_deleted_setting_is_gone():
    layer = nn.Conv2d(3, 2, 3)
    del layer.stride
    with pytest.raises(AttributeError, match="stride"):
        _ = layer.stride
    layer.stride = 2
    assert layer.stride == (2, 2)


def test_a_subclass_adds_its_own():
    class Scaled(nn.LeakyReLU):
        _setting_checks = {"scale": lambda name, value: float(value)}  # noqa: RUF012

    layer = Scaled(0.5)
    layer.scale, layer.negative_slope = 3, np.float32(0.25)
    assert (layer.scale, layer.negative_slope) == (3.0, 0.25)
    with pytest.raises(TypeError, match="negative_slope: expected a number"):
        layer.negative_slope = None
