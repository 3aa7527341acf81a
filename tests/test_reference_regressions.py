"""One test for each kernel bug that the source documents tell of. The reference must not have them."""

import numpy as np
import pytest

from fastcnn.kernels import reference as ref


def images(*shape):
    """Images of distinct values in random order."""
    return np.random.default_rng(11).permutation(np.arange(1.0, np.prod(shape) + 1)).reshape(shape)


def test_columns_are_in_the_order_that_the_output_is_reshaped_in():
    """The emotion diary wrote its rows in the order (i, j, n) and read them as (n, i, j)."""
    x, weight = images(3, 4, 5, 2), images(2, 2, 2, 3)
    y = (ref.im2col(x, 2) @ weight.reshape(-1, 3)).reshape(3, 3, 4, 3)
    for n, i, j in np.ndindex(3, 3, 4):
        window = x[n, i : i + 2, j : j + 2]
        expected = [(window * weight[..., f]).sum() for f in range(3)]
        np.testing.assert_array_equal(y[n, i, j], expected)
    np.testing.assert_array_equal(y, ref.conv2d_forward(x, weight))


@pytest.mark.parametrize("stride", [2, 3, (1, 4)])
def test_windows_are_a_stride_apart(stride):
    """The emotion diary's max-pool took the window at w + stride for the one at w * stride."""
    x = images(2, 7, 9, 2)
    stride_h, stride_w = (stride, stride) if isinstance(stride, int) else stride
    y, argmax = ref.max_pool2d_forward(x, 2, stride)
    average = ref.avg_pool2d_forward(x, 2, stride)
    for i, j in np.ndindex(*y.shape[1:3]):
        window = x[:, i * stride_h : i * stride_h + 2, j * stride_w : j * stride_w + 2]
        np.testing.assert_array_equal(y[:, i, j], window.max(axis=(1, 2)))
        np.testing.assert_array_equal(argmax[:, i, j], window.reshape(2, 4, 2).argmax(axis=1))
        np.testing.assert_array_equal(average[:, i, j], window.mean(axis=(1, 2)))


def test_argmax_has_the_shape_of_the_output():
    """The emotion diary's cache of maxima had another shape."""
    y, argmax = ref.max_pool2d_forward(images(2, 7, 9, 3), (3, 2), (2, 3), (1, 1))
    assert argmax.shape == y.shape == (2, 4, 4, 3)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_gradient_goes_back_to_the_maximum_at_any_stride(stride):
    """The MNIST cookbook marked the maximum at (i + a, j + b) instead of (i * stride + a, j * stride + b)."""
    x = images(1, 6, 6, 1)
    y, argmax = ref.max_pool2d_forward(x, 2, stride)
    dx = ref.max_pool2d_backward(np.ones(y.shape), argmax, x.shape, 2, stride)
    expected = np.zeros(x.shape)
    for value in y.ravel():
        expected[x == value] += 1
    np.testing.assert_array_equal(dx, expected)


def test_convolution_backward_honours_stride_and_padding():
    """The MNIST cookbook's backward passes ignored both."""
    x, weight = images(1, 5, 5, 1), images(3, 3, 1, 1)
    dout = images(1, 3, 3, 1)
    padded_dx, dweight = np.zeros((7, 7)), np.zeros((3, 3))
    padded = np.pad(x[0, :, :, 0], 1)
    for i, j in np.ndindex(3, 3):
        window = np.s_[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        padded_dx[window] += dout[0, i, j, 0] * weight[..., 0, 0]
        dweight += dout[0, i, j, 0] * padded[window]
    dx = ref.conv2d_backward_input(dout, weight, x.shape, stride=2, padding=1)
    np.testing.assert_array_equal(dx[0, :, :, 0], padded_dx[1:-1, 1:-1])
    result = ref.conv2d_backward_weight(dout, x, 3, stride=2, padding=1)
    np.testing.assert_array_equal(result[..., 0, 0], dweight)


def test_pooling_backward_honours_padding():
    """The MNIST cookbook's pooling gave back the gradient of the padded image."""
    x = images(1, 3, 3, 1)
    y, argmax = ref.max_pool2d_forward(x, 2, 2, 1)
    dx = ref.max_pool2d_backward(np.ones(y.shape), argmax, x.shape, 2, 2, 1)
    np.testing.assert_array_equal(dx, np.isin(x, y))
    dx = ref.avg_pool2d_backward(np.ones(y.shape), x.shape, 2, 2, 1)
    np.testing.assert_array_equal(dx, np.full(x.shape, 0.25))


def test_batch_norm_backward_needs_nothing_but_its_arguments():
    """The MNIST cookbook's backward read an input that forward had never stored."""
    x = images(4, 3)
    _, mean, inv_std = ref.batch_norm_forward(x, None, None, None, None, True, eps=0.0)
    other = images(5, 3) * 7
    ref.batch_norm_forward(other, None, None, None, None, True)
    dx, dweight, _ = ref.batch_norm_backward(x, x, None, mean, inv_std, True)
    # This dout is a mean plus a multiple of x_hat, and no change of x can move y along either.
    np.testing.assert_allclose(dx, np.zeros(x.shape), atol=1e-14)
    np.testing.assert_allclose(dweight, 4 * x.var(axis=0) * inv_std)


def test_softmax_runs_over_the_classes():
    """The MNIST cookbook's ran over the batch: these are its logits, turned, and the numbers it printed."""
    logits = np.array([[1.0, 2.0, 3.0, 6.0], [0.5, 2.5, 2.0, 5.5], [0.3, 2.7, 4.5, 6.1]])
    printed = [
        [0.47548496, 0.21447841, 0.17095278, 0.36877214],
        [0.2883962, 0.35361511, 0.06289001, 0.22367161],
        [0.23611884, 0.43190648, 0.76615721, 0.40755625],
    ]
    np.testing.assert_allclose(ref.softmax(logits.T), np.transpose(printed), atol=1e-8)
    np.testing.assert_allclose(ref.softmax(logits).sum(axis=1), [1, 1, 1])
    np.testing.assert_allclose(np.exp(ref.log_softmax(logits)).sum(axis=1), [1, 1, 1])


def test_nothing_mixes_the_images_of_a_batch():
    """Chapter 9's convolution and pooling reduced over the batch."""
    x, weight = images(3, 5, 6, 2), images(3, 3, 2, 4)
    dout = images(3, 3, 4, 4)
    functions = [
        lambda n: ref.conv2d_forward(x[n], weight),
        lambda n: ref.conv2d_backward_input(dout[n], weight, x[n].shape),
        lambda n: ref.max_pool2d_forward(x[n], 2)[0],
        lambda n: ref.max_pool2d_forward(x[n], 2)[1],
        lambda n: ref.avg_pool2d_forward(x[n], 2),
        lambda n: ref.adaptive_avg_pool2d_forward(x[n], 2),
        lambda n: ref.global_avg_pool2d_forward(x[n]),
    ]
    for function in functions:
        whole = function(slice(None))
        assert len(whole) == 3
        alone = [function(slice(n, n + 1)) for n in range(3)]
        np.testing.assert_array_equal(whole, np.concatenate(alone))


@pytest.mark.parametrize("stride", [1, 2])
def test_col2im_adds_overlaps(stride):
    """A CuPy network that the documents point at overwrote them."""
    x_shape, reads = (1, 5, 5, 1), np.zeros((5, 5))
    cols = ref.im2col(np.zeros(x_shape), 3, stride)
    for i in range(0, 3, stride):
        for j in range(0, 3, stride):
            reads[i : i + 3, j : j + 3] += 1
    assert reads.max() > 1
    dx = ref.col2im(np.ones_like(cols), x_shape, 3, stride)
    np.testing.assert_array_equal(dx[0, :, :, 0], reads)


def test_nesterov_looks_ahead():
    """The MNIST cookbook's update stepped back and counted the momentum twice.

    The textbook takes the gradient where the velocity is about to lead: v = m * v - lr * g(theta + m * v),
    theta = theta + v. PyTorch's form keeps theta + m * v instead of theta, and must walk through the same
    points.
    """
    curvature, lr, m = np.array([1.0, 3.0, 0.1]), 0.1, 0.9
    theta, v = np.array([1.0, -2.0, 5.0]), np.zeros(3)
    param, velocity = theta.copy(), np.zeros(3)
    for step in range(10):
        np.testing.assert_allclose(param, theta + m * v, rtol=1e-12)
        v = m * v - lr * curvature * (theta + m * v)
        theta = theta + v
        ref.sgd_update(param, curvature * param, velocity, lr, m, nesterov=True, first=step == 0)
    np.testing.assert_allclose(-lr * velocity, v, rtol=1e-12)
