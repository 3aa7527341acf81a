"""The reference's backward passes against central differences and adjoint identities, in float64."""

import numpy as np
import pytest

from fastcnn.kernels import reference as ref

# (x_shape, kernel, filters, stride, padding, dilation, groups)
CONVOLUTIONS = [
    ((2, 5, 4, 3), (3, 3), 4, 1, 1, 1, 1),
    ((1, 6, 7, 2), (2, 3), 3, (2, 3), 0, 1, 1),
    ((2, 5, 5, 4), (3, 2), 6, 2, ((0, 2), (1, 0)), 1, 2),
    ((1, 7, 6, 3), (3, 2), 6, (1, 2), (2, 1), (2, 3), 3),
    ((3, 4, 4, 2), (1, 1), 5, 3, 0, 1, 1),
    ((1, 1, 6, 4), (1, 4), 2, 1, ((0, 0), (3, 1)), 1, 2),
    ((1, 3, 3, 1), (5, 5), 1, 1, 2, 1, 1),
]

# (x_shape, kernel, stride, padding, dilation, ceil_mode)
MAX_POOLS = [
    ((2, 4, 6, 3), 2, None, 0, 1, False),
    ((1, 7, 7, 2), 3, 2, 1, 1, False),
    ((1, 7, 5, 2), (3, 2), 1, (1, 1), (2, 3), False),
    ((2, 5, 6, 1), 2, 3, ((0, 1), (1, 0)), 1, True),
    ((1, 6, 8, 1), 3, (2, 4), 0, 1, True),
]

# (x_shape, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override)
AVERAGE_POOLS = [
    ((2, 4, 6, 3), 2, None, 0, False, True, None),
    ((1, 7, 7, 2), 3, 2, 1, False, False, None),
    ((1, 6, 8, 1), 3, (2, 4), ((1, 0), (0, 1)), True, True, None),
    ((2, 5, 5, 1), (2, 3), (3, 2), (1, 1), True, False, None),
    ((1, 5, 5, 2), 3, 1, 1, False, True, 5),
]


def rng(*seed):
    return np.random.default_rng([7, *seed])


def without_ties(shape):
    """Distinct values, 0.1 apart, none of them 0, in random order."""
    count = int(np.prod(shape))
    return (rng(count).permutation(count).reshape(shape) - count // 2 + 0.5) / 10


def numeric_gradient(loss, x, step=1e-5):
    """Central difference of a function of x, one element at a time; x is put back."""
    gradient = np.empty_like(x)
    for position in np.ndindex(x.shape):
        value = x[position]
        x[position] = value + step
        above = loss()
        x[position] = value - step
        below = loss()
        x[position] = value
        gradient[position] = (above - below) / (2 * step)
    return gradient


def check_gradient(forward, x, dout, analytic):
    """`analytic` is the gradient of sum(forward() * dout) to x, which `forward` reads."""
    assert analytic.dtype == np.float64
    numeric = numeric_gradient(lambda: (forward() * dout).sum(), x)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-6, atol=1e-8)


def inner(a, b):
    assert a.shape == b.shape
    return (a * b).sum()


# Linear maps: <forward(x), r> = <x, backward(r)>


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_col2im_is_the_adjoint_of_im2col(case):
    x_shape, kernel, _, stride, padding, dilation, _ = case
    x = rng(1).standard_normal(x_shape)
    cols = ref.im2col(x, kernel, stride, padding, dilation)
    r = rng(2).standard_normal(cols.shape)
    back = ref.col2im(r, x_shape, kernel, stride, padding, dilation)
    np.testing.assert_allclose(inner(cols, r), inner(x, back), rtol=1e-12)


def convolution(case):
    x_shape, kernel, filters, stride, padding, dilation, groups = case
    x = rng(3).standard_normal(x_shape)
    weight = rng(4).standard_normal((*kernel, x_shape[3] // groups, filters))
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    dout = rng(5).standard_normal(ref.conv2d_forward(x, weight, **how).shape)
    return x, weight, dout, how


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_gradients_are_adjoints(case):
    x, weight, dout, how = convolution(case)
    forward = inner(ref.conv2d_forward(x, weight, **how), dout)
    dx = ref.conv2d_backward_input(dout, weight, x.shape, **how)
    dweight = ref.conv2d_backward_weight(dout, x, weight.shape[:2], **how)
    np.testing.assert_allclose(inner(x, dx), forward, rtol=1e-11)
    np.testing.assert_allclose(inner(weight, dweight), forward, rtol=1e-11)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_is_im2col_times_weights(case):
    x, weight, dout, how = convolution(case)
    groups, f = how.pop("groups"), weight.shape[3]
    channels, filters = weight.shape[2], f // groups
    for g in range(groups):
        x_g = x[..., g * channels : (g + 1) * channels]
        of_group = slice(g * filters, (g + 1) * filters)
        cols = ref.im2col(x_g, weight.shape[:2], **how)
        weight_g = weight[..., of_group]
        y = ref.conv2d_forward(x_g, weight_g, **how)
        np.testing.assert_allclose(y.reshape(-1, filters), cols @ weight_g.reshape(-1, filters), rtol=1e-10)
        dcols = dout[..., of_group].reshape(-1, filters) @ weight_g.reshape(-1, filters).T
        dx = ref.col2im(dcols, x_g.shape, weight.shape[:2], **how)
        np.testing.assert_allclose(
            ref.conv2d_backward_input(dout[..., of_group], weight_g, x_g.shape, **how), dx, atol=1e-12
        )


@pytest.mark.parametrize("case", AVERAGE_POOLS)
def test_average_pool_gradient_is_its_adjoint(case):
    x_shape, *how = case
    x = rng(6).standard_normal(x_shape)
    y = ref.avg_pool2d_forward(x, *how)
    r = rng(7).standard_normal(y.shape)
    np.testing.assert_allclose(inner(y, r), inner(x, ref.avg_pool2d_backward(r, x_shape, *how)), rtol=1e-12)


@pytest.mark.parametrize("output_size", [1, 2, (3, 4), (5, 7), (8, 2)])
def test_adaptive_average_pool_gradient_is_its_adjoint(output_size):
    x = rng(8).standard_normal((2, 5, 7, 3))
    y = ref.adaptive_avg_pool2d_forward(x, output_size)
    r = rng(9).standard_normal(y.shape)
    back = ref.adaptive_avg_pool2d_backward(r, x.shape)
    np.testing.assert_allclose(inner(y, r), inner(x, back), rtol=1e-11)


def test_global_average_pool_gradient_is_its_adjoint():
    x, r = rng(10).standard_normal((3, 4, 5, 2)), rng(11).standard_normal((3, 2))
    y, back = ref.global_avg_pool2d_forward(x), ref.global_avg_pool2d_backward(r, x.shape)
    np.testing.assert_allclose(inner(y, r), inner(x, back), rtol=1e-12)


def test_linear_gradients_are_adjoints():
    x, weight, r = (rng(12, i).standard_normal(s) for i, s in enumerate([(4, 5), (5, 3), (4, 3)]))
    forward = inner(ref.linear_forward(x, weight), r)
    np.testing.assert_allclose(inner(x, ref.linear_backward_input(r, weight)), forward, rtol=1e-12)
    np.testing.assert_allclose(inner(weight, ref.linear_backward_weight(r, x)), forward, rtol=1e-12)


# Central differences


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_gradients(case):
    x, weight, dout, how = convolution(case)
    bias = rng(13).standard_normal(weight.shape[3])

    def forward():
        return ref.conv2d_forward(x, weight, bias, **how)

    check_gradient(forward, x, dout, ref.conv2d_backward_input(dout, weight, x.shape, **how))
    check_gradient(forward, weight, dout, ref.conv2d_backward_weight(dout, x, weight.shape[:2], **how))
    check_gradient(forward, bias, dout, ref.conv2d_backward_bias(dout))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_col2im_gradient_is_im2col(case):
    x_shape, kernel, _, *how, _ = case
    dout = rng(14).standard_normal(x_shape)
    cols = rng(15).standard_normal(ref.im2col(dout, kernel, *how).shape)
    check_gradient(
        lambda: ref.col2im(cols, x_shape, kernel, *how), cols, dout, ref.im2col(dout, kernel, *how)
    )


@pytest.mark.parametrize("case", MAX_POOLS)
def test_max_pool_gradient(case):
    x_shape, kernel, stride, padding, dilation, ceil_mode = case
    x = without_ties(x_shape)

    def forward():
        return ref.max_pool2d_forward(x, kernel, stride, padding, dilation, ceil_mode)

    y, argmax = forward()
    dout = rng(16).standard_normal(y.shape)
    dx = ref.max_pool2d_backward(dout, argmax, x_shape, kernel, stride, padding, dilation)
    check_gradient(lambda: forward()[0], x, dout, dx)


@pytest.mark.parametrize("case", AVERAGE_POOLS)
def test_average_pool_gradient(case):
    x_shape, *how = case
    x = rng(17).standard_normal(x_shape)
    dout = rng(18).standard_normal(ref.avg_pool2d_forward(x, *how).shape)
    check_gradient(
        lambda: ref.avg_pool2d_forward(x, *how), x, dout, ref.avg_pool2d_backward(dout, x_shape, *how)
    )


@pytest.mark.parametrize("output_size", [1, (3, 4), (7, 2)])
def test_adaptive_average_pool_gradient(output_size):
    x = rng(19).standard_normal((2, 5, 4, 2))
    dout = rng(20).standard_normal(ref.adaptive_avg_pool2d_forward(x, output_size).shape)
    dx = ref.adaptive_avg_pool2d_backward(dout, x.shape)
    check_gradient(lambda: ref.adaptive_avg_pool2d_forward(x, output_size), x, dout, dx)


def test_global_average_pool_gradient():
    x, dout = rng(21).standard_normal((2, 3, 4, 2)), rng(22).standard_normal((2, 2))
    dx = ref.global_avg_pool2d_backward(dout, x.shape)
    check_gradient(lambda: ref.global_avg_pool2d_forward(x), x, dout, dx)


def test_linear_gradients():
    x, weight, bias, dout = (
        rng(23, i).standard_normal(s) for i, s in enumerate([(4, 5), (5, 3), (3,), (4, 3)])
    )

    def forward():
        return ref.linear_forward(x, weight, bias)

    check_gradient(forward, x, dout, ref.linear_backward_input(dout, weight))
    check_gradient(forward, weight, dout, ref.linear_backward_weight(dout, x))
    check_gradient(forward, bias, dout, ref.conv2d_backward_bias(dout))


def test_relu_and_leaky_relu_gradients():
    x, dout = without_ties((3, 4, 2)), rng(24).standard_normal((3, 4, 2))
    dx = ref.relu_backward(dout, ref.relu_forward(x))
    check_gradient(lambda: ref.relu_forward(x), x, dout, dx)
    dx = ref.leaky_relu_backward(dout, x, 0.2)
    check_gradient(lambda: ref.leaky_relu_forward(x, 0.2), x, dout, dx)


@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu_gradients(slopes):
    x, dout = without_ties((2, 4, 3)), rng(25).standard_normal((2, 4, 3))
    weight = rng(26).standard_normal(slopes)
    dx, dweight = ref.prelu_backward(dout, x, weight)
    check_gradient(lambda: ref.prelu_forward(x, weight), x, dout, dx)
    check_gradient(lambda: ref.prelu_forward(x, weight), weight, dout, dweight)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 3)])
def test_batch_norm_gradients(shape, training):
    x, dout = rng(27).standard_normal(shape) * 3 + 1, rng(28).standard_normal(shape)
    weight, bias, running_mean = (rng(29, i).standard_normal(3) for i in range(3))
    running_var = np.array([0.5, 1.0, 2.0])

    def forward():
        statistics = (None, None) if training else (running_mean, running_var)
        return ref.batch_norm_forward(x, weight, bias, *statistics, training)

    _, mean, inv_std = forward()
    dx, dweight, dbias = ref.batch_norm_backward(dout, x, weight, mean, inv_std, training)
    check_gradient(lambda: forward()[0], x, dout, dx)
    check_gradient(lambda: forward()[0], weight, dout, dweight)
    check_gradient(lambda: forward()[0], bias, dout, dbias)


def test_dropout_gradient():
    x, dout = rng(30).standard_normal((4, 5)), rng(31).standard_normal((4, 5))
    check_gradient(lambda: ref.dropout_forward(x, 0.4, 9), x, dout, ref.dropout_backward(dout, 0.4, 9))


def test_softmax_gradients():
    x, dout = rng(32).standard_normal((2, 3, 4)), rng(33).standard_normal((2, 3, 4))
    check_gradient(lambda: ref.softmax(x), x, dout, ref.softmax_backward(dout, ref.softmax(x)))
    check_gradient(lambda: ref.log_softmax(x), x, dout, ref.log_softmax_backward(dout, ref.log_softmax(x)))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("weight", [None, np.array([0.5, 2.0, 1.0, 0.0])])
def test_cross_entropy_gradients(weight, label_smoothing):
    x, dlosses = rng(34).standard_normal((5, 4)), rng(35).standard_normal(5)
    target = np.array([0, 3, -100, 1, 2])
    how = {"weight": weight, "label_smoothing": label_smoothing}
    dx = ref.softmax_cross_entropy_backward(dlosses, x, target, **how)
    check_gradient(lambda: ref.softmax_cross_entropy(x, target, **how)[0], x, dlosses, dx)
    target = rng(36).dirichlet(np.ones(4), 5)
    dx = ref.soft_cross_entropy_backward(dlosses, x, target, **how)
    check_gradient(lambda: ref.soft_cross_entropy(x, target, **how), x, dlosses, dx)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weight", [None, np.array([0.5, 2.0, 1.0, 0.25])])
def test_one_hot_targets_give_the_loss_of_labels(weight, label_smoothing):
    x, target = rng(37).standard_normal((6, 4)), np.array([0, 1, 2, 3, 3, 0])
    losses, _ = ref.softmax_cross_entropy(x, target, weight, label_smoothing=label_smoothing)
    soft = ref.soft_cross_entropy(x, np.eye(4)[target], weight, label_smoothing)
    np.testing.assert_allclose(losses, soft, rtol=1e-12)
