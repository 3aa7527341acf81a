"""Networks drawn at random once and for all, trained for a few steps beside PyTorch's, in float64.

What `Sequential` fuses, records and plays depends on which layers are neighbours and on the batches' sizes.
"""

import numpy as np
import pytest

import fastcnn
from fastcnn import nn, optim

torch = pytest.importorskip("torch")

NETWORKS = 250
TOLERANCE = 1e-8
# What is smaller is rounding.
SMALLEST = 1e-3
# Elements of the largest result of a layer for one image, and inputs of the first linear layer.
MOST_ELEMENTS, MOST_FEATURES = 20_000, 2000
CLASSES = 7


class _TheirResidual(torch.nn.Module):
    def __init__(self, *body):
        super().__init__()
        self.body = torch.nn.Sequential(*body)

    def forward(self, x):
        return x + self.body(x)


def convolution(rng, channels):
    kernel = (int(rng.choice([1, 2, 3, 3, 5])),) * 2 if rng.random() < 0.8 else (3, 5)
    groups = int(rng.choice([divisor for divisor in range(1, channels + 1) if channels % divisor == 0]))
    groups = groups if rng.random() < 0.3 else 1
    filters = groups * int(rng.choice([1, 2, 3, 8, 10, 16, 17, 32]))
    how = {
        "stride": int(rng.choice([1, 1, 1, 2, 3])),
        "padding": "valid" if rng.random() < 0.1 else tuple(int(rng.integers(k // 2 + 2)) for k in kernel),
        "dilation": int(rng.choice([1, 1, 1, 2])),
        "groups": groups,
        "bias": bool(rng.random() < 0.7),
    }
    return "Conv2d", (channels, filters, kernel), how


def pool(rng, channels):
    kernel = [2, 2, 3, (2, 3), 4][rng.integers(5)]
    how = {"stride": [None, None, 1, 2, (2, 1)][rng.integers(5)], "ceil_mode": bool(rng.random() < 0.3)}
    return "MaxPool2d" if rng.random() < 0.6 else "AvgPool2d", (kernel,), how


def batch_norm(rng, channels):
    how = {"affine": bool(rng.random() < 0.8), "track_running_stats": bool(rng.random() < 0.8)}
    return "BatchNorm2d", (channels,), how


def activation(rng, channels):
    name = ["ReLU", "ReLU", "LeakyReLU", "PReLU", "Identity"][rng.integers(5)]
    return name, (int(rng.choice([1, channels])),) if name == "PReLU" else (), {}


def average(rng, channels):
    return "AdaptiveAvgPool2d", ([1, 2, (1, 3)][rng.integers(3)],), {}


def residual(rng, channels):
    return "Residual", (channels,), {}


KINDS = (convolution, convolution, convolution, pool, batch_norm, activation, activation, average, residual)


def build(name, arguments, how):
    """A layer of ours and PyTorch's."""
    if name == "Residual":
        inner = [
            build("Conv2d", (*arguments, *arguments, 3), {"padding": 1}),
            build("BatchNorm2d", arguments, {}),
        ]
        ours, theirs = zip(*inner, strict=True)
        return nn.Residual(nn.Sequential(*ours)), _TheirResidual(*theirs)
    has_parameters = name in ("Conv2d", "BatchNorm2d", "BatchNorm1d", "PReLU", "Linear")
    ours, theirs = ({"dtype": dtype} if has_parameters else {} for dtype in (np.float64, torch.float64))
    return getattr(nn, name)(*arguments, **how, **ours), getattr(torch.nn, name)(*arguments, **how, **theirs)


def output_shape(theirs, shape):
    """PyTorch's, of one image; None if the layer can't take it or makes too much of it."""
    theirs.eval()
    try:
        out = theirs(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:]
    except RuntimeError:
        return None
    finally:
        theirs.train()
    return tuple(out) if 0 < out.numel() <= MOST_ELEMENTS else None


def networks(rng):
    """Two networks of the same layers and weights, and the shape of an image."""
    image = (int(rng.choice([1, 3, 4, 10, 16])), int(rng.integers(5, 25)), int(rng.integers(4, 25)))
    shape, pairs = image, []
    for _ in range(rng.integers(1, 7)):
        pair = build(*KINDS[rng.integers(len(KINDS))](rng, shape[0]))
        after = output_shape(pair[1], shape)
        if after is not None:
            pairs.append(pair)
            shape = after
    features = int(np.prod(shape))
    if features <= MOST_FEATURES and rng.random() < 0.7:
        pairs.append(build("Flatten", (), {}))
        if rng.random() < 0.5:
            hidden = int(rng.choice([1, 5, 16, 37]))
            pairs += [build("Linear", (features, hidden), {}), build("ReLU", (), {})]
            features = hidden
        pairs.append(build("Linear", (features, CLASSES), {}))
        shape = (CLASSES,)
    if not any(list(ours.parameters()) for ours, _ in pairs):
        pairs.insert(0, build("Conv2d", (image[0], image[0], 1), {}))
    ours, theirs = nn.Sequential(*(pair[0] for pair in pairs)), torch.nn.Sequential(*(p[1] for p in pairs))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        other.data.copy_(torch.from_numpy(mine.data.copy()))
    return ours, theirs, image


def laid_out(rng, x):
    """The same numbers, at once, channels-last, or with gaps."""
    way = rng.integers(3)
    if way == 1:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return np.repeat(x, 2, axis=3)[..., ::2] if way == 2 else x


def assert_near(ours, theirs, largest=0.0, message=""):
    expected = theirs.detach().numpy()
    tolerance = TOLERANCE * max(np.abs(expected).max(initial=SMALLEST), largest)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance, err_msg=message)


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_trains_as_pytorch_s(seed, team, scratch):
    rng = np.random.default_rng(seed)
    fastcnn.manual_seed(seed)
    team(int(rng.integers(1, 3)))
    ours, theirs, image = networks(rng)
    settings = {"lr": 1e-3, "momentum": 0.9}
    mine, other = optim.SGD(ours.parameters(), **settings), torch.optim.SGD(theirs.parameters(), **settings)
    usual = int(rng.choice([2, 3, 7, 16, 17]))
    for _ in range(rng.integers(1, 6)):
        images = usual if rng.random() < 0.7 else int(rng.integers(2, 9))
        x = rng.standard_normal((images, *image))
        their_x = torch.from_numpy(x.copy()).requires_grad_(True)
        y, their_y = ours(laid_out(rng, x)), theirs(their_x)
        assert_near(y, their_y, message="y")
        mine.zero_grad()
        other.zero_grad()
        dout = rng.standard_normal(y.shape)
        their_y.backward(torch.from_numpy(dout))
        wants_dx = bool(rng.random() < 0.8)
        dx = ours.backward(dout, input_grad=wants_dx)
        # Gradients that are zero but for rounding are as large as the others' rounding.
        gradients = [parameter.grad for parameter in theirs.parameters()]
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        if wants_dx:
            assert_near(dx, their_x.grad, message="dx")
        for (name, parameter), gradient in zip(ours.named_parameters(), gradients, strict=True):
            assert_near(parameter.grad, gradient, largest, name)
        mine.step()
        other.step()
        if rng.random() < 0.3:
            x = rng.standard_normal((int(rng.integers(1, 9)), *image))
            ours.eval(), theirs.eval()
            with fastcnn.no_grad(), torch.no_grad():
                assert_near(ours(x), theirs(torch.from_numpy(x)), message="inference")
            ours.train(), theirs.train()
    for (name, array), theirs_ in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_near(array, theirs_, message=name)
    scratch.check("training")
