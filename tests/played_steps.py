"""Training steps of a network that is played and of its twin that is not, compared bit by bit."""

import numpy as np

import fastcnn
from fastcnn import models, nn
from fastcnn.nn import replay

SHAPES = {
    "emotion": (1, 48, 48),
    "cifar-small": (3, 32, 32),
    "cifar-batchnorm": (3, 32, 32),
    "mnist-prelu": (1, 28, 28),
    "chapter9": (1, 28, 28),
}


def twins(make):
    """Two equal networks, the second of which is never played."""
    net, plain = make(), make()
    plain.load_state_dict(net.state_dict())
    plain._replay.forward = lambda *_: None
    return net, plain


def is_played(net):
    """Whether forward and backward passes of `net` are recorded."""
    passes = [known for known in net._replay._known.passes.values() if isinstance(known, replay._Pass)]
    return any(known.backward for known in passes)


def grads(net):
    return [parameter.grad.copy() for parameter in net.parameters()]


def step(net, x, dout, input_grad=True, seed=0):
    """All that a training step gives: the output, the gradients, that of the input last, and the buffers."""
    fastcnn.manual_seed(seed)
    y = net(x)
    assert y.flags.writeable
    dx = net.backward(dout(y), input_grad=input_grad)
    return [y, *grads(net), *(array.copy() for array in net.buffers()), *([] if dx is None else [dx])]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def compare(net, plain, shape, dtype, steps=5, seed=2, **options):
    rng = np.random.default_rng(seed)
    for i in range(steps):
        x = rng.standard_normal(shape).astype(dtype)
        noise = np.random.default_rng(i)
        dout = noise.standard_normal(plain(x).shape).astype(dtype)
        plain.load_state_dict(net.state_dict())
        results = [step(of, x, lambda y, dout=dout: dout, seed=i, **options) for of in (net, plain)]
        assert_same(*results)
        if i % 2:
            for of in (net, plain):
                of.zero_grad()
        for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
            ours.data[...] -= 0.01 * ours.grad
            theirs.data[...] -= 0.01 * theirs.grad


BLOCKS = {
    "1x1": lambda: [nn.Conv2d(8, 12, 1)],
    "strided": lambda: [nn.Conv2d(8, 20, 3, stride=2, padding=1), nn.LeakyReLU(0.1)],
    "dilated": lambda: [nn.Conv2d(8, 20, 3, dilation=2, bias=False), nn.ReLU(), nn.MaxPool2d((2, 3))],
    "uneven": lambda: [nn.Conv2d(8, 3, (2, 5), padding=((0, 1), (2, 1))), nn.PReLU(3)],
    "depthwise": lambda: [nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=8, stride=2)],
    "groups": lambda: [nn.Conv2d(8, 12, 3, groups=4), nn.ReLU()],
    "norms": lambda: [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.MaxPool2d(2)],
    "untracked": lambda: [nn.Conv2d(8, 9, 3), nn.BatchNorm2d(9, track_running_stats=False), nn.ReLU()],
    "slopes": lambda: [nn.Conv2d(8, 10, 3), nn.PReLU(10), nn.MaxPool2d(2), nn.PReLU(10), nn.PReLU()],
    "pools": lambda: [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(2)],
    "adaptive pools": lambda: [nn.AdaptiveAvgPool2d((5, None)), nn.Conv2d(8, 20, 3), nn.AdaptiveAvgPool2d(1)],
    "softmax": lambda: [nn.Conv2d(8, 5, 3), nn.LogSoftmax(1), nn.Softmax(-1), nn.Softmax(0)],
    "lists": lambda: [
        nn.Flatten(2),
        nn.BatchNorm1d(8),
        nn.Unflatten(2, (12, 15)),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.BatchNorm1d(32),
    ],
    "dropout": lambda: [nn.Dropout(0.3), nn.Conv2d(8, 4, 3), nn.Dropout(0.5), nn.Dropout(1.0)],
    "rows": lambda: [nn.Flatten(2), nn.Linear(180, 40), nn.Linear(40, 3, bias=False), nn.ReLU()],
    "deep": lambda: [nn.Conv2d(8, 40, 3), nn.Conv2d(40, 80, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
    "residual": lambda: [
        nn.Residual(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), activation=nn.ReLU()),
        nn.Residual(nn.Conv2d(8, 4, 1, bias=False), nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))),
    ],
    "nested": lambda: [nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), nn.Identity()],
}


def small():
    return models.create("cifar-small", (3, 32, 32), 10, seed=0)


def batch_of(count, seed=1, shape=(3, 32, 32)):
    return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


def played(make=small, count=4, shape=(3, 32, 32)):
    """A network whose steps are played, its twin, and the input."""
    net, plain = twins(make)
    x = batch_of(count, shape=shape)
    compare(net, plain, x.shape, np.float32, steps=4)
    assert is_played(net)
    return net, plain, x
