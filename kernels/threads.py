"""A team of threads for the kernels.

A job is one kernel call in a number of parts. The calling thread publishes a share of them for itself and for
each helper, and whoever is awake takes parts by one atomic step each: those of its own share from the first
on, and then the last ones of the others'. A thread thus does the same images layer after layer, which lie in
its cache, and yet nobody waits for a part that nobody has taken: a helper that sleeps, or that the system has
put aside, delays nothing. Helpers look for the next job for some tenths of a millisecond, which carries them
from layer to layer, and as long as a recording is played, and then sleep in a lock. One that wakes up where
another of the team runs moves to a processor that none of them has: the system would let both share theirs
for some ten milliseconds.

No threading runtime lies underneath that a fork, a second Python thread or another library could upset. A
forked child starts helpers of its own; a call that finds the team at work does all of its parts itself. No
result depends on any of it: kernels cut their work by its shape, and sum in a fixed order.

A `Recording` notes jobs while they are done, and does all of them again in one call into compiled code, or a
few: what is done `between_jobs` comes at its place.
"""

from __future__ import annotations

import contextlib
import os
import threading
from _thread import LockType, allocate_lock
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from .atomic import (
    ARGUMENT_WORDS,
    ARGUMENTS,
    JOB,
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap_if,
    naming,
    nap,
    pause,
    prepare,
    processor,
    run_part,
)
from .jit import entry, kernel

# The words of a control block, each on a cache line of its own.
_LINE = 8
_JOBS = 0 * _LINE  # jobs that were published so far
_DONE = 1 * _LINE  # parts that are finished
# atomic.JOB and the two words behind it: the third line
_FAILED = 3 * _LINE  # 1 if a part ended in an error
_LIMIT = 4 * _LINE  # helpers that may take parts
_PLAYING = _LIMIT + 1  # 1 while a recording is played: nobody would wake a helper for its next job
# atomic.ARGUMENTS and the words behind it: the fifth line and on
_THREADS = ARGUMENTS + ARGUMENT_WORDS  # and on, two lines for each thread, the caller first
_THREAD = 2 * _LINE
# In the first is the number of the processor that it runs on, and so much more, or 0 if it is a helper that
# sleeps; in the second job number << 32 | first << 16 | end of those of its parts that nobody has taken.
_NUMBERED = 2
_SHARE = _LINE

# Polls of some 15 ns each: how long a helper looks for a job before it sleeps, and how long a caller waits
# for the last parts before it gives its processor away.
_HELPER_POLLS = 20_000
_POLLS_ON_A_PROCESSOR = 256  # before it looks whether it is alone there
_CALLER_POLLS = 4_000
# Instead of a number of helpers: do all parts here, and leave the control block alone.
_ALONE = -1
# Parts for each thread, so that one which the system slows down takes fewer of them.
_PARTS_A_THREAD = 4
# With less work, in operations or bytes, handing parts out takes longer than it spares: to helpers that wait
# for a call from Python, and to those that play a recording.
_LEAST_WORK = 50_000
_LEAST_WORK_PLAYED = 15_000


@kernel
def span(part, parts, tasks):
    """First and last + 1 of the `tasks` that `part` of `parts` does."""
    return part * tasks // parts, (part + 1) * tasks // parts


@kernel
def _take_part(control, thread, steals):
    """A part of a thread's share, the first, or the last if another `steals` it; -1 if there is none."""
    place = _THREADS + thread * _THREAD + _SHARE
    while True:
        word = atomic_load(control, place)
        first, end = (word >> 16) & 0xFFFF, word & 0xFFFF
        if first >= end:
            return -1
        # The job's number is in the word: a job that has ended is never taken for the next one.
        if atomic_swap_if(control, place, word, word - 1 if steals else word + (1 << 16)):
            return end - 1 if steals else first


@kernel
def _take_parts(control, thread):
    """Do parts of the published job, those of a thread's own share first, until all are taken."""
    sharing, done = atomic_load(control, _LIMIT) + 1, 0
    for k in range(sharing):
        owner = (thread + k) % sharing
        part = _take_part(control, owner, k > 0)
        while part >= 0:
            if run_part(control, part) != 0:
                atomic_store(control, _FAILED, 1)
            done += 1
            part = _take_part(control, owner, k > 0)
    atomic_add(control, _DONE, done)


@kernel
def _is_crowded(control, helper):
    """Note where a helper that is awake runs, and say whether the caller or a helper before it runs there."""
    here, others = processor() + _NUMBERED, 0
    atomic_store(control, _THREADS + helper * _THREAD, here)
    for thread in range(helper):
        others += atomic_load(control, _THREADS + thread * _THREAD) == here
    return others > 0 and here >= _NUMBERED


@entry
def _help_out(control, helper, polls, may_leave):
    """Do parts of whatever is published, until `polls` looks in a row have found nothing and none is played.

    If it may, it returns true instead as soon as it shares a processor.
    """
    idle, seen, crowded = 0, 0, False
    while (idle < polls or atomic_load(control, _PLAYING) != 0) and not crowded:
        if idle % _POLLS_ON_A_PROCESSOR == 0:
            crowded = _is_crowded(control, helper) and may_leave
        idle += 1
        job = atomic_load(control, _JOBS)
        if job != seen and not crowded:
            seen = job
            if helper <= atomic_load(control, _LIMIT):
                _take_parts(control, helper)
                idle = 0
        pause()
    if not crowded:
        atomic_store(control, _THREADS + helper * _THREAD, 0)
    return crowded


@kernel
def _finish(control, parts, helpers):
    """Hand out the prepared job, and return when all of its parts are done; true unless one failed."""
    atomic_store(control, _THREADS, processor() + _NUMBERED)
    atomic_store(control, _LIMIT, helpers)
    atomic_store(control, _FAILED, 0)
    atomic_store(control, _DONE, 0)
    job = atomic_load(control, _JOBS) + 1
    for thread in range(helpers + 1):
        first, end = span(thread, helpers + 1, parts)
        place = _THREADS + thread * _THREAD + _SHARE
        atomic_store(control, place, (job << 32) | (first << 16) | end)
    atomic_store(control, _JOBS, job)
    _take_parts(control, 0)
    polls = 0
    while atomic_load(control, _DONE) != parts:
        polls += 1
        if polls < _CALLER_POLLS:
            pause()
        else:
            nap()
    return atomic_load(control, _FAILED) == 0


@entry
def _play(control, jobs, helpers):
    """Do recorded jobs, one after the other; true unless one failed."""
    for i in range(jobs.shape[0]):
        parts = jobs[i, 2]
        for k in range(3):
            control[JOB + k] = jobs[i, k]
        if parts == 1 or helpers == 0:
            for part in range(parts):
                if run_part(control, part) != 0:
                    return False
        elif not _finish(control, parts, min(helpers, parts - 1)):
            return False
    return True


def _check(succeeded: bool) -> None:
    if not succeeded:
        raise IndexError("a kernel was about to read or write outside of an array")


class _Team:
    """The helpers of this process, and the control block that they look at."""

    def __init__(self) -> None:
        self.most = numba.config.NUMBA_NUM_THREADS
        self.threads = self.most
        self._reset()

    def _reset(self) -> None:
        self.control = _control_block(self.most)
        self.helpers: list[LockType] = []
        self.lock = threading.Lock()

    def after_fork_in_child(self) -> None:
        """The parent's helpers don't exist here; neither does whoever may have held the lock."""
        self._reset()

    def run(self, driver: Callable, parts: int, args: tuple) -> None:
        """Do a job with all threads, or alone if another Python thread has the team."""
        if not self.lock.acquire(blocking=False):
            driver(self.control, parts, _ALONE, *args)
            return
        try:
            helpers = min(self.threads, parts) - 1
            self._wake(helpers)
            succeeded = driver(self.control, parts, helpers, *args)
        finally:
            self.lock.release()
        _check(succeeded)

    def play(self, jobs: np.ndarray, parts: int, blocks: list[np.ndarray]) -> None:
        """Do recorded jobs of at most `parts` parts, as `run` does one; `blocks` keep their arguments."""
        if not self.lock.acquire(blocking=False):
            _check(_play(_control_block(), jobs, 0))
            return
        try:
            helpers = min(self.threads, parts) - 1
            self._wake(helpers, surely=True)
            # Who is awake now stays so. Not before: to hire one calls `_help_out` here.
            self.control[_PLAYING] = helpers > 0
            succeeded = _play(self.control, jobs, helpers)
        finally:
            self.control[_PLAYING] = 0
            self.lock.release()
        _check(succeeded)

    def _wake(self, count: int, surely: bool = False) -> None:
        """Wake the first `count` helpers; if `surely`, one that is about to fall asleep looks once more."""
        for i in range(count):
            if i == len(self.helpers):
                self._hire()
                continue
            is_awake = self.control[_THREADS + (i + 1) * _THREAD] != 0
            if (surely or not is_awake) and self.helpers[i].locked():
                self.helpers[i].release()

    def _hire(self) -> None:
        """Start one more helper, at work already."""
        _help_out(self.control, 0, 0, False)  # compiles, here rather than there
        lock = allocate_lock()
        self.helpers.append(lock)
        index = len(self.helpers)
        arguments = (self.control, index, lock)
        threading.Thread(target=_helper, args=arguments, name=f"fastcnn-{index}", daemon=True).start()


def _control_block(helpers: int = 0) -> np.ndarray:
    return np.zeros(_THREADS + (helpers + 1) * _THREAD, np.int64)


def _helper(control: np.ndarray, index: int, lock: LockType) -> None:
    while True:
        lock.acquire()
        while _help_out(control, index, _HELPER_POLLS, True):
            if not _has_moved(control, index):
                _help_out(control, index, _HELPER_POLLS, False)
                break


def _has_moved(control: np.ndarray, helper: int) -> bool:
    """Move this thread to a processor that neither the caller nor a helper before it has."""
    try:
        allowed = os.sched_getaffinity(0)
        free = allowed - {int(control[_THREADS + i * _THREAD]) - _NUMBERED for i in range(helper)}
        if free:
            os.sched_setaffinity(0, free)
            # It is there now; the system may move it again.
            os.sched_setaffinity(0, allowed)
    except OSError:
        return False
    return bool(free)


_team = _Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_team.after_fork_in_child)


def get_num_threads() -> int:
    """Number of threads that kernels use."""
    return _team.threads


def set_num_threads(threads: int) -> None:
    """Use `threads` threads in every kernel from now on. Results don't depend on it, bit for bit.

    Raises
    ------
    ValueError
        If `threads` is below 1, or above the number of processors (``NUMBA_NUM_THREADS`` where it is set).
    """
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"threads: expected an int, got {threads!r}")
    if not 1 <= threads <= _team.most:
        raise ValueError(
            f"threads: {threads} is not between 1 and {_team.most} (set NUMBA_NUM_THREADS to raise it)"
        )
    _team.threads = int(threads)


def part_count(tasks: int, work: float = np.inf) -> int:
    """Number of parts in which to do `tasks` independent tasks of `work` operations or bytes in all.

    Little work is done in one.
    """
    if _team.threads == 1 or work < _LEAST_WORK_PLAYED or (work < _LEAST_WORK and not is_recording()):
        return 1
    return max(1, min(_PARTS_A_THREAD * _team.threads, tasks))


class _Active(threading.local):
    """The recording that notes this thread's jobs."""

    recording: Recording | None = None


_active = _Active()


def is_recording() -> bool:
    """Whether this thread's jobs are being recorded: what they read and write must then stay theirs."""
    return _active.recording is not None


def recording() -> Recording | None:
    """The recording that notes this thread's jobs, if there is one."""
    return _active.recording


def between_jobs(function: Callable, *args: Any) -> None:
    """Call a function that is no job, now and whenever a recording that is under way is played.

    Everything that depends on the numbers in arrays, and not on their sizes alone, must be a job or come by
    here. A recording without calls leaves it out: see there.
    """
    under_way = _active.recording
    if under_way is None:
        function(*args)
        return
    # What it does on its own account is not to be noted twice.
    _active.recording = None
    try:
        function(*args)
    finally:
        _active.recording = under_way
    under_way.note_call(function, args)


def decide(function: Callable, *args: Any) -> bool:
    """The answer of a function to which numbers matter; a recording holds as long as it stays the same."""
    answer = bool(function(*args))
    if _active.recording is not None:
        _active.recording.note_decision(function, args, answer)
    return answer


class NotRecordedError(RuntimeError):
    """A computation was to be recorded that does something beside jobs."""


class Recording:
    """Jobs of this thread, noted while they are done in a ``with`` block, to be done again by `play`.

    Numbers and addresses are those of the first time; the arrays are kept alive.

    Parameters
    ----------
    calls : bool
        Whether what is done `between_jobs` is done again too; only this thread may then play, whose scratch
        memory the jobs use. Without, `play` is one call into compiled code, and it is the caller's to know
        that those numbers, biases and statistics of layers, are what they were.
    """

    def __init__(self, calls: bool = False) -> None:
        self.calls = calls
        self._steps: list[Any] = []
        self._arguments: list[tuple] = []
        self._decisions: list[tuple[Callable, tuple, bool]] = []

    def __enter__(self) -> Recording:
        if is_recording():
            raise RuntimeError("a recording is under way on this thread already")
        _active.recording = self
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.recording = None
        steps: list[Any] = []
        blocks: list[np.ndarray] = []
        for step in (*self._steps, None):
            if isinstance(step, np.ndarray):
                blocks.append(step)
                continue
            if blocks:
                jobs = np.array([block[JOB : JOB + 3] for block in blocks], np.int64)
                # The blocks hold the jobs' arguments.
                steps.append((_team.play, (jobs, int(jobs[:, 2].max()), blocks)))
                blocks = []
            if step is not None:
                steps.append(step)
        self._steps = steps

    def note(self, driver: Callable, parts: int, args: tuple) -> None:
        """Do a job, and remember it."""
        block = _control_block()
        _check(driver(block, parts, 0, *args))
        self._steps.append(block)
        self.keep(args)

    def keep(self, args: tuple) -> None:
        """Hold the arrays that a job reads and writes as long as it may be done again."""
        self._arguments.append(args)

    def note_call(self, function: Callable, args: tuple) -> None:
        """Remember what was done between two jobs."""
        if self.calls:
            self._steps.append((function, args))

    def note_decision(self, function: Callable, args: tuple, answer: bool) -> None:
        """Remember what the jobs depend on."""
        if self.calls:
            self._decisions.append((function, args, answer))

    def holds(self) -> bool:
        """Whether the same jobs would be done now."""
        return all(bool(function(*args)) is answer for function, args, answer in self._decisions)

    def play(self) -> None:
        """Do all of it again, in its order."""
        # As in kernels, overflow ends in inf or NaN, and not in a warning of NumPy's.
        with np.errstate(all="ignore") if self.calls else contextlib.nullcontext():
            for function, args in self._steps:
                function(*args)


class Parallel:
    """A kernel ``func(part, parts, ...)`` that does one part of its work, and returns nothing.

    Called with the number of parts and the other arguments, it does all of them, on several threads if there
    is more than one.
    """

    def __init__(self, func: Callable):
        self.__doc__ = func.__doc__
        self.__name__ = func.__name__
        # Out of line: the thread that does its parts alone runs the same machine code as a team, so that no
        # sum depends on which it was. Other kernels, too, may call it for a part.
        self.body = kernel(func, out_of_line=True)
        self._driver: Any = None
        # Which arguments are named tuples, and how to make plain ones of them.
        self._named: list[tuple[int, Callable[[Any], tuple]]] = []

    def _compile(self, args: tuple) -> None:
        """Make the driver, for which arguments are named as these are."""
        func, kinds = self.body.py_func, tuple(map(_kind, args))
        self._named = [(i, _plainer(kind)) for i, kind in enumerate(kinds) if kind is not None]
        body, named = self.body, naming(kinds)

        def driver(control, parts, helpers, *args):
            items = named(args)
            if helpers == _ALONE:
                for part in range(parts):
                    body(part, parts, *items)
                return True
            prepare(control, parts, body, items)
            return _finish(control, parts, helpers)

        self._driver = entry(driver, f"{func.__module__}.{func.__qualname__}")

    def __call__(self, parts: int, *args: Any) -> None:
        if self._driver is None:
            self._compile(args)
        if self._named:
            plain = list(args)
            for i, plainer in self._named:
                plain[i] = plainer(plain[i])
            args = tuple(plain)
        if _active.recording is not None:
            _active.recording.note(self._driver, parts, args)
        elif parts == 1:
            self._driver(_team.control, 1, _ALONE, *args)
        else:
            _team.run(self._driver, parts, args)


_Kind = tuple[type, tuple] | None


def _kind(value: Any) -> _Kind:
    """The class of a named tuple and the kinds of its items, or None for what is none; see `naming`."""
    return (type(value), tuple(map(_kind, value))) if hasattr(value, "_fields") else None


def _plainer(kind: tuple[type, tuple]) -> Callable[[Any], tuple]:
    """A function that makes a plain tuple of a named one of this kind, and of its items."""
    inner = [(i, _plainer(item)) for i, item in enumerate(kind[1]) if item is not None]
    if not inner:
        return tuple

    def plainer(value: Any) -> tuple:
        items = list(value)
        for i, of_item in inner:
            items[i] = of_item(items[i])
        return tuple(items)

    return plainer


def parallel(func: Callable) -> Parallel:
    """Compile a kernel that works in parts; see `Parallel`."""
    return Parallel(func)
