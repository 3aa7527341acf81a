"""The commands around training: data, check, info, warmup, help; and what all of them share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastcnn
from fastcnn import models, nn
from fastcnn.cli import app, main, output, text
from fastcnn.kernels import threads as team
from fastcnn.warmup import WarmupError, WarmupResult

COMMANDS = ["train", "evaluate", "predict", "check", "warmup", "info", "data", "data list", "data info"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTCNN_DEBUG", raising=False)
    threads = team.get_num_threads()
    yield
    team.set_num_threads(threads)


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def read(*words, code=0):
    result = call(*words, "--json", code=code)
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def python(code, **environment):
    words = [sys.executable, "-c", code]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environment, timeout=300)


# Help and version


@pytest.mark.parametrize("name", [*COMMANDS, "data convert"])
def test_help(name):
    text = call(*name.split(), "--help").stdout
    assert text.startswith(f"Usage: fastcnn {name}" if name else "Usage: ")
    assert "\x1b" not in text


def test_help_names_every_command_and_needs_no_compiler():
    code = (
        "import sys; from fastcnn.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'numba', 'PIL', 'rich.progress', 'fastcnn.nn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert all(f"  {name} " in result.stdout for name in COMMANDS if " " not in name)


def test_version():
    assert call("--version").stdout == f"fastcnn {fastcnn.__version__}\n"


def test_run_as_a_module():
    words = [sys.executable, "-m", "fastcnn", "--version"]
    assert fastcnn.__version__ in subprocess.run(words, capture_output=True, text=True, check=True).stdout


# Data


def test_data_list():
    content = read("data", "list")["datasets"]
    assert [entry["name"] for entry in content][:2] == ["digits", "fashion-mnist"]
    assert content[0]["path"]
    text = call("data", "list").stdout
    assert "digits" in text
    assert "built in" in text


def test_data_info():
    content = read("data", "info", "digits", "--split", "test")
    assert content["images"] == 1000
    assert content["input_shape"] == [1, 28, 28]
    text = call("data", "info", "digits", "--split", "test").stdout
    assert "28 x 28 pixels, 1 channel, uint8" in text
    assert "no data set" not in text
    assert "nowhere" in call("data", "info", "nowhere", code=1).stderr
    call("data", "info", "digits", "--split", "half", code=2)


def pictures():
    for label in ("cat", "dog"):
        Path("pictures", label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((10, 8), 40 * i, np.uint8)).save(f"pictures/{label}/{i}.png")
    Path("pictures/cat/broken.png").write_text("no picture")


def test_data_convert():
    pictures()
    content = read("data", "convert", "pictures", "out.npz", "--size", "6x5", "--rgb")
    assert content["input_shape"] == [3, 6, 5]
    assert content["images"] == {"all": 6}
    assert [Path(entry["path"]).name for entry in content["skipped"]] == ["broken.png"]
    with np.load("out.npz") as archive:
        assert archive["x"].shape == (6, 3, 6, 5)
        assert archive["x"].dtype == np.float32
    text = call("data", "convert", "pictures", "grey.npz", "--size", 7, "--grey").stdout
    assert "1 file left out:" in text
    assert "broken.png" in text
    assert "grey.npz: 6 all images of 1x7x7 in 2 classes" in text
    assert read("data", "info", "grey.npz")["classes"] == {"cat": 3, "dog": 3}


def test_data_convert_errors():
    pictures()
    call("data", "convert", "pictures", "out.npz", "--grey", "--rgb", code=2)
    for size in ("0", "6x", "1x2x3", "big"):
        call("data", "convert", "pictures", "out.npz", "--size", size, code=2)
    Path("out.npz").write_text("precious")
    error = call("data", "convert", "pictures", "out.npz", code=1).stderr
    assert "out.npz: exists already" in error
    assert Path("out.npz").read_text() == "precious"
    assert "does not end in .npz" in read("data", "convert", "pictures", "out.png", code=1)["error"]


# Check


@pytest.fixture
def images(monkeypatch):
    monkeypatch.setattr("fastcnn.warmup.warmup", lambda *a, **k: WarmupResult(0, 0.0, cached=True))
    rng = np.random.default_rng(0)
    np.savez("tiny.npz", x=rng.integers(0, 255, (20, 1, 8, 8)).astype(np.uint8), y=np.arange(20) % 2)
    return ["--data", "tiny.npz", "--samples", 2]


def test_check_passes(images):
    lines = call("check", *images).stdout.splitlines()
    assert lines[0] == "emotion on 4 images of tiny:"
    assert lines[1].startswith("[IN ] Layer 00 Conv2d                ok=True  max_err=")
    assert lines[2].startswith("[PAR] Layer 00 Conv2d                param[0]   ok=True  max_err=")
    assert lines[-1] == f"{len(lines) - 2} tests, all passed."
    kinds = {line[:5] for line in lines[1:-1]}
    assert kinds == {"[IN ]", "[PAR]", "[VJP]", "[ROW]", "[DX ]", "[ADJ]"}
    content = read("check", *images)
    assert content["ok"] is True
    assert content["models"]["emotion"]["rows"][0]["name"] == "Conv2d"


def test_check_fails_with_code_1(images, monkeypatch):
    monkeypatch.setattr(nn.ReLU, "backward", lambda self, dout, input_grad=True: dout)
    result = call("check", *images, code=1)
    assert "[IN ] Layer 01 ReLU                  ok=False" in result.stdout
    assert " failed." in result.stdout
    assert result.stderr == ""
    content = read("check", *images, code=1)
    assert content["ok"] is False
    assert not content["models"]["emotion"]["ok"]


def test_check_all_models(images, monkeypatch):
    monkeypatch.setattr(models, "names", lambda: ["emotion", "chapter9"])
    assert list(read("check", *images, "--model", "all")["models"]) == ["emotion", "chapter9"]
    assert "'nothing' is none of" in call("check", *images, "--model", "nothing", code=1).stderr


# Info and warmup


def test_info():
    content = read("info", "--threads", 1)
    assert content["fastcnn"] == fastcnn.__version__
    assert content["threads"] == 1
    assert content["vector_bits"] in (128, 256, 512)
    assert content["threading_layer"] == "own"
    assert content["models"] == list(models.names())
    text = call("info").stdout
    for part in ("Python", "NumPy", "Numba", "CPU", "vectors of", "threads", "kernel cache", "emotion"):
        assert part in text


def test_warmup_command(monkeypatch):
    asked = []

    def warmup(model, input_shape, num_classes, **options):
        asked.append((model, input_shape, num_classes, options))
        return WarmupResult(2, 1.5, cached=False)

    monkeypatch.setattr("fastcnn.warmup.warmup", warmup)
    text = call("warmup", "--data", "cifar100", "--double", "--optimizer", "sgd", "--processes", 0).stdout
    assert "Compiled 2 kernels in 1.5 s" in text
    assert asked[0][:3] == ("emotion", (3, 32, 32), 100)
    options = {key: asked[0][3][key] for key in ("dtype", "optimizer", "processes")}
    assert options == {"dtype": "float64", "optimizer": "SGD", "processes": 0}
    content = read("warmup", "--model", "all")
    assert content["compiled"] == 2 * len(models.names())
    assert not content["cached"]
    assert "--model nothing" in call("warmup", "--model", "nothing", code=1).stderr


def test_warmup_command_fails_clearly(monkeypatch):
    def warmup(*args, **options):
        raise WarmupError("compiling 'ReLU' failed: no memory")

    monkeypatch.setattr("fastcnn.warmup.warmup", warmup)
    assert call("warmup", code=1).stderr == "error: compiling 'ReLU' failed: no memory\n"


# What all commands share


@pytest.mark.parametrize(
    "words", [["train", "--epochs", "0"], ["predict"], ["data", "info", "--nope"], ["trian"], ["train", "x"]]
)
def test_wrong_usage_as_json(words, capsys):
    with pytest.raises(SystemExit) as end:
        main([*words, "--json"])
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert set(json.loads(captured.out)) == {"error"}
    assert "Usage" not in captured.out


def test_main_gives_exit_codes(capsys):
    for words, code in ((["data", "list"], 0), (["data", "info", "nowhere"], 1), (["train", "--x"], 2)):
        for option in ([], ["--json"]):
            with pytest.raises(SystemExit) as end:
                main([*words, *option])
            assert (end.value.code or 0) == code
    capsys.readouterr()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.npz"), "a.npz: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError("size: 3 is\n  too small"), "size: 3 is too small"),
        (MemoryError(), "out of memory"),
        (MemoryError("4 GiB"), "out of memory (4 GiB); a smaller --batch-size needs less"),
        (KeyError("x"), "KeyError: 'x' (FASTCNN_DEBUG=1 shows where)"),
    ],
)
def test_errors_are_one_line(error, message, monkeypatch):
    def info(*args):
        raise error

    monkeypatch.setattr(fastcnn.data, "info", info)
    result = call("data", "list", code=1)
    assert result.stderr == f"error: {message}\n"
    assert read("data", "list", code=1) == {"error": message}


def test_reader_that_leaves_early_gets_no_traceback():
    code = "import sys; from fastcnn.cli import main; main(['data', 'list'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, errors = process.communicate(timeout=300)
    assert b"Traceback" not in errors


def test_names_that_the_terminal_lacks(capsys):
    result = python(
        "from fastcnn.cli import main; main(['data', 'info', '\\u732b'])", PYTHONIOENCODING="ascii"
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_json_has_no_nan():
    content = {"a": float("nan"), "b": [np.float32(np.inf)], "c": np.arange(2), "d": Path("x"), "e": (1,)}
    assert json.loads(output.to_json(content)) == {"a": None, "b": [None], "c": [0, 1], "d": "x", "e": [1]}


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/fastcnn/__main__.py"])
    assert output.command_line("predict", "a b").endswith(" -m fastcnn predict 'a b'")
    script = tmp_path / "bin" / "fastcnn"
    script.parent.mkdir()
    script.touch()
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "")
    assert output.command_line("info") == f"{Path('bin/fastcnn')} info"


def test_tables():
    assert text.table([["a", "bb"], ["ccc", 1]], "<>") == "a    bb\nccc   1"
    assert text.table([]) == ""
    assert text.counted(1, "image") == "1 image"
    assert text.counted(2000, "class") == "2,000 classes"
    assert [text.size(n) for n in (0, 1023, 2048, 5 << 30)] == ["0 bytes", "1023 bytes", "2.0 KiB", "5.0 GiB"]
    assert "30 classes are too many" in text.confusion(np.eye(30, dtype=int).tolist(), ["c"] * 30)
    assert text.shortened("a" * 40) == "a" * 15 + "…"
