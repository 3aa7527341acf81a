"""Launches and copies as the CUDA driver is asked for them, which is stubbed: no device is needed."""

import ctypes
import os
import warnings
from types import SimpleNamespace

import cuda_device
import numpy as np
import pytest

if cuda_device.SIMULATED:
    pytest.skip("the simulator asks no driver", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")

from cuda.bindings import driver as api
from numba.cuda import types
from numba.cuda.dispatcher import _Kernel

from fastcnn.kernels import cuda
from fastcnn.kernels.cuda import driver
from fastcnn.kernels.cuda.jit import KERNELS, kernel

SIGNATURES = [
    pytest.param(kernel, compiled, id=f"{name}-{number}")
    for name, kernel in sorted(KERNELS.items())
    for number, compiled in enumerate(kernel.signatures)
]
STREAM, FUNCTION = 0x51, 0xF0


class Numba_s:
    """An array of the device as Numba's own preparation of arguments takes it."""

    __cuda_memory__ = True

    def __init__(self, array):
        layout = SimpleNamespace(strides_in_bytes=array.strides)
        self._strided_memory_view_shim = SimpleNamespace(
            ptr=array.pointer, shape=array.shape, dtype=array.dtype, size=array.size, _layout=layout
        )


def example(kind, number):
    """An argument of a type."""
    if isinstance(kind, types.Array):
        shape = tuple(range(2, 2 + kind.ndim))
        return cuda.DeviceArray(4096 * (number + 1), None, shape, np.dtype(str(kind.dtype)))
    if isinstance(kind, types.BaseTuple):
        return tuple(example(item, number + k) for k, item in enumerate(kind))
    return number + 0.1 if isinstance(kind, types.Float) else number + 3


def as_numba_prepares(argument_types, arguments):
    """The bytes of all parameters."""
    numba_s = _Kernel.__new__(_Kernel)
    numba_s.extensions = []
    prepared = []
    for kind, argument in zip(argument_types, arguments, strict=True):
        value = Numba_s(argument) if isinstance(kind, types.Array) else argument
        numba_s._prepare_args(kind, value, 0, [], prepared)
    return [bytes(ctypes.c_int64(value) if isinstance(value, int) else value) for value in prepared]


@pytest.fixture
def launches(monkeypatch):
    """What a stub of the driver is asked to launch: function, grid, block, and so on."""
    asked = []

    def launch(*arguments):
        asked.append(arguments)
        return (api.CUresult.CUDA_SUCCESS,)

    monkeypatch.setattr(api, "cuLaunchKernel", launch)
    return asked


def launcher(name, argument_types):
    compiled = SimpleNamespace(library=SimpleNamespace(get_cufunc=lambda: SimpleNamespace(handle=FUNCTION)))
    return driver.Launcher(name, compiled, argument_types, STREAM)


@pytest.mark.parametrize(("kernel", "compiled"), SIGNATURES)
def test_the_parameters_of_every_kernel_are_those_that_numba_prepares(kernel, compiled, launches):
    arguments = [example(kind, number) for number, kind in enumerate(compiled.argument_types)]
    expected = as_numba_prepares(compiled.argument_types, arguments)
    ours = launcher(kernel.name, compiled.argument_types)
    ours.launch((3, 2, 1), (32, 4, 1), compiled.parameters(arguments))
    *rest, parameters, extra = launches.pop()
    assert rest == [FUNCTION, 3, 2, 1, 32, 4, 1, 0, STREAM]
    assert extra == 0
    pointers = (ctypes.c_uint64 * len(expected)).from_address(parameters)
    assert len(ours._pointers) == len(expected)
    for pointer, parameter in zip(pointers, expected, strict=True):
        assert pointer % len(parameter) == 0
        assert ctypes.string_at(pointer, len(parameter)) == parameter


@pytest.fixture
def scale(launches):
    """A kernel that looks compiled."""

    @kernel("T[::1], T, int64")
    def scale(y, number, count):
        pass

    for compiled in scale.signatures:
        compiled._launcher = launcher(scale.name, compiled.argument_types)
    yield scale
    del KERNELS[scale.name]


def test_numbers_beyond_a_kernel_s_dtype_are_infinite(scale, launches):
    y = cuda.DeviceArray(512, None, (5,), np.dtype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scale[1, 32](y, -1e39, np.int32(4))
    pointers = (ctypes.c_uint64 * 9).from_address(launches[0][-2])
    assert ctypes.c_float.from_address(pointers[7]).value == -np.inf
    assert ctypes.c_int64.from_address(pointers[8]).value == 4


@pytest.mark.parametrize("grid", [2**31, (1, 65536), (1, 1, 65536)])
def test_a_grid_above_the_device_s_is_refused(grid, scale, launches):
    y = cuda.DeviceArray(512, None, (5,), np.dtype(np.float32))
    with pytest.raises(ValueError, match=r"^test_cuda_driver.scale: a grid of .* is above"):
        scale[grid, 32](y, 1, 1)
    scale[(2**31 - 1, 65535, 65535), 32](y, 1, 1)
    assert len(launches) == 1


def test_the_first_call_of_a_thread_makes_a_context_and_errors_are_named(monkeypatch):
    codes = [api.CUresult.CUDA_ERROR_INVALID_CONTEXT, api.CUresult.CUDA_SUCCESS]
    made = []
    monkeypatch.setattr(driver.cuda, "current_context", lambda: made.append(1))
    driver.call("copy", lambda: (codes.pop(0),))
    assert (codes, made) == ([], [1])
    wrong = api.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(RuntimeError, match=r"^copy: the driver answers CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.call("copy", lambda: (wrong,))
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(RuntimeError, match=r"^copy: this process was forked"):
        driver.call("copy", lambda: (api.CUresult.CUDA_ERROR_NOT_INITIALIZED,))


def test_what_is_copied_to_the_device_may_change_at_once(monkeypatch):
    queued, recorded, waits = [], set(), []

    def stub(name, function):
        def answer(*arguments):
            function(*arguments)
            return (api.CUresult.CUDA_SUCCESS,)

        monkeypatch.setattr(api, name, answer)

    stub("cuMemcpyHtoDAsync", lambda *arguments: queued.append(arguments))
    stub("cuEventRecord", lambda event, stream: recorded.add(event))
    stub("cuEventSynchronize", lambda event: waits.append("event") if event in recorded else None)
    stub("cuStreamSynchronize", lambda stream: waits.append("stream"))
    monkeypatch.setattr(driver.cuda, "pinned_array", np.empty)
    monkeypatch.setattr(driver.cuda, "event", lambda timing: SimpleNamespace(handle=object()))
    staging = driver.Staging(SimpleNamespace(handle=STREAM))
    for number in range(driver._SLOTS):
        host = np.full((3, 5), number, np.float32)
        staging.send(host, 1000 + number)
        host[...] = -1
    assert not waits
    # As if the device only began to copy now.
    for number, (pointer, source, nbytes, stream) in enumerate(queued):
        assert (pointer, nbytes, stream) == (1000 + number, 60, STREAM)
        assert ctypes.c_float.from_address(source + 56).value == number
    # No pinned memory is left that is not in use: the oldest is waited for.
    staging.send(np.zeros(1), 0)
    assert (waits, queued[-1][1]) == (["event"], queued[0][1])
    # What is large is copied from where it is, and waited for.
    large = np.zeros(driver._SLOT + 1, np.uint8)
    staging.send(large, 8)
    assert queued[-1] == (8, large.ctypes.data, large.nbytes, STREAM)
    assert waits == ["event", "stream"]
