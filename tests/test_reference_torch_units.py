"""The reference's other kernels against PyTorch, forward and gradients."""

import numpy as np
import pytest

from fastcnn.kernels import reference as ref

torch = None


@pytest.fixture(autouse=True)
def _torch():
    global torch
    torch = pytest.importorskip("torch")


def leaf(x):
    return torch.from_numpy(x.copy()).requires_grad_()


def check(actual, expected):
    single = actual.dtype == np.float32
    expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(
        actual, expected, rtol=2e-5 if single else 1e-10, atol=1e-6 if single else 1e-12
    )


@pytest.fixture(params=[np.float32, np.float64])
def normal(request):
    """A function that draws standard normal arrays of the dtype under test."""
    rng = np.random.default_rng(20)
    return lambda *shape: rng.standard_normal(shape).astype(request.param)


def test_linear(normal):
    x, weight, bias, dout = normal(5, 7), normal(7, 3), normal(3), normal(5, 3)
    tx, tw, tb = leaf(x), leaf(weight.T), leaf(bias)
    ty = torch.nn.functional.linear(tx, tw, tb)
    ty.backward(torch.from_numpy(dout))
    check(ref.linear_forward(x, weight, bias), ty)
    check(ref.linear_backward_input(dout, weight), tx.grad)
    check(ref.linear_backward_weight(dout, x), tw.grad.T)
    check(ref.conv2d_backward_bias(dout), tb.grad)


def test_relu_and_leaky_relu(normal):
    x, dout = normal(4, 5), normal(4, 5)
    x[0] = [0, -0.0, np.nan, np.inf, -np.inf]
    tx = leaf(x)
    ty = torch.relu(tx)
    ty.backward(torch.from_numpy(dout))
    check(ref.relu_forward(x), ty)
    number = ~np.isnan(x)
    check(ref.relu_backward(dout, ref.relu_forward(x))[number], tx.grad.numpy()[number])
    tx = leaf(x)
    ty = torch.nn.functional.leaky_relu(tx, 0.2)
    ty.backward(torch.from_numpy(dout))
    check(ref.leaky_relu_forward(x, 0.2), ty)
    check(ref.leaky_relu_backward(dout, x, 0.2), tx.grad)


@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu(normal, slopes):
    x, weight, dout = normal(4, 3, 5, 2), normal(slopes), normal(4, 3, 5, 2)  # (N, C, H, W)
    tx, tw = leaf(x), leaf(weight)
    ty = torch.nn.functional.prelu(tx, tw)
    ty.backward(torch.from_numpy(dout))
    x, dout = np.moveaxis(x, 1, -1), np.moveaxis(dout, 1, -1)
    check(ref.prelu_forward(x, weight), ty.movedim(1, -1))
    dx, dweight = ref.prelu_backward(dout, x, weight)
    check(dx, tx.grad.movedim(1, -1))
    check(dweight, tw.grad)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4, 5), (1, 3, 2, 1)])
def test_batch_norm(normal, shape, affine):
    x, dout = normal(*shape) * 2 + 1, normal(*shape)
    weight, bias = (normal(3), normal(3)) if affine else (None, None)
    running_mean, running_var = normal(3), normal(3) ** 2
    t_mean, t_var = torch.from_numpy(running_mean.copy()), torch.from_numpy(running_var.copy())
    for training in (True, False, True):
        tx = leaf(x)
        tw, tb = (leaf(weight), leaf(bias)) if affine else (None, None)
        ty = torch.nn.functional.batch_norm(tx, t_mean, t_var, tw, tb, training, 0.3, 1e-4)
        ty.backward(torch.from_numpy(dout))
        x_last, dout_last = np.moveaxis(x, 1, -1), np.moveaxis(dout, 1, -1)
        y, mean, inv_std = ref.batch_norm_forward(
            x_last, weight, bias, running_mean, running_var, training, 0.3, 1e-4
        )
        check(y, ty.movedim(1, -1))
        check(running_mean, t_mean)
        check(running_var, t_var)
        dx, dweight, dbias = ref.batch_norm_backward(dout_last, x_last, weight, mean, inv_std, training)
        check(dx, tx.grad.movedim(1, -1))
        if affine:
            check(dweight, tw.grad)
            check(dbias, tb.grad)


def test_softmax(normal):
    x, dout = normal(3, 4, 5) * 4, normal(3, 4, 5)
    x[0, 0, :2] = -np.inf
    tx = leaf(x)
    ty = torch.softmax(tx, -1)
    ty.backward(torch.from_numpy(dout))
    check(ref.softmax(x), ty)
    check(ref.softmax_backward(dout, ref.softmax(x)), tx.grad)
    tx = leaf(x)
    ty = torch.log_softmax(tx, -1)
    ty.backward(torch.from_numpy(dout))
    check(ref.log_softmax(x), ty)
    check(ref.log_softmax_backward(dout, ref.log_softmax(x)), tx.grad)


@pytest.mark.parametrize("ignore_index", [-100, 2, -1])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_labels(normal, weighted, label_smoothing, ignore_index):
    x, dlosses = normal(7, 4) * 3, normal(7)
    weight = np.array([0.5, 2, 0, 1.5], x.dtype) if weighted else None
    target = np.array([0, 3, 2, 1, 2, ignore_index, 0])
    how = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    t_weight = None if weight is None else torch.from_numpy(weight)
    tx, tt = leaf(x), torch.from_numpy(target)
    t_losses = torch.nn.functional.cross_entropy(tx, tt, t_weight, reduction="none", **how)
    t_losses.backward(torch.from_numpy(dlosses))
    losses, weights = ref.softmax_cross_entropy(x, target, weight, **how)
    check(losses, t_losses)
    check(ref.softmax_cross_entropy_backward(dlosses, x, target, weight, **how), tx.grad)
    mean = torch.nn.functional.cross_entropy(tx, tt, t_weight, **how).item()
    np.testing.assert_allclose(losses.sum() / weights.sum(), mean, rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_with_probabilities(normal, weighted, label_smoothing):
    x, dlosses, target = normal(7, 4) * 3, normal(7), ref.softmax(normal(7, 4))
    target[0] = [0, 1, 0, 0]
    weight = np.array([0.5, 2, 0, 1.5], x.dtype) if weighted else None
    t_weight = None if weight is None else torch.from_numpy(weight)
    tx = leaf(x)
    t_losses = torch.nn.functional.cross_entropy(
        tx, torch.from_numpy(target), t_weight, reduction="none", label_smoothing=label_smoothing
    )
    t_losses.backward(torch.from_numpy(dlosses))
    how = {"weight": weight, "label_smoothing": label_smoothing}
    check(ref.soft_cross_entropy(x, target, **how), t_losses)
    check(ref.soft_cross_entropy_backward(dlosses, x, target, **how), tx.grad)


STEPS = 8


def walk(normal, make_optimizer, update):
    """Take the same steps with PyTorch and with `update(param, grad, step)`, comparing after each."""
    param = normal(9)
    peer = leaf(param)
    optimizer = make_optimizer([peer])
    for step in range(1, STEPS + 1):
        grad = normal(9)
        peer.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        update(param, grad, step)
        check(param, peer)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ],
)
def test_sgd(normal, how):
    velocity = np.full_like(normal(9), np.nan) if how.get("momentum") else None
    walk(
        normal,
        lambda params: torch.optim.SGD(params, lr=0.1, **how),
        lambda param, grad, step: ref.sgd_update(param, grad, velocity, 0.1, first=step == 1, **how),
    )


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8)])
def test_adam_and_adamw(normal, betas, weight_decay, decoupled):
    exp_avg, exp_avg_sq = np.zeros_like(normal(9)), np.zeros_like(normal(9))
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    walk(
        normal,
        lambda params: optimizer(params, lr=0.02, betas=betas, eps=1e-6, weight_decay=weight_decay),
        lambda param, grad, step: ref.adam_update(
            param, grad, exp_avg, exp_avg_sq, step, 0.02, *betas, 1e-6, weight_decay, decoupled
        ),
    )
