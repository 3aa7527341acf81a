"""The history: what it takes, what it tells, and its way through JSON."""

import sys

import numpy as np
import pytest

from fastcnn.train import History
from fastcnn.train.history import COLUMNS


def row(epoch, **values):
    needed = {"train_loss": 1.0, "train_accuracy": 0.5, "lr": 0.1, "seconds": 2.0, "images_per_second": 10.0}
    return {"epoch": epoch, **needed, **values}


@pytest.fixture
def history():
    history = History()
    history.append(row(1, val_loss=0.9, val_accuracy=0.5))
    history.append(row(2, val_loss=0.7, val_accuracy=0.6))
    history.append(row(3, val_loss=0.8, val_accuracy=0.6))
    return history


def test_columns_and_rows(history):
    assert len(history) == 3
    assert history["val_loss"] == [0.9, 0.7, 0.8]
    assert history["val_f1"] == [None] * 3
    rows = list(history.rows())
    assert [r["epoch"] for r in rows] == [1, 2, 3]
    assert tuple(rows[0]) == COLUMNS
    with pytest.raises(KeyError, match="val_lost"):
        history["val_lost"]
    history["val_loss"].append(1.0)
    assert len(history["val_loss"]) == 3


def test_best_epoch(history):
    assert history.best("val_loss")["epoch"] == 2
    assert history.best("val_accuracy")["epoch"] == 2, "the first of equals"
    assert history.best("val_f1") is None
    assert History().best("train_loss") is None
    with pytest.raises(ValueError, match="monitor: 'seconds' is none of"):
        history.best("seconds")


def test_json_round_trip(history):
    history.interrupted = True
    again = History.from_json(history.to_json())
    assert again == history
    assert again.interrupted
    assert not again.stopped_early
    assert again != History()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(3), "epoch: 3 does not follow 0"),
        (row(1, val_loss=float("nan")), "val_loss: expected a finite number, got nan"),
        (row(1, train_loss=None), "train_loss: expected a finite number, got None"),
        (row(1, lr=True), "lr: expected a finite number"),
        (row(1, val_loss=np.float32(1)), "val_loss: expected a finite number"),
        (row(1, speed=1.0), "row: 'speed' is none of"),
    ],
)
def test_append_refuses(bad, message):
    history = History()
    with pytest.raises(ValueError, match=message):
        history.append(bad)
    assert len(history) == 0
    assert all(history[name] == [] for name in COLUMNS)


def _without(content, name):
    return {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: [],
        lambda content: _without(content, "columns"),
        lambda content: _without(content, "interrupted"),
        lambda content: content | {"interrupted": 1},
        lambda content: content | {"columns": _without(content["columns"], "lr")},
        lambda content: content | {"columns": content["columns"] | {"lr": [0.1]}},
        lambda content: content | {"columns": content["columns"] | {"lr": ["a", "b", "c"]}},
        lambda content: content | {"columns": content["columns"] | {"epoch": [1, 2, 4]}},
        lambda content: content | {"columns": content["columns"] | {"lr": {"0": 1}}},
    ],
)
def test_from_dict_refuses(history, spoil):
    with pytest.raises(ValueError):
        History.from_dict(spoil(history.to_dict()))


def test_plot_writes_a_picture(history, tmp_path):
    pytest.importorskip("matplotlib")
    history.plot(tmp_path / "history.png")
    assert (tmp_path / "history.png").read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_lacks(history, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no epoch"):
        History().plot(tmp_path / "history.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"fastcnn\[plot\]"):
        history.plot(tmp_path / "history.png")
    assert list(tmp_path.iterdir()) == []
