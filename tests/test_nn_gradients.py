"""Every layer's backward pass against central differences, in float64."""

import numpy as np
import pytest

from fastcnn import nn

LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 6)),
    "conv, stride and padding": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2)),
        (2, 2, 6, 5),
    ),
    "conv, sides": (lambda: nn.Conv2d(2, 2, 3, padding=((2, 0), (0, 1))), (1, 2, 5, 5)),
    "conv, same": (lambda: nn.Conv2d(2, 2, 4, padding="same"), (1, 2, 5, 5)),
    "conv, dilation": (lambda: nn.Conv2d(2, 2, 3, dilation=2, padding=2), (1, 2, 5, 6)),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 4, 4)),
    "conv, depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (2, 3, 4, 4)),
    "conv, 1x1": (lambda: nn.Conv2d(3, 2, 1), (2, 3, 3, 3)),
    "conv, one image": (lambda: nn.Conv2d(2, 2, 2), (2, 4, 4)),
    "conv, reflect": (lambda: nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), (1, 2, 4, 5)),
    "conv, replicate": (
        lambda: nn.Conv2d(2, 2, 3, stride=2, padding=((3, 1), (0, 2)), padding_mode="replicate"),
        (1, 2, 4, 5),
    ),
    "conv, circular": (lambda: nn.Conv2d(2, 2, 3, padding=(1, 3), padding_mode="circular"), (2, 2, 4, 3)),
    "max pool": (lambda: nn.MaxPool2d(2), (2, 3, 6, 5)),
    "max pool, all": (lambda: nn.MaxPool2d(3, 2, 1, dilation=2, ceil_mode=True), (2, 2, 8, 7)),
    "average pool": (lambda: nn.AvgPool2d(2), (2, 3, 6, 5)),
    "average pool, padding": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 2, 6, 7)),
    "average pool, pixels only": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 2, 6, 7)),
    "average pool, divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), (2, 2, 4, 4)),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 2, 7, 5)),
    "adaptive, one axis": (lambda: nn.AdaptiveAvgPool2d((None, 2)), (2, 2, 3, 5)),
    "global": (lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 4, 5)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "batch norm 1d, sequences": (lambda: nn.BatchNorm1d(3), (3, 3, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3), (3, 3, 3, 2)),
    "batch norm, not affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 3, 3, 2)),
    "batch norm, evaluation": (lambda: nn.BatchNorm2d(3).eval(), (3, 3, 3, 2)),
    "relu": (nn.ReLU, (2, 3, 4, 4)),
    "leaky relu": (lambda: nn.LeakyReLU(0.2), (3, 4)),
    "prelu": (nn.PReLU, (2, 3, 4, 4)),
    "prelu, channels": (lambda: nn.PReLU(3), (2, 3, 4, 4)),
    "prelu, sequences": (lambda: nn.PReLU(3), (2, 3, 4)),
    "prelu, vector": (nn.PReLU, (5,)),
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, vector": (lambda: nn.Linear(5, 3), (5,)),
    "linear, leading axes": (lambda: nn.Linear(5, 3, bias=False), (2, 2, 5)),
    "flatten": (nn.Flatten, (2, 3, 2, 2)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (2, 6)),
    "identity": (nn.Identity, (2, 3)),
    "dropout, evaluation": (lambda: nn.Dropout().eval(), (3, 4)),
    "softmax": (lambda: nn.Softmax(1), (3, 4)),
    "softmax of images": (lambda: nn.Softmax(1), (2, 3, 2, 2)),
    "log softmax": (lambda: nn.LogSoftmax(-1), (2, 3, 4)),
    "log softmax, first axis": (lambda: nn.LogSoftmax(0), (3, 4)),
}


def difference(function, values, index, step):
    kept = values[index]
    values[index] = kept + step
    above = function()
    values[index] = kept - step
    below = function()
    values[index] = kept
    return (above - below) / (2 * step)


@pytest.mark.parametrize("name", LAYERS)
def test_backward_is_the_gradient_of_forward(name):
    make, shape = LAYERS[name]
    rng = np.random.default_rng(1)
    layer = make().double()
    # Distinct values, none near zero: neither ties in a window nor the kink of an activation.
    x = rng.permutation(np.linspace(-2, 2, int(np.prod(shape)) // 2 * 2 + 2))[: int(np.prod(shape))]
    x = np.ascontiguousarray(x.reshape(shape))
    for parameter in layer.parameters():
        parameter.data = rng.standard_normal(parameter.shape)
    dout = rng.standard_normal(layer(x).shape)

    def loss():
        return float((layer(x) * dout).sum())

    layer(x)
    dx = layer.backward(dout)
    assert dx.dtype == np.float64
    checked = {"input": (x, dx)}
    checked |= {key: (p.data, p.grad.copy()) for key, p in layer.named_parameters()}
    for key, (values, grad) in checked.items():
        assert grad.shape == values.shape
        expected = np.empty(values.shape)
        for index in np.ndindex(*values.shape):
            expected[index] = difference(loss, values, index, 1e-6)
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-7, err_msg=key)


def test_dropout_goes_back_through_the_mask_of_its_forward_pass():
    layer, x = nn.Dropout(0.4), np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    y = layer(x)
    dx = layer.backward(np.ones_like(x))
    np.testing.assert_allclose(y, x * dx)
