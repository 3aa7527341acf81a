"""Recordings: every operation of the table in ops.py does the same again, on other numbers."""

import time

import numpy as np
import pytest
from ops import OPERATIONS
from parity import arrays, assert_same_bits

from fastcnn.kernels import cpu, threads
from fastcnn.kernels.atomic import atomic_add, atomic_load, nap
from fastcnn.kernels.cpu import transpose
from fastcnn.kernels.threads import (
    NotRecordedError,
    Recording,
    between_jobs,
    decide,
    get_num_threads,
    is_recording,
    parallel,
    set_num_threads,
)

# The data loader's: they prepare a batch ahead of the step that takes it.
NOT_RECORDED = {"augment_batch", "gather_batch"}
RECORDED = [
    pytest.param(operation, dtype, id=f"{operation.name}-{np.dtype(dtype)}")
    for operation in OPERATIONS
    for dtype in operation.dtypes
    if operation.name not in NOT_RECORDED
]


def call(operation, arguments):
    """Copies of the arguments, and all arrays that a call with them returns or changes."""
    own = {
        name: value.copy() if isinstance(value, np.ndarray) else value for name, value in arguments.items()
    }
    result = getattr(cpu, operation.name)(**own)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    changed = [own[name] for name in operation.updates if own.get(name) is not None]
    return own, [*returned, *changed]


@pytest.mark.parametrize(("operation", "dtype"), RECORDED)
def test_played_again_on_other_numbers(operation, dtype):
    for case in operation.cases:
        first, second = (
            operation.call(case, dtype),
            operation.build(np.random.default_rng(7), dtype, *operation.cases[case]),
        )
        with Recording(calls=True) as jobs:
            own, results = call(operation, first)
        _, expected = call(operation, second)
        for name, array in arrays(own).items():
            array[...] = second[name]
        assert jobs.holds()
        jobs.play()
        assert_same_bits(results, expected, case)


def test_a_seed_is_read_anew():
    x, seed = np.ones(1000, np.float32), np.array(3, np.uint64)
    with Recording(calls=True) as jobs:
        y = cpu.dropout_forward(x, 0.5, seed)
    np.testing.assert_array_equal(y, cpu.dropout_forward(x, 0.5, 3))
    seed[...] = 2**64 - 1
    jobs.play()
    np.testing.assert_array_equal(y, cpu.dropout_forward(x, 0.5, 2**64 - 1))


def test_what_is_between_jobs_comes_at_its_place():
    order = []
    x, y = np.array([-1, 2], np.float32), np.empty(2, np.float32)

    def note(word):
        order.append((word, y.tolist()))
        # Belongs to the call, and is not noted on its own.
        cpu.relu_forward(np.ones(1, np.float32))

    with Recording(calls=True) as jobs:
        y.fill(9)
        between_jobs(note, "before")
        cpu.relu_forward(x, out=y)
        between_jobs(note, "behind")
        assert is_recording()
    x[...] = 5
    jobs.play()
    words = [("before", [9, 9]), ("behind", [0, 2]), ("before", [0, 2]), ("behind", [5, 5])]
    assert order == words


def test_calls_are_left_out_unless_they_are_asked_for():
    count = np.zeros(())
    with Recording() as jobs:
        between_jobs(np.add, count, 1, count)
    jobs.play()
    assert count == 1
    between_jobs(np.add, count, 1, count)
    assert count == 2


def test_what_a_call_raises_ends_its_recording():
    with pytest.raises(ZeroDivisionError), Recording(calls=True):
        between_jobs(lambda: 1 / 0)
    assert not is_recording()


def test_a_recording_holds_while_its_decisions_do():
    slope = np.ones(1)
    with Recording(calls=True) as jobs:
        assert decide(lambda: slope > 0)
        assert not decide(lambda: slope > 2)
    assert jobs.holds()
    slope[...] = 3
    assert not jobs.holds()
    slope[...] = 2
    assert jobs.holds()
    assert not decide(lambda: slope > 2)


def test_a_recording_does_its_jobs_again():
    x, y = np.array([-1, 2], np.float32), np.empty(2, np.float32)
    with Recording() as jobs:
        assert is_recording()
        cpu.relu_forward(x, out=y)
    assert not is_recording()
    assert y.tolist() == [0, 2]
    x[...] = 3, -4
    jobs.play()
    assert y.tolist() == [3, 0]
    Recording().play()


def test_a_recording_without_calls_refuses_what_it_does_not_see():
    with pytest.raises(NotRecordedError), Recording():
        transpose.copy(np.ones((3, 4)).T, np.empty((4, 3)))
    assert not is_recording()
    with pytest.raises(RuntimeError, match="under way"), Recording(), Recording():
        pass
    assert not is_recording()


@parallel
def _rest(part, parts, naps):
    """Take longer than a helper looks for work before it sleeps."""
    for _ in range(naps):
        nap()


@parallel
def _meet(part, parts, words, naps):
    """Wait for the other part to begin, and count the parts that saw it."""
    atomic_add(words, 0, 1)
    for _ in range(naps):
        if atomic_load(words, 0) == parts:
            atomic_add(words, 8, 1)
            break
        nap()


@pytest.mark.skipif(get_num_threads() < 2, reason="one processor")
def test_helpers_stay_awake_while_a_recording_is_played():
    """Nobody would wake them between two jobs, of which the first has nothing for them."""
    words = np.zeros(16, np.int64)
    before = get_num_threads()
    set_num_threads(2)
    try:
        with Recording() as jobs:
            _rest(1, 2000)
            # While it is recorded one thread does both parts, the first of which waits in vain.
            _meet(2, words, 20_000)
        for _ in range(3):
            words[:] = 0
            jobs.play()
            assert words[8] == 2
        # A helper whose last look is just over still seems to be awake: what it has noted of itself stays.
        team, is_awake = threads._team, threads._THREADS + threads._THREAD
        while team.control[is_awake]:
            time.sleep(1e-3)
        team.control[is_awake] = threads._NUMBERED
        words[:] = 0
        jobs.play()
        assert words[8] == 2
    finally:
        set_num_threads(before)
