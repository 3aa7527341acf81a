"""The reference's image kernels against PyTorch, forward and gradients."""

import itertools

import numpy as np
import pytest

from fastcnn.kernels import reference as ref

torch = None


@pytest.fixture(autouse=True)
def _torch():
    global torch
    torch = pytest.importorskip("torch")


def to_torch(x, grad=True):
    """Images (N, H, W, C) as an (N, C, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).requires_grad_(grad)


def to_numpy(tensor):
    """An (N, C, H, W) tensor as images (N, H, W, C)."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def check(actual, expected, dtype=np.float64):
    rtol, atol = (1e-10, 1e-11) if dtype == np.float64 else (2e-5, 2e-5)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def both(reference, peer):
    """Results of the two calls, or None where both refuse; refusing alone is a failure."""
    try:
        expected = peer()
    except RuntimeError:
        with pytest.raises(ValueError, match=": "):
            reference()
        return None
    return reference(), expected


# (x_shape, kernel, filters, stride, padding, dilation, groups)
CONVOLUTIONS = [
    ((2, 8, 8, 3), (3, 3), 4, 1, 1, 1, 1),
    ((1, 7, 5, 1), (5, 3), 2, 2, (2, 0), 1, 1),
    ((3, 9, 10, 4), (3, 2), 6, (2, 3), (1, 2), (2, 1), 2),
    ((2, 6, 7, 6), (3, 3), 6, 1, 1, 1, 6),
    ((2, 6, 7, 3), (2, 3), 9, (1, 2), 0, (1, 2), 3),
    ((1, 1, 1, 5), (1, 1), 7, 1, 0, 1, 1),
    ((4, 5, 5, 2), (1, 1), 3, 2, 1, 1, 1),
    ((2, 3, 3, 2), (7, 7), 2, 3, 4, 1, 1),
    ((1, 12, 4, 2), (4, 4), 4, 5, (1, 1), (3, 1), 2),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, dtype):
    x_shape, kernel, filters, stride, padding, dilation, groups = case
    rng = np.random.default_rng(1)
    x = rng.standard_normal(x_shape).astype(dtype)
    weight = rng.standard_normal((*kernel, x_shape[3] // groups, filters)).astype(dtype)
    bias = rng.standard_normal(filters).astype(dtype)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    tx, tw = to_torch(x), torch.from_numpy(weight.transpose(3, 2, 0, 1).copy()).requires_grad_()
    tb = torch.from_numpy(bias).requires_grad_()
    ty = torch.nn.functional.conv2d(tx, tw, tb, **how)
    y = ref.conv2d_forward(x, weight, bias, **how)
    check(y, to_numpy(ty), dtype)
    dout = rng.standard_normal(y.shape).astype(dtype)
    ty.backward(to_torch(dout, False))
    check(ref.conv2d_backward_input(dout, weight, x.shape, **how), to_numpy(tx.grad), dtype)
    dweight = ref.conv2d_backward_weight(dout, x, kernel, **how)
    check(dweight, tw.grad.numpy().transpose(2, 3, 1, 0), dtype)
    check(ref.conv2d_backward_bias(dout), tb.grad.numpy(), dtype)


def test_convolution_with_asymmetric_padding():
    rng = np.random.default_rng(2)
    x, weight = rng.standard_normal((2, 5, 6, 2)), rng.standard_normal((3, 4, 2, 3))
    for top, bottom, left, right in itertools.product((0, 2), (1, 3), (0, 1), (0, 4)):
        tx, tw = to_torch(x), torch.from_numpy(weight.transpose(3, 2, 0, 1).copy()).requires_grad_()
        padded = torch.nn.functional.pad(tx, (left, right, top, bottom))
        ty = torch.nn.functional.conv2d(padded, tw, stride=2)
        how = {"stride": 2, "padding": ((top, bottom), (left, right))}
        y = ref.conv2d_forward(x, weight, **how)
        check(y, to_numpy(ty))
        dout = rng.standard_normal(y.shape)
        ty.backward(to_torch(dout, False))
        check(ref.conv2d_backward_input(dout, weight, x.shape, **how), to_numpy(tx.grad))
        dweight = ref.conv2d_backward_weight(dout, x, (3, 4), **how)
        check(dweight, tw.grad.numpy().transpose(2, 3, 1, 0))


def test_same_padding_of_pytorch():
    """PyTorch's 'same' (stride 1) puts the odd pixel at the end, as TensorFlow's does."""
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((1, 5, 6, 2)), rng.standard_normal((4, 3, 2, 3))
    tw = torch.from_numpy(weight.transpose(3, 2, 0, 1).copy())
    with pytest.warns(UserWarning, match="padding='same' with even kernel"):
        ty = torch.nn.functional.conv2d(to_torch(x, False), tw, padding="same")
    check(ref.conv2d_forward(x, weight, padding=((1, 2), (1, 1))), to_numpy(ty))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_columns(case):
    x_shape, kernel, _, stride, padding, dilation, _ = case
    x = np.random.default_rng(4).standard_normal(x_shape)
    how = {"stride": stride, "padding": padding, "dilation": dilation}
    tx = to_torch(x)
    unfolded = torch.nn.functional.unfold(tx, kernel, **how)  # (N, C * kH * kW, Ho * Wo)
    n, c, windows = x_shape[0], x_shape[3], unfolded.shape[2]

    def as_columns(array):
        return array.reshape(n, c, -1, windows).transpose(0, 3, 2, 1).reshape(n * windows, -1)

    cols = ref.im2col(x, kernel, **how)
    check(cols, as_columns(unfolded.detach().numpy()))
    dcols = np.random.default_rng(5).standard_normal(cols.shape)
    dunfolded = dcols.reshape(n, windows, -1, c).transpose(0, 3, 2, 1).reshape(unfolded.shape)
    unfolded.backward(torch.from_numpy(dunfolded.copy()))
    check(ref.col2im(dcols, x_shape, kernel, **how), to_numpy(tx.grad))


KERNELS = [1, 2, 3, (3, 2), (1, 4), 5]
STRIDES = [None, 1, 2, 3, (3, 1), (2, 7)]
PADDINGS = [0, 1, (0, 1), (1, 2)]


def pooling_cases(count, *options):
    """`count` of the combinations of the options with image sizes, drawn at random."""
    table = list(itertools.product([(7, 8), (5, 5), (3, 6), (1, 4)], KERNELS, STRIDES, PADDINGS, *options))
    return [table[i] for i in np.random.default_rng(6).permutation(len(table))[:count]]


def tied_images(size):
    """Small integers, so that windows have ties, with a few NaN and infinities among them."""
    x = np.random.default_rng(7).integers(-2, 3, (2, *size, 3)).astype(np.float64)
    flat = x[0].reshape(-1)
    flat[::7], flat[3::13], flat[5::11] = np.nan, np.inf, -np.inf
    x[1, :, :, 0] = -np.inf
    return x


def index_in_image(argmax, size, kernel, stride, padding, dilation):
    """PyTorch's index (row * W + column of the image) from the offset in the window."""
    (kw, sh, sw), (ph, pw), (dh, dw) = (kernel[1], *stride), padding, dilation
    i, j = np.ogrid[: argmax.shape[1], : argmax.shape[2]]
    offset = argmax.astype(int)
    row = i[None, :, :, None] * sh - ph + offset // kw * dh
    column = j[None, :, :, None] * sw - pw + offset % kw * dw
    return row * size[1] + column


def pair(value):
    return (value, value) if isinstance(value, int) else value


@pytest.mark.parametrize("special", [False, True], ids=["numbers", "ties and NaN"])
def test_max_pool(special):
    compared = 0
    for size, kernel, stride, padding, dilation, ceil_mode in pooling_cases(
        400, [1, 2, (1, 3)], [False, True]
    ):
        x = tied_images(size) if special else np.random.default_rng(8).standard_normal((2, *size, 3))
        tx = to_torch(x)
        how = (kernel, stride, padding, dilation, ceil_mode)
        results = both(
            lambda x=x, how=how: ref.max_pool2d_forward(x, *how),
            lambda tx=tx, how=how: torch.nn.functional.max_pool2d(tx, *how, return_indices=True),
        )
        if results is None:
            continue
        (y, argmax), (ty, indices) = results
        np.testing.assert_array_equal(y, to_numpy(ty), err_msg=str(how))
        geometry = pair(kernel), pair(stride or kernel), pair(padding), pair(dilation)
        found = index_in_image(argmax, size, *geometry)
        expected = to_numpy(indices)
        if expected.max() >= size[0] * size[1]:  # a dilated window that sees padding only
            continue
        np.testing.assert_array_equal(found, expected, err_msg=str((size, how)))
        dout = np.random.default_rng(9).standard_normal(y.shape)
        ty.backward(to_torch(dout, False))
        dx = ref.max_pool2d_backward(dout, argmax, x.shape, kernel, stride, padding, dilation)
        check(dx, to_numpy(tx.grad))
        compared += 1
    assert compared > 100


def test_average_pool():
    compared = 0
    for size, kernel, stride, padding, *how in pooling_cases(
        500, [False, True], [False, True], [None, 1, 3, -2]
    ):
        x = np.random.default_rng(10).standard_normal((2, *size, 3))
        tx = to_torch(x)
        arguments = (kernel, stride, padding, *how)
        results = both(
            lambda x=x, how=arguments: ref.avg_pool2d_forward(x, *how),
            lambda tx=tx, how=arguments: torch.nn.functional.avg_pool2d(tx, *how),
        )
        if results is None:
            continue
        y, ty = results
        check(y, to_numpy(ty))
        dout = np.random.default_rng(11).standard_normal(y.shape)
        ty.backward(to_torch(dout, False))
        check(ref.avg_pool2d_backward(dout, x.shape, *arguments), to_numpy(tx.grad))
        compared += 1
    assert compared > 200


@pytest.mark.parametrize("output_size", [1, 2, 3, (5, 1), (4, 7), (10, 13), (7, 9)])
@pytest.mark.parametrize("size", [(7, 9), (1, 5), (6, 6)])
def test_adaptive_and_global_average_pool(size, output_size):
    rng = np.random.default_rng(12)
    x = rng.standard_normal((2, *size, 3))
    tx = to_torch(x)
    ty = torch.nn.functional.adaptive_avg_pool2d(tx, output_size)
    y = ref.adaptive_avg_pool2d_forward(x, output_size)
    check(y, to_numpy(ty))
    dout = rng.standard_normal(y.shape)
    ty.backward(to_torch(dout, False))
    check(ref.adaptive_avg_pool2d_backward(dout, x.shape), to_numpy(tx.grad))
    if output_size == 1:
        check(ref.global_avg_pool2d_forward(x), to_numpy(ty)[:, 0, 0])
        check(ref.global_avg_pool2d_backward(dout[:, 0, 0], x.shape), to_numpy(tx.grad))
