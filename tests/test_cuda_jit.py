"""Kernels for CUDA: their signatures, and the simulator that runs them where there is no GPU."""

import cuda_device
import numpy as np
import pytest
from numba import cuda

device = cuda_device.module()

from fastcnn.kernels.cuda.jit import KERNELS, device_function, kernel  # noqa: E402 (after the look whether it can be)

pytestmark = cuda_device.marks
simulated = pytest.mark.skipif(not cuda_device.SIMULATED, reason="tests the simulator")


@pytest.fixture(autouse=True)
def no_kernels_left_behind():
    names = set(KERNELS)
    yield
    for name in set(KERNELS) - names:
        del KERNELS[name]


def test_a_signature_stands_for_both_dtypes_and_converts_numbers():
    @kernel("T[::1], T, int64")
    def add(y, number, count):
        i = cuda.grid(1)
        if i < count:
            y[i] += number

    assert len(add.signatures) == 2
    for dtype in (np.float32, np.float64):
        y = device.zeros(5, dtype)
        add[2, 4](y, 3, np.int32(4))
        add.launch(1, 4, y, np.float64(0.1), True)
        expected = np.array([dtype(3) + dtype(0.1), 3, 3, 3, 0], dtype)
        assert np.array_equal(y.numpy(), expected)


def test_an_empty_grid_launches_nothing():
    @kernel("T[::1]")
    def one(y):
        y[cuda.grid(1)] = 1

    y = device.zeros(3)
    one[0, 3](y)
    one[(2, 0), 3](y)
    assert not y.numpy().any()


def test_arrays_that_no_signature_has_are_refused():
    @kernel("T[::1], T[::1]", "T[:, ::1], T[::1]")
    def nothing(a, b):
        pass

    one, two = device.zeros(4), device.zeros((2, 2))
    nothing[1, 1](one, one)
    nothing[1, 1](two, one)
    for wrong in (two, one[::2], device.zeros(4, np.float64), device.zeros(4, np.int64)):
        with pytest.raises(TypeError, match=r"^test_cuda_jit.nothing: no signature fits"):
            nothing[1, 1](one, wrong)


def test_two_kernels_or_signatures_of_one_name_are_refused():
    def declare(*signatures):
        @kernel(*signatures)
        def twice(a, b):
            pass

    with pytest.raises(ValueError, match="two signatures"):
        declare("T[::1], T", "T[::1], int64")
    declare("T[::1], T")
    with pytest.raises(ValueError, match="declared twice"):
        declare("T[::1], T")


@device_function
def neighbour_s(shared, value):
    shared[cuda.threadIdx.x] = value
    cuda.syncthreads()
    return shared[(cuda.threadIdx.x + 1) % cuda.blockDim.x]


def test_blocks_share_memory_and_wait():
    @kernel("T[::1], T[::1]")
    def rotate(x, y):
        shared = cuda.shared.array(8, x.dtype)
        i = cuda.grid(1)
        y[i] = neighbour_s(shared, x[i])

    x = np.arange(24, dtype=np.float32)
    y = device.zeros(24)
    rotate[3, 8](device.from_numpy(x), y)
    assert np.array_equal(y.numpy(), np.roll(x.reshape(3, 8), -1, axis=1).ravel())


@simulated
def test_a_barrier_that_not_all_threads_reach_is_an_error():
    @kernel("T[::1]")
    def half(y):
        if cuda.threadIdx.x < 2:
            cuda.syncthreads()

    with pytest.raises(RuntimeError, match="others never reach"):
        half[1, 4](device.zeros(4))


@simulated
def test_an_index_out_of_bounds_is_an_error_with_and_without_barriers():
    @kernel("T[::1]")
    def beyond(y):
        y[cuda.grid(1)] = 1

    @kernel("T[::1]")
    def beyond_and_wait(y):
        y[cuda.grid(1)] = 1
        cuda.syncthreads()

    for each in (beyond, beyond_and_wait):
        with pytest.raises(IndexError):
            each[1, 5](device.zeros(4))
        each[1, 4](device.zeros(4))


def test_blocks_above_the_launch_bounds_are_refused():
    @kernel("T[::1]", launch_bounds=64)
    def bound(y):
        pass

    bound[1, (8, 8)](device.zeros(4))
    with pytest.raises(ValueError, match="launch bounds"):
        bound[1, 65](device.zeros(4))
