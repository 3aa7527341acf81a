"""``fastcnn train`` on a few small images."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastcnn import train
from fastcnn.cli import app, progress, waiting
from fastcnn.kernels import threads as team


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty folder with a small data set, and no compiling in other processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCNN_DEBUG", raising=False)
    monkeypatch.setattr("fastcnn.warmup.warmup", lambda *args, **kwargs: jit_result())
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 60, (120, 1, 12, 12)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * label : 4 * label + 4] += 180
    np.savez("tiny.npz", x_train=images[:90], y_train=labels[:90], x_test=images[90:], y_test=labels[90:])
    threads = team.get_num_threads()
    yield tmp_path
    team.set_num_threads(threads)


def jit_result():
    from fastcnn.warmup import WarmupResult

    return WarmupResult(0, 0.0, cached=True)


def run(*words, code=0):
    result = CliRunner().invoke(app, ["train", *map(str, words)])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def train_tiny(*words, code=0):
    return run("--data", "tiny.npz", "--epochs", 2, *words, code=code)


def weights(folder):
    return train.load_checkpoint(Path(folder) / "last").model


def test_trains_saves_and_tells():
    text = train_tiny().stdout
    folder = Path("runs/tiny-emotion")
    assert {"run.json", "metrics.json", "best.safetensors", "last.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert "90 images to train on, 30 to test" in text
    assert "by training loss" in text
    assert " 2/2 " in text
    for part in ("Confusion matrix", "precision", "recall", "F1", "accuracy"):
        assert part in text
    assert f"predict {folder} --data tiny.npz --index 0" in text
    assert not set(text) & {"\x1b", "\r", "\x08"}, "plain lines, where nobody watches a terminal"


def test_validation_part():
    text = train_tiny("--validation", 0.1).stdout
    assert "81 images to train on, 9 to choose the epoch, 30 to test" in text
    assert "by training loss" not in text
    with np.load("tiny.npz") as archive:
        own = {"x_validation": archive["x_test"][:12], "y_validation": archive["y_test"][:12]}
        np.savez("own.npz", **archive, **own)
    assert "90 images to train on, 12 to choose the epoch" in train_tiny("--data", "own.npz").stdout


def test_learns():
    result = json.loads(train_tiny("--json", "--epochs", 5, "--lr", 0.003).stdout)
    assert result["test"]["accuracy"] >= 0.9


def test_second_run_gets_its_own_folder():
    train_tiny()
    before = Path("runs/tiny-emotion/last.safetensors").read_bytes()
    text = train_tiny("--seed", 1).stdout
    assert "this one goes to runs/tiny-emotion-2" in text
    assert "goes to runs/tiny-emotion-3" in train_tiny().stdout
    assert Path("runs/tiny-emotion/last.safetensors").read_bytes() == before
    assert Path("runs/tiny-emotion-2/best.json").exists()


def test_json_is_one_object():
    result = train_tiny("--json", "--optimizer", "sgd", "--schedule", "step", "--limit-train", 40)
    content = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert content["epochs"] == len(content["history"]) == 2
    assert content["settings"]["limit_train"] == 40
    assert content["settings"]["lr"] == 0.05
    assert sum(map(sum, content["test"]["confusion"])) == 30
    assert Path(content["checkpoint"]).exists()
    assert "40 images to train on" in result.stderr
    saved = json.loads(Path("runs/tiny-emotion/metrics.json").read_text())
    assert saved["accuracy"] == content["test"]["accuracy"]


def test_same_seed_same_bits_at_any_number_of_threads():
    train_tiny("--out", "a", "--augment", "light", "--model", "mnist-prelu")
    train_tiny("--out", "b", "--augment", "light", "--model", "mnist-prelu", "--threads", 1)
    train_tiny("--out", "c", "--augment", "light", "--model", "mnist-prelu", "--seed", 1)
    a, b, c = map(weights, "abc")
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert not all(np.array_equal(a[key], c[key]) for key in a)


def test_options_reach_the_run(monkeypatch):
    built = []
    original = train.Trainer.fit

    def fit(self, *args, **kwargs):
        built.append((self, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.Trainer, "fit", fit)
    words = ["--optimizer", "adamw", "--weight-decay", 0.1, "--lr", 0.002, "--schedule", "none"]
    train_tiny(*words, "--label-smoothing", 0.1, "--patience", 1, "--batch-size", 30)
    trainer, arguments = built[0]
    assert type(trainer.optimizer).__name__ == "AdamW"
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.1
    assert trainer.optimizer.param_groups[0]["lr"] == 0.002
    assert trainer.scheduler is None
    assert trainer.loss_fn.label_smoothing == 0.1
    assert arguments["patience"] == 1
    assert trainer.step == 2 * 3
    assert trainer.model_config["input_shape"] == (1, 12, 12)
    assert set(trainer.normalize) == {"mean", "std"}


def test_patience_ends_a_run_early():
    text = train_tiny("--epochs", 30, "--patience", 1, "--schedule", "none", "--lr", 0.05).stdout
    assert "Stopped early: no better epoch for 1 epoch." in text


def test_folder_that_is_taken_is_kept():
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("all my work")
    result = train_tiny("--out", "out", code=1)
    assert result.stderr.startswith("error: out: exists already; --overwrite")
    assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]
    train_tiny("--out", "out", "--overwrite")
    assert Path("out/thesis.txt").read_text() == "all my work"
    before = weights("out")
    train_tiny("--out", "out", "--overwrite", "--seed", 3)
    after = weights("out")
    assert any(not np.array_equal(before[key], after[key]) for key in before)


def interrupt(monkeypatch, epoch, batch):
    """Let Ctrl-C come in the middle of an epoch."""

    def on_step(self, trainer, info):
        if (info.epoch, info.batch) == (epoch, batch):
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.TrainingProgress, "on_step", on_step)


def test_interrupted_run_goes_on_bit_for_bit(monkeypatch):
    options = ["--epochs", 3, "--batch-size", 20, "--augment", "light", "--model", "mnist-prelu"]
    options += ["--validation", 0.1]
    train_tiny("--out", "whole", *options)
    with monkeypatch.context() as patch:
        interrupt(patch, 2, 3)
        result = train_tiny("--out", "cut", *options, code=130)
    assert "interrupted: 1 of 3 epochs are done and saved in cut." in result.stderr
    assert "train --resume --out cut" in result.stderr
    text = run("--resume", "--out", "cut").stdout
    assert " 2/3 " in text
    assert " 1/3 " not in text
    whole, cut = weights("whole"), weights("cut")
    assert all(np.array_equal(whole[key], cut[key]) for key in whole)
    histories = [train.load_checkpoint(Path(name) / "last").history for name in ("whole", "cut")]
    assert histories[0]["val_loss"] == histories[1]["val_loss"] != [None] * 3


def test_interrupt_as_json(monkeypatch):
    interrupt(monkeypatch, 1, 1)
    content = json.loads(train_tiny("--json", code=130).stdout)
    assert content["interrupted"] is True
    assert content["epochs"] == 0
    assert content["run"] == "runs/tiny-emotion"
    assert "error" in content


def test_interrupt_while_compiling(monkeypatch):
    def warmup(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastcnn.warmup.warmup", warmup)
    assert train_tiny(code=130).stderr == "interrupted: by Ctrl-C\n"
    assert not Path("runs").exists()


def test_resume_a_run_of_a_version_without_devices():
    train_tiny("--out", "a", "--schedule", "none")
    settings = json.loads(Path("a/run.json").read_text())
    assert settings["settings"].pop("device") == "cpu"
    Path("a/run.json").write_text(json.dumps(settings))
    assert "3/3" in run("--resume", "--out", "a", "--epochs", 3).stdout


def test_resume_takes_the_newest_run_and_its_settings():
    train_tiny("--out", "runs/old")
    time.sleep(0.01)
    train_tiny("--out", "runs/new", "--schedule", "none", "--batch-size", 30)
    text = run("--resume", "--epochs", 3).stdout
    assert "batches of 30" in text
    assert " 3/3 " in text
    assert train.load_checkpoint("runs/new/last").epoch == 3
    assert "3/3" not in run("--resume", "--data", "tiny.npz").stdout, "it has its 3 epochs"
    assert train.load_checkpoint("runs/old/last").epoch == 2


def test_resume_refuses_another_run():
    train_tiny("--out", "a")
    error = run("--resume", "--out", "a", "--batch-size", 32, code=1).stderr
    assert error == "error: --batch-size 32: the run to resume was started with 64, and keeps it\n"
    error = run("--resume", "--out", "a", "--epochs", 9, code=1).stderr
    assert "cosine schedule is laid out for 2" in error
    assert "holds no run to resume" in run("--resume", "--out", "nowhere", code=1).stderr
    assert "no run to resume under runs" in run("--resume", code=1).stderr
    assert "exclude each other" in run("--resume", "--overwrite", code=2).stderr
    assert "--overwrite needs --out" in run("--overwrite", code=2).stderr


@pytest.mark.parametrize("content", ["", "{}", '{"settings": {"data": 1}}', '{"settings": []}', "\x00"])
def test_resume_with_damaged_settings(content):
    Path("a").mkdir()
    Path("a/run.json").write_text(content)
    assert "is damaged" in run("--resume", "--out", "a", code=1).stderr


def test_resume_from_a_damaged_checkpoint():
    train_tiny("--out", "a")
    path = Path("a/last.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert run("--resume", "--out", "a", code=1).stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "neither a data set's name nor an existing path"),
        (["--model", "emotoin"], "'emotoin' is none of"),
        (["--model", "resnet9", "--data", "small.npz"], "too small"),
        (["--lr", "-1"], "lr: -1"),
        (["--threads", "100000"], "threads: 100000 is not between"),
        (["--data", "text.npz"], "text.npz"),
        (["--out", "tiny.npz/x"], "tiny.npz"),
    ],
)
def test_user_errors_are_one_line(words, message):
    np.savez("small.npz", x=np.zeros((40, 1, 2, 2), np.uint8), y=np.arange(40) % 2)
    Path("text.npz").write_text("no archive")
    result = run("--data", "tiny.npz", "--epochs", 1, *words, code=1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    content = json.loads(run("--data", "tiny.npz", "--epochs", 1, "--json", *words, code=1).stdout)
    assert message in content["error"]


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--schedule", "linear"], ["--nope"], ["--seed", "x"]])
def test_wrong_usage_is_code_2(words):
    assert run(*words, code=2).stdout == ""


def test_loss_that_is_not_finite_is_reported():
    result = train_tiny("--lr", "1e30", "--schedule", "none", code=1)
    assert "A smaller --lr may help" in result.stderr
    assert "step" in result.stderr
    assert "layer" in result.stderr


def test_debug_lets_the_traceback_through(monkeypatch):
    monkeypatch.setenv("FASTCNN_DEBUG", "1")
    result = CliRunner().invoke(app, ["train", "--data", "nowhere"])
    assert isinstance(result.exception, ValueError)


def test_a_failed_warmup_does_not_stop_training(monkeypatch):
    from fastcnn.warmup import WarmupError

    def warmup(*args, **kwargs):
        raise WarmupError("compiling 'ReLU' failed: no memory")

    monkeypatch.setattr("fastcnn.warmup.warmup", warmup)
    assert "warning: compiling 'ReLU' failed: no memory" in train_tiny().stdout


def test_what_is_compiled(monkeypatch):
    seen = []

    def warmup(model, input_shape, num_classes, **options):
        seen.append((type(model).__name__, input_shape, num_classes, options))
        options["progress"](0, 2, "ReLU")
        options["progress"](2, 2, "")
        return jit_result()

    monkeypatch.setattr("fastcnn.warmup.warmup", warmup)
    text = train_tiny("--optimizer", "sgd").stdout
    assert seen[0][:3] == ("Sequential", (1, 12, 12), 3)
    assert {key: seen[0][3][key] for key in ("optimizer", "augment", "image_dtype")} == {
        "optimizer": "SGD",
        "augment": False,
        "image_dtype": "uint8",
    }
    assert "Compiling kernels for this machine" in text
    assert "Compiling kernels 0/2: ReLU\nCompiling kernels 2/2\n" in text


def test_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("fastcnn.cli.output.Output.live", True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    text = train_tiny().stdout
    assert "epoch 1/2" in text
    assert "images/s" in text
    assert "accuracy" in text
    assert " 2/2 " in text


def test_counting_on_a_terminal(monkeypatch, capsys):
    from fastcnn.cli.output import Output

    monkeypatch.setattr("fastcnn.cli.output.Output.live", True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    out = Output(as_json=False)
    with waiting.counting(out, "Compiling"):
        pass
    assert capsys.readouterr().out == "", "nothing to wait for, nothing to show"
    with waiting.counting(out, "Compiling") as report:
        report(1, 4, "ReLU")
    with waiting.downloads(out) as fetched:
        fetched("images.gz", 5, 10)
    text = capsys.readouterr().out
    assert "1/4" in text
    assert "images.gz" in text


@pytest.mark.skipif(os.name == "nt", reason="SIGINT can't be sent to one process there")
def test_a_real_ctrl_c(tmp_path):
    words = ["--data", "tiny.npz", "--epochs", "100000", "--out", "a", "--validation", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcnn", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    # Kernels may have to be compiled first.
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if line.strip().startswith("2/100000"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate()
    finally:
        watchdog.cancel()
    assert process.returncode == 130, errors
    assert "epochs are done and saved in a." in errors
    assert "Traceback" not in errors
    assert train.load_checkpoint(tmp_path / "a" / "last").epoch >= 2
