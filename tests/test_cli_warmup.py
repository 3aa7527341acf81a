"""Compiling ahead of time: jobs, processes that fail, stamps."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

import fastcnn
from fastcnn import models, nn, warmup
from fastcnn.kernels import jit
from fastcnn.warmup import WarmupError


class Foreign(nn.ReLU):
    """A layer that no other process can import."""


@pytest.fixture
def stamps(tmp_path, monkeypatch):
    """Stamps in a folder of their own, kernels where they always are."""
    monkeypatch.setattr(warmup, "_leave", lambda path: (tmp_path / path.name).touch())
    monkeypatch.setattr(
        warmup._Plan, "stamp", lambda self, stamp=warmup._Plan.stamp: tmp_path / stamp(self).name
    )
    return tmp_path


def small():
    return nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def test_named_network_in_processes(stamps):
    seen = []
    start = time.perf_counter()
    result = warmup.warmup("emotion", (1, 12, 12), 3, progress=lambda *event: seen.append(event))
    assert not result.cached
    assert result.seconds <= time.perf_counter() - start
    done, totals, names = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert seen[-1] == (totals[0], totals[0], "")
    assert {"ConvPool forward", "ConvPool gradients"} <= set(names[0].split(", ")) | set(names[1].split(", "))
    assert names[-2] == "whole network"
    assert all(any(kind in name for name in names) for kind in ("Linear", "Adam", "CrossEntropyLoss"))
    # What trains also runs.
    assert warmup.warmup("emotion", (1, 12, 12), 3).cached
    assert warmup.warmup("emotion", (1, 12, 12), 3, training=False).cached


def test_training_finds_everything_compiled(stamps):
    """After a warmup nothing of a real training step is left to compile, for a full batch and a small one."""
    warmup.warmup("cifar-batchnorm", (1, 12, 12), 3)
    before = {path.name for path in jit.cache_directory().glob("*.nbc")}
    model = models.create("cifar-batchnorm", (1, 12, 12), 3, seed=0)
    optimizer = fastcnn.optim.Adam(model.parameters())
    images = np.zeros((100, 12, 12, 1), np.uint8)
    dataset = fastcnn.data.Dataset(images, np.arange(100) % 3, ("a", "b", "c"))
    loss_fn = nn.CrossEntropyLoss()
    for augment in (None, "light"):
        for x, y in fastcnn.data.Loader(dataset, 64, augment=augment):
            loss_fn(model(x), y)
            model.backward(loss_fn.backward(), input_grad=False)
            optimizer.step()
    assert {path.name for path in jit.cache_directory().glob("*.nbc")} == before


def test_stamp_knows_what_it_stands_for(stamps, monkeypatch):
    def jobs(plan):
        return iter(["ReLU"])

    monkeypatch.setattr(warmup, "_jobs", jobs)
    monkeypatch.setattr(warmup, "_carry_out", lambda plan, job: None)

    def cached(model=None, **options):
        return warmup.warmup(model or small(), (1, 8, 8), 3, processes=0, **options).cached

    assert not cached()
    assert cached()
    assert cached(training=False)
    assert not cached(dtype="float64")
    assert not cached(optimizer="SGD")
    assert not cached(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    monkeypatch.setattr(warmup, "_machine", lambda: "another CPU")
    assert not cached()


def test_model_itself_is_untouched(stamps):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 3))
    before, state = model.state_dict(), fastcnn.default_generator().bit_generator.state
    warmup.warmup(model, (1, 8, 8), 3, processes=0, optimizer="SGD", image_dtype=None)
    assert all(np.array_equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.grad.any() for parameter in model.parameters())
    assert fastcnn.default_generator().bit_generator.state == state


def test_worker_that_cannot_load_the_network(stamps, monkeypatch):
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(Foreign=Foreign))
    monkeypatch.setattr(Foreign, "__module__", "made_up")
    with pytest.raises(WarmupError, match=r"failed: its process was ended with exit code 1: ModuleNotFound"):
        warmup.warmup(nn.Sequential(Foreign(), nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8), 3, processes=1)
    assert not list(stamps.iterdir())


def test_layers_of_a_script_are_compiled_here(stamps, monkeypatch):
    monkeypatch.setattr(Foreign, "__module__", "__main__")
    monkeypatch.setattr(warmup, "_run_in_workers", None)
    model = nn.Sequential(Foreign(), nn.Flatten(), nn.Linear(64, 3))
    warmup.warmup(model, (1, 8, 8), 3, optimizer=None, image_dtype=None)


def test_job_that_fails(stamps):
    with pytest.raises(WarmupError, match=r"compiling 'whole network' failed: ValueError: .*64 features"):
        warmup.warmup(small(), (1, 9, 9), 3, processes=1, optimizer=None, image_dtype=None)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_worker_that_is_killed(stamps):
    def kill_it(done, total, what):
        for worker in workers:
            worker._process.kill()

    workers = []
    original = warmup._Worker.__init__

    def remember(self, plan):
        original(self, plan)
        workers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup._Worker, "__init__", remember)
        with pytest.raises(WarmupError, match=f"by signal {signal.SIGKILL:d} .*short of memory"):
            warmup.warmup(small(), (1, 8, 8), 3, processes=2, progress=kill_it)
    assert all(worker._process.poll() is not None for worker in workers)


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_interrupt_ends_the_workers(stamps):
    workers = []
    original = warmup._Worker.__init__

    def remember(self, plan):
        original(self, plan)
        workers.append(self)

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup._Worker, "__init__", remember)
        with pytest.raises(KeyboardInterrupt):
            warmup.warmup(small(), (1, 8, 8), 3, processes=2, progress=interrupt)
    assert len(workers) == 2
    assert all(worker._process.poll() is not None for worker in workers)


def test_cache_that_cannot_be_written(stamps, monkeypatch, tmp_path):
    """Other processes could not hand their kernels over: everything is compiled here."""
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setattr(warmup, "cache_directory", lambda: blocked / "kernels")
    monkeypatch.setattr(warmup, "_run_in_workers", None)
    done = []
    monkeypatch.setattr(warmup, "_carry_out", lambda plan, job: done.append(job))
    warmup.warmup(small(), (1, 8, 8), 3)
    assert done[-1] == "whole network"


def test_bad_arguments():
    with pytest.raises(ValueError, match="'nothing' is none of"):
        warmup.warmup("nothing")
    with pytest.raises(ValueError, match="dtype: 'int8' is neither"):
        warmup.warmup(small(), (1, 8, 8), 3, dtype="int8")
    with pytest.raises(ValueError, match="optimizer: 'Optimizer' is none of SGD, Adam, AdamW"):
        warmup.warmup(small(), (1, 8, 8), 3, optimizer="Optimizer")
