"""The buffer pool: memory is used again, and never while anybody holds it."""

import os
import threading
import tracemalloc

import numpy as np
import pytest

import fastcnn
from fastcnn import _buffers, nn, optim

SIZE = 123_457  # of no buffer elsewhere


def test_a_free_buffer_is_used_again():
    first = _buffers.empty((SIZE,), np.float32)
    address = first.ctypes.data
    del first
    before = _buffers.stats()
    second = _buffers.empty((SIZE,), np.float32)
    assert second.ctypes.data == address
    after = _buffers.stats()
    assert (after["hits"], after["misses"]) == (before["hits"] + 1, before["misses"])


def test_buffers_are_aligned_and_writable():
    for shape in ((), (0,), (3,), (2, 0, 5), (7, 5, 3)):
        for dtype in (np.uint8, np.float32, np.float64):
            array = _buffers.empty(shape, dtype)
            assert array.shape == shape
            assert array.dtype == dtype
            assert array.flags.c_contiguous
            array[...] = 1


def hold_view(array):
    return array[5:10]


def hold_reshaped_view_of_view(array):
    return array.reshape(-1, 1).T[:, 2:9]


def hold_transposed_other_dtype(array):
    return array.view(np.int32)[::-1]


def hold_memoryview(array):
    return memoryview(array)[3:6]


def hold_tensor(array):
    return pytest.importorskip("torch").from_numpy(array)[3:9]


def hold_dlpack(array):
    return np.from_dlpack(array)


@pytest.mark.parametrize(
    "hold",
    [
        hold_view,
        hold_reshaped_view_of_view,
        hold_transposed_other_dtype,
        hold_memoryview,
        hold_tensor,
        hold_dlpack,
    ],
)
def test_whatever_is_held_is_not_handed_out(hold):
    array = _buffers.empty((SIZE,), np.float32)
    array[...] = 1
    held = hold(array)
    expected = np.asarray(held).copy()
    del array
    for _ in range(3):
        _buffers.empty((SIZE,), np.float32)[...] = 7
    np.testing.assert_array_equal(np.asarray(held), expected)


def test_a_result_that_the_caller_holds_is_never_overwritten():
    layer = nn.Conv2d(3, 5, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 9, 9)).astype(np.float32)
    y1 = layer(x)
    kept, view = y1.copy(), y1[1, 2]
    y2 = layer(2 * x)
    y3 = layer(3 * x)
    np.testing.assert_array_equal(y1, kept)
    del y1
    dx = layer.backward(y3)
    layer(4 * x)
    np.testing.assert_array_equal(view, kept[1, 2])
    assert not np.shares_memory(y2, y3)
    kept_dx = dx.copy()
    layer.backward(y2)
    np.testing.assert_array_equal(dx, kept_dx)


def test_inputs_that_layers_remember_are_not_handed_out():
    conv, relu = nn.Conv2d(2, 2, 1), nn.ReLU()
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)
    y = relu(conv(x))
    kept = y.copy()
    del y
    for _ in range(4):
        _buffers.empty((1, 4, 4, 2), np.float32)[...] = np.nan
    dx = relu.backward(np.ones_like(x))
    np.testing.assert_array_equal(dx, kept > 0)


def test_threads_never_get_the_same_buffer():
    failures = []

    def work(number):
        for _ in range(300):
            array = _buffers.empty((64,), np.int64)
            array[...] = number
            other = _buffers.empty((64,), np.int64)
            other[...] = -number
            if not (array == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_sizes_out_of_use_are_dropped():
    _buffers.clear()
    big = _buffers.empty((SIZE, 10), np.float32)
    held = _buffers.empty((SIZE, 5), np.float32)
    held[...] = 3
    del big
    for _ in range(_buffers._FORGET_AFTER + 1):
        _buffers.empty((3,), np.float32)
    _buffers.empty((SIZE,), np.float32)
    assert _buffers.stats()["bytes"] < held.nbytes + 4 * SIZE + 1000
    assert (held == 3).all()


def test_many_shapes_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(_buffers, "_KEEP_BYTES", 10 * SIZE)
    _buffers.clear()
    for i in range(100):
        _buffers.empty((SIZE + 100 * i,), np.uint8)
    assert _buffers.stats()["bytes"] < 12 * (SIZE + 10_000)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_the_pool_is_busy_can_use_it():
    with _buffers._pool.lock:
        child = os.fork()
        if child == 0:
            _buffers.empty((4,), np.float32)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def every_layer():
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", padding_mode="reflect"),
        nn.BatchNorm2d(8),
        nn.PReLU(8),
        nn.MaxPool2d(2),
        nn.Residual(block, nn.Conv2d(8, 8, 1), nn.LeakyReLU()),
        nn.Dropout(0.25),
        nn.AvgPool2d(2),
        nn.Residual(nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("make", [optim.Adam, lambda p: optim.SGD(p, momentum=0.9, maximize=True)])
def test_a_training_step_allocates_nothing_after_the_first(make):
    net = every_layer()
    opt, loss_fn = make(net.parameters()), nn.CrossEntropyLoss(label_smoothing=0.1)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 3, 24, 24)).astype(np.float32)
    y = rng.integers(0, 10, 32)

    def step():
        loss = loss_fn(net(x), y)
        net.backward(loss_fn.backward(), input_grad=False)
        optim.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return loss

    for _ in range(2):
        step()
    misses = _buffers.stats()["misses"]
    tracemalloc.start()
    try:
        step()
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)

        def numpy_bytes():
            snapshot = tracemalloc.take_snapshot().filter_traces([arrays])
            return sum(trace.size for trace in snapshot.traces)

        held = numpy_bytes()
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        step()
        step()
        # The largest activation has 590 kB; losses and statistics are small.
        assert tracemalloc.get_traced_memory()[1] - start < 100_000
        assert numpy_bytes() <= held + 1000
    finally:
        tracemalloc.stop()
    assert _buffers.stats()["misses"] == misses


def test_inference_under_no_grad_keeps_nothing():
    net = every_layer().eval()
    x = np.zeros((4, 3, 24, 24), np.float32)
    with fastcnn.no_grad():
        net(x)
    assert all(module._saved is None for module in net.modules())
    _buffers.clear()
    with fastcnn.no_grad():
        y = net(x)
    largest = 4 * 8 * 26 * 26 * 4
    assert _buffers.stats()["bytes"] < 12 * largest
    with pytest.raises(RuntimeError, match="Sequential: backward needs a forward before it"):
        net.backward(y)
