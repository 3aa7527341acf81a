"""Fixtures of several files."""

import pytest

from fastcnn.kernels import threads


@pytest.fixture
def team():
    """A function that sets the number of threads for the test."""
    before = threads.get_num_threads()
    yield threads.set_num_threads
    threads.set_num_threads(before)
