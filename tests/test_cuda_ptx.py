"""Every CUDA kernel compiles for compute capability 8.0 and 9.0, and none spills registers, says ptxas.

Kernels of float32 compute in float32, but for the sums that are to be exact.
"""

import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda_device
import pytest

if cuda_device.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="needs fastcnn[cuda]")

from numba.cuda import types

# Two of these for their kernels, which are compiled too.
from fastcnn.kernels.cuda import arithmetic as _arithmetic  # noqa: F401
from fastcnn.kernels.cuda import driver
from fastcnn.kernels.cuda import padding as _padding  # noqa: F401
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


@functools.cache
def ptx(kernel, argument_types, capability):
    """One kernel as PTX."""
    from numba import cuda

    options = {"launch_bounds": kernel.options.get("launch_bounds")}
    # Functions that kernels call are compiled for the device at hand, whichever the kernel is for.
    device = SimpleNamespace(compute_capability=capability)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numba.cuda.dispatcher.get_current_device", lambda: device)
        source, _ = cuda.compile_ptx(kernel.function, argument_types, cc=capability, device=False, **options)
    return source


def report(source, kernel, capability, folder):
    """What ptxas says of one kernel: its numbers by the words around them."""
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
def test_compiles_without_spills(kernel, argument_types, capability, tmp_path):
    used = report(ptx(kernel, argument_types, capability), kernel, capability, tmp_path)
    assert not used["spills"]
    assert not used["stack"]
    assert used["shared"] <= SHARED_BYTES
    assert used["registers"] * kernel.threads <= REGISTERS_PER_BLOCK


# Where float64 is meant: a float constant of Python's, or one of its integers beside a float32, makes Numba
# compute in float64, which on most devices takes 32 or 64 times as long.
MEANT = {
    "arrays._convert": "to float64",
    "activation._prelu_backward": "the gradient of a slope is a sum over all images",
    "arithmetic._squares": "the norm of all gradients",
    "batch._augment": "the mean of an image",
    "columns._add_sums": "the gradient of a bias is a sum over all pixels",
    "columns._sum_rows": "the same",
    "normalization._moments": "mean and variance over all pixels",
    "normalization._given_moments": "one over a root, once for each channel",
    "normalization._gradient_sums": "sums over all pixels",
    "normalization.pooled_sums": "sums over all pixels",
    "normalization._backward": "factors from those sums, once for each thread's channel",
    "normalization.backward_pool": "the same",
}
ARITHMETIC = re.compile(
    r"^\s*(?:@\S+\s+)?(?:add|sub|mul|div|fma|rcp|sqrt|cvt)\.[\w.]*f64[\w.]*\s", re.MULTILINE
)


@pytest.mark.parametrize(("kernel", "argument_types"), SIGNATURES)
def test_float32_is_computed_in_float32(kernel, argument_types):
    first = next(kind for kind in argument_types if isinstance(kind, types.Array))
    if first.dtype == types.float64:
        return
    found = ARITHMETIC.findall(ptx(kernel, argument_types, CAPABILITIES[-1]))
    assert not found or kernel.name.partition("[")[0] in MEANT, found


@pytest.mark.parametrize(("kernel", "argument_types"), SIGNATURES)
def test_parameters_have_the_sizes_that_launches_give_them(kernel, argument_types):
    letters = "".join(map(driver.letters, argument_types))
    entry = ptx(kernel, argument_types, CAPABILITIES[-1]).partition(".entry")[2].partition(")")[0]
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[usfb](\d+)", entry)]
    assert sizes == [struct.calcsize(letter) for letter in letters]


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
