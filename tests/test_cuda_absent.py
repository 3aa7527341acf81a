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


@pytest.mark.parametrize("missing", ["numba-cuda", "device"])
def test_networks_and_commands_say_what_is_missing(missing):
    if missing == "device":
        pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")
    code = f"""
import sys
if {missing == "numba-cuda"}:
    sys.modules["numba_cuda"] = None
from typer.testing import CliRunner
from fastcnn import data, nn
from fastcnn.cli import app
import numpy as np
net = nn.Sequential(nn.Linear(2, 3))
images = data.Dataset(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), ("a",))
for call in (lambda: net.to("cuda"), lambda: data.Loader(images, 2, device="cuda")):
    try:
        call()
    except (ImportError, RuntimeError) as error:
        print(error)
assert net[0].weight.device == "cpu"
result = CliRunner().invoke(app, ["train", "--device", "cuda"])
print(result.stderr.strip() if result.exit_code == 1 else result)
"""
    needed = "fastcnn[cuda]" if missing == "numba-cuda" else "no CUDA device can be used"
    lines = python(code, CUDA_VISIBLE_DEVICES="-1").splitlines()
    assert len(lines) == 3, lines
    assert all(needed in line for line in lines)
    assert lines[2].startswith("error: --device cuda: ")
