"""The gradient checks pass for right layers and, what matters more, fail for wrong ones."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

import fastcnn
from fastcnn import diagnostics, nn
from fastcnn.diagnostics import CheckReport, CheckRow
from fastcnn.kernels import reference


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def kinds(report):
    return [row.kind for row in report]


def failed(report):
    return {row.kind for row in report.failures}


LAYERS = {
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 6, 5)),
    "conv-stride": (nn.Conv2d(2, 4, 3, stride=2, padding=(1, 0)), (2, 2, 7, 6)),
    "conv-dilation": (nn.Conv2d(1, 2, 2, dilation=2, bias=False), (2, 1, 6, 6)),
    "conv-groups": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5)),
    "conv-depthwise": (nn.Conv2d(3, 3, (3, 2), groups=3, padding="same"), (2, 3, 5, 5)),
    "conv-asymmetric": (nn.Conv2d(1, 2, 3, padding=((0, 2), (1, 0))), (2, 1, 5, 5)),
    "conv-reflect": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (2, 1, 5, 5)),
    "max-pool": (nn.MaxPool2d(3, stride=2, padding=1), (2, 3, 7, 6)),
    "avg-pool": (nn.AvgPool2d(2), (2, 3, 6, 6)),
    "adaptive-pool": (nn.AdaptiveAvgPool2d(2), (2, 3, 5, 5)),
    "relu": (nn.ReLU(), (3, 2, 4, 4)),
    "leaky": (nn.LeakyReLU(0.1), (3, 7)),
    "prelu": (nn.PReLU(3), (2, 3, 4, 4)),
    "batchnorm2d": (nn.BatchNorm2d(3), (4, 3, 4, 4)),
    "batchnorm1d": (nn.BatchNorm1d(5), (8, 5)),
    "dropout": (nn.Dropout(0.4), (6, 9)),
    "softmax": (nn.Softmax(-1), (4, 6)),
    "linear": (nn.Linear(7, 4), (5, 7)),
    "flatten": (nn.Flatten(), (2, 3, 2, 2)),
    "residual": (
        nn.Residual(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)), None, nn.ReLU()),
        (3, 2, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_pass(name, rng):
    layer, shape = LAYERS[name]
    report = diagnostics.check_layer(layer, rng.standard_normal(shape), samples=8)
    assert report.ok, f"\n{report}"
    assert len([row for row in report if row.kind == "PAR"]) == len(layer.parameters())
    assert ("ROW" in kinds(report)) == (name.startswith("conv") and name != "conv-reflect")
    assert all(row.tested > 0 for row in report)


def small_model():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Dropout(0.3), nn.Flatten()),
        nn.Linear(27, 4),
    )


def test_model_is_checked_layer_by_layer(rng):
    rows = []
    report = diagnostics.check_model(
        small_model(), rng.standard_normal((4, 1, 6, 6)), np.arange(4), samples=5, on_row=rows.append
    )
    assert report.ok, f"\n{report}"
    assert rows == report.rows
    assert [row.name for row in report if row.kind == "IN"] == [
        *("Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout", "Flatten", "Linear", "CrossEntropyLoss")
    ]
    assert [row.layer for row in report if row.kind == "IN"] == list(range(8))
    assert [row.parameter for row in report if row.layer is None] == ["input", "parameters"]


def test_report_looks_like_the_diarys():
    rows = [
        CheckRow("IN", "Conv2d", ok=True, max_err=1.642e-3, tested=20),
        CheckRow("PAR", "Conv2d", ok=True, max_err=3.458e-6, parameter="weight", index=0),
        CheckRow("IN", "MaxPool2d", ok=False, max_err=1.341, layer=2),
    ]
    report = CheckReport(rows)
    assert str(report).splitlines() == [
        "[IN ] Layer 00 Conv2d                ok=True  max_err=1.642e-03",
        "[PAR] Layer 00 Conv2d                param[0]   ok=True  max_err=3.458e-06",
        "[IN ] Layer 02 MaxPool2d             ok=False  max_err=1.341e+00",
    ]
    assert not report.ok
    assert report.failures == rows[2:]
    assert report.as_dict()["rows"][1]["parameter"] == "weight"
    assert not CheckReport().ok, "nothing checked is nothing proved"


def test_nothing_is_changed(rng):
    model = small_model().eval()
    x = rng.standard_normal((4, 1, 6, 6))
    before, generator = model.state_dict(), fastcnn.default_generator().bit_generator.state
    diagnostics.check_model(model, x, np.arange(4), samples=2)
    diagnostics.check_layer(model[1], rng.standard_normal((4, 3, 5, 5)), samples=2)
    layer = nn.BatchNorm2d(2).double()
    diagnostics.check_input_gradient(layer, rng.standard_normal((4, 2, 3, 3)))
    assert layer.running_mean.tolist() == [0, 0]
    assert not any(p.grad.any() for p in layer.parameters())
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype
        assert np.array_equal(value, before[key])
    assert not model.training
    assert fastcnn.default_generator().bit_generator.state == generator


def test_same_seed_same_report(rng):
    x = rng.standard_normal((3, 1, 6, 6))
    model = small_model()
    first, second, other = (diagnostics.check_model(model, x, samples=3, rng=seed) for seed in (1, 1, 2))
    assert str(first) == str(second)
    assert str(first) != str(other)


def test_kinks_are_skipped_and_counted():
    x = np.linspace(-1, 1, 40).reshape(4, 10)
    x[:, ::2] = 0
    row = diagnostics.check_input_gradient(nn.ReLU(), x, samples=20)
    assert row.ok
    assert (row.tested, row.skipped) == (20, 20)
    assert re.search(r"20 tested, 20 skipped at kinks", str(row))


def test_a_layer_with_kinks_only_is_not_proved():
    row = diagnostics.check_input_gradient(nn.ReLU(), np.zeros((3, 4)))
    assert not row.ok
    assert row.tested == 0


def test_near_a_kink_the_step_is_shortened():
    x = np.array([[1e-6, -1e-6, 1e-6], [1.0, -1.0, 1.0]])
    row = diagnostics.check_input_gradient(nn.ReLU(), x, step=3e-6)
    assert row.ok
    assert row.skipped == 0


def test_direction_leaves_ties(rng):
    x = np.maximum(rng.standard_normal((2, 3, 8, 8)) - 1, 0)
    row = diagnostics.check_vector_jacobian(nn.MaxPool2d(2), x)
    assert row.ok
    assert row.skipped > 0


# Planted bugs, those of the diaries and notebooks among them.


def rows_i_j_n(x, kernel_size, stride=1, padding=0, dilation=1):
    """The diary's first im2col: for each pixel all images, so that rows come as (i, j, n)."""
    cols = reference.im2col(x, kernel_size, stride, padding, dilation)
    return cols.reshape(len(x), -1, cols.shape[1]).transpose(1, 0, 2).reshape(cols.shape)


class DiaryConv(nn.Conv2d):
    """A convolution that mixes the images of a batch, in forward and backward alike."""

    def forward(self, input):
        self.x = input.transpose(0, 2, 3, 1)
        cols = rows_i_j_n(self.x, self.kernel_size)
        weight = self.weight.data.transpose(2, 3, 1, 0).reshape(-1, self.out_channels)
        n, h, w, _ = self.x.shape
        side = self.kernel_size[0] - 1
        y = (cols @ weight + self.bias.data).reshape(n, h - side, w - side, -1)
        return y.transpose(0, 3, 1, 2)

    def backward(self, dout, input_grad=True):
        rows = dout.transpose(0, 2, 3, 1).reshape(-1, self.out_channels)
        weight = self.weight.data.transpose(2, 3, 1, 0).reshape(-1, self.out_channels)
        cols = rows_i_j_n(self.x, self.kernel_size)
        self.bias.grad[...] += rows.sum(0)
        shown = (cols.T @ rows).reshape(*self.kernel_size, self.in_channels, self.out_channels)
        self.weight.grad[...] += shown.transpose(3, 2, 0, 1)
        dcols = rows @ weight.T
        n = len(self.x)
        dcols = dcols.reshape(-1, n, dcols.shape[1]).transpose(1, 0, 2).reshape(dcols.shape)
        return reference.col2im(dcols, self.x.shape, self.kernel_size).transpose(0, 3, 1, 2)


def test_wrong_row_order_passes_every_gradient_test_but_not_the_row_order(rng):
    report = diagnostics.check_layer(DiaryConv(1, 2, 3), rng.standard_normal((3, 1, 5, 5)), samples=5)
    assert failed(report) == {"ROW", "DX"}


class WrongPool(nn.Module):
    """Max-pool by 2 whose forward starts its windows at `w + stride` for `w * stride`."""

    def windows(self, x):
        h, w = x.shape[2:]
        return [(i, j, 2 * i, min(j + 2, w - 2)) for i in range(h // 2) for j in range(w // 2)]

    def forward(self, input):
        self.x = input
        n, c, h, w = input.shape
        y = np.empty((n, c, h // 2, w // 2))
        for i, j, top, left in self.windows(input):
            y[:, :, i, j] = input[:, :, top : top + 2, left : left + 2].max((2, 3))
        return y

    def backward(self, dout, input_grad=True):
        dx = np.zeros_like(self.x)
        for i in range(dout.shape[2]):
            for j in range(dout.shape[3]):
                window = self.x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                hit = window == window.max((2, 3), keepdims=True)
                dx[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += hit * dout[:, :, i : i + 1, j : j + 1]
        return dx


def test_sum_for_product_in_a_pool_fails(rng):
    report = diagnostics.check_layer(WrongPool(), rng.standard_normal((2, 2, 8, 8)))
    assert failed(report) == {"IN", "VJP"}


class ForgetsStride(nn.Conv2d):
    """A backward pass that spreads dout as if the stride were 1."""

    def backward(self, dout, input_grad=True):
        dx = super().backward(dout)
        wrong = reference.conv2d_backward_input(
            np.ascontiguousarray(dout.transpose(0, 2, 3, 1)),
            np.ascontiguousarray(self.weight.data.transpose(2, 3, 1, 0)),
            (len(dx), dout.shape[2] + 2, dout.shape[3] + 2, self.in_channels),
        ).transpose(0, 3, 1, 2)
        full = np.zeros_like(dx)
        full[:, :, : wrong.shape[2], : wrong.shape[3]] = wrong
        return full


def test_backward_without_the_stride_fails(rng):
    layer = ForgetsStride(2, 3, 3, stride=2)
    report = diagnostics.check_layer(layer, rng.standard_normal((2, 2, 9, 9)))
    assert failed(report) == {"IN", "VJP", "DX"}


class WrongShape(nn.ReLU):
    def backward(self, dout, input_grad=True):
        return super().backward(dout)[:, :-1]


class Silent(nn.ReLU):
    def backward(self, dout, input_grad=True):
        return np.full_like(super().backward(dout), np.nan)


@pytest.mark.parametrize("layer", [WrongShape(), Silent()])
def test_wrong_shape_and_nan_fail(layer, rng):
    assert failed(diagnostics.check_layer(layer, rng.standard_normal((4, 5)))) == {"IN", "VJP"}


class WrongParameters(nn.Linear):
    def backward(self, dout, input_grad=True):
        dx = super().backward(dout)
        self.bias.grad[...] = dout.mean(0)
        return dx


def test_parameter_gradient_fails_alone(rng):
    report = diagnostics.check_layer(WrongParameters(6, 3), rng.standard_normal((5, 6)))
    assert [(row.kind, row.parameter) for row in report.failures] == [("PAR", "bias")]
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), WrongParameters(6, 3))
    failures = diagnostics.check_model(model, rng.standard_normal((5, 4))).failures
    assert [(row.layer, row.parameter) for row in failures] == [(2, "bias"), (None, "parameters")]


class OneEntryWrong(nn.Flatten):
    def backward(self, dout, input_grad=True):
        dx = np.array(super().backward(dout))
        dx[-1, -1, -1, -1] *= 1.5
        return dx


def test_direction_sees_one_wrong_entry(rng):
    x = rng.standard_normal((2, 2, 20, 20))
    assert diagnostics.check_input_gradient(OneEntryWrong(), x, samples=5).ok
    assert not diagnostics.check_vector_jacobian(OneEntryWrong(), x).ok


def overwriting_col2im(cols, x_shape, kernel_size, stride=1, padding=0, dilation=1):
    """A col2im that writes where windows overlap instead of adding."""
    counts = reference.col2im(np.ones_like(cols), x_shape, kernel_size, stride, padding, dilation)
    return reference.col2im(cols, x_shape, kernel_size, stride, padding, dilation) / np.maximum(counts, 1)


def test_col2im_that_does_not_add_is_no_adjoint(rng):
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    x = rng.standard_normal((2, 2, 5, 5))
    wrong = SimpleNamespace(im2col=reference.im2col, col2im=overwriting_col2im)
    assert diagnostics.check_adjoint(layer, x, kernels=reference).ok
    assert diagnostics.check_dx_path(layer, x, kernels=reference).ok
    assert not diagnostics.check_adjoint(layer, x, kernels=wrong).ok
    assert not diagnostics.check_dx_path(layer, x, kernels=wrong).ok


def test_im2col_with_wrong_rows_fails(rng):
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    wrong = SimpleNamespace(im2col=rows_i_j_n, col2im=reference.col2im)
    x = rng.standard_normal((2, 2, 5, 5))
    assert not diagnostics.check_row_order(layer, x, kernels=wrong).ok
    assert not diagnostics.check_adjoint(layer, x, kernels=wrong).ok


def test_bad_arguments():
    with pytest.raises(ValueError, match="parameter: 'slope' is not one of"):
        diagnostics.check_parameter_gradient(nn.Linear(2, 2), np.ones((2, 2)), "slope")
    with pytest.raises(ValueError, match="wrt: 'output'"):
        diagnostics.check_vector_jacobian(nn.ReLU(), np.ones((2, 2)), wrt="output")
    with pytest.raises(ValueError, match=r"x: shape \(0, 1, 6, 6\)"):
        diagnostics.check_model(small_model(), np.ones((0, 1, 6, 6)))
