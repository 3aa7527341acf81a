"""Networks on a CUDA device (or its simulator): the same results, training, state and errors as on the CPU.

On the simulator networks and images are tiny.
"""

import copy
import pickle

import cuda_device
import numpy as np
import pytest

import fastcnn
from fastcnn import data, nn, optim
from fastcnn.train import Trainer

cuda = cuda_device.module()
pytestmark = cuda_device.marks


def seeded(make):
    fastcnn.manual_seed(3)
    return make()


def conv_pool():
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def norm_pool():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def residual():
    # A bias before normalization has a gradient of rounding errors, which Adam would blow up.
    body = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2))
    layers = nn.Residual(body, activation=nn.ReLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)
    return nn.Sequential(*layers)


def slopes():
    return nn.Sequential(
        nn.Conv2d(2, 3, 2),
        nn.PReLU(3),
        nn.MaxPool2d(3),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(3, 3),
    )


def averages():
    layers = nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3), nn.LogSoftmax(1)
    return nn.Sequential(*layers)


NETWORKS = [conv_pool, norm_pool, residual, slopes, averages]
every_network = pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)


def batch(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((3, 2, 4, 4)).astype(dtype), np.array([0, 2, 1])


def images(x):
    """A batch as a layer returns it: (N, C, H, W) shown, channels last."""
    return cuda.from_numpy(np.ascontiguousarray(x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)


def close(actual, expected):
    if hasattr(actual, "numpy"):
        actual = actual.numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def step(net, optimizer, x, y):
    """One training step: loss, logits, gradient of the images."""
    fastcnn.manual_seed(5)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    logits = net(x)
    loss = loss_fn(logits, y)
    dx = net.backward(loss_fn.backward())
    optimizer.step(zero_grad=True)
    return loss, logits, dx


@every_network
@pytest.mark.parametrize("fusion", [True, False], ids=["fused", "layer by layer"])
def test_training_and_inference_as_on_the_cpu(make, fusion):
    fastcnn.set_fusion(fusion)
    try:
        there, here = seeded(make).to("cuda"), seeded(make)
        optimizers = [optim.Adam(net.parameters(), lr=0.01) for net in (there, here)]
        for seed in range(2):
            x, y = batch(seed)
            actual = step(there, optimizers[0], images(x) if seed else cuda.from_numpy(x), y)
            expected = step(here, optimizers[1], x, y)
            assert isinstance(actual[0], float)
            for ours, theirs in zip(actual, expected, strict=True):
                close(ours, theirs)
        there.eval()
        here.eval()
        with fastcnn.no_grad():
            close(there(images(x)), here(x))
        expected = here.state_dict()
        for name, values in there.state_dict().items():
            assert type(values) is np.ndarray, name
            close(values, expected[name])
    finally:
        fastcnn.set_fusion(True)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [((1, 2), (3, 0)), (0, 1)])
def test_padding_modes(padding_mode, padding):
    x, _ = batch()
    results = []
    for device in ("cuda", "cpu"):
        net = seeded(lambda: nn.Conv2d(2, 3, (2, 3), padding=padding, padding_mode=padding_mode)).to(device)
        y = net(images(x) if device == "cuda" else x)
        dx = net.backward(y)
        results.append([y, dx, *(parameter.grad for parameter in net.parameters())])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


def test_an_empty_batch():
    x, _ = batch()
    for make in (conv_pool, norm_pool, averages):
        net = seeded(make).to("cuda")
        net.eval()
        assert net(images(x)[:0]).shape == (0, 3)
    net = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect").to("cuda")
    y = net(images(x)[:0])
    assert net.backward(y).shape == (0, *x.shape[1:])


def test_float64():
    x, y = batch(dtype=np.float64)
    there, here = seeded(conv_pool).to("cuda").double(), seeded(conv_pool).double()
    loss_fn = nn.CrossEntropyLoss()
    assert abs(loss_fn(there(images(x)), y) - loss_fn(here(x), y)) < 1e-12


@pytest.mark.parametrize("make", [optim.SGD, optim.AdamW], ids=lambda make: make.__name__)
def test_an_optimiser_follows_its_parameters_with_its_state(make):
    options = {"momentum": 0.9, "nesterov": True} if make is optim.SGD else {"maximize": True}
    x, y = batch()
    nets = [seeded(conv_pool), seeded(conv_pool)]
    optimizers = [make(net.parameters(), lr=0.01, **options) for net in nets]
    for moved in (True, True, False):
        for net, optimizer in zip(nets, optimizers, strict=True):
            on_device = net is nets[0] and moved
            net.to("cuda" if on_device else "cpu")
            step(net, optimizer, images(x) if on_device else x, y)
    for name, values in nets[1].state_dict().items():
        close(nets[0].state_dict()[name], values)
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for number, state in theirs.items():
        for name, values in state.items():
            close(np.asarray(ours[number][name]), np.asarray(values))


def test_an_optimiser_s_state_is_loaded_to_the_device():
    x, y = batch()
    here, there = seeded(conv_pool), seeded(conv_pool)
    trained = optim.Adam(here.parameters(), lr=0.01)
    step(here, trained, x, y)
    there.load_state_dict(here.state_dict())
    there.to("cuda")
    resumed = optim.Adam(there.parameters(), lr=0.5)
    resumed.load_state_dict(trained.state_dict())
    step(here, trained, x, y)
    step(there, resumed, images(x), y)
    close(there[0].weight.data, here[0].weight.data)


@pytest.mark.parametrize("norm_type", [2, 1, np.inf])
def test_clipping(norm_type):
    nets = [seeded(conv_pool).to("cuda"), seeded(conv_pool)]
    x, y = batch()
    norms = []
    for net, given in zip(nets, (images(x), x), strict=True):
        loss_fn = nn.CrossEntropyLoss()
        loss_fn(net(given), y)
        net.backward(loss_fn.backward(), input_grad=False)
        norms.append(optim.clip_grad_norm_(net.parameters(), 0.01, norm_type))
    assert abs(norms[0] - norms[1]) < 1e-5
    close(nets[0][0].weight.grad, nets[1][0].weight.grad)
    nets[0].zero_grad()
    assert not nets[0][0].weight.grad.numpy().any()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_losses_of_every_reduction(reduction):
    x, y = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32), np.array([1, -100, 3])
    weight = np.array([1, 2, 3, 4], np.float32)
    there, here = (nn.CrossEntropyLoss(weight, reduction=reduction) for _ in range(2))
    close(there(cuda.from_numpy(x), y), here(x, y))
    dout = np.array([1.0, 2.0, 3.0]) if reduction == "none" else 2.0
    close(there.backward(dout), here.backward(dout))
    probabilities = np.full((3, 4), 0.25, np.float32)
    close(there(cuda.from_numpy(x), cuda.from_numpy(probabilities)), here(x, probabilities))


def test_max_pool_indices():
    x, _ = batch()
    there, here = (nn.MaxPool2d(2, return_indices=True) for _ in range(2))
    for ours, theirs in zip(there(images(x)), here(x), strict=True):
        close(ours, theirs)


class Foreign:
    """What CuPy and PyTorch have: an array that only says where it is."""

    def __init__(self, array):
        self._array, self.ndim = array, array.ndim
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def test_foreign_arrays_pass_without_a_copy():
    x, _ = batch()
    net = seeded(conv_pool).to("cuda")
    close(net(Foreign(cuda.from_numpy(x))), net(images(x)).numpy())
    relu = nn.ReLU()
    mine = cuda.from_numpy(x)
    assert cuda.as_device(Foreign(mine)).pointer == mine.pointer
    close(relu(Foreign(mine)), x.clip(0))


def test_copies_pickles_and_the_way_back():
    net = seeded(norm_pool).to("cuda")
    net.eval()
    x, _ = batch()
    expected = net(images(x)).numpy()
    twin = copy.deepcopy(net)
    assert all(parameter.device == "cuda" for parameter in twin.parameters())
    close(twin(images(x)), expected)
    loaded = pickle.loads(pickle.dumps(net))
    assert all(parameter.device == "cpu" for parameter in loaded.parameters())
    close(loaded(x), expected)
    net.to("cpu")
    assert type(net[0].weight.data) is np.ndarray
    assert type(net[1].running_mean) is np.ndarray
    close(net(x), expected)


def test_wrong_devices_are_refused_by_name():
    x, y = batch()
    net = seeded(conv_pool)
    with pytest.raises(TypeError, match=r"^input: .*'cuda'.*'cpu'.*numpy\(\)"):
        net(images(x))
    net.to("cuda")
    for _ in range(3):
        with pytest.raises(TypeError, match=r"^input: .*'cpu'.*'cuda'.*from_numpy"), fastcnn.no_grad():
            net(x)
    with pytest.raises(TypeError, match=r"^input: expected"):
        net([[1.0]])
    with pytest.raises(ValueError, match=r"^device: 'tpu'"):
        net.to("tpu")
    group = [*seeded(conv_pool).parameters(), *net.parameters()]
    with pytest.raises(TypeError, match=r"^params: .*devices"):
        optim.SGD(group, lr=0.1)
    with pytest.raises(ValueError, match=r"^target: label 3"):
        nn.CrossEntropyLoss()(net(images(x)), y + 1)


def dataset():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 4, 4, 2), dtype=np.uint8)
    return data.Dataset(pixels, np.arange(7) % 3, ("a", "b", "c"))


@pytest.mark.parametrize("augment", [None, data.Augmentation(flip=True, shift=1, noise=0.1)])
def test_a_loader_makes_the_same_batches(augment):
    loaders = [
        data.Loader(dataset(), 3, augment=augment, rng=1, normalize=(0.5, 0.25), device=device)
        for device in ("cuda", "cpu")
    ]
    for (ours, our_labels), (theirs, their_labels) in zip(*loaders, strict=True):
        assert np.array_equal(our_labels, their_labels)
        close(ours, theirs)


@pytest.mark.parametrize("on", ["cuda", "cpu"])
def test_a_trainer_takes_batches_from_either_side(on, tmp_path):
    histories = []
    for device in ("cuda", "cpu"):
        fastcnn.manual_seed(1)
        net = norm_pool().to(device)
        trainer = Trainer(
            net, optim.Adam(net.parameters(), lr=0.01), clip_norm=1.0, run_dir=tmp_path / device
        )
        given = on if device == "cuda" else "cpu"
        loaders = [data.Loader(dataset(), 4, rng=2, device=given) for _ in range(2)]
        histories.append(trainer.fit(*loaders, epochs=2))
        logits = trainer.predict(batch()[0])
        assert type(logits) is np.ndarray
        histories.append(logits)
    for name in ("train_loss", "val_loss", "val_accuracy"):
        close(np.array(histories[0][name]), np.array(histories[2][name]))
    close(histories[1], histories[3])
    fastcnn.manual_seed(1)
    net = norm_pool().to("cuda")
    resumed = Trainer(net, optim.Adam(net.parameters()), run_dir=tmp_path / "cpu")
    resumed.fit(*(data.Loader(dataset(), 4, rng=2) for _ in range(2)), epochs=2, resume=True)
    close(resumed.predict(batch()[0]), histories[3])


def test_a_loss_that_is_not_finite_names_the_layer():
    net = norm_pool().to("cuda")
    net[5].weight.data[...] = np.nan
    trainer = Trainer(net, optim.Adam(net.parameters()))
    with pytest.raises(fastcnn.train.NonFiniteLossError, match="parameter 'weight' of layer '5'"):
        trainer.fit(data.Loader(dataset(), 4, rng=2, device="cuda"), epochs=1)


def test_no_new_memory_after_the_first_step():
    x, y = batch()
    net = seeded(norm_pool).to("cuda")
    optimizer = optim.Adam(net.parameters())
    x = images(x)
    for _ in range(2):
        step(net, optimizer, x, y)
    before = cuda.arrays.pool.stats()["misses"]
    step(net, optimizer, x, y)
    assert cuda.arrays.pool.stats()["misses"] == before


def test_a_run_of_the_command_line_is_made_on_the_device():
    from fastcnn.cli.run import Datasets, Settings, build, load_datasets

    settings = Settings(
        data="digits",
        model="chapter9",
        epochs=1,
        batch_size=8,
        lr=None,
        optimizer="adam",
        weight_decay=None,
        schedule="none",
        augment="none",
        label_smoothing=0.0,
        validation=0.0,
        patience=None,
        limit_train=16,
        seed=0,
        device="cuda",
    ).resolved()
    parts = load_datasets(settings, lambda *_: None)
    assert isinstance(parts, Datasets)
    run = build(settings, parts)
    assert all(parameter.device == "cuda" for parameter in run.trainer.model.parameters())
    assert run.train.device == run.test.device == "cuda"
    x, y = next(iter(run.train))
    assert isinstance(x, cuda.DeviceArray)
    assert isinstance(y, np.ndarray)
