"""The benchmarks measure what they say: workloads, formulas, parity, statistics, reports."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

# At the end, where the checkout hides no installed package.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastcnn
from benchmarks import compare, inputs, machine, measure, memory, parity, peers, report, rows, work
from benchmarks.measure import Spread
from benchmarks.peers import OURS, reference
from benchmarks.shapes import MODELS, SUMMARY, WORKLOADS, Model, Scores, Workload, scaled_down

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = {name: peers.load(name) for name in (OURS, *peers.DEFAULT)}
every_workload = pytest.mark.parametrize("name", list(WORKLOADS))


def small(name):
    workload = scaled_down(WORKLOADS[name])
    return workload, inputs.build(workload)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Busy machines make several threads wait for each other; results don't depend on their number."""
    before = fastcnn.get_num_threads()
    for library in INSTALLED.values():
        if library is not None:
            library.set_threads(1)
    yield
    for library in INSTALLED.values():
        if library is not None:
            library.set_threads(before)


# Workloads


@every_workload
def test_workload_agrees_with_the_reference_and_the_installed_peers(name):
    workload, arrays = small(name)
    before = {key: array.copy() for key, array in arrays.items()}
    side = peers.load(OURS).prepare(workload, arrays, OURS)
    ours = side.result()
    parity.check(ours, reference.result(workload, arrays))
    for peer, library in INSTALLED.items():
        for variant in library.variants(workload) if peer != OURS and library is not None else ():
            other = library.prepare(workload, arrays, variant)
            parity.check(ours, other.result())
            other.run()
    result = [side.run() for _ in range(2)][-1]
    values = result if isinstance(result, tuple) else (result,)
    assert all(np.isfinite(value).all() for value in values)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, before[key])


@every_workload
def test_inputs_are_the_same_each_time_and_have_the_workloads_shape(name):
    workload, arrays = small(name)
    again = inputs.build(workload)
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, again[key])
        assert array.flags.c_contiguous
        assert array.dtype in (np.float32, np.int64)
    sized = arrays.get("x", arrays.get("dout"))
    if hasattr(workload.shape, "n") and sized is not None:
        assert len(sized) == workload.shape.n


def test_scaling_down_keeps_channels_and_operation():
    for workload in WORKLOADS.values():
        less = scaled_down(workload)
        assert (less.name, less.op, type(less.shape)) == (workload.name, workload.op, type(workload.shape))
        for key in ("c", "f", "groups", "kernel", "stride", "padding", "dilation", "model"):
            assert getattr(less.shape, key, None) == getattr(workload.shape, key, None)


def test_every_named_model_is_measured():
    from fastcnn import models

    assert set(models.names()) == set(MODELS)
    assert set(SUMMARY) < set(MODELS)
    assert {f"{op}/{name}" for op in ("train", "infer-1", "infer-256") for name in MODELS} < set(WORKLOADS)


# FLOPs and bytes, counted by hand

EMOTION_LAYERS = (48 * 48 * 32 * 9, 24 * 24 * 64 * 9 * 32, 64 * 12 * 12 * 128, 128 * 7)
EMOTION_PARAMETERS = 32 * 9 + 32 + 64 * 32 * 9 + 64 + 9216 * 128 + 128 + 128 * 7 + 7
RESNET_LAYERS = (
    32 * 32 * 64 * 27,
    32 * 32 * 128 * 64 * 9,
    *[16 * 16 * 128 * 128 * 9] * 2,
    16 * 16 * 256 * 128 * 9,
    8 * 8 * 512 * 256 * 9,
    *[4 * 4 * 512 * 512 * 9] * 2,
    512 * 10,
)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("conv-forward/first-1-3x3-32", 2 * 64 * 48 * 48 * 32 * 9),
        ("conv-input/32-3x3-64", 2 * 64 * 24 * 24 * 64 * 9 * 32),
        ("conv-weight/32-3x3-64", 2 * 64 * 24 * 24 * 64 * 9 * 32),
        # No padding: 28 - 5 + 1 = 24.
        ("conv-forward/first-3-5x5-10", 2 * 200 * 28 * 28 * 10 * 25 * 3),
        # (32 + 2 - 3) // 2 + 1 = 16.
        ("conv-forward/64-3x3-128-stride2", 2 * 32 * 16 * 16 * 128 * 9 * 64),
        ("conv-forward/64-3x3-64-dilation2", 2 * 16 * 32 * 32 * 64 * 9 * 64),
        ("conv-forward/depthwise-64-3x3", 2 * 32 * 32 * 32 * 64 * 9),
        ("conv-forward/grouped-128-3x3-128-by4", 2 * 32 * 16 * 16 * 128 * 9 * 32),
        ("linear-weight/64-9216-128", 2 * 64 * 9216 * 128),
        ("infer-1/emotion", 2 * sum(EMOTION_LAYERS)),
        ("infer-256/emotion", 256 * 2 * sum(EMOTION_LAYERS)),
        ("train/emotion", 64 * 2 * (3 * sum(EMOTION_LAYERS) - EMOTION_LAYERS[0])),
        ("infer-1/resnet9", 2 * sum(RESNET_LAYERS)),
        ("train/resnet9", 64 * 2 * (3 * sum(RESNET_LAYERS) - RESNET_LAYERS[0])),
        ("relu-forward/48-32", 0),
        ("adam/10M", 0),
    ],
)
def test_flops_agree_with_a_count_by_hand(name, flops):
    assert work.of(WORKLOADS[name]).flops == flops


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("conv-forward/32-3x3-64", 4 * (64 * 24 * 24 * 32 + 64 * 24 * 24 * 64 + 9 * 32 * 64)),
        # Each output has one byte that says which input was the largest.
        ("max-pool-forward/48-2x2-32", 64 * 32 * (4 * 48 * 48 + 5 * 24 * 24)),
        ("avg-pool-backward/12-2x2-32", 4 * 64 * 32 * (12 * 12 + 6 * 6)),
        ("batch-norm-backward/26-10", 4 * 5 * 500 * 26 * 26 * 10),
        ("relu-backward/48-32", 4 * 3 * 64 * 48 * 48 * 32),
        ("im2col/32-5x5-3", 4 * 200 * (32 * 32 * 3 + 28 * 28 * 75)),
        ("linear-forward/1-9216-128", 4 * (9216 + 128 + 9216 * 128)),
        ("cross-entropy/500x10", 500 * (4 * 2 * 10 + 4 + 8)),
        ("adam/10M", 4 * 7 * 10_000_000),
        ("infer-1/emotion", 4 * (EMOTION_PARAMETERS + 48 * 48)),
        ("train/emotion", 4 * (10 * EMOTION_PARAMETERS + 2 * 64 * 48 * 48)),
    ],
)
def test_bytes_agree_with_a_count_by_hand(name, size):
    assert work.of(WORKLOADS[name]).bytes == size


@every_workload
def test_every_workload_has_a_formula(name):
    needed = work.of(WORKLOADS[name])
    assert needed.bytes > 0
    assert (needed.flops > 0) == name.startswith(("conv-", "linear-", "train", "infer"))


# Parity


def test_parity_returns_the_largest_relative_difference():
    theirs = {"a": np.array([1.0, 100.0]), "b": np.array([2.0])}
    mine = {"a": np.array([1.001, 100.0]), "b": np.array([2.0]), "more": np.array([5.0])}
    assert parity.check(mine, theirs) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (np.array([1.0, np.nan]), "differs by nan"),
        (np.array([1.0, 2.001]), "differs by 5.0e-04"),
        (np.ones((2, 1)), r"shape \(2, 1\), not \(2,\)"),
    ],
)
def test_parity_refuses(mine, message):
    with pytest.raises(parity.ParityError, match=message):
        parity.check({"y": mine}, {"y": np.array([1.0, 2.0])})


def test_parity_needs_something_to_compare():
    with pytest.raises(parity.ParityError, match="nothing"):
        parity.check({"y": np.ones(2)}, {"z": np.ones(2)})


def test_gradients_are_compared_by_norm_and_rounding_errors_of_zero_pass():
    weight, bias = parity.GRADIENT + "weight", parity.GRADIENT + "bias"
    theirs = {weight: np.full(100, 1.0), bias: np.array([1e-8])}
    moved = np.full(100, 1.0)
    moved[0] = 1.05
    assert parity.check({weight: moved, bias: np.array([-1e-8])}, theirs) == pytest.approx(0.005)
    with pytest.raises(parity.ParityError, match="weight"):
        parity.check({weight: theirs[weight] * 1.02, bias: theirs[bias]}, theirs)


# Statistics


def test_spread_is_the_median_between_its_quartiles():
    assert measure.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert measure.spread([1.0, 2.0]) == Spread(1.5, 1.25, 1.75)
    assert measure.spread([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratios_are_medians_of_pairs_and_not_ratios_of_medians():
    ours, theirs = [1.0, 10.0, 2.0], [3.0, 20.0, 8.0]
    # Pairs: 3, 2, 4; of the medians it would be 8 / 2 = 4.
    assert measure.ratios(ours, theirs) == Spread(3.0, 2.5, 3.5)


def test_ratios_need_pairs():
    with pytest.raises(ValueError):
        measure.ratios([1.0], [1.0, 2.0])


def test_geometric_mean():
    assert measure.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_interleaved_rounds_give_everyone_a_turn(monkeypatch):
    monkeypatch.setattr(measure, "WARMUP_SECONDS", 0.0)
    order = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    times = measure.interleaved(runs, [2, 1], rounds=3)
    assert [len(side) for side in times] == [3, 3]
    # One call to warm up, then two timed ones of the first side and one of the second; who begins alternates.
    assert "".join(order) == "aaa" + "bb" + "bb" + "aaa" + "aaa" + "bb"


def test_peaks_are_positive_and_the_better_of_two_counts():
    assert machine.fma_peak(1, tries=1, seconds=1e-4) > 0
    assert machine.copy_bandwidth(1, tries=1, size=1 << 16) > 0
    assert machine.copy_size() >= 64 << 20
    assert machine.Peaks(1.0, 5.0).or_better(machine.Peaks(2.0, 4.0)) == machine.Peaks(2.0, 5.0)


def test_memory_is_that_of_a_process_of_its_own():
    held = memory.in_child("cross-entropy/64x7", OURS, OURS, 1)
    assert 0 < held["imported"] <= held["peak"]
    assert memory.in_child("cross-entropy/64x7", "no such peer", OURS, 1) is None


# Rows and reports

PEAKS = machine.Peaks(100.0, 20.0)


def timing(peer, variant, milliseconds, ratio):
    return rows.Timing(peer, variant, Spread(*[milliseconds / 1e3] * 3), ratio and Spread(*ratio))


@pytest.fixture
def run():
    """Two rows that were measured, and one that failed."""
    conv = rows.Row("conv-forward/a", "conv-forward", 200_000_000, 1_000_000, timing(OURS, OURS, 4.0, None))
    conv.peers = [
        timing("torch", "torch NCHW", 12.0, (3.0, 2.9, 3.2)),
        timing("torch", "torch channels-last", 8.0, (2.0, 1.9, 2.1)),
        timing("jax", "jax", 80.0, None),
        rows.Timing("scipy", "scipy", error="RuntimeError: no"),
    ]
    conv.ours.memory = {"imported": 100_000_000, "peak": 150_000_000}
    train = rows.Row("train/emotion", "train", 200_000, 40_000_000, timing(OURS, OURS, 2.0, None))
    train.peers = [timing("torch", "torch NCHW", 1.6, (0.8, 0.7, 0.9))]
    failed = rows.Row("relu/x", "relu", 0, 10, rows.Timing(OURS, OURS), failed="torch: y differs by 1.0e+00")
    about = {
        "cpu": "A CPU",
        "cores": 2,
        "vector_bits": 512,
        "last_cache_mib": 32.0,
        "system": "Linux",
        "python": "3",
    }
    settings = {"threads": 2, "rounds": 15, "commit": "abc", "date": "today"}
    return report.Run([conv, train, failed], PEAKS, about, {"fastcnn": "0", "torch": "2"}, settings)


def test_a_row_names_its_best_peer_and_its_bound(run):
    conv, train, _ = run.rows
    assert conv.best().variant == "torch channels-last"
    assert conv.best("jax") is None
    # 0.2 GFLOP at 100 GFLOP/s take 2 ms, 1 MB at 20 GB/s 0.05 ms.
    assert conv.bound(PEAKS) == ("FMA", pytest.approx(50.0), pytest.approx(0.5))
    assert train.bound(PEAKS) == ("copy", pytest.approx(20.0), pytest.approx(1.0))


def test_table_has_a_line_for_each_row(run):
    lines = report.table(run).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:7] == [
        "conv-forward/a",
        "4.00",
        "8.00",
        "torch channels-last",
        "2.00x (1.90 to 2.10)",
        "50.0 GFLOP/s",
        "50% FMA",
    ]
    assert cells[2][7] == "150 (50)"
    assert cells[3][5:7] == ["20.0 GB/s", "100% copy"]
    assert cells[4][1] == "FAILED"
    assert "y differs by 1.0e+00" in lines[4]


def test_table_of_every_side(run):
    text = report.table(run, every=True)
    assert len(text.splitlines()) == 2 + 4 + 1 + 1
    assert "about 20.0x" in text
    assert "RuntimeError: no" in text


def test_summary_means_the_named_networks_and_lists_slow_rows(run):
    lines = report.summary(run.rows)
    assert lines[0].startswith("Training step, 1 of 4 networks, against torch: geometric mean 0.80x")
    assert lines[1] == "Below 0.9x of torch's best: 1 of 2 rows: train/emotion (0.80x)."
    assert lines[-1] == "Failed: relu/x."


def test_json_holds_every_side(run):
    data = json.loads(report.as_json(run))
    conv, _, failed = data["rows"]
    assert data["peaks"] == {"fma_gflops": 100.0, "copy_gbytes": 20.0}
    assert conv["best_peer"] == "torch channels-last"
    assert conv["share_of_fma"] == pytest.approx(0.5)
    assert [side["ratio"] and side["ratio"]["median"] for side in conv["peers"]] == [3.0, 2.0, None, None]
    assert failed["failed"] == "torch: y differs by 1.0e+00"
    assert failed["ours"]["seconds"] is None


def test_markdown_has_machine_table_and_summary(run):
    text = report.markdown(run)
    assert "A CPU" in text
    assert "100 GFLOP/s" in text
    assert "| conv-forward/a" in text
    assert "- Failed: relu/x." in text


def test_chart_is_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.png"
    report.chart(run, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again.png"
    report.chart(run, again)
    assert again.read_bytes() == path.read_bytes()


class Peer:
    """A library that computes a workload with an error."""

    def __init__(self, error=0.0, raises=None):
        self.error, self.raises = error, raises
        self.runs = 0

    def variants(self, workload):
        return ("peer",)

    def prepare(self, workload, arrays, variant):
        if self.raises is not None:
            raise self.raises
        right = reference.result(workload, arrays)
        return peers.Side(self.count, lambda: {name: array + self.error for name, array in right.items()})

    def count(self):
        self.runs += 1


OPTIONS = rows.Options(threads=1, rounds=2, seconds=0.0, memory=False)
SMALL = Workload("cross-entropy/64x7", "cross-entropy", Scores(8, 7))


def compared(peer):
    return rows.compare(SMALL, {OURS: peers.load(OURS), "peer": peer}, OPTIONS)


def test_a_row_is_checked_then_timed():
    peer = Peer()
    row = compared(peer)
    assert row.failed is None
    assert row.best().variant == "peer"
    assert row.ours.seconds.median > 0
    assert peer.runs > 2


def test_a_row_that_differs_is_not_timed():
    peer = Peer(error=1.0)
    row = compared(peer)
    assert re.search(r"peer: \w+ differs by", row.failed)
    assert row.ours.seconds is None
    assert peer.runs == 0
    assert "FAILED" in report.table(report.Run([row], PEAKS, {}, {}, {}))


def test_a_peer_that_breaks_leaves_the_row_standing():
    row = compared(Peer(raises=RuntimeError("out of order\nand more")))
    assert row.failed is None
    assert row.best() is None
    assert row.ours.seconds.median > 0
    assert row.peers[0].error == "RuntimeError: out of order"


def test_a_wrong_result_of_our_own_fails_the_row(monkeypatch):
    right = reference.result
    monkeypatch.setattr(reference, "result", lambda *a: {k: v + 1 for k, v in right(*a).items()})
    row = compared(Peer())
    assert row.failed.startswith("reference: ")
    assert row.ours.seconds is None


# Command line


@pytest.fixture
def quick(monkeypatch):
    """Comparisons that measure no peaks and set nothing that outlasts them."""
    threads = fastcnn.get_num_threads()
    monkeypatch.setattr(machine, "peaks", lambda threads, quick=False: PEAKS)
    yield
    fastcnn.set_num_threads(threads)


def test_listing(capsys):
    assert compare.main(["--list", "--rows", "^adam"]) == 0
    assert capsys.readouterr().out == "adam/10M\n"


def test_a_comparison_from_the_command_line(quick, tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown")}
    arguments = [
        "--rows",
        "cross-entropy/64x7",
        "--quick",
        "--repeat",
        "1",
        "--threads",
        "1",
        "--peers",
        "none",
    ]
    for kind, path in files.items():
        arguments += [f"--{kind}", str(path)]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == files["markdown"].read_text()
    assert "[1/1] cross-entropy/64x7" in printed.err
    assert [row["name"] for row in json.loads(files["json"].read_text())["rows"]] == ["cross-entropy/64x7"]


def test_a_failed_row_is_an_exit_code(quick, monkeypatch, capsys):
    def refuse(*_):
        raise parity.ParityError("reference: y differs")

    monkeypatch.setattr(rows, "against_reference", refuse)
    arguments = [
        "--rows",
        "cross-entropy/64x7",
        "--quick",
        "--repeat",
        "1",
        "--threads",
        "1",
        "--peers",
        "none",
    ]
    assert compare.main(arguments) == 1
    assert "FAILED" in capsys.readouterr().out


def test_ctrl_c_keeps_the_rows_so_far(quick, monkeypatch, capsys):
    first = rows.compare

    def once(workload, *arguments):
        if workload.name != "cross-entropy/64x7":
            raise KeyboardInterrupt
        return first(workload, *arguments)

    monkeypatch.setattr(rows, "compare", once)
    arguments = ["--rows", "cross-entropy", "--quick", "--repeat", "1", "--threads", "1", "--peers", "none"]
    assert compare.main(arguments) == 130
    assert "| cross-entropy/64x7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "("], "--rows: '(' is no regular expression"),
        (["--rows", "nothing at all"], "matches no workload"),
        (["--threads", "0"], "--threads: threads: 0 is not between 1"),
        (["--repeat", "0"], "--repeat: 0 is below 1"),
        (["--peers", "pytorch"], "--peers: 'pytorch' is none of torch,"),
        (["--json", "/no/such/directory/x.json"], "--json: there is no directory /no/such/directory"),
    ],
)
def test_errors_of_the_command_line(quick, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        compare.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


# asv


def test_asv_suites_name_workloads_that_exist():
    from benchmarks.suites import kernels, networks, ratios, space

    assert set(kernels.Kernels.params) < set(WORKLOADS)
    assert set(ratios.AgainstTorch.params) < set(WORKLOADS)
    models, images = networks.Inference.params
    assert {f"infer-{n}/{model}" for model in models for n in images} < set(WORKLOADS)
    assert {f"train/{model}" for model in (*networks.Training.params, *space.Workspace.params)} < set(
        WORKLOADS
    )


def test_asv_layers_agree_with_the_reference():
    from benchmarks.suites import layers

    for name in layers.Layers.params:
        case = layers._case(name)
        assert np.isfinite(case.step()).all()


def test_asv_configuration_pins_its_runner():
    text = (ROOT / "benchmarks" / "asv.conf.json").read_text()
    config = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert config["benchmark_dir"] == "suites"
    assert config["matrix"]["req"]["asv_runner"] == ["==0.3.2"]


def test_model_workloads_are_the_documents():
    assert MODELS["emotion"] == Model("emotion", 64, 1, 48, 48, 7)
    assert {name: model.n for name, model in MODELS.items()} == {
        "emotion": 64,
        "cifar-batchnorm": 500,
        "cifar-small": 200,
        "mnist-prelu": 64,
        "chapter9": 64,
        "resnet9": 64,
    }
