"""The memory of recorded passes: how much it is, that it is used again, and that it is given back."""

import gc
import weakref

import numpy as np
import pytest
from played_steps import BLOCKS, SHAPES, assert_same, compare, grads, is_played, played, step, twins

import fastcnn
from fastcnn import _buffers, models, nn
from fastcnn.nn import replay


def test_passes_that_take_much_memory_are_not_recorded(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_BYTES", 1 << 24)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.AvgPool2d(8))
    for size, expected in ((128, False), (32, True)):
        x = np.ones((16, 1, size, size), np.float32)
        for _ in range(4):
            step(net, x, np.ones_like)
        assert is_played(net) is expected


def test_recordings_share_the_memory_of_a_network(monkeypatch):
    monkeypatch.setattr(replay, "_MOST_BYTES", 1 << 23)
    net = nn.Sequential(nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.AvgPool2d(8))
    for batch in (16, 15, 14, 13):
        for _ in range(4):
            step(net, np.ones((batch, 1, 32, 32), np.float32), np.ones_like)
    recorded = [one for one in net._replay._known.passes.values() if isinstance(one, replay._Pass)]
    assert 1 <= len(recorded) < 4
    assert len(recorded[-1]._output) == 13


def poison(net):
    """Overwrite, with NaN, what no layer holds of the memory of recorded passes."""
    for known in net._replay._known.passes.values():
        for buffers in known.pool.buffers.values() if isinstance(known, replay._Pass) else ():
            for buffer in buffers:
                if buffer.references() == _buffers._UNHELD:
                    buffer.raw.fill(0xFF)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("name", [*BLOCKS, *SHAPES])
def test_a_played_pass_reads_nothing_that_another_left(name, fusion):
    """Its memory is used again within it: nothing may be there that only the recording wrote."""
    fastcnn.set_fusion(fusion)
    try:
        if name in BLOCKS:
            net, plain = twins(lambda: nn.Sequential(*BLOCKS[name]()))
            shape = (17, 8, 12, 15)
        else:
            net, plain = twins(lambda: models.create(name, SHAPES[name], 10, seed=0))
            shape = (5, *SHAPES[name])
        compare(net, plain, shape, np.float32, steps=3)
        assert is_played(net)
        for seed in range(3):
            poison(net)
            compare(net, plain, shape, np.float32, steps=1, seed=seed)
    finally:
        fastcnn.set_fusion(True)


def test_a_recorded_pass_takes_little_more_memory_than_its_results():
    """A gradient of one layer lies where that of another did."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(12)]
    net = nn.Sequential(*layers)
    x = np.ones((4, 8, 32, 32), np.float32)
    for _ in range(4):
        step(net, x, np.ones_like)
    assert is_played(net)
    (recorded,) = (one for one in net._replay._known.passes.values() if isinstance(one, replay._Pass))
    # Each block keeps two results of its layers for the gradients.
    assert recorded.pool.bytes() < (2 * 12 + 8) * x.nbytes


def recorded_bytes(net):
    passes = net._replay._known.passes.values()
    return sum(one.pool.bytes() for one in passes if isinstance(one, replay._Pass))


def bottleneck():
    """Wider inside than at its ends."""
    inner = [nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1, groups=32)]
    return nn.Residual(nn.Sequential(*inner, nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 8, 1)))


def narrowing():
    """Sizes that come but once."""
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(c, f, 3), nn.BatchNorm2d(f), nn.ReLU())
            for c, f in ((8, 64), (64, 32), (32, 16))
        )
    )


@pytest.mark.parametrize("make", [lambda: [bottleneck() for _ in range(4)], lambda: [narrowing()]])
def test_recording_takes_no_more_than_running_the_layers(make):
    """Gradients lie where layers kept what they needed, once they are done with it."""
    net, plain = twins(lambda: nn.Sequential(*make()))
    x = np.ones((17, 8, 12, 15), np.float32)
    _buffers.clear()
    step(plain, x, np.ones_like)
    most = _buffers.stats()["bytes"]
    for _ in range(4):
        step(net, x, np.ones_like)
    assert is_played(net)
    assert recorded_bytes(net) <= most


@pytest.mark.parametrize("name", ["deep", "residual", "norms", "dropout", "lists"])
def test_what_layers_kept_outlives_the_recording(name):
    """A backward pass that is not played finds what the played forward pass left, whatever became of it."""
    net, plain = twins(lambda: nn.Sequential(*BLOCKS[name]()))
    shape = (5, 8, 12, 15)
    compare(net, plain, shape, np.float32, steps=4)
    assert is_played(net)
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    gradients = []
    for of in (net, plain):
        of.zero_grad()
        fastcnn.manual_seed(3)
        dout = np.ones_like(of(x))
        of._replay._known.passes.clear()
        of._replay._known.latest = None
        gc.collect()
        # Somebody else's buffers, of the same sizes.
        others = [_buffers.empty(array.shape, np.float32) for array in (x, dout) for _ in range(9)]
        for other in others:
            other.fill(np.nan)
        gradients.append([of.backward(dout), *grads(of)])
    assert_same(*gradients)


def test_memory_is_given_back_with_the_network():
    net, plain, _ = played()
    known = [known for known in net._replay._known.passes.values() if isinstance(known, replay._Pass)]
    outputs = [weakref.ref(one._output) for one in known]
    assert outputs
    del known, plain
    # Without the collector of garbage, which does not know how large arrays are.
    gc.disable()
    try:
        del net
        assert [output() for output in outputs] == [None] * len(outputs)
    finally:
        gc.enable()
