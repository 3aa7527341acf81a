"""Fixtures of several files."""

import pytest

import fastcnn
from fastcnn.kernels import threads


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
