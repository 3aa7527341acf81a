"""``fastcnn evaluate`` and ``predict``: trained networks, pictures, and what is neither."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from fastcnn import models, nn, optim, train
from fastcnn.cli import app
from fastcnn.warmup import WarmupResult


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def read(*words, code=0):
    return json.loads(call(*words, "--json", code=code).stdout)


def stripes(count, seed=0):
    """Images with a bright stripe at the place that the label says, (count, 12, 12) uint8."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = rng.integers(0, 60, (count, 12, 12)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4] += 180
    return images, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data and a run that has learned them."""
    folder = tmp_path_factory.mktemp("trained")
    x, y = stripes(120)
    names = np.array(["top", "middle", "bottom"])
    np.savez(folder / "data.npz", x_train=x[:90], y_train=y[:90], x_test=x[90:], y_test=y[90:], classes=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcnn.warmup.warmup", lambda *a, **k: WarmupResult(0, 0.0, cached=True))
        call("train", "--data", folder / "data.npz", "--epochs", 4, "--lr", 0.003, "--out", folder / "run")
    return folder


@pytest.fixture(autouse=True)
def workplace(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcnn.warmup.warmup", lambda *a, **k: WarmupResult(0, 0.0, cached=True))
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


def test_evaluate_what_it_was_trained_on():
    text = call("evaluate", "run").stdout
    assert "run/best on" in text
    assert "Confusion matrix" in text
    assert "0 top" in text, "long names stand at the rows, numbers above the columns"
    content = read("evaluate", "run")
    assert content["samples"] == 30
    assert content["accuracy"] > 0.9
    assert content["classes"] == ["top", "middle", "bottom"]
    assert content["accuracy"] == json.loads(Path("run/metrics.json").read_text())["accuracy"]
    assert read("evaluate", "run/last.json", "--split", "train")["samples"] == 90
    assert read("evaluate", "run/best.safetensors", "--split", "all", "--batch-size", 7)["samples"] == 120


def test_predict_images_of_the_data():
    content = read("predict", "run", "--data", "data.npz", "--index", 0, "--index", 4)
    first, second = content["predictions"]
    assert (first["class"], first["true"]) == ("top", "top")
    assert (second["class"], second["true"]) == ("middle", "middle")
    assert first["probability"] > 0.5
    assert sum(one["probability"] for one in first["top"]) == pytest.approx(1)
    assert first["top"][0]["class"] == "top"
    assert len(read("predict", "run", "--data", "data.npz", "--top", 1)["predictions"][0]["top"]) == 1
    assert "data.npz test image 0: top (" in call("predict", "run", "--data", "data.npz").stdout


def write_files(images):
    """The same image in every form that predict reads."""
    image = images[2]
    Image.fromarray(image).save("grey.png")
    Image.fromarray(image).convert("RGB").save("colour.png")
    Image.fromarray(image).resize((48, 48), Image.Resampling.NEAREST).save("large.bmp")
    np.save("flat.npy", image)
    np.save("float.npy", (image / 255).astype(np.float64))
    np.save("channel.npy", image[None])
    np.save("last.npy", image[..., None])
    np.save("wide.npy", image.astype(np.int64))
    np.savez("named.npz", x=image[None, None])
    np.savez("only.npz", whatever=image[None])
    return "grey.png colour.png large.bmp flat.npy float.npy channel.npy last.npy wide.npy named.npz only.npz"


def test_predict_files():
    images, _ = stripes(3, seed=5)
    names = write_files(images).split()
    rows = read("predict", "run", *names)["predictions"]
    assert [row["source"] for row in rows] == names
    assert {row["class"] for row in rows} == {"bottom"}
    exact = [row["probability"] for row in rows if row["source"] not in ("large.bmp", "float.npy")]
    assert len(set(exact)) == 1, "every form of the image is the same image"
    assert rows[4]["probability"] == pytest.approx(exact[0], rel=1e-5)


def test_predict_many_images_of_one_file():
    images, _ = stripes(5)
    np.save("many.npy", images[:, None])
    rows = read("predict", "run", "many.npy")["predictions"]
    assert [row["source"] for row in rows] == [f"many.npy[{i}]" for i in range(5)]
    assert [row["class"] for row in rows] == ["top", "middle", "bottom", "top", "middle"]


def test_invert():
    images, _ = stripes(2)
    Image.fromarray(255 - images[1]).save("negative.png")
    assert read("predict", "run", "negative.png", "--invert")["predictions"][0]["class"] == "middle"


def hostile_files():
    Path("text.png").write_text("I am no picture")
    Path("empty.npy").write_bytes(b"")
    Path("text.npz").write_text("nor an archive")
    np.save("large.npy", np.zeros((99, 99), np.uint8))
    np.save("nan.npy", np.full((12, 12), np.nan))
    np.save("bright.npy", np.full((12, 12), 3.5))
    np.save("negative.npy", np.full((12, 12), -1))
    np.save("words.npy", np.full((12, 12), "a"))
    np.save("object.npy", np.full((12, 12), None), allow_pickle=True)
    np.savez("other.npz", a=np.zeros(3), b=np.zeros(3))
    Image.fromarray(np.zeros((12, 12), np.uint8)).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:40])
    Path("folder.png").mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", "does not exist"),
        ("folder.png", "is a folder"),
        ("text.png", "cannot identify image file"),
        ("cut.png", ""),
        ("run/run.json", "no image file"),
        ("empty.npy", "is no readable .npy file"),
        ("text.npz", "is no readable .npz file"),
        ("large.npy", "shape (99, 99) holds no images of the network's 1x12x12"),
        ("nan.npy", "not in [0, 1]"),
        ("bright.npy", "floats from 3.5 to 3.5 are not in [0, 1]"),
        ("negative.npy", "not in 0 to 255"),
        ("words.npy", "neither integers nor floats"),
        ("object.npy", "is no readable .npy file"),
        ("other.npz", "holds no array named x or images (it has a, b)"),
    ],
)
def test_hostile_files_do_not_hide_the_others(name, message):
    hostile_files()
    Image.fromarray(stripes(1)[0][0]).save("good.png")
    bad, good = read("predict", "run", name, "good.png", code=1)["predictions"]
    assert message in bad["error"]
    assert good["class"] == "top"
    result = call("predict", "run", name, code=1)
    assert result.stdout.startswith(f"{name}: error: ")
    assert result.stdout.count("\n") == 1


def test_usage_of_predict():
    assert "give either files or --data" in call("predict", "run", code=2).stderr
    call("predict", "run", "a.png", "--data", "data.npz", code=2)
    call("predict", "run", "a.png", "--index", 1, code=2)
    call("predict", code=2)
    error = call("predict", "run", "--data", "data.npz", "--index", 30, code=1).stderr
    assert error == "error: --index 30: the test part of data.npz has 30 images\n"


def test_checkpoints_that_are_none():
    assert "holds no checkpoint" in call("evaluate", ".", code=1).stderr
    assert "nowhere" in call("evaluate", "nowhere", code=1).stderr
    Path("text.json").write_text("not JSON")
    Path("text.safetensors").write_text("nor tensors")
    assert call("evaluate", "text", code=1).stderr.startswith("error: ")
    path = Path("run/best.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    result = call("predict", "run", "--data", "data.npz", code=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def changed_header(**changes):
    path = Path("run/best.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "config",
    [
        {"name": "cifar-small", "input_shape": [1, 12, 12], "num_classes": 3},
        {"name": "emotion", "input_shape": [1, 28, 28], "num_classes": 3},
        {"name": "emotion", "input_shape": [1, 12, 12], "num_classes": 4},
        {"name": "nothing", "input_shape": [1, 12, 12], "num_classes": 3},
        {"name": "emotion", "input_shape": "large", "num_classes": 3},
        {"name": "emotion", "depth": 50},
        {"name": "emotion"},
    ],
)
def test_checkpoint_of_another_model(config):
    changed_header(model_config=config)
    result = call("evaluate", "run", code=1)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_checkpoint_without_a_description():
    model = nn.Sequential(nn.Linear(2, 2))
    checkpoint = train.Checkpoint.take(model, optim.SGD(model.parameters()))
    train.save_checkpoint("bare", checkpoint)
    assert "does not say which network" in call("evaluate", "bare", code=1).stderr


def test_checkpoint_from_python():
    model = models.create("emotion", (1, 12, 12), 3, seed=0)
    train.save_checkpoint("own", train.Checkpoint.take(model, model_config=model.config))
    content = read("predict", "own", "--data", "data.npz")
    assert content["predictions"][0]["class"] in "012"
    assert "give --data" in call("evaluate", "own", code=1).stderr


def test_other_data():
    x, y = stripes(6)
    np.savez("large.npz", x=np.zeros((6, 1, 20, 20), np.uint8), y=y, classes=["top", "middle", "bottom"])
    np.savez("other.npz", x=x, y=y, classes=["cat", "dog", "cow"])
    np.savez("fewer.npz", x=x[:4, None], y=y[:4] // 2, classes=["top", "middle"])
    error = call("evaluate", "run", "--data", "large.npz", "--split", "all", code=1).stderr
    assert "images of 1x20x20 are not the network's 1x12x12" in error
    error = call("evaluate", "run", "--data", "other.npz", "--split", "all", code=1).stderr
    assert "(cat, dog, cow) are not the network's (top, middle, bottom)" in error
    assert read("evaluate", "run", "--data", "fewer.npz", "--split", "all")["samples"] == 4
    assert "1x20x20" in call("predict", "run", "--data", "large.npz", "--split", "all", code=1).stderr
