"""Ctrl-C at every event and every save: nothing is lost, and the run goes on."""

import itertools
import os
import signal
import sys
import threading

import numpy as np
import pytest

import fastcnn
from fastcnn import nn
from fastcnn.train import Callback, Trainer, load_checkpoint
from fastcnn.train.interrupts import deferred_interrupt

PACKAGE = os.path.dirname(fastcnn.train.__file__)


class Loader:
    """Twelve points of two classes in batches of four, shuffled."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.x = self.rng.standard_normal((12, 1, 2, 2)).astype(np.float32)
        self.y = (self.x.mean(axis=(1, 2, 3)) > 0).astype(np.int64)
        self.closed = 0

    def __len__(self):
        return 3

    def __iter__(self):
        order = self.rng.permutation(12)
        try:
            for start in (0, 4, 8):
                index = order[start : start + 4]
                yield self.x[index], self.y[index]
        finally:
            self.closed += 1


def trainer(run_dir=None, callbacks=()):
    fastcnn.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    opt = fastcnn.optim.Adam(net.parameters(), lr=0.01)
    scheduler = fastcnn.optim.lr_scheduler.CosineWarmupLR(opt, total_steps=12, warmup_steps=4)
    return Trainer(net, opt, scheduler=scheduler, run_dir=run_dir, callbacks=callbacks)


def weights(run):
    return {name: array.tobytes() for name, array in run.model.state_dict().items()}


class Interrupt(Callback):
    """Ctrl-C at the n-th call of an event."""

    def __init__(self, event, call, signals=False):
        self.left = call
        self.signals = signals
        setattr(self, event, self.strike)

    def strike(self, *arguments):
        self.left -= 1
        if self.left == 0:
            if not self.signals:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)


EVENTS = [
    ("on_fit_start", 1, 0),
    ("on_epoch_start", 1, 0),
    ("on_epoch_start", 3, 2),
    ("on_step", 1, 0),
    ("on_step", 3, 0),
    ("on_step", 8, 2),
    ("on_epoch_end", 1, 1),
    ("on_epoch_end", 4, 4),
]


@pytest.mark.parametrize("signals", [False, True])
@pytest.mark.parametrize(("event", "call", "completed"), EVENTS)
def test_interrupted_anywhere_then_resumed_is_the_straight_run(tmp_path, event, call, completed, signals):
    straight = trainer()
    straight.fit(Loader(), epochs=4)

    run = trainer(tmp_path, [Interrupt(event, call, signals)])
    train = Loader()
    history = run.fit(train, epochs=4)
    assert history.interrupted
    assert history is run.history
    assert len(history) == completed
    assert not run.model.training
    assert load_checkpoint(tmp_path / "last").epoch == completed

    other = trainer(tmp_path)
    history = other.fit(Loader(), epochs=4, resume=True)
    assert not history.interrupted
    assert len(history) == 4
    assert weights(other) == weights(straight)
    assert history["train_loss"] == straight.history["train_loss"]
    assert history["lr"] == straight.history["lr"]


class CtrlCAtLine(Callback):
    """A signal just before a line of fastcnn.train, counted from the first one of the training loop.

    Not of all of fastcnn: a tracing function can raise between the body of ``with lock:`` and the release,
    where Python itself lets no signal in.
    """

    def __init__(self, number):
        self.left = number
        self.before = sys.gettrace()

    def on_fit_start(self, trainer, epochs):
        sys.settrace(
            lambda frame, event, argument: self.line if PACKAGE in frame.f_code.co_filename else None
        )

    def line(self, frame, event, argument):
        self.left -= event == "line"
        if self.left == 0:
            sys.settrace(self.before)
            os.kill(os.getpid(), signal.SIGINT)
        return self.line

    def on_fit_end(self, trainer):
        sys.settrace(self.before)


def test_ctrl_c_at_any_line(tmp_path):
    straight = trainer()
    straight.fit(Loader(), epochs=2)
    trials = 0
    for number in itertools.count(1, 61):
        run_dir = tmp_path / str(number)
        history = trainer(run_dir, [CtrlCAtLine(number)]).fit(Loader(), epochs=2)
        if not history.interrupted:
            break
        trials += 1
        other = trainer(run_dir)
        other.fit(Loader(), epochs=2, resume=True)
        assert weights(other) == weights(straight), number
        assert not [file for file in run_dir.iterdir() if file.name.startswith(".")]
    assert trials > 20


def test_the_model_as_it_was_is_kept(tmp_path):
    run = trainer(tmp_path, [Interrupt("on_step", 5)])
    train = Loader()
    run.fit(train, epochs=4)
    assert train.closed == 2, "the loader's iterator is closed, and its thread with it"
    kept = load_checkpoint(tmp_path / "interrupted")
    assert not kept.complete
    assert (kept.epoch, kept.step) == (1, 5)
    assert {name: array.tobytes() for name, array in kept.model.items()} == weights(run)
    last = load_checkpoint(tmp_path / "last")
    assert last.complete
    assert (last.epoch, last.step) == (1, 3)


def test_a_second_call_goes_on_with_the_model_as_it_is(tmp_path):
    run = trainer(tmp_path, [Interrupt("on_step", 5)])
    run.fit(Loader(), epochs=4)
    before = weights(run)
    seen = []

    class First(Callback):
        def on_epoch_start(self, trainer, epoch, batches):
            seen.append((epoch, trainer.step, weights(trainer)))

    run.callbacks = [First()]
    history = run.fit(Loader(), epochs=4)
    assert seen[0] == (2, 3, before)
    assert history["epoch"] == [1, 2, 3, 4]
    assert not history.interrupted
    # The schedule of the unfinished epoch starts again with it.
    straight = trainer()
    assert history["lr"] == straight.fit(Loader(), epochs=4)["lr"]
    assert run.step == 12


def test_going_back_to_the_last_epoch_in_the_same_process(tmp_path):
    straight = trainer()
    straight.fit(Loader(), epochs=4)
    run = trainer(tmp_path, [Interrupt("on_step", 5)])
    train = Loader()
    run.fit(train, epochs=4)
    run.callbacks = []
    run.fit(train, epochs=4, resume=True)
    assert weights(run) == weights(straight)


def test_interrupt_without_a_folder_keeps_history_and_model():
    run = trainer(None, [Interrupt("on_step", 5)])
    assert len(run.fit(Loader(), epochs=4)) == 1
    run.callbacks = []
    assert len(run.fit(Loader(), epochs=4)) == 4


def test_ctrl_c_during_a_save_waits_for_its_end(tmp_path, monkeypatch):
    """A signal at every rename of an epoch's end: the epoch is complete, saved and in the history."""
    for at in range(1, 12):
        run = trainer(tmp_path / str(at))
        real, calls = os.replace, []

        def interrupted(*args, real=real, calls=calls, at=at):
            calls.append(args)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", interrupted)
            history = run.fit(Loader(), epochs=4)
        assert history.interrupted
        last = load_checkpoint(tmp_path / str(at) / "last")
        assert last.epoch == len(history)
        assert {name: array.tobytes() for name, array in last.model.items()} == weights(run)
        assert not (tmp_path / str(at) / "interrupted.json").exists()


def test_a_full_disk_at_the_interrupt_does_not_cost_the_history(tmp_path, monkeypatch):
    class Full(Callback):
        def on_step(self, trainer, info):
            if info.step == 5:
                monkeypatch.setattr(os, "fsync", self.full)
                raise KeyboardInterrupt

        def full(self, *args):
            raise OSError(28, "No space left on device")

    run = trainer(tmp_path, [Full()])
    with pytest.warns(RuntimeWarning, match="the interrupted model was not saved: .*No space left"):
        history = run.fit(Loader(), epochs=4)
    assert history.interrupted
    assert len(history) == 1
    assert load_checkpoint(tmp_path / "last").epoch == 1


def test_deferred_interrupt():
    done = []

    def work():
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("within")
        done.append("after")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["within"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def elsewhere():
        with deferred_interrupt():
            done.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == ["within", "thread"]


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
