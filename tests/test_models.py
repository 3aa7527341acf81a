"""The named models: any image, any number of classes, a seed; and they learn."""

import json
import math

import numpy as np
import pytest

import fastcnn
from fastcnn import models, nn, optim

SHAPES = {
    "emotion": (1, 48, 48),
    "cifar-small": (3, 32, 32),
    "cifar-batchnorm": (3, 32, 32),
    "chapter9": (1, 28, 28),
    "mnist-prelu": (1, 28, 28),
    "resnet9": (3, 32, 32),
}


@pytest.fixture(params=models.names())
def name(request):
    return request.param


def test_names():
    assert models.names() == list(SHAPES)


def test_sizes_of_the_source_documents():
    """Linear(360, 64) and Linear(1690, 300) stand in the CIFAR-10 diary."""
    small = models.create("cifar-small", (3, 32, 32), 10)
    assert [small[i].weight.shape for i in (0, 3, 7, 9)] == [
        (10, 3, 5, 5),
        (10, 10, 3, 3),
        (64, 360),
        (10, 64),
    ]
    batchnorm = models.create("cifar-batchnorm", (3, 32, 32), 10)
    assert [batchnorm[i].weight.shape for i in (0, 6, 8)] == [(10, 3, 7, 7), (300, 1690), (10, 300)]
    assert models.create("emotion", (1, 48, 48), 7)[7].weight.shape == (128, 64 * 12 * 12)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 33)])
def test_any_image_and_number_of_classes(name, shape):
    net = models.create(name, shape, 4, seed=0)
    x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
    logits = net(x)
    assert logits.shape == (3, 4)
    assert net.output_shape(shape) == (4,)
    assert net.backward(logits).shape == x.shape


def test_a_seed_decides_the_values_and_leaves_the_generator(name):
    state = fastcnn.default_generator().bit_generator.state
    one, other = (models.create(name, SHAPES[name], 10, seed=3).state_dict() for _ in range(2))
    assert fastcnn.default_generator().bit_generator.state == state
    for key, array in one.items():
        np.testing.assert_array_equal(array, other[key])
    different = models.create(name, SHAPES[name], 10, seed=4).state_dict()
    assert any(not np.array_equal(array, different[key]) for key, array in one.items())
    fastcnn.manual_seed(3)
    for key, array in models.create(name, SHAPES[name], 10).state_dict().items():
        np.testing.assert_array_equal(array, one[key])


def test_first_losses_are_those_of_guessing(name):
    net = models.create(name, SHAPES[name], 10, seed=0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, *SHAPES[name])).astype(np.float32)
    loss = nn.CrossEntropyLoss()(net(x), rng.integers(0, 10, 16))
    assert math.log(10) / 2 < loss < 2 * math.log(10)


def test_config_rebuilds_the_model(name):
    net = models.create(name, SHAPES[name], 5, seed=0)
    assert net.config == {"name": name, "input_shape": SHAPES[name], "num_classes": 5}
    twin = models.create(**json.loads(json.dumps(net.config)))
    twin.load_state_dict(net.state_dict())
    assert twin.config == net.config


def test_one_flat_store(name):
    net = models.create(name, SHAPES[name], 5, seed=0)
    assert len(optim.SGD(net.parameters())._flats[0].segments) == 1


@pytest.mark.parametrize("name", ["cifar-small", "cifar-batchnorm", "mnist-prelu"])
def test_overfits_ten_samples(name):
    net = models.create(name, SHAPES[name], 10, seed=0)
    rng = np.random.default_rng(0)
    x = rng.random((10, *SHAPES[name]), np.float32)
    y = np.arange(10)
    opt, loss_fn = optim.Adam(net.parameters(), lr=2e-3), nn.CrossEntropyLoss()
    for _ in range(60):
        loss_fn(net(x), y)
        net.backward(loss_fn.backward(), input_grad=False)
        opt.step(zero_grad=True)
        with fastcnn.no_grad():
            right = (net.eval()(x).argmax(1) == y).all()
        net.train()
        if right:
            break
    assert right


@pytest.mark.parametrize("small", [(1, 3, 3), (3, 1, 40)])
def test_images_too_small_for_the_model(name, small):
    with pytest.raises(ValueError, match=r"input_shape: \(.*\) is too small for '.*': kernel_size"):
        models.create(name, small, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg"}, "name: 'vgg' is none of emotion"),
        ({"input_shape": (48, 48)}, r"input_shape: expected \(C, H, W\)"),
        ({"input_shape": 48}, r"input_shape: expected \(C, H, W\), got 48"),
        ({"input_shape": (0, 48, 48)}, "input_shape: 0 is below 1"),
        ({"num_classes": 0}, "num_classes: 0 is below 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(**{"name": "emotion", "input_shape": (1, 48, 48), "num_classes": 7} | arguments)
