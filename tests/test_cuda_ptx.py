"""Every CUDA kernel compiles for compute capability 8.0 and 9.0, and none spills registers, says ptxas."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_device
import pytest

if cuda_device.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")

from fastcnn.kernels.cuda import arithmetic as _arithmetic  # noqa: F401 (its kernels are compiled too)
from fastcnn.kernels.cuda.jit import KERNELS

CAPABILITIES = [(8, 0), (9, 0)]
# Of a thread block; more needs a launch that asks for it.
SHARED_BYTES = 48 * 1024
REGISTERS_PER_BLOCK = 65536


def ptxas():
    """ptxas of the environment or the machine."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec else ():
        program = Path(root) / "cuda_nvcc" / "bin" / "ptxas"
        if program.exists():
            return str(program)
    return shutil.which("ptxas")


pytestmark = pytest.mark.skipif(ptxas() is None, reason="ptxas is not installed")

SIGNATURES = [
    pytest.param(kernel, compiled.argument_types, id=f"{name}-{number}")
    for name, kernel in sorted(KERNELS.items())
    for number, compiled in enumerate(kernel.signatures)
]


def report(kernel, argument_types, capability, folder):
    """What ptxas says of one kernel: its numbers by the words around them."""
    from numba import cuda

    options = {"launch_bounds": kernel.options.get("launch_bounds")}
    source, _ = cuda.compile_ptx(kernel.function, argument_types, cc=capability, device=False, **options)
    file = folder / "kernel.ptx"
    file.write_text(source)
    command = [
        ptxas(),
        "-v",
        f"-arch=sm_{capability[0]}{capability[1]}",
        str(file),
        "-o",
        str(folder / "kernel.o"),
    ]
    if "max_registers" in kernel.options:
        command.append(f"-maxrregcount={kernel.options['max_registers']}")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = {
        name: [int(number) for number in re.findall(pattern, text)]
        for name, pattern in {
            "spills": r"(\d+) bytes spill",
            "stack": r"(\d+) bytes stack frame",
            "registers": r"Used (\d+) registers",
            "shared": r"(\d+) bytes smem",
        }.items()
    }
    assert found["registers"], text
    return {name: max(numbers, default=0) for name, numbers in found.items()}


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm_{pair[0]}{pair[1]}")
@pytest.mark.parametrize(("kernel", "argument_types"), SIGNATURES)
def test_compiles_without_spills(kernel, argument_types, capability, tmp_path, monkeypatch):
    # Functions that kernels call are compiled for the device at hand, whichever the kernel is for.
    device = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
    used = report(kernel, argument_types, capability, tmp_path)
    assert not used["spills"]
    assert not used["stack"]
    assert used["shared"] <= SHARED_BYTES
    assert used["registers"] * kernel.threads <= REGISTERS_PER_BLOCK


# No device here: what asks for one is told that it is of capability 9.0.
FIND_OR_COMPILE = """
from types import SimpleNamespace
from numba import cuda
from numba.cuda import codegen, dispatcher
device = SimpleNamespace(compute_capability=(9, 0))
dispatcher.get_current_device = lambda: device
codegen.devices.get_context = lambda *_: SimpleNamespace(device=device)
from fastcnn.kernels.cuda import activation, jit
for kernel in (activation._relu, activation._leaky_relu):
    for compiled in kernel.signatures:
        cache = jit._kernel_cache(kernel)
        target = cuda.jit(kernel.function).targetctx
        found = cache.load_overload(compiled.argument_types, target)
        print(found is not None)
        if found is None:
            options = cuda.jit(**kernel.options)(kernel.function).targetoptions
            fresh = dispatcher._Kernel(kernel.function, compiled.argument_types, **options)
            fresh._codelibrary.get_cubin(cc=(9, 0))
            cache.save_overload(compiled.argument_types, fresh)
"""


def test_the_next_process_finds_compiled_kernels_on_disk(tmp_path):
    environment = {**os.environ, "FASTCNN_CACHE_DIR": str(tmp_path)}
    for expected in ("False", "True"):
        done = subprocess.run(
            [sys.executable, "-c", FIND_OR_COMPILE],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        assert done.stdout.split() == [expected] * 4
