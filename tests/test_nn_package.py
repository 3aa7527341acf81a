"""What ``import fastcnn`` gives: lazy submodules, the seed, the gradient switch, thread counts."""

import subprocess
import sys
import threading

import numba
import numpy as np
import pytest

import fastcnn
from fastcnn import _random, nn


def test_import_loads_neither_numba_nor_submodules():
    code = (
        "import sys, fastcnn; "
        "loaded = [n for n in sys.modules if n.split('.')[0] == 'numba' or n.startswith('fastcnn.')]; "
        "assert set(loaded) <= {'fastcnn._grad_mode', 'fastcnn._random'}, loaded; "
        "assert fastcnn.nn.Linear and fastcnn.optim.SGD and fastcnn.get_num_threads() >= 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    for name in fastcnn.__all__:
        assert hasattr(fastcnn, name), name
        assert name in dir(fastcnn)
    for module in (fastcnn.nn, fastcnn.optim, fastcnn.models):
        for name in module.__all__:
            assert hasattr(module, name), name
    with pytest.raises(AttributeError, match="no attribute 'tensor'"):
        _ = fastcnn.tensor


def test_threads():
    before = fastcnn.get_num_threads()
    fastcnn.set_num_threads(1)
    assert fastcnn.get_num_threads() == 1
    fastcnn.set_num_threads(before)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
def test_training_does_not_depend_on_the_number_of_threads():
    before = fastcnn.get_num_threads()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, 3, 24, 24)).astype(np.float32), rng.integers(0, 5, 16)
    results = []
    try:
        for threads in (1, 2, 2):
            fastcnn.set_num_threads(threads)
            fastcnn.manual_seed(0)
            block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.PReLU())
            net = nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Residual(block),
                nn.Dropout(0.2),
                nn.AvgPool2d(2),
                nn.Flatten(),
                nn.Linear(16 * 36, 64),
                nn.LeakyReLU(),
                nn.Linear(64, 5),
            )
            opt, loss_fn = fastcnn.optim.Adam(net.parameters()), nn.CrossEntropyLoss()
            losses = []
            for _ in range(3):
                losses.append(loss_fn(net(x), y))
                dx = net.backward(loss_fn.backward())
                opt.step(zero_grad=True)
            state = [array.tobytes() for array in net.state_dict().values()]
            results.append((losses, dx.tobytes(), state))
    finally:
        fastcnn.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_manual_seed_starts_the_same_generator_afresh():
    generator = fastcnn.default_generator()
    assert fastcnn.manual_seed(5) is generator
    first = generator.random(3)
    fastcnn.manual_seed(5)
    np.testing.assert_array_equal(generator.random(3), first)
    np.testing.assert_array_equal(np.random.default_rng(5).random(3), first)
    with pytest.raises(ValueError, match="seed: -1 is negative"):
        fastcnn.manual_seed(-1)
    for bad in (1.5, True, "1"):
        with pytest.raises(TypeError, match="seed: expected an int"):
            fastcnn.manual_seed(bad)


def test_another_generator_for_a_while_and_this_thread_alone():
    common, own = fastcnn.default_generator(), np.random.default_rng(1)
    seen = []
    with _random.using(own):
        assert fastcnn.default_generator() is own
        thread = threading.Thread(target=lambda: seen.append(fastcnn.default_generator()))
        thread.start()
        thread.join()
    assert seen == [common]
    assert fastcnn.default_generator() is common


def test_no_grad_nests_and_decorates():
    @fastcnn.no_grad()
    def inside():
        return fastcnn.is_grad_enabled()

    assert fastcnn.is_grad_enabled()
    with fastcnn.no_grad():
        assert not fastcnn.is_grad_enabled()
        assert not inside()
        assert not fastcnn.is_grad_enabled()
    assert not inside()
    again = fastcnn.no_grad()
    with again:
        with again:
            pass
        assert not fastcnn.is_grad_enabled()
    assert fastcnn.is_grad_enabled()
    with pytest.raises(KeyError), fastcnn.no_grad():
        raise KeyError
    assert fastcnn.is_grad_enabled()


def test_no_grad_is_the_threads_own():
    seen = []
    with fastcnn.no_grad():
        thread = threading.Thread(target=lambda: seen.append(fastcnn.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


def test_two_threads_infer_with_one_network():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * 9, 3))
    xs = np.random.default_rng(0).standard_normal((8, 4, 1, 8, 8)).astype(np.float32)
    with fastcnn.no_grad():
        expected = [net(x).copy() for x in xs]
    failures = []

    def work():
        with fastcnn.no_grad():
            for _ in range(10):
                for x, y in zip(xs, expected, strict=True):
                    if not np.array_equal(net(x), y):
                        failures.append(x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
