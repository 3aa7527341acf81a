"""The device that the CUDA tests run on: a real one, or Numba's simulator (``NUMBA_ENABLE_CUDASIM=1``)."""

import os

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
# Set by `make test-gpu`: a missing device is an error then, and no reason to skip.
REQUIRED = os.environ.get("FASTCNN_TEST_GPU") == "1"

# The simulator runs each of the device's threads as one of Python's: multiply-adds that it may be asked for.
SIMULATED_WORK = 40_000


def module():
    """`fastcnn.kernels.cuda`; skips the tests of a file where nothing can run it."""
    if not (SIMULATED or REQUIRED):
        pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")
    from fastcnn.kernels import cuda
    from fastcnn.kernels.cuda.jit import require_device

    if REQUIRED:
        require_device()
    elif not SIMULATED:
        try:
            require_device()
        except RuntimeError as error:
            pytest.skip(f"{error} (make test-cuda simulates one)", allow_module_level=True)
    return cuda


# The simulator computes with NumPy's numbers, which warn where the device is silent.
marks = [pytest.mark.gpu] if not SIMULATED else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def moved(value):
    """Arguments with NumPy arrays on the device."""
    from fastcnn.kernels import cuda

    if isinstance(value, dict):
        return {name: moved(item) for name, item in value.items()}
    return cuda.from_numpy(value) if isinstance(value, np.ndarray) else value


def run(operation, arguments, **more):
    """All results of a call as NumPy arrays: what it returns, and what it changes, which are copies."""
    from fastcnn.kernels import cuda

    on_device = moved(arguments)
    result = getattr(cuda, operation.name)(**on_device, **more)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    updated = (on_device[name] for name in operation.updates if arguments.get(name) is not None)
    return [array.numpy() for array in (*returned, *updated)]


def affordable(operation, arguments, results):
    """Whether this device does the call in a moment."""
    if not SIMULATED:
        return True
    elements = max(
        (array.size for array in (*results, *arguments.values()) if hasattr(array, "size")), default=0
    )
    return elements * operation.terms(arguments) <= SIMULATED_WORK and elements <= SIMULATED_WORK // 10
