"""Forward passes that are played again: the bits of the layers' own, whatever changes between two calls."""

import copy
import os
import pickle
import sys
import threading

import numpy as np
import played_steps
import pytest

import fastcnn
from fastcnn import models, nn
from fastcnn.nn import replay

SHAPES = {**played_steps.SHAPES, "resnet9": (3, 32, 32)}


def network(name, seed=0):
    """A network in evaluation mode, none of whose numbers has its initial value."""
    net = models.create(name, SHAPES[name], 10, seed=seed).eval()
    stir(net, np.random.default_rng(seed))
    return net


def stir(net, rng):
    """Change every parameter and statistic in place."""
    for parameter in net.parameters():
        parameter.data[...] *= rng.uniform(0.5, 1.5, parameter.shape)
        parameter.data[...] += 0.01 * rng.standard_normal(parameter.shape)
    for array in net.buffers():
        if array.dtype.kind == "f":
            array[...] = rng.uniform(0.5, 1.5, array.shape)


def image(net_or_shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((1, *net_or_shape)).astype(dtype)


@fastcnn.no_grad()
def plain(net, x):
    """The result of the layers one after the other."""
    return net._run(x)


@fastcnn.no_grad()
def played(net, x):
    """The result of a recorded pass, which it must come from."""
    for _ in range(3):
        net(x)
    assert any(isinstance(known, replay._Pass) for known in net._replay._known.passes.values())
    return net(x)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_played_pass_has_the_bits_of_the_layers(name, dtype):
    net = network(name)
    if dtype == np.float64:
        net.double()
    x = image(SHAPES[name], dtype=dtype)
    played(net, x)
    for seed in range(3):
        x = image(SHAPES[name], seed, dtype)
        np.testing.assert_array_equal(played(net, x), plain(net, x))


@pytest.mark.parametrize("name", ["cifar-small", "emotion"])
def test_every_layout_of_the_image(name):
    net = network(name)
    x = image(SHAPES[name])
    expected = plain(net, x)
    c, h, w = SHAPES[name]
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    wide = np.zeros((2, c, 2 * h, 3 * w), np.float32)[1:, :, ::2, ::3]
    wide[...] = x
    swapped = x.astype(">f4")
    frozen = x.copy()
    frozen.setflags(write=False)
    shifted = np.zeros(4 * x.size + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    shifted[...] = x
    for other in (last, wide, swapped, frozen, shifted, x[:, :, ::-1][:, :, ::-1]):
        with fastcnn.no_grad():
            for _ in range(4):
                np.testing.assert_array_equal(net(other), expected)


def wide(*conv, **settings):
    return [nn.Conv2d(*conv, **settings), nn.BatchNorm2d(conv[1]), nn.ReLU()]


# Every way of a convolution, and what else may stand in a network that is played.
BLOCKS = {
    "1x1": lambda: [nn.Conv2d(8, 20, 1)],
    "strided": lambda: [nn.Conv2d(8, 20, 3, stride=2, padding=1), nn.LeakyReLU(0.1)],
    "dilated": lambda: [nn.Conv2d(8, 20, 3, dilation=2, bias=False), nn.ReLU(), nn.MaxPool2d((2, 3))],
    "uneven": lambda: [nn.Conv2d(8, 3, (2, 5), padding=((0, 1), (2, 1))), nn.PReLU(3)],
    "few pixels": lambda: [nn.AvgPool2d(3), *wide(8, 128, 1), *wide(128, 130, 3, padding=1)],
    "few tiles": lambda: [*wide(8, 128, 1), *wide(128, 256, 3, padding=1)],
    "many tiles": lambda: [*wide(8, 64, 3), nn.Conv2d(64, 40, 3, padding=1), nn.MaxPool2d(2)],
    "few results": lambda: [*wide(8, 64, 3), nn.Conv2d(64, 2, 3), nn.ReLU()],
    "depthwise": lambda: [
        *wide(8, 48, 1),
        *wide(48, 48, 3, groups=48),
        *wide(48, 48, 5, padding=2, groups=48),
        nn.Conv2d(48, 96, 3, groups=48, bias=False),
    ],
    "groups": lambda: [*wide(8, 12, 3, groups=4), nn.Conv2d(12, 24, 3, groups=2), nn.MaxPool2d(2)],
    "norms": lambda: [nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False), nn.MaxPool2d(2)],
    "slopes": lambda: [nn.Conv2d(8, 10, 3), nn.PReLU(10), nn.MaxPool2d(2), nn.PReLU(10), nn.PReLU()],
    **{name: played_steps.BLOCKS[name] for name in ("pools", "adaptive pools", "softmax", "lists")},
    "rows": lambda: [nn.Flatten(2), nn.Linear(180, 40), nn.Linear(40, 3, bias=False), nn.ReLU()],
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_layers_of_every_kind(name, dtype):
    rng = np.random.default_rng(4)
    net = nn.Sequential(*BLOCKS[name]()).eval()
    if dtype == np.float64:
        net.double()
    stir(net, rng)
    x = image((8, 12, 15), dtype=dtype)
    for _ in range(2):
        np.testing.assert_array_equal(played(net, x), plain(net, x))
        stir(net, rng)
        with fastcnn.no_grad():
            np.testing.assert_array_equal(net(x), plain(net, x))
        x = rng.standard_normal(x.shape).astype(dtype)


def test_an_image_without_a_batch():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)).eval()
    x = image((3, 10, 12))[0]
    result = played(net, x)
    assert result.shape == (8, 4, 5)
    np.testing.assert_array_equal(result, plain(net, x))


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_that_change_in_place_count_at_once(name):
    net, x, rng = network(name), image(SHAPES[name]), np.random.default_rng(5)
    played(net, x)
    arrays = [parameter.data for parameter in net.parameters()]
    arrays += [array for _, array in net.named_buffers() if array.dtype.kind == "f"]
    for array in arrays:
        before = played(net, x)
        array[...] = array * rng.uniform(0.5, 2, array.shape)
        with fastcnn.no_grad():
            after = net(x)
        np.testing.assert_array_equal(after, plain(net, x))
        assert not np.array_equal(after, before)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        # Depthwise: its weights are repeated to fill vectors.
        (lambda: [nn.Conv2d(1, 1, 3)], (1, 1, 8, 9)),
        (lambda: [nn.Conv2d(3, 3, 3, groups=3), nn.ReLU()], (1, 3, 8, 9)),
        # One input, but to the layers many images: their weights are packed.
        (lambda: [nn.Flatten(0, 1), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)], (1, 20, 3, 8, 9)),
    ],
)
def test_weights_that_are_prepared_outside_of_jobs_count_at_once(layers, shape):
    net = nn.Sequential(*layers()).eval()
    x = np.random.default_rng(6).standard_normal(shape).astype(np.float32)
    for _ in range(3):
        with fastcnn.no_grad():
            for _ in range(4):
                np.testing.assert_array_equal(net(x), plain(net, x))
        # Not the biases: a recording that sees them change is given up.
        for parameter in net.parameters():
            parameter.data[...] *= 1.5 if parameter.ndim == 4 else 1


def test_a_slope_that_turns_negative_counts_at_once():
    net, x = network("mnist-prelu"), image(SHAPES["mnist-prelu"])
    played(net, x)
    net[1].weight.data[...] = -0.5
    with fastcnn.no_grad():
        for _ in range(3):
            np.testing.assert_array_equal(net(x), plain(net, x))


def test_results_are_never_overwritten():
    net = network("cifar-small")
    images = [image(SHAPES["cifar-small"], seed) for seed in range(8)]
    with fastcnn.no_grad():
        results = [net(x) for x in images]
        copies = [result.copy() for result in results]
        for x in images:
            net(x)
    for result, expected in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, expected)
    results[4][...] = 7
    with fastcnn.no_grad():
        np.testing.assert_array_equal(net(images[4]), copies[4])


def test_the_image_is_not_kept():
    net, x = network("cifar-small"), image(SHAPES["cifar-small"])
    expected = played(net, x).copy()
    kept = x.copy()
    x[...] = np.nan
    with fastcnn.no_grad():
        np.testing.assert_array_equal(net(kept), expected)
        assert np.isnan(net(x)).all()
        np.testing.assert_array_equal(net(kept), expected)


def test_a_wrong_image_is_told_as_before():
    net, x = network("cifar-small"), image(SHAPES["cifar-small"])
    played(net, x)
    with fastcnn.no_grad():
        for _ in range(3):
            with pytest.raises(ValueError, match="has 4 channels, the layer takes 3"):
                net(np.zeros((1, 4, 32, 32), np.float32))
            with pytest.raises(TypeError, match="float64 differs"):
                net(x.astype(np.float64))
            with pytest.raises(TypeError, match="expected a NumPy array, got list"):
                net(x.tolist())
            with pytest.raises(ValueError, match="expected"):
                net(np.zeros((), np.float32))
            with pytest.raises(ValueError, match="features"):
                net(np.zeros((1, 3, 40, 40), np.float32))
            assert net(np.zeros((0, 3, 32, 32), np.float32)).shape == (0, 10)
    np.testing.assert_array_equal(played(net, x), plain(net, x))


@pytest.mark.parametrize("name", SHAPES)
def test_a_changed_setting_counts_at_once(name):
    net, x = network(name), image(SHAPES[name])
    played(net, x)

    def check():
        with fastcnn.no_grad():
            for _ in range(3):
                np.testing.assert_array_equal(net(x), plain(net, x))

    winograd, threads = fastcnn.get_winograd(), fastcnn.get_num_threads()
    try:
        fastcnn.set_fusion(False)
        check()
        fastcnn.set_winograd(False)
        check()
        fastcnn.set_fusion(True)
        check()
        fastcnn.set_num_threads(1)
        check()
    finally:
        fastcnn.set_fusion(True)
        fastcnn.set_winograd(winograd)
        fastcnn.set_num_threads(threads)
    net.append(nn.LeakyReLU(0.5))
    check()
    net[-1].negative_slope = 0.25
    check()
    nn.Sequential(nn.Linear(3, 3), net)  # moves the parameters
    stir(net, np.random.default_rng(3))
    check()
    net.load_state_dict(network(name, 9).state_dict())
    check()
    net.double()
    x = x.astype(np.float64)
    check()


def test_training_mode_is_not_played():
    net, x = network("cifar-batchnorm"), image(SHAPES["cifar-batchnorm"])
    expected = played(net, x)
    dropout = net[4]
    dropout.train()
    with fastcnn.no_grad():
        results = [net(x) for _ in range(4)]
    assert not np.array_equal(results[2], results[3])
    dropout.eval()
    np.testing.assert_array_equal(played(net, x), expected)


def test_backward_after_a_played_pass_is_an_error():
    net, x = network("cifar-small"), image(SHAPES["cifar-small"])
    played(net, x)
    y = net(x)
    np.testing.assert_array_equal(y, plain(net, x))
    y = net(x)
    played(net, x)
    with pytest.raises(RuntimeError, match="none inside no_grad"):
        net.backward(np.ones_like(y))
    y = net(x)
    assert net.backward(np.ones_like(y)).shape == x.shape


def test_layers_of_other_classes_are_run():
    class Noise(nn.Module):
        def forward(self, input):
            return input + np.float32(next(numbers))

    numbers = iter(range(100))
    net = nn.Sequential(nn.Linear(3, 2), Noise()).eval()
    x = np.zeros((1, 3), np.float32)
    with fastcnn.no_grad():
        results = [net(x) for _ in range(5)]
    np.testing.assert_allclose(np.diff(results, axis=0), 1, rtol=1e-6)

    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    net[1].forward = lambda input: input + np.float32(next(numbers))
    with fastcnn.no_grad():
        results = [net(x) for _ in range(5)]
    np.testing.assert_allclose(np.diff(results, axis=0), 1, rtol=1e-6)


def test_networks_in_networks():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(inner, nn.MaxPool2d(2), nn.Residual(nn.Sequential(nn.Conv2d(4, 4, 1))), nn.Flatten())
    net.eval()
    stir(net, np.random.default_rng(0))
    x = image((3, 8, 8))
    expected = plain(net, x)
    with fastcnn.no_grad():
        for _ in range(4):
            np.testing.assert_array_equal(net(x), expected)


def test_copies_and_pickles_have_recordings_of_their_own():
    net, x = network("cifar-small"), image(SHAPES["cifar-small"])
    expected = played(net, x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        np.testing.assert_array_equal(played(twin, x), expected)
        stir(twin, np.random.default_rng(2))
        np.testing.assert_array_equal(played(twin, x), plain(twin, x))
    np.testing.assert_array_equal(played(net, x), expected)


def test_several_python_threads_play_one_network():
    net = network("cifar-small")
    images = [image(SHAPES["cifar-small"], seed) for seed in range(4)]
    expected = [plain(net, x) for x in images]
    played(net, images[0])
    wrong = []

    def many(number):
        for _ in range(200):
            with fastcnn.no_grad():
                if not np.array_equal(net(images[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=many, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_plays_too():
    net, x = network("cifar-small"), image(SHAPES["cifar-small"])
    expected = played(net, x)
    child = os.fork()
    if child == 0:
        with fastcnn.no_grad():
            os._exit(0 if np.array_equal(net(x), expected) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_small_inputs_and_few_shapes_are_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_LARGEST_BATCH", 1 << 16)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
    with fastcnn.no_grad():
        for size in range(8, 24):
            for _ in range(3):
                net(np.zeros((1, 1, size, size), np.float32))
        assert len(net._replay._known.passes) == replay._MOST
        before = dict(net._replay._known.passes)
        for _ in range(3):
            net(np.zeros((1, 1, 300, 300), np.float32))
        assert net._replay._known.passes == before


@pytest.mark.parametrize("name", SHAPES)
def test_batches(name):
    net = network(name)
    rng = np.random.default_rng(0)
    for size in (3, 20):
        for _ in range(4):
            x = rng.standard_normal((size, *SHAPES[name])).astype(np.float32)
            np.testing.assert_array_equal(played(net, x), plain(net, x))
            stir(net, rng)
    assert {
        key[0][0] for key, known in net._replay._known.passes.items() if isinstance(known, replay._Pass)
    } == {
        3,
        20,
    }
