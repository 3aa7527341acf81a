"""Layers: memory layout, shapes, modes, and errors that name the argument, its value and the rule."""

import numpy as np
import pytest

import fastcnn
from fastcnn import nn


def draw(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


IMAGE_LAYERS = {
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "Conv2d circular": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 2, padding=1),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d((3, None)),
    "global": lambda: nn.AdaptiveAvgPool2d(1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "PReLU": lambda: nn.PReLU(4),
    "Softmax": lambda: nn.Softmax(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "Dropout": lambda: nn.Dropout(0.5),
    "Residual": lambda: nn.Residual(nn.ReLU()),
    "Sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
}
UNBATCHED = ["Conv2d", "Conv2d circular", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "global"]


@pytest.fixture(params=IMAGE_LAYERS)
def name(request):
    return request.param


def run(name, x, dout=None, seed=1):
    """Output, input gradient and parameter gradients of a fresh layer."""
    fastcnn.manual_seed(seed)
    layer = IMAGE_LAYERS[name]()
    y = layer(x)
    dout = draw(*y.shape, seed=5) if dout is None else dout
    return [y, layer.backward(dout), *(parameter.grad for parameter in layer.parameters())]


class TestEveryImageLayer:
    def test_shows_nchw_and_stores_channels_last(self, name):
        x = draw(2, 4, 7, 6)
        y, dx, *_ = run(name, x)
        assert y.ndim == 4
        assert y.transpose(0, 2, 3, 1).flags.c_contiguous
        assert dx.shape == x.shape
        assert dx.transpose(0, 2, 3, 1).flags.c_contiguous

    def test_takes_any_strides_and_leaves_its_input_alone(self, name):
        x = draw(2, 4, 7, 6)
        dout = draw(*run(name, x)[0].shape, seed=5)
        expected = run(name, x, dout)
        wide = np.zeros((4, 4, 14, 6), np.float32)
        wide[::2, :, ::2] = x
        read_only = x.copy()
        read_only.flags.writeable = False
        channels_last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        swapped = x.astype(x.dtype.newbyteorder())
        unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
        reverse = x[:, :, ::-1].copy()[:, :, ::-1]
        for other in (wide[::2, :, ::2], read_only, channels_last, swapped, unaligned, reverse):
            before = other.copy()
            for got, want in zip(run(name, other, dout), expected, strict=True):
                np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(other, before)
        strided = np.zeros((*dout.shape[:-1], 2 * dout.shape[-1]), np.float32)[..., ::2]
        strided[...] = dout
        for got, want in zip(run(name, x, strided), expected, strict=True):
            np.testing.assert_array_equal(got, want)

    def test_channels_last_input_is_not_copied(self, name, monkeypatch):
        x = np.ascontiguousarray(draw(2, 7, 6, 4)).transpose(0, 3, 1, 2)
        monkeypatch.setattr("fastcnn.nn._arrays.np.copyto", None)
        IMAGE_LAYERS[name]()(x)

    @pytest.mark.parametrize("name", UNBATCHED)
    def test_unbatched(self, name):
        x = draw(4, 7, 6)
        y, dx, *grads = run(name, x)
        y1, dx1, *grads1 = run(name, x[None], draw(*y.shape, seed=5)[None])
        assert y.ndim == dx.ndim == 3
        np.testing.assert_array_equal(y, y1[0])
        np.testing.assert_array_equal(dx, dx1[0])
        for one, other in zip(grads, grads1, strict=True):
            np.testing.assert_array_equal(one, other)

    def test_empty_batch(self, name):
        if name == "BatchNorm2d":
            with pytest.raises(ValueError, match="input: batch statistics need two values"):
                run(name, np.zeros((0, 4, 7, 6), np.float32))
            return
        y, dx, *grads = run(name, np.zeros((0, 4, 7, 6), np.float32))
        assert y.shape[0] == 0
        assert dx.shape == (0, 4, 7, 6)
        assert not any(grad.any() for grad in grads)

    def test_output_shape(self, name):
        layer = IMAGE_LAYERS[name]()
        assert layer(draw(2, 4, 7, 6)).shape[1:] == layer.output_shape((4, 7, 6))

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            ([[1.0]], "expected a NumPy array, got list"),
            (3.0, "expected a NumPy array, got float"),
            (np.zeros((2, 4, 7, 6), int), "dtype int64 is neither float32 nor float64"),
            (np.zeros((2, 4, 7, 6), np.float16), "dtype float16 is neither"),
            (np.zeros((2, 4, 7, 6), complex), "dtype complex128 is neither"),
        ],
    )
    def test_input_must_be_a_float_array(self, name, bad, message):
        with pytest.raises(TypeError, match=f"input: {message}"):
            IMAGE_LAYERS[name]()(bad)

    def test_dtype_is_the_parameters(self, name):
        layer = IMAGE_LAYERS[name]()
        x = draw(2, 4, 7, 6, dtype=np.float64)
        if not layer.parameters():
            assert layer(x).dtype == np.float64
            return
        with pytest.raises(TypeError, match=r"input: dtype float64 .* float32; use .*net.double\(\)"):
            layer(x)
        assert layer.double()(x).dtype == np.float64
        with pytest.raises(TypeError, match=r"input: dtype float32 .* float64; use .*net.float\(\)"):
            layer(x.astype(np.float32))

    def test_dout_must_fit_the_output(self, name):
        layer = IMAGE_LAYERS[name]()
        y = layer(draw(2, 4, 7, 6))
        for bad in (y[:, :-1], y[0], y[..., None]):
            with pytest.raises(ValueError, match=r"dout: shape \(.*\) is not the output's"):
                layer.backward(bad)
        with pytest.raises(TypeError, match="dout: dtype float64 differs from the output's float32"):
            layer.backward(y.astype(np.float64))
        with pytest.raises(TypeError, match="dout: expected a NumPy array"):
            layer.backward([1.0])

    def test_backward_needs_forward(self, name):
        layer = IMAGE_LAYERS[name]()
        with pytest.raises(RuntimeError, match="backward needs a forward before it"):
            layer.backward(draw(2, 4, 7, 6))
        with fastcnn.no_grad():
            y = layer(draw(2, 4, 7, 6))
        with pytest.raises(RuntimeError, match="backward needs a forward before it"):
            layer.backward(y)

    def test_frozen_parameters_get_no_gradient(self, name):
        layer = IMAGE_LAYERS[name]().requires_grad_(False)
        y = layer(draw(2, 4, 7, 6))
        assert layer.backward(y) is not None
        assert not any(parameter.grad.any() for parameter in layer.parameters())

    def test_without_input_gradient(self, name):
        layer = IMAGE_LAYERS[name]()
        y = layer(draw(2, 4, 7, 6))
        assert layer.backward(y, input_grad=False) is None
        assert all(parameter.grad.any() for parameter in layer.parameters())


RANKED = ["Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d"]


@pytest.mark.parametrize("kind", RANKED)
@pytest.mark.parametrize("shape", [(7,), (7, 6), (1, 1, 4, 7, 6)])
def test_images_have_three_or_four_axes(kind, shape):
    with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\) or \(C, H, W\), got shape"):
        IMAGE_LAYERS[kind]()(np.zeros(shape, np.float32))


class TestConv2d:
    def test_channels(self):
        with pytest.raises(
            ValueError, match=r"input: shape \(2, 3, 7, 6\) has 3 channels, the layer takes 4"
        ):
            nn.Conv2d(4, 6, 3)(draw(2, 3, 7, 6))

    def test_image_smaller_than_the_kernel(self):
        with pytest.raises(ValueError, match=r"kernel_size: 5 .* more than the"):
            nn.Conv2d(1, 1, 5)(draw(1, 1, 9, 4))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"in_channels": 0}, "in_channels: 0 is below 1"),
            ({"out_channels": -1}, "out_channels: -1 is below 1"),
            ({"kernel_size": 0}, "kernel_size: 0 is below 1"),
            ({"kernel_size": (3, 3, 3)}, "kernel_size: expected an int or two"),
            ({"stride": 0}, "stride: 0 is below 1"),
            ({"dilation": 0}, "dilation: 0 is below 1"),
            ({"padding": -1}, "padding: -1 is below 0"),
            ({"padding": "half"}, "padding: 'half' is neither"),
            ({"padding": "same", "stride": 2}, "padding: 'same' is not defined for stride"),
            ({"groups": 0}, "groups: 0 is below 1"),
            ({"groups": 3}, "in_channels: 4 is not divisible by groups 3"),
            ({"groups": 4}, "out_channels: 6 is not divisible by groups 4"),
            ({"padding_mode": "mirror"}, "padding_mode: 'mirror' is none of"),
        ],
    )
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            nn.Conv2d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3} | arguments)

    def test_types_of_arguments(self):
        with pytest.raises(TypeError, match=r"kernel_size: expected an int, got 2\.5"):
            nn.Conv2d(1, 1, 2.5)
        with pytest.raises(TypeError, match="dtype: float16"):
            nn.Conv2d(1, 1, 2, dtype=np.float16)

    @pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (4, 1), ((2, 5), 1), (2, 3)])
    def test_same_keeps_the_size(self, kernel, dilation):
        layer = nn.Conv2d(1, 2, kernel, padding="same", dilation=dilation)
        assert layer(draw(1, 1, 9, 8)).shape == (1, 2, 9, 8)

    def test_same_puts_the_larger_half_behind(self):
        layer = nn.Conv2d(1, 1, (1, 2), padding="same", bias=False)
        layer.weight.data[...] = [[[[1.0, 10.0]]]]
        x = np.array([[[[1.0, 2.0, 3.0]]]], np.float32)
        np.testing.assert_array_equal(layer(x), [[[[21, 32, 3]]]])

    def test_padding_that_is_set_later(self):
        x, layer = draw(2, 3, 6, 7), nn.Conv2d(3, 4, 3)
        net = nn.Sequential(layer, nn.ReLU())
        for padding in (1, (2, 0), ((0, 1), (2, 1)), "same", "valid"):
            for _ in range(4):
                net(x)
            layer.padding = padding
            other = nn.Conv2d(3, 4, 3, padding=padding)
            other.load_state_dict(layer.state_dict())
            assert repr(layer) == repr(other)
            for _ in range(4):
                np.testing.assert_array_equal(net(x), np.maximum(other(x), 0))
        for wrong in (-1, "full", None):
            with pytest.raises((TypeError, ValueError), match="padding"):
                layer.padding = wrong
        assert layer.padding == "valid"
        np.testing.assert_array_equal(net(x), np.maximum(other(x), 0))

    def test_padding_of_each_side(self):
        layer = nn.Conv2d(2, 3, 3, padding=((2, 0), (1, 3)))
        x = draw(2, 2, 5, 5)
        padded = np.pad(x, ((0, 0), (0, 0), (2, 0), (1, 3)))
        plain = nn.Conv2d(2, 3, 3)
        plain.load_state_dict(layer.state_dict())
        np.testing.assert_allclose(layer(x), plain(padded), rtol=1e-6, atol=1e-6)
        assert layer.padding == ((2, 0), (1, 3))

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    def test_padding_modes(self, mode):
        names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
        layer = nn.Conv2d(2, 3, 3, padding=((2, 0), (1, 3)), padding_mode=mode)
        x = draw(2, 2, 5, 5)
        plain = nn.Conv2d(2, 3, 3)
        plain.load_state_dict(layer.state_dict())
        padded = np.pad(x, ((0, 0), (0, 0), (2, 0), (1, 3)), names[mode])
        np.testing.assert_allclose(layer(x), plain(padded), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("mode", "padding"), [("reflect", 4), ("circular", 5)])
    def test_padding_modes_have_limits(self, mode, padding):
        with pytest.raises(
            ValueError, match=f"padding: {padding} is more than '{mode}' can fill from 4 pixels"
        ):
            nn.Conv2d(1, 1, 1, padding=padding, padding_mode=mode)(draw(1, 1, 4, 4))

    def test_repr(self):
        layer = nn.Conv2d(4, 6, 3, 2, (1, 0), dilation=2, groups=2, bias=False, padding_mode="replicate")
        assert repr(layer) == (
            "Conv2d(4, 6, kernel_size=(3, 3), stride=(2, 2), padding=(1, 0), dilation=(2, 2), groups=2, "
            "bias=False, padding_mode=replicate)"
        )


class TestPooling:
    def test_golden(self):
        x = np.array([[[[1, 3, 2, 4], [5, 6, 1, 2], [7, 8, 9, 1], [2, 3, 4, 5]]]], np.float32)
        np.testing.assert_array_equal(nn.MaxPool2d(2)(x), [[[[6, 4], [8, 9]]]])
        np.testing.assert_array_equal(nn.AvgPool2d(2)(x), [[[[3.75, 2.25], [5, 4.75]]]])
        np.testing.assert_array_equal(nn.AdaptiveAvgPool2d(1)(x), [[[[63 / 16]]]])

    @pytest.mark.parametrize(
        ("kernel", "stride", "padding", "dilation", "ceil_mode"),
        [
            (2, None, 0, 1, False),
            (3, 2, 1, 1, True),
            ((2, 3), (1, 2), (1, 0), (2, 1), False),
            (17, 1, 8, 1, False),
        ],
    )
    def test_indices_point_at_the_maxima(self, kernel, stride, padding, dilation, ceil_mode):
        layer = nn.MaxPool2d(kernel, stride, padding, dilation, return_indices=True, ceil_mode=ceil_mode)
        x = draw(2, 3, 9, 10)
        y, indices = layer(x)
        assert indices.dtype == np.int64
        flat = x.reshape(2, 3, 90)
        np.testing.assert_array_equal(
            np.take_along_axis(flat, indices.reshape(2, 3, -1), 2).reshape(y.shape), y
        )
        dx = layer.backward(np.ones_like(y))
        assert dx.sum() == y.size

    @pytest.mark.parametrize("make", [nn.MaxPool2d, nn.AvgPool2d])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"padding": 2}, r"padding: \(2, 2\) is more than half of kernel_size"),
            ({"stride": 0}, "stride: 0 is below 1"),
            ({"kernel_size": 0}, "kernel_size: 0 is below 1"),
        ],
    )
    def test_arguments(self, make, arguments, message):
        with pytest.raises(ValueError, match=message):
            make(**{"kernel_size": 3} | arguments)

    def test_other_arguments(self):
        with pytest.raises(ValueError, match="divisor_override"):
            nn.AvgPool2d(2, divisor_override=0)
        with pytest.raises(ValueError, match="output_size: 0 is below 1"):
            nn.AdaptiveAvgPool2d(0)
        with pytest.raises(ValueError, match="output_size: expected an int or two"):
            nn.AdaptiveAvgPool2d((1, 2, 3))

    def test_image_smaller_than_the_window(self):
        with pytest.raises(ValueError, match=r"kernel_size: 3 .* more than the"):
            nn.MaxPool2d(3)(draw(1, 1, 2, 2))
        with pytest.raises(ValueError, match="no pixels"):
            nn.AdaptiveAvgPool2d(1)(draw(1, 1, 0, 2))

    def test_nan_wins(self):
        x = np.zeros((1, 1, 2, 2), np.float32)
        x[0, 0, 1, 0] = np.nan
        assert np.isnan(nn.MaxPool2d(2)(x)).all()


class TestBatchNorm:
    def test_running_statistics(self):
        layer = nn.BatchNorm2d(3)
        x = draw(4, 3, 5, 5) * 2 + 1
        y = layer(x)
        np.testing.assert_allclose(y.mean((0, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(y.std((0, 2, 3)), 1, rtol=1e-4)
        np.testing.assert_allclose(layer.running_mean, 0.1 * x.mean((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * x.var((0, 2, 3), ddof=1), rtol=1e-5)
        assert layer.num_batches_tracked == 1
        before = layer.state_dict()
        layer.eval()(x)
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, before[name])
        layer.reset_parameters()
        assert layer.num_batches_tracked == 0
        np.testing.assert_array_equal(layer.running_var, 1)

    def test_plain_mean_over_batches(self):
        layer = nn.BatchNorm1d(2, momentum=None)
        batches = [draw(6, 2, seed=seed) for seed in range(3)]
        for batch in batches:
            layer(batch)
        np.testing.assert_allclose(
            layer.running_mean, np.mean([b.mean(0) for b in batches], 0), rtol=1e-5, atol=1e-7
        )

    def test_without_tracking_evaluation_takes_the_batch(self):
        layer = nn.BatchNorm2d(3, track_running_stats=False, affine=False).eval()
        x = draw(4, 3, 5, 5)
        np.testing.assert_allclose(layer(x).mean((0, 2, 3)), 0, atol=1e-6)
        assert layer.state_dict() == {}
        assert layer.backward(x).shape == x.shape
        layer.reset_parameters()

    def test_keys(self):
        assert list(nn.BatchNorm1d(2).state_dict()) == [
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "num_batches_tracked",
        ]

    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (0, 3)])
    def test_one_value_is_no_batch(self, shape):
        layer = nn.BatchNorm1d(3)
        with pytest.raises(ValueError, match="input: batch statistics need two values of each channel"):
            layer(np.zeros(shape, np.float32))
        assert layer.num_batches_tracked == 0
        layer.eval()(np.zeros(shape, np.float32))

    def test_ranks_and_channels(self):
        with pytest.raises(ValueError, match=r"input: expected 2 or 3 axes, got shape \(2, 3, 4, 4\)"):
            nn.BatchNorm1d(3)(draw(2, 3, 4, 4))
        with pytest.raises(ValueError, match="input: expected 4 axes"):
            nn.BatchNorm2d(3)(draw(2, 3))
        with pytest.raises(ValueError, match="has 4 channels, the layer takes 3"):
            nn.BatchNorm2d(3)(draw(2, 4, 3, 3))

    def test_sequences(self):
        layer, x = nn.BatchNorm1d(3), draw(4, 3, 5)
        y = layer(x)
        flat = nn.BatchNorm1d(3)
        np.testing.assert_allclose(
            y.transpose(0, 2, 1).reshape(-1, 3), flat(x.transpose(0, 2, 1).reshape(-1, 3))
        )


class TestActivations:
    def test_values(self):
        x = np.array([-2.0, -0.0, 0.0, 3.0, np.nan, np.inf], np.float32)
        np.testing.assert_array_equal(nn.ReLU()(x), [0, 0, 0, 3, np.nan, np.inf])
        np.testing.assert_array_equal(nn.LeakyReLU(0.5)(x), [-1, 0, 0, 3, np.nan, np.inf])
        np.testing.assert_array_equal(nn.PReLU(init=0.5)(x), [-1, 0, 0, 3, np.nan, np.inf])

    @pytest.mark.parametrize(
        "layer", [nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU(), nn.Dropout(0.0), nn.Softmax(-1)]
    )
    @pytest.mark.parametrize(
        "shape", [(5,), (4, 3), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 2), (2, 1, 1, 2, 2, 3)]
    )
    def test_any_rank(self, layer, shape):
        x = draw(*shape)
        y = layer(x)
        assert y.shape == shape
        dx = layer.backward(np.ones_like(x))
        assert dx.shape == shape
        for order in ((*range(1, len(shape)), 0), tuple(reversed(range(len(shape))))):
            back = np.argsort(order)
            other = np.ascontiguousarray(x.transpose(order)).transpose(back)
            np.testing.assert_array_equal(layer(other), y)
            np.testing.assert_array_equal(layer.backward(np.ones_like(x)), dx)

    def test_prelu_takes_one_slope_or_one_for_each_channel(self):
        with pytest.raises(ValueError, match="has 4 channels, the layer has 3 slopes"):
            nn.PReLU(3)(draw(2, 4))
        layer = nn.PReLU(3)
        layer.weight.data[...] = [0, 1, 2]
        np.testing.assert_array_equal(
            layer(-np.ones((1, 3, 1, 1), np.float32)), -np.array([0, 1, 2.0]).reshape(1, 3, 1, 1)
        )
        layer.reset_parameters()
        np.testing.assert_array_equal(layer.weight.data, 0.25)

    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
    def test_softmax_along_any_axis(self, dim):
        x = draw(2, 3, 4) * 50
        p = nn.Softmax(dim)(x)
        np.testing.assert_allclose(p.sum(dim), 1, rtol=1e-5)
        np.testing.assert_allclose(np.exp(nn.LogSoftmax(dim)(x)), p, rtol=1e-4, atol=1e-30)
        with pytest.raises(ValueError, match="dim: 3 is no axis"):
            nn.Softmax(3)(x)
        with pytest.raises(TypeError, match=r"dim: expected an int, got 1\.5"):
            nn.Softmax(1.5)

    def test_identity(self):
        x = draw(2, 3)
        assert nn.Identity(54, unused=1)(x) is x
        assert nn.Identity().backward(x) is x
        assert nn.Identity().backward(x, input_grad=False) is None

    def test_reprs(self):
        assert repr(nn.LeakyReLU()) == "LeakyReLU(negative_slope=0.01)"
        assert repr(nn.PReLU()) == "PReLU(num_parameters=1)"
        assert repr(nn.Softmax(1)) == "Softmax(dim=1)"
        assert repr(nn.ReLU(inplace=True)) == "ReLU()"


class TestLinear:
    @pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0, 3)])
    def test_any_leading_axes(self, lead):
        layer = nn.Linear(5, 3)
        x = draw(*lead, 5)
        y = layer(x)
        assert y.shape == (*lead, 3)
        np.testing.assert_allclose(y, x @ layer.weight.data.T + layer.bias.data, rtol=1e-5, atol=1e-6)
        assert layer.backward(y).shape == x.shape

    def test_checks(self):
        with pytest.raises(ValueError, match=r"input: shape \(2, 4\) does not end in the 5 features"):
            nn.Linear(5, 3)(draw(2, 4))
        with pytest.raises(ValueError, match="does not end in"):
            nn.Linear(5, 3)(np.array(3, np.float32))
        with pytest.raises(ValueError, match="in_features: 0 is below 1"):
            nn.Linear(0, 3)
        assert repr(nn.Linear(5, 3, bias=False)) == "Linear(in_features=5, out_features=3, bias=False)"


class TestFlatten:
    def test_order_is_channels_rows_columns(self):
        x = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
        stored = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        layer = nn.Flatten()
        np.testing.assert_array_equal(layer(stored), x.reshape(2, 60))
        np.testing.assert_array_equal(layer.backward(x.reshape(2, 60)), x)
        np.testing.assert_array_equal(nn.Flatten(2)(stored), x.reshape(2, 3, 20))
        np.testing.assert_array_equal(nn.Flatten(0, 1)(stored), x.reshape(6, 4, 5))

    def test_unflatten(self):
        x = draw(2, 12)
        layer = nn.Unflatten(1, (3, -1, 2))
        y = layer(x)
        assert y.shape == (2, 3, 2, 2)
        np.testing.assert_array_equal(layer.backward(y), x)
        assert layer.output_shape((12,)) == (3, 2, 2)

    def test_checks(self):
        with pytest.raises(ValueError, match="start_dim: axis 5 is out of range"):
            nn.Flatten(5)(draw(2, 3))
        with pytest.raises(ValueError, match="start_dim: 2 comes after end_dim 1"):
            nn.Flatten(2, 1)(draw(2, 3, 4))
        with pytest.raises(ValueError, match="unflattened_size"):
            nn.Unflatten(1, (-1, -1))
        with pytest.raises(ValueError, match="does not divide axis 1"):
            nn.Unflatten(1, (5, -1))(draw(2, 12))
        assert repr(nn.Flatten()) == "Flatten(start_dim=1, end_dim=-1)"


class TestDropout:
    def test_follows_the_default_generator(self):
        layer, x = nn.Dropout(0.3), np.ones((50, 40), np.float32)
        fastcnn.manual_seed(3)
        y = layer(x)
        dx = layer.backward(x)
        np.testing.assert_array_equal(y, dx)
        assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
        assert 0.25 < (y == 0).mean() < 0.35
        assert not np.array_equal(layer(x), y)
        fastcnn.manual_seed(3)
        np.testing.assert_array_equal(layer(x), y)

    def test_evaluation_is_the_identity_and_draws_nothing(self):
        layer, x = nn.Dropout().eval(), draw(3, 4)
        state = fastcnn.default_generator().bit_generator.state
        assert layer(x) is x
        assert layer.backward(x) is x
        assert fastcnn.default_generator().bit_generator.state == state

    def test_all_dropped(self):
        assert not nn.Dropout(1.0)(draw(3, 4)).any()

    @pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
    def test_checks(self, p):
        with pytest.raises(ValueError, match=r"p: .* is not between 0 and 1"):
            nn.Dropout(p)
