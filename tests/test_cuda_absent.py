"""Without numba-cuda, or without a device, everything but CUDA works, and CUDA says what is missing."""

import os
import subprocess
import sys

import pytest


def python(code, **environment):
    """What a fresh process prints."""
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}, check=True)
    return done.stdout


def test_nothing_of_cuda_is_imported_with_fastcnn():
    code = "import sys, fastcnn.nn; print({'numba.cuda', 'fastcnn.kernels.cuda'} & set(sys.modules))"
    assert python(code).strip() == "set()"


def test_numba_cuda_missing():
    code = """
import sys
sys.modules["numba_cuda"] = None
import fastcnn
try:
    import fastcnn.kernels.cuda
except ImportError as error:
    print(error)
"""
    assert python(code).strip() == "fastcnn.kernels.cuda needs numba-cuda: pip install 'fastcnn[cuda]'"


def test_no_device():
    pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")
    code = """
import numpy as np
from fastcnn.kernels import cuda
for call in (lambda: cuda.zeros(3), lambda: cuda.from_numpy(np.zeros(3)), cuda.synchronize):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    lines = python(code, CUDA_VISIBLE_DEVICES="-1").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("cuda: no CUDA device can be used: ") for line in lines)
