"""Batches: complete, in the right order, never overwritten, and the same with and without the thread."""

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import fastcnn
from fastcnn import data
from fastcnn.data import Augmentation, Dataset, Loader
from fastcnn.data.prefetch import Prefetched

RNG = np.random.default_rng(2)
N = 107
IMAGES = RNG.integers(0, 256, (N, 6, 5, 3), np.uint8)
# The label is the row, so that batches tell which images they hold.
DATASET = Dataset(IMAGES, np.arange(N), tuple(map(str, range(N))), "rows")
STRONG = Augmentation(flip=True, shift=2, brightness=0.2, contrast=0.3, noise=0.1, cutout=3)


def epoch(loader):
    """Copies of all batches."""
    return [(x.copy(), y.copy()) for x, y in loader]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, b) and np.array_equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True)
    )


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "fastcnn-prefetch"]


def wait_for_no_thread():
    for _ in range(500):
        if not threads():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("batch_size", [1, 10, 53, 54, 106, 107, 108, 1000])
def test_every_image_once_an_epoch(batch_size, prefetch):
    loader = Loader(DATASET, batch_size, prefetch=prefetch, rng=0)
    for _ in range(2):
        batches = epoch(loader)
        assert len(batches) == len(loader) == -(-N // batch_size)
        assert sorted(np.concatenate([y for _, y in batches])) == list(range(N))
        assert all(len(x) == len(y) == batch_size for x, y in batches[:-1])


@pytest.mark.parametrize("prefetch", [True, False])
def test_pixels_and_layout(prefetch):
    for x, y in Loader(DATASET, 16, rng=0, prefetch=prefetch):
        assert x.dtype == np.float32
        assert y.dtype == np.int64
        assert x.shape[1:] == (3, 6, 5)
        assert x.transpose(0, 2, 3, 1).flags.c_contiguous
        np.testing.assert_allclose(x, IMAGES[y].transpose(0, 3, 1, 2) / 255, rtol=1e-6)


def test_normalize():
    mean, std = DATASET.mean_std()
    x = np.concatenate([x for x, _ in Loader(DATASET, 16, normalize=(mean, std), rng=0)])
    np.testing.assert_allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(0, 2, 3)), 1, atol=1e-5)
    floats = Dataset((IMAGES / 255).astype(np.float32), DATASET.labels, DATASET.classes)
    x = np.concatenate([x for x, _ in Loader(floats, 16, shuffle=False, normalize=(0.5, 0.25))])
    np.testing.assert_allclose(x, (IMAGES.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, atol=1e-5)


def test_orders():
    loader = Loader(DATASET, 20, rng=0)
    first, second = (np.concatenate([y for _, y in loader]) for _ in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(N))
    plain = np.concatenate([y for _, y in Loader(DATASET, 20, shuffle=False)])
    np.testing.assert_array_equal(plain, np.arange(N))


def test_drop_last():
    loader = Loader(DATASET, 20, drop_last=True, rng=0)
    assert [len(y) for _, y in loader] == [20] * 5
    assert len(loader) == 5
    assert len(Loader(DATASET.subset(range(40)), 20, drop_last=True)) == 2


@pytest.mark.parametrize("augment", [None, STRONG])
def test_the_thread_changes_nothing(augment):
    runs = []
    for prefetch in (True, False):
        loader = Loader(DATASET, 16, augment=augment, rng=np.random.default_rng(5), prefetch=prefetch)
        runs.append(epoch(loader) + epoch(loader))
    assert same(*runs)


def test_thread_count_changes_nothing():
    runs = []
    before = fastcnn.get_num_threads()
    try:
        for count in (1, before):
            fastcnn.set_num_threads(count)
            runs.append(epoch(Loader(DATASET, 50, augment=STRONG, rng=5)))
    finally:
        fastcnn.set_num_threads(before)
    assert same(*runs)


@pytest.mark.parametrize("prefetch", [True, False])
def test_resume_from_the_generators_state(prefetch):
    loader = Loader(DATASET, 16, augment=STRONG, rng=5, prefetch=prefetch)
    epoch(loader)
    state = loader.rng.bit_generator.state
    wanted = epoch(loader) + epoch(loader)
    resumed = Loader(DATASET, 16, augment=STRONG, rng=0, prefetch=prefetch)
    resumed.rng.bit_generator.state = state
    assert same(wanted, epoch(resumed) + epoch(resumed))


def test_an_abandoned_epoch_counts_as_one():
    loaders = [Loader(DATASET, 16, augment=STRONG, rng=5) for _ in range(2)]
    epoch(loaders[0])
    next(iter(loaders[1]))
    assert same(epoch(loaders[0]), epoch(loaders[1]))


def test_default_generator():
    orders = []
    for _ in range(2):
        fastcnn.manual_seed(11)
        orders.append(np.concatenate([y for _, y in Loader(DATASET, 16)]))
    np.testing.assert_array_equal(*orders)
    assert Loader(DATASET).rng is fastcnn.default_generator()


def test_without_randomness_nothing_is_drawn():
    rng = np.random.default_rng(0)
    epoch(Loader(DATASET, 16, shuffle=False, rng=rng))
    assert rng.random() == np.random.default_rng(0).random()


def test_held_batches_are_never_overwritten():
    loader = Loader(DATASET, 8, rng=0)
    held = [(x, y, x.copy()) for _ in range(3) for x, y in loader]
    epoch(loader)
    for x, y, copy in held:
        np.testing.assert_array_equal(x, copy)
        np.testing.assert_allclose(x, IMAGES[y].transpose(0, 3, 1, 2) / 255, rtol=1e-6)


def test_a_held_view_is_enough():
    loader = Loader(DATASET, 8, rng=0)
    views = []
    for x, _ in loader:
        views.append((memoryview(x.transpose(0, 2, 3, 1)[1:, 2]), x[1:, :, 2].transpose(0, 2, 1).copy()))
        del x
    epoch(loader)
    assert all(np.array_equal(np.asarray(view), copy) for view, copy in views)


def test_memory_is_used_again():
    loader = Loader(DATASET, 8, rng=0)
    addresses = [x.__array_interface__["data"][0] for _ in range(5) for x, _ in loader]
    assert len(set(addresses)) <= 10


def test_two_iterators_at_once():
    loader = Loader(DATASET, 16, rng=0)
    pairs = list(zip(loader, loader, strict=True))
    for side in (0, 1):
        assert sorted(np.concatenate([pair[side][1] for pair in pairs])) == list(range(N))


def test_thread_ends_with_the_epoch():
    epoch(Loader(DATASET, 16, rng=0))
    assert wait_for_no_thread()


def test_thread_ends_when_the_iterator_is_dropped():
    iterator = iter(Loader(DATASET, 4, rng=0))
    next(iterator)
    assert threads()
    del iterator
    gc.collect()
    assert wait_for_no_thread()


def test_thread_ends_on_close_and_break():
    iterator = iter(Loader(DATASET, 4, rng=0))
    next(iterator)
    iterator.close()
    assert not threads()
    assert next(iterator, None) is None
    for _ in Loader(DATASET, 4, rng=0):
        break
    gc.collect()
    assert wait_for_no_thread()


def test_errors_come_out_where_the_item_would():
    def make(index):
        if index == 3:
            raise RuntimeError("no more")
        return index

    iterator = Prefetched(make, 10)
    assert [next(iterator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no more"):
        next(iterator)
    assert next(iterator, None) is None
    assert wait_for_no_thread()


def test_no_further_ahead_than_depth():
    made = []
    iterator = Prefetched(made.append, 10, depth=2)
    next(iterator)
    time.sleep(0.05)
    assert len(made) <= 3
    iterator.close()


def run(code):
    """Output of a Python process that runs `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split()


def test_interpreter_ends_with_an_iterator_alive():
    out = run(
        """
        from fastcnn import data
        iterator = iter(data.Loader(data.load("digits", "test"), 8, rng=0))
        next(iterator)
        print("done")
        """
    )
    assert out == ["done"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_goes_on_by_itself():
    out = run(
        """
        import os, sys
        import numpy as np
        from fastcnn import data
        loader = data.Loader(data.load("digits", "test"), 100, rng=0)
        wanted = [y.tolist() for _, y in data.Loader(loader.dataset, 100, rng=0)]
        iterator = iter(loader)
        got = [next(iterator)[1].tolist() for _ in range(3)]
        child = os.fork()
        rest = [y.tolist() for _, y in iterator]
        assert got + rest == wanted
        if child:
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out[-1] == "0"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dataset": IMAGES}, TypeError, "dataset: expected a Dataset, got ndarray"),
        ({"batch_size": 0}, ValueError, "batch_size: 0 is below 1"),
        ({"batch_size": -3}, ValueError, "batch_size: -3"),
        ({"batch_size": 2.5}, TypeError, "batch_size: expected an int"),
        (
            {"batch_size": 108, "drop_last": True},
            ValueError,
            "batch_size: 108 with drop_last leaves no batch",
        ),
        ({"augment": "heavy"}, ValueError, "augment: 'heavy'"),
        ({"normalize": 0.5}, TypeError, r"normalize: expected \(mean, std\)"),
        ({"normalize": ([0.5, 0.5], 1.0)}, ValueError, r"normalize: mean of shape \(2,\)"),
        ({"normalize": (0.5, 0.0)}, ValueError, "is not above 0"),
        ({"normalize": (0.5, float("nan"))}, ValueError, "std nan is not finite"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        Loader(**({"dataset": DATASET} | change))


def test_digits_epoch():
    digits = data.load("digits")
    x, y = next(iter(Loader(digits, 64, augment="digits", normalize=digits.mean_std(), rng=0)))
    assert x.shape == (64, 1, 28, 28)
    assert np.isfinite(x).all()
    assert set(y) <= set(range(10))
