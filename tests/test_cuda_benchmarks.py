"""The GPU's comparison: the device's side of every operation, a row from fake sides, and what it refuses."""

import cuda_device
import numpy as np
import pytest

import fastcnn
from benchmarks import gpu, inputs, parity
from benchmarks.peers import Side, networks, ours
from benchmarks.shapes import WORKLOADS, scaled_down

cuda = cuda_device.module()
pytestmark = cuda_device.marks


def smallest(op):
    """The workload of an operation with the least input."""
    found = [scaled_down(workload) for workload in WORKLOADS.values() if workload.op == op]
    return min(found, key=lambda workload: sum(array.size for array in inputs.build(workload).values()))


OPS = sorted({workload.op for workload in WORKLOADS.values()} - {*networks.MODEL_OPS})


@pytest.mark.parametrize("op", OPS)
def test_operations_on_the_device(op):
    workload = smallest(op)
    arrays = inputs.build(workload)
    there, here = (ours.prepare(workload, arrays, "fastcnn", device) for device in ("cuda", "cpu"))
    parity.check(there.result(), here.result())
    there.run()
    parity.check(there.result(), here.result())


@pytest.mark.skipif(cuda_device.SIMULATED, reason="minutes on the simulator")
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith("train/")])
def test_networks_on_the_device(name):
    workload = scaled_down(WORKLOADS[name])
    arrays = inputs.build(workload)
    there, here = (ours.prepare(workload, arrays, "fastcnn", device) for device in ("cuda", "cpu"))
    parity.check(there.result(), here.result())
    for side in (there, here):
        # The same elements are dropped on either side.
        fastcnn.manual_seed(0)
        side.run()
    parity.check(there.result(), here.result())


def fake(calls, value=1.0):
    return Side(lambda: calls.append("run"), lambda: {"y": np.full(3, value)})


def test_a_row_is_compared_and_timed():
    calls, waits = [], []
    sides = {"fastcnn": fake(calls), "torch": fake(calls)}
    row = gpu.compare(WORKLOADS["relu-forward/14-64"], sides, lambda: waits.append(1), rounds=2)
    assert row.best == "torch"
    assert row.ratio.low > 0
    assert row.microseconds > 0
    assert len(calls) > len(waits) > 2
    assert row.line().count("|") == gpu.HEAD.splitlines()[0].count("|")
    with pytest.raises(parity.ParityError):
        gpu.compare(WORKLOADS["relu-forward/14-64"], {**sides, "torch": fake([], 2.0)}, waits.clear, rounds=2)


def test_refuses_what_it_can_t_do(capsys):
    pytest.importorskip("torch")
    refused = [
        (["--rows", "("], "--rows"),
        (["--rows", "nothing"], "--rows"),
        (["--repeat", "0"], "--repeat"),
    ]
    if cuda_device.SIMULATED:
        refused.append(([], "PyTorch can't use a CUDA device"))
    for arguments, message in refused:
        with pytest.raises(SystemExit):
            gpu.main(arguments)
        assert message in capsys.readouterr().err
