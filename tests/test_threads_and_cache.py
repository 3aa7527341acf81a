"""Kernels survive forks, several Python threads and an unwritable cache; results don't depend on threads."""

import hashlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import fastcnn
from fastcnn.kernels import cpu, jit, threads


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=variables,
        timeout=300,
        check=False,
    )


WORK = """
    import numpy as np, fastcnn
    from fastcnn.kernels import cpu
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 24, 24, 8)).astype(np.float32)
    w = rng.standard_normal((3, 3, 8, 32)).astype(np.float32)
    def work():
        y = cpu.conv2d_forward(x, w, None, 1, 1)
        return y, cpu.conv2d_backward_weight(y, x, 3, 1, 1)
    expected = work()
    def same(result):
        return all(np.array_equal(a, b) for a, b in zip(result, expected))
"""


def test_forked_child_computes_the_same():
    code = """
    import os, sys
    child = os.fork()
    if child == 0:
        os._exit(0 if same(work()) else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or (0 if same(work()) else 4))
    """
    done = run_python(textwrap.dedent(WORK) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_python_threads_share_the_kernels():
    code = """
    import sys, threading
    wrong = []
    def many():
        for _ in range(20):
            if not same(work()):
                wrong.append(1)
    threads = [threading.Thread(target=many) for _ in range(4)]
    [t.start() for t in threads]; [t.join() for t in threads]
    sys.exit(len(wrong))
    """
    done = run_python(textwrap.dedent(WORK) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_numbas_own_threads_live_beside_the_team():
    code = """
    import numba
    @numba.njit(parallel=True)
    def total(x):
        s = 0.0
        for i in numba.prange(x.size):
            s += x[i]
        return s
    for _ in range(5):
        assert total(np.ones(1000)) == 1000 and same(work())
    """
    done = run_python(textwrap.dedent(WORK) + textwrap.dedent(code))
    assert done.returncode == 0, done.stderr


def test_an_error_in_any_part_reaches_the_caller():
    """With bounds checked, as in the second pass of the tests; one part fails, on whichever thread."""
    code = """
    from fastcnn.kernels.threads import parallel
    @parallel
    def outside(part, parts, x):
        if part == 0:
            x[x.size + part] = 1
    fastcnn.set_num_threads(2)
    for _ in range(3):
        try:
            outside(8, np.zeros(4))
        except IndexError:
            pass
        else:
            raise SystemExit("no error")
    assert same(work())
    """
    done = run_python(textwrap.dedent(WORK) + textwrap.dedent(code), NUMBA_BOUNDSCHECK="1")
    assert done.returncode == 0, done.stderr


@threads.parallel
def _note_order(part, parts, order):
    """Where the last entry is how many parts were done before."""
    order[order[-1]] = part
    order[-1] += 1


@pytest.mark.parametrize(
    ("helpers", "parts", "expected"),
    [
        pytest.param(0, 4, [0, 1, 2, 3], id="alone"),
        pytest.param(1, 8, [0, 1, 2, 3, 7, 6, 5, 4], id="one helper"),
        pytest.param(2, 8, [0, 1, 4, 3, 2, 7, 6, 5], id="shares of two and three"),
        pytest.param(3, 2, [0, 1], id="fewer parts than helpers"),
    ],
)
def test_caller_does_its_share_and_then_those_of_helpers_that_sleep(helpers, parts, expected):
    order = np.zeros(parts + 1, np.int64)
    _note_order(1, order)  # compiles
    order[-1] = 0
    control = threads._control_block(helpers)
    for _ in range(2):
        order[-1] = 0
        assert _note_order._driver(control, parts, helpers, order)
        assert list(order) == [*expected, parts]


@pytest.fixture
def two_processors():
    """Numbers of two that this process may use, while it is on the first; skips the test if it may not."""
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("threads can't be put on one of several processors here")
    before = os.sched_getaffinity(0)
    first, second, *_ = sorted(before)
    os.sched_setaffinity(0, {first})
    yield first, second
    os.sched_setaffinity(0, before)


def test_helper_leaves_a_processor_that_it_shares(two_processors):
    here, elsewhere = two_processors
    control = threads._control_block(2)
    for caller, may_leave, leaves in ((here, True, True), (here, False, False), (elsewhere, True, False)):
        control[threads._THREADS] = caller + threads._NUMBERED
        assert threads._help_out(control, 1, 10, may_leave) is leaves
        is_awake = control[threads._THREADS + threads._THREAD] != 0
        assert is_awake == leaves


def test_helper_moves_to_where_none_of_the_team_is(two_processors, monkeypatch):
    here, elsewhere = two_processors
    os.sched_setaffinity(0, {here, elsewhere})
    control, put = threads._control_block(2), []
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, processors: put.append(set(processors)))
    control[threads._THREADS] = here + threads._NUMBERED
    assert threads._has_moved(control, 1)
    assert put == [{elsewhere}, {here, elsewhere}]
    control[threads._THREADS + threads._THREAD] = elsewhere + threads._NUMBERED
    assert not threads._has_moved(control, 2)
    assert len(put) == 2


def test_every_part_is_done_once():
    code = """
    from fastcnn.kernels.threads import parallel
    @parallel
    def count(part, parts, x):
        for i in range(part, x.size, parts):
            x[i] += 1
    x = np.zeros(1000)
    for parts in [1, 2, 3, 8, 64, 1000] * 20:
        count(parts, x)
    assert (x == 120).all()
    """
    done = run_python(textwrap.dedent(WORK) + textwrap.dedent(code), NUMBA_NUM_THREADS="4")
    assert done.returncode == 0, done.stderr


def test_unwritable_cache_costs_nothing_but_time(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    code = """
    from fastcnn.kernels import cpu
    import numpy as np
    assert cpu.relu_forward(np.array([-1.0, 2.0], np.float32)).tolist() == [0.0, 2.0]
    """
    done = run_python(code, FASTCNN_CACHE_DIR=str(blocker))
    assert done.returncode == 0, done.stderr


def test_damaged_cache_is_compiled_anew(tmp_path):
    code = """
    from fastcnn.kernels import cpu
    import numpy as np
    assert cpu.relu_forward(np.array([-1.0, 2.0], np.float32)).tolist() == [0.0, 2.0]
    """
    assert run_python(code, FASTCNN_CACHE_DIR=str(tmp_path)).returncode == 0
    files = list(tmp_path.rglob("*.nbc"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    done = run_python(code, FASTCNN_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_cache_version_follows_every_kernel_source(monkeypatch):
    before = jit._version_key()
    read = Path.read_bytes

    def edited(path):
        return read(path) + (b"# edited" if path.name == "tile.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", edited)
    assert jit._version_key() != before


def test_number_of_threads_is_checked():
    before = fastcnn.get_num_threads()
    with pytest.raises(ValueError, match="threads: 0"):
        fastcnn.set_num_threads(0)
    with pytest.raises(ValueError, match="threads: 100000"):
        fastcnn.set_num_threads(100_000)
    with pytest.raises(TypeError, match="threads"):
        fastcnn.set_num_threads(1.5)
    assert fastcnn.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_results_have_the_same_bits_on_any_number_of_threads(threads):
    code = """
    import hashlib
    fastcnn.set_num_threads({threads})
    y, dw = work()
    dx = cpu.conv2d_backward_input(y, w, x.shape, 1, 1)
    z = cpu.linear_forward(x.reshape(16, -1), np.ones((24 * 24 * 8, 40), np.float32))
    print(hashlib.sha256(b"".join(a.tobytes() for a in (y, dw, dx, z))).hexdigest())
    """
    done = run_python(
        textwrap.dedent(WORK) + textwrap.dedent(code.format(threads=threads)), NUMBA_NUM_THREADS="4"
    )
    assert done.returncode == 0, done.stderr
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 24, 24, 8)).astype(np.float32)
    w = rng.standard_normal((3, 3, 8, 32)).astype(np.float32)
    y = cpu.conv2d_forward(x, w, None, 1, 1)
    dw = cpu.conv2d_backward_weight(y, x, 3, 1, 1)
    dx = cpu.conv2d_backward_input(y, w, x.shape, 1, 1)
    z = cpu.linear_forward(x.reshape(16, -1), np.ones((24 * 24 * 8, 40), np.float32))

    digest = hashlib.sha256(b"".join(a.tobytes() for a in (y, dw, dx, z))).hexdigest()
    assert done.stdout.strip() == digest


def test_refuses_to_be_imported_under_another_name(tmp_path):
    checkout = Path(fastcnn.__file__).resolve().parents[1]
    if not (checkout / "kernels").is_dir():
        pytest.skip("not a checkout")
    done = run_python(f"import sys; sys.path.insert(0, {str(checkout)!r}); import kernels")
    assert done.returncode != 0
    assert "fastcnn.kernels" in done.stderr
