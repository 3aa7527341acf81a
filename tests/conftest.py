"""Fixtures of several files, and what all tests need of the process."""

import signal

import pytest
from guarded import GuardedScratch

import fastcnn
from fastcnn.kernels import threads

# Shells start what runs in the background with Ctrl-C ignored, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def team():
    """A function that sets the number of threads for the test."""
    before = threads.get_num_threads()
    yield threads.set_num_threads
    threads.set_num_threads(before)


@pytest.fixture
def switch():
    """A function that sets whether Winograd's algorithm may be used in the test."""
    before = fastcnn.get_winograd()
    yield fastcnn.set_winograd
    fastcnn.set_winograd(before)


@pytest.fixture
def scratch(monkeypatch):
    """Scratch memory of the CPU kernels that notices what is written outside of it."""
    return GuardedScratch(monkeypatch)
