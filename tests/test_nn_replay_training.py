"""Training steps that are played again: the bits of the layers' own, whatever changes between two steps."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
from played_steps import (
    BLOCKS,
    SHAPES,
    assert_same,
    batch_of,
    compare,
    grads,
    is_played,
    played,
    small,
    step,
    twins,
)

import fastcnn
from fastcnn import _random, models, nn, optim
from fastcnn.nn import replay


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("batch", [1, 5, 20])
@pytest.mark.parametrize("name", SHAPES)
def test_a_played_step_has_the_bits_of_the_layers(name, batch, input_grad):
    net, plain = twins(lambda: models.create(name, SHAPES[name], 10, seed=0))
    compare(net, plain, (batch, *SHAPES[name]), np.float32, input_grad=input_grad)
    assert is_played(net)


@pytest.mark.parametrize("name", SHAPES)
def test_in_float64(name):
    net, plain = twins(lambda: models.create(name, SHAPES[name], 10, seed=0).double())
    compare(net, plain, (3, *SHAPES[name]), np.float64)
    assert is_played(net)


def test_a_network_with_skip_connections():
    net, plain = twins(lambda: models.create("resnet9", (3, 32, 32), 10, seed=0))
    compare(net, plain, (2, 3, 32, 32), np.float32, steps=4)
    assert is_played(net)


def test_a_pass_with_more_to_copy_than_to_do_is_not_recorded():
    net, plain = twins(lambda: nn.Sequential(nn.ReLU()))
    compare(net, plain, (4, 16, 64, 64), np.float32)
    assert not is_played(net)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_layers_of_every_kind(name, fusion):
    fastcnn.set_fusion(fusion)
    try:
        for dtype, batch in ((np.float32, 3), (np.float32, 17), (np.float64, 2)):
            make = lambda: nn.Sequential(*BLOCKS[name]())  # noqa: E731
            net, plain = twins(make if dtype == np.float32 else lambda: make().double())  # noqa: B023
            compare(net, plain, (batch, 8, 12, 15), dtype)
            assert is_played(net)
    finally:
        fastcnn.set_fusion(True)


def test_every_layout_of_the_batch():
    net, plain, x = played()
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    spread = np.zeros((4, 3, 64, 96), np.float32)[:, :, ::2, ::3]
    spread[...] = x
    frozen = x.copy()
    frozen.setflags(write=False)
    for other in (last, spread, x.astype(">f4"), frozen, x[:, :, ::-1][:, :, ::-1]):
        for _ in range(4):
            plain.load_state_dict(net.state_dict())
            net.zero_grad()
            plain.zero_grad()
            assert_same(step(net, other, np.ones_like), step(plain, x, np.ones_like))


def test_results_are_never_overwritten_and_inputs_are_not_kept():
    net, plain, x = played()
    plain.load_state_dict(net.state_dict())
    results = []
    for seed in range(6):
        x = batch_of(4, seed)
        y = net(x)
        x[...] = np.nan
        dout = np.full_like(y, seed)
        dx = net.backward(dout)
        dout[...] = np.nan
        results.append((y, y.copy(), dx, dx.copy()))
    for y, y_then, dx, dx_then in results:
        np.testing.assert_array_equal(y, y_then)
        np.testing.assert_array_equal(dx, dx_then)
        assert np.isfinite(dx).all()
    for seed, (y, *_) in enumerate(results):
        np.testing.assert_array_equal(y, plain(batch_of(4, seed)))


def test_the_last_forward_pass_is_the_one_that_backward_follows():
    net, plain, x = played()
    other, fewer = batch_of(4, 8), batch_of(3, 9)
    for of in (net, plain):
        of.zero_grad()
    plain.load_state_dict(net.state_dict())
    for first, second in ((x, other), (fewer, x), (x, fewer), (other, x)):
        results = []
        for of in (net, plain):
            of(first)
            results.append(step(of, second, np.ones_like))
        assert_same(*results)


def test_each_forward_pass_serves_one_backward_pass():
    net, _, x = played()
    y = net(x)
    net.backward(y)
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        net.backward(y)
    net(x)
    with fastcnn.no_grad():
        net(x[:1])
    with pytest.raises(RuntimeError, match="none inside no_grad"):
        net.backward(y)


def test_a_wrong_gradient_leaves_everything_as_it_was():
    net, plain, x = played()
    plain.load_state_dict(net.state_dict())
    for of in (net, plain):
        of.zero_grad()
    y, expected = net(x), plain(x)
    for _ in range(3):
        with pytest.raises(ValueError, match="dout: shape"):
            net.backward(np.ones((4, 11), np.float32))
        with pytest.raises(TypeError, match="dout: dtype"):
            net.backward(y.astype(np.float64))
        with pytest.raises(TypeError, match="dout: expected"):
            net.backward(y.tolist())
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(net.backward(y), plain.backward(y))
    assert_same(grads(net), grads(plain))


def test_a_backward_pass_that_is_not_played_finds_what_forward_kept():
    net, plain, x = played()
    plain.load_state_dict(net.state_dict())
    results = []
    for of in (net, plain):
        of.zero_grad()
        y = of(x)
        # Strides that were not seen before.
        results.append([of.backward(np.asfortranarray(y)), *grads(of)])
    assert_same(*results)


def test_layers_walked_through_backward_by_hand():
    fastcnn.set_fusion(False)
    try:
        net, plain, x = played()
        plain.load_state_dict(net.state_dict())
        results = []
        for of in (net, plain):
            of.zero_grad()
            grad = np.ones_like(of(x))
            for layer in reversed(list(of)):
                grad = layer.backward(grad)
            results.append([grad, *grads(of)])
        assert_same(*results)
    finally:
        fastcnn.set_fusion(True)


def test_a_changed_setting_counts_at_once():
    net, plain, x = played(lambda: models.create("cifar-batchnorm", (3, 32, 32), 10, seed=0))

    def check():
        for _ in range(4):
            plain.load_state_dict(net.state_dict())
            for of in (net, plain):
                of.zero_grad()
            assert_same(*(step(of, x, np.ones_like) for of in (net, plain)))

    threads = fastcnn.get_num_threads()
    try:
        for switch in (fastcnn.set_fusion, fastcnn.set_winograd):
            switch(False)
            check()
            switch(True)
            check()
        fastcnn.set_num_threads(1)
        check()
    finally:
        fastcnn.set_fusion(True)
        fastcnn.set_winograd(True)
        fastcnn.set_num_threads(threads)
    norm = next(i for i, layer in enumerate(net) if isinstance(layer, nn.BatchNorm2d))
    for change in (
        lambda of: setattr(of[norm], "momentum", 0.5),
        lambda of: setattr(of[norm], "momentum", None),
        lambda of: setattr(of[norm], "momentum", 0.1),
        lambda of: of[norm].eval(),
        lambda of: of.eval(),
        lambda of: of.train(),
        lambda of: of[0].requires_grad_(False),
        lambda of: setattr(of[0].bias, "requires_grad", True),
        lambda of: of.append(nn.LeakyReLU(0.5)),
        lambda of: nn.Sequential(nn.Linear(3, 3), of),  # moves the parameters
    ):
        for of in (net, plain):
            change(of)
        check()


def test_passes_are_kept_from_epoch_to_epoch():
    net, plain, x = played(lambda: models.create("cifar-batchnorm", (3, 32, 32), 10, seed=0))
    fewer = batch_of(2)
    for of in (net, plain):
        of.zero_grad()
    for epoch in range(4):
        plain.load_state_dict(net.state_dict())
        for batch in (x, x, fewer):
            assert_same(*(step(of, batch, np.ones_like, seed=epoch) for of in (net.train(), plain.train())))
        with fastcnn.no_grad():
            for batch in (x, fewer):
                np.testing.assert_array_equal(net.eval()(batch), plain.eval()(batch))
        if epoch == 2:
            known = dict(net._replay._known.passes)
    assert known == net._replay._known.passes
    assert len(known) == 4
    assert all(isinstance(one, replay._Pass) for one in known.values())


def test_a_switch_between_the_passes_of_a_step():
    net, plain, x = played()
    for change in (fastcnn.set_winograd, fastcnn.set_fusion):
        plain.load_state_dict(net.state_dict())
        results = []
        for of in (net, plain):
            of.zero_grad()
            y = of(x)
            try:
                change(False)
                results.append([of.backward(y), *grads(of)])
            finally:
                change(True)
        assert_same(*results)


def test_slopes_that_turn_negative_count_at_once():
    shape = (1, 28, 28)
    net, plain, x = played(lambda: models.create("mnist-prelu", shape, 10, seed=0), shape=shape)
    for slope in (-0.5, 0.25, 0.0, 0.5):
        for of in (net, plain):
            of[1].weight.data[...] = slope
        compare(net, plain, x.shape, np.float32, steps=3)


def test_dropout_draws_what_it_would_draw():
    make = lambda: nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 8), nn.Dropout(0.25))  # noqa: E731
    net, plain = twins(make)
    x = np.ones((3, 2, 2, 2), np.float32)
    results = []
    for of in (net, plain):
        fastcnn.manual_seed(4)
        results.append([])
        for _ in range(6):
            y = of(x)
            results[-1] += [y, of.backward(np.ones_like(y))]
    assert is_played(net)
    assert_same(*results)
    assert not np.array_equal(results[0][-2], results[0][-4])


def test_overflow_ends_in_nan_and_without_a_warning():
    net, plain, _ = played(lambda: models.create("cifar-batchnorm", (3, 32, 32), 10, seed=0))
    x = np.full((4, 3, 32, 32), 3e38, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(net.state_dict())
        assert_same(*(step(of, x, np.ones_like) for of in (net, plain)))


def test_layers_of_other_classes_are_run():
    class Twice(nn.Module):
        def forward(self, input):
            return input * np.float32(2)

        def backward(self, dout, input_grad=True):
            return dout * np.float32(2)

    net = nn.Sequential(nn.Linear(4, 4), Twice())
    for _ in range(4):
        step(net, np.ones((2, 4), np.float32), np.ones_like)
    assert not is_played(net)


def test_networks_in_networks_are_recorded_as_one():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(inner, nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    for _ in range(4):
        step(net, batch_of(2), np.ones_like)
    assert not is_played(net)
    assert not inner._replay._known.passes
    outer = nn.Sequential(inner, nn.MaxPool2d(2))
    for _ in range(4):
        step(outer, batch_of(2), np.ones_like)
    assert is_played(outer)
    assert not inner._replay._known.passes


def test_repeated_layers():
    def make():
        layer = nn.Conv2d(3, 3, 3, padding=1)
        return nn.Sequential(layer, nn.ReLU(), layer, nn.PReLU(), layer)

    net, plain = twins(make)
    compare(net, plain, (2, 3, 8, 9), np.float32)
    assert is_played(net)


def test_a_network_that_runs_twice_in_a_skip_connection():
    for place in ("shortcut", "activation"):
        made = []
        for play in (True, False):
            fastcnn.manual_seed(0)
            body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5), nn.ReLU())
            body._replay.forward = body._replay.forward if play else lambda *_: None
            made.append(nn.Residual(body, **{place: body}))
        for seed in range(5):
            x = np.ascontiguousarray(batch_of(4, seed).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            assert_same(*(step(of, x, lambda y: y, seed=seed) for of in made))


def test_a_layer_with_a_layer_of_its_own_is_not_recorded():
    x, rows = batch_of(2), np.ones((2, 4), np.float32)
    for net in (nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Sequential(nn.Residual(nn.Conv2d(3, 3, 1)))):
        extra = nn.Linear(4, 4)
        net[0].extra = extra
        for factor in range(1, 5):
            extra(rows * np.float32(factor))
            step(net, x, np.ones_like)
            extra.zero_grad()
            extra.backward(rows)
            np.testing.assert_array_equal(extra.weight.grad, 2 * factor)
        assert not is_played(net)


class Interrupted(Exception):
    """What Ctrl-C raises, but for pytest, which would end."""


class Stop:
    """A random generator at which Ctrl-C is pressed."""

    def integers(self, *_, **__):
        raise Interrupted


@pytest.mark.parametrize("times", [0, 4])
def test_no_backward_pass_follows_an_interrupted_forward_pass(times):
    def make():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(2))

    x = batch_of(3)
    for net in (make(), nn.Residual(nn.Sequential(nn.Dropout(0.5)))):
        for _ in range(times):
            step(net, x, np.ones_like)
        y = net(x)
        with pytest.raises(Interrupted), _random.using(Stop()):
            net(x)
        with pytest.raises(RuntimeError, match="needs a forward before it"):
            net.backward(y)
        step(net, x, np.ones_like)


def test_a_change_in_the_middle_of_a_recording_counts():
    """As another thread may make it."""
    net, x = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5), nn.Linear(3, 3)), np.ones((2, 3), np.float32)
    changes = []

    class Meddler:
        def integers(self, *_, **__):
            if changes:
                changes.pop()()
                net(x)
            return 7

    with _random.using(Meddler()):
        for _ in range(2):
            net(x)
        changes.append(lambda: setattr(net[0], "p", 0.9))
        net(x)
        for _ in range(4):
            np.testing.assert_array_equal(net(x), net._run(x))


def test_an_interrupted_backward_pass_is_not_done_again():
    net, _, x = played()
    y = net(x)
    (known,) = (known for known in net._replay._known.latest.backward.values() if known.result() is not None)
    known.play = Stop().integers
    with pytest.raises(Interrupted):
        net.backward(np.ones_like(y))
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        net.backward(np.ones_like(y))


def test_large_batches_are_not_recorded():
    net = nn.Sequential(nn.Linear(1 << 10, 2))
    x = np.ones((1 << 12, 1 << 10), np.float32)
    for _ in range(4):
        step(net, x, np.ones_like)
    assert not is_played(net)


def test_copies_and_pickles_have_recordings_of_their_own():
    net, plain, x = played()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert not is_played(twin)
        plain.load_state_dict(net.state_dict())
        for of in (twin, plain):
            of.zero_grad()
        compare(twin, plain, x.shape, np.float32)
        assert is_played(twin)


def test_every_python_thread_records_its_own():
    net, plain, _ = played()
    plain.load_state_dict(net.state_dict())
    results = []

    def work(of):
        of.zero_grad()
        results.extend([step(of, batch_of(4, seed), np.ones_like) for seed in range(4)])

    for of in (net, plain):
        thread = threading.Thread(target=work, args=(of,))
        thread.start()
        thread.join()
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        assert_same(ours, theirs)
    assert len({key[-1] for key in net._replay._known.passes}) == 2


def test_networks_in_several_threads_at_once():
    # Without dropout, whose seeds come from one generator.
    makers = [small, lambda: models.create("emotion", (1, 48, 48), 10, seed=0)]
    shapes = [(5, 3, 32, 32), (5, 1, 48, 48)]
    wrong = []

    def work(number):
        net, plain = twins(makers[number % 2])
        try:
            compare(net, plain, shapes[number % 2], np.float32, steps=12, seed=number)
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_learns_with_an_optimiser():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    x = (rng.standard_normal((64, 1, 8, 8)) + labels[:, None, None, None]).astype(np.float32)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    loss_fn, optimizer = nn.CrossEntropyLoss(), optim.Adam(net.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        losses.append(loss_fn(net(x), labels))
        net.backward(loss_fn.backward(), input_grad=False)
        optimizer.step(zero_grad=True)
    assert is_played(net)
    assert losses[-1] < 0.2 * losses[0]
