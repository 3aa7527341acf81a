"""The training loop: what it computes, remembers, saves and resumes."""

import errno
import json
import os

import numpy as np
import pytest

import fastcnn
from fastcnn import nn
from fastcnn.data import Augmentation, Dataset, Loader
from fastcnn.train import Callback, CheckpointError, Trainer, load_checkpoint
from fastcnn.train.nonfinite import gradients_finite

LIGHT = Augmentation(flip=True, shift=1, noise=0.05)
CLASSES = ("dark", "bright", "left")


def images(count=30, seed=0):
    """Small grey pictures of three kinds that a tiny network can tell apart, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 60, (count, 6, 6, 1))
    pixels[labels == 1] += 150
    pixels[labels == 2, :, :3] += 150
    return Dataset(pixels.astype(np.uint8), labels, CLASSES)


def loader(count=30, batch_size=8, seed=0, **options):
    options = {"shuffle": True, "rng": np.random.default_rng(seed)} | options
    return Loader(images(count), batch_size=batch_size, **options)


def network(seed=0, dropout=0.25):
    fastcnn.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(16, 3),
    )


def trainer(run_dir=None, seed=0, optimizer=fastcnn.optim.Adam, **options):
    net = network(seed)
    return Trainer(net, optimizer(net.parameters(), lr=0.01), run_dir=run_dir, **options)


def bits(one):
    """Everything that a run can be told by, without its timings."""
    parameters = {name: array.tobytes() for name, array in one.model.state_dict().items()}
    columns = {
        name: one.history[name] for name in ("epoch", "train_loss", "train_accuracy", "val_loss", "lr")
    }
    return parameters, columns, one.step, fastcnn.default_generator().bit_generator.state


# Learning and measuring


def test_learns_and_keeps_the_record(tmp_path):
    run = trainer(tmp_path, classes=CLASSES)
    history = run.fit(loader(), loader(seed=1, shuffle=False), epochs=12)
    assert history is run.history
    assert history["epoch"] == list(range(1, 13))
    assert history["train_loss"][-1] < history["train_loss"][0] / 2
    assert history["val_accuracy"][-1] == 1.0
    assert history["val_f1"][-1] == history["val_precision"][-1] == history["val_recall"][-1] == 1.0
    assert history["lr"] == [0.01] * 12
    assert all(value > 0 for value in history["seconds"] + history["images_per_second"])
    assert not history.interrupted
    assert run.step == 12 * 4
    assert not run.model.training
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "best.json",
        "best.safetensors",
        "last.json",
        "last.safetensors",
    ]


def test_train_metrics_are_the_loops_own():
    """The loss and accuracy of an epoch are those of the outputs that the steps computed, per sample."""
    run, twin = trainer(), network()
    run.optimizer.param_groups[0]["lr"] = 0.0
    history = run.fit(loader(count=21, batch_size=8), epochs=1)
    fastcnn.manual_seed(0)
    network()
    twin.train()
    losses, hits = 0.0, 0
    for x, y in loader(count=21, batch_size=8):
        logits = twin(x)
        losses += nn.CrossEntropyLoss()(logits, y) * len(y)
        hits += (logits.argmax(1) == y).sum()
    assert history["train_loss"][0] == pytest.approx(losses / 21, rel=1e-12)
    assert history["train_accuracy"][0] == hits / 21


def test_evaluate_in_batches_is_evaluate_at_once():
    run = trainer(classes=CLASSES)
    run.fit(loader(), epochs=1)
    x, y = next(iter(loader(batch_size=30)))
    whole = run.evaluate((x, y))
    for data, size in (
        ((x, y), 7),
        (loader(batch_size=30, shuffle=False), 256),
        ([(x[:3], y[:3]), (x[3:], y[3:])], 1),
    ):
        part = run.evaluate(data, batch_size=size)
        assert part.loss == pytest.approx(whole.loss, rel=1e-5)
        np.testing.assert_array_equal(part.confusion, whole.confusion)
    logits = run.predict(x)
    assert whole.loss == pytest.approx(nn.CrossEntropyLoss()(logits, y), rel=1e-6)
    assert whole.accuracy == (logits.argmax(1) == y).mean()
    assert whole.classes == CLASSES
    np.testing.assert_array_equal(whole.confusion.sum(axis=1), np.bincount(y, minlength=3))


def test_predict():
    run = trainer()
    x = next(iter(loader(batch_size=30)))[0]
    whole = run.predict(x)
    assert whole.shape == (30, 3)
    np.testing.assert_allclose(run.predict(x, batch_size=7), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run.predict_classes(x), whole.argmax(axis=1))
    assert run.predict(x[:0]).shape == (0, 3)
    assert run.predict_classes(x[:0]).shape == (0,)
    with pytest.raises(ValueError, match="batch_size: 0"):
        run.predict(x, batch_size=0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_and_predict_put_the_mode_back(training):
    run = trainer()
    run.model.train(training)
    run.model[1].eval()
    x, y = next(iter(loader()))
    before = run.model.state_dict()
    run.predict(x)
    run.evaluate((x, y))
    with pytest.raises(ValueError, match="labels"):
        run.evaluate((x, y + 100))
    assert [module.training for module in run.model.modules()] == [training, training, False] + [training] * 5
    for name, array in run.model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert fastcnn.is_grad_enabled()


def test_evaluation_holds_one_batch_at_a_time():
    alive = []

    def batches():
        for _ in range(20):
            x = np.zeros((4, 1, 6, 6), np.float32)
            alive.append(__import__("weakref").ref(x))
            assert sum(one() is not None for one in alive) <= 3
            yield x, np.zeros(4, np.int64)

    assert trainer().evaluate(batches()).samples == 80


def test_ignored_labels_count_nowhere():
    run = trainer()
    x, y = next(iter(loader(batch_size=30)))
    partly = np.where(y == 2, -100, y)
    metrics = run.evaluate((x, partly), batch_size=4)
    assert metrics.samples == 20
    kept = run.evaluate((x[y != 2], y[y != 2]))
    np.testing.assert_array_equal(metrics.confusion, kept.confusion)
    assert metrics.loss == pytest.approx(kept.loss, rel=1e-5)
    with pytest.raises(ValueError, match="no labelled samples"):
        run.evaluate((x, np.full(30, -100)))


def test_soft_labels_train():
    run = trainer()
    soft = [(x, np.eye(3, dtype=np.float32)[y] * 0.9 + 0.1 / 3) for x, y in loader()]
    history = run.fit(soft, epochs=10)
    assert history["train_loss"][-1] < history["train_loss"][0]
    assert history["train_accuracy"][-1] > 0.8


# Schedules and clipping


def test_scheduler_after_every_epoch_or_step():
    run = trainer()
    run.scheduler = fastcnn.optim.lr_scheduler.StepLR(run.optimizer, step_size=2, gamma=0.1)
    np.testing.assert_allclose(run.fit(loader(), epochs=4)["lr"], [0.01, 0.01, 0.001, 0.001])
    net = network()
    opt = fastcnn.optim.SGD(net.parameters(), lr=1.0)
    warmup = fastcnn.optim.lr_scheduler.CosineWarmupLR(opt, total_steps=8, warmup_steps=4)
    rates = []

    class Rates(Callback):
        def on_step(self, trainer, info):
            rates.append(info.lr)

    Trainer(net, opt, scheduler=warmup, callbacks=[Rates()]).fit(loader(), epochs=2)
    assert len(rates) == 8
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < rates[-2] < 1.0
    assert rates[0] < rates[1]


def test_finite_check_is_exact_where_squares_overflow():
    net = nn.Sequential(nn.Linear(2, 2))
    parameters = net.parameters()
    parameters[0].grad[...] = 1e30
    assert gradients_finite(parameters)
    for value in (np.inf, np.nan):
        parameters[1].grad[0] = value
        assert not gradients_finite(parameters)


def test_clip_norm_bounds_each_step():
    net = network()
    run = Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=1.0), clip_norm=1e-3)
    before = np.concatenate([p.data.ravel() for p in net.parameters()])
    run.fit([next(iter(loader()))], epochs=1)
    after = np.concatenate([p.data.ravel() for p in net.parameters()])
    assert np.linalg.norm(after - before) == pytest.approx(1e-3, rel=1e-2)


# Early stopping and the best checkpoint


class Scripted(Trainer):
    """Validation results from a list."""

    def evaluate(self, data, batch_size=256):
        metrics = super().evaluate(data, batch_size)
        object.__setattr__(metrics, "loss", self.losses[len(self.history)])
        return metrics


def test_early_stopping_and_the_best_epoch(tmp_path):
    net = network()
    run = Scripted(net, fastcnn.optim.Adam(net.parameters(), lr=0.01), run_dir=tmp_path)
    run.losses = [3.0, 2.0, 2.5, 2.0, 2.5, 1.0]
    history = run.fit(loader(), loader(shuffle=False), epochs=10, patience=3)
    assert history.stopped_early
    assert len(history) == 5
    best = load_checkpoint(tmp_path / "best")
    assert best.epoch == 2
    assert best.history["val_loss"] == [3.0, 2.0]
    assert best.optimizer is None
    again = run.fit(loader(), loader(shuffle=False), epochs=10, patience=3)
    assert again.stopped_early
    assert len(again) == 5
    assert len(run.fit(loader(), loader(shuffle=False), epochs=6)) == 6
    assert load_checkpoint(tmp_path / "best").epoch == 6


def test_monitor_accuracy_takes_the_largest(tmp_path):
    run = trainer(tmp_path)
    history = run.fit(loader(), loader(shuffle=False), epochs=6, monitor="val_accuracy")
    expected = 1 + int(np.argmax(history["val_accuracy"]))
    assert load_checkpoint(tmp_path / "best").epoch == expected


# Checkpoints and resuming


def scheduled(run_dir, seed=0, **options):
    run = trainer(run_dir, seed=seed, classes=CLASSES, normalize=(np.array([0.5]), (0.25,)), **options)
    run.scheduler = fastcnn.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 4)
    return run


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("prefetch", [False, True])
def test_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, optimizer, prefetch):
    def make(run_dir, seed):
        def build(parameters, lr):
            options = {"momentum": 0.9, "nesterov": True} if optimizer == "SGD" else {}
            return getattr(fastcnn.optim, optimizer)(parameters, lr=lr, weight_decay=0.01, **options)

        run = scheduled(run_dir, seed=seed, optimizer=build)
        batches = loader(seed=seed, augment=LIGHT, prefetch=prefetch)
        return run, batches, loader(seed=5, shuffle=False)

    straight, train, val = make(None, 0)
    straight.fit(train, val, epochs=4)
    expected = bits(straight)

    first, train, val = make(tmp_path, 0)
    first.fit(train, val, epochs=2)
    # Another process: other weights, other random numbers so far.
    second, train, val = make(tmp_path, 77)
    fastcnn.default_generator().random(13)
    second.fit(train, val, epochs=4, resume=True)
    assert bits(second) == expected


def test_checkpoint_tells_how_to_use_the_model(tmp_path):
    config = {"name": "emotion", "input_shape": [1, 48, 48], "num_classes": 3}
    scheduled(tmp_path, model_config=config | {"input_shape": (1, 48, 48)}).fit(loader(), epochs=1)
    for name in ("last", "best"):
        checkpoint = load_checkpoint(tmp_path / name)
        assert checkpoint.classes == CLASSES
        assert checkpoint.normalize == [[0.5], [0.25]]
        assert checkpoint.model_config == config
        assert checkpoint.complete
    net = network(seed=8)
    load_checkpoint(tmp_path / "best").restore(net)
    assert json.loads((tmp_path / "last.json").read_text())["model_config"] == config


def test_a_model_by_name_comes_back_from_its_checkpoint(tmp_path):
    net = fastcnn.models.create("chapter9", input_shape=(1, 8, 8), num_classes=3, seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 1, 8, 8)).astype(np.float32), rng.integers(0, 3, 6)
    run = Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=0.01), run_dir=tmp_path)
    run.fit([(x, y)], epochs=1)
    saved = load_checkpoint(tmp_path / "best")
    twin = fastcnn.models.create(**saved.model_config, seed=1)
    saved.restore(twin)
    np.testing.assert_array_equal(fastcnn.train.predict(twin, x), run.predict(x))


def test_a_run_is_not_overwritten_unasked(tmp_path):
    trainer(tmp_path).fit(loader(), epochs=2)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="holds another run"):
        trainer(tmp_path).fit(loader(), epochs=1)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    run = trainer(tmp_path, seed=3)
    run.fit(loader(), epochs=1, overwrite=True)
    assert load_checkpoint(tmp_path / "last").epoch == 1
    # Its own second call needs no permission.
    run.fit(loader(), epochs=2)
    assert load_checkpoint(tmp_path / "last").epoch == 2


def test_a_run_that_failed_at_once_is_in_nobodys_way(tmp_path):
    with pytest.raises(ValueError, match="train_loader: gave no samples in epoch 1"):
        trainer(tmp_path).fit([], epochs=1)
    assert load_checkpoint(tmp_path / "last").epoch == 0
    assert len(trainer(tmp_path).fit(loader(), epochs=1)) == 1


def test_a_users_file_counts_as_a_run(tmp_path):
    (tmp_path / "last.json").write_text("shopping list")
    with pytest.raises(FileExistsError):
        trainer(tmp_path).fit(loader(), epochs=1)
    assert (tmp_path / "last.json").read_text() == "shopping list"


def test_resume_refuses_and_changes_nothing(tmp_path):
    with pytest.raises(ValueError, match="resume: needs a run_dir"):
        trainer().fit(loader(), epochs=1, resume=True)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        trainer(tmp_path).fit(loader(), epochs=1, resume=True)
    scheduled(tmp_path).fit(loader(), epochs=1)
    other = scheduled(tmp_path, seed=9, optimizer=fastcnn.optim.SGD)
    before = bits(other)
    with pytest.raises(CheckpointError, match="its optimizer is Adam, not SGD"):
        other.fit(loader(), epochs=2, resume=True)
    assert bits(other) == before
    for name, value in (("classes", ("a", "b", "c")), ("normalize", [[0.0], [1.0]])):
        other = scheduled(tmp_path, seed=9)
        setattr(other, name, value)
        before = bits(other)
        with pytest.raises(CheckpointError, match=f"its {name} is"):
            other.fit(loader(), epochs=2, resume=True)
        assert bits(other) == before


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    trainer(tmp_path).fit(loader(), epochs=2)
    run = trainer(tmp_path, seed=4)
    assert len(run.fit(loader(), epochs=2, resume=True)) == 2
    assert run.step == 8


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
def test_full_disk_at_any_save_loses_nothing(tmp_path, monkeypatch, at):
    """The disk is full from some rename of the second epoch's checkpoints on."""
    run = scheduled(tmp_path / "run")
    run.fit(loader(), epochs=1)
    before = load_checkpoint(tmp_path / "run" / "last")
    real, calls = os.replace, []

    def full(*args):
        calls.append(args)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="can't save a checkpoint: No space left"):
            run.fit(loader(), epochs=3)
    assert (
        load_checkpoint(tmp_path / "run" / "last").model["0.weight"].tobytes()
        == before.model["0.weight"].tobytes()
    )
    load_checkpoint(tmp_path / "run" / "best")
    assert len(run.history) == 2
    assert not run.model.training
    assert len(run.fit(loader(), epochs=3)) == 3
    assert load_checkpoint(tmp_path / "run" / "last").epoch == 3


# Callbacks


class Recorder(Callback):
    def __init__(self):
        self.events = []

    def on_fit_start(self, trainer, epochs):
        self.events.append(("fit", epochs))

    def on_epoch_start(self, trainer, epoch, batches):
        self.events.append(("epoch", epoch, batches))

    def on_step(self, trainer, info):
        self.events.append(("step", info.epoch, info.batch, info.step, info.batches, info.samples))
        assert trainer.model.training
        assert info.seconds > 0
        assert np.isfinite([info.loss, info.accuracy, info.batch_loss]).all()

    def on_epoch_end(self, trainer, row):
        assert row == list(trainer.history.rows())[-1]
        self.events.append(("end", row["epoch"]))

    def on_fit_end(self, trainer):
        self.events.append(("done",))


def test_callbacks_see_every_event():
    recorder = Recorder()
    trainer(callbacks=[Callback(), recorder]).fit(loader(count=20, batch_size=16), epochs=2)
    assert recorder.events == [
        ("fit", 2),
        ("epoch", 1, 2),
        ("step", 1, 1, 1, 2, 16),
        ("step", 1, 2, 2, 2, 20),
        ("end", 1),
        ("epoch", 2, 2),
        ("step", 2, 1, 3, 2, 16),
        ("step", 2, 2, 4, 2, 20),
        ("end", 2),
        ("done",),
    ]


def test_a_callbacks_error_ends_training_and_tells_the_others():
    class Fails(Callback):
        def on_step(self, trainer, info):
            raise RuntimeError("mine")

    recorder = Recorder()
    run = trainer(callbacks=[recorder, Fails()])
    with pytest.raises(RuntimeError, match="mine"):
        run.fit(loader(), epochs=1)
    assert recorder.events[-1] == ("done",)
    assert not run.model.training


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs: 0 is below 1"),
        ({"epochs": 2.0}, TypeError, "epochs: expected an int"),
        ({"epochs": 1, "patience": 0}, ValueError, "patience: 0 is below 1"),
        ({"epochs": 1, "monitor": "val_loss"}, ValueError, "monitor: 'val_loss' needs a val_loader"),
        ({"epochs": 1, "monitor": "speed"}, ValueError, "monitor: 'speed' is none of"),
    ],
)
def test_bad_arguments_of_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        trainer().fit(loader(), **arguments)


def test_bad_arguments_of_the_trainer():
    for clip_norm in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="clip_norm"):
            trainer(clip_norm=clip_norm)
    with pytest.raises(ValueError, match="scheduler_interval: 'batch'"):
        trainer(scheduler_interval="batch")


def test_labels_out_of_range_are_named():
    x, y = next(iter(loader()))
    for wrong in (3, -1, 250):
        labels = y.copy()
        labels[4] = wrong
        with pytest.raises(ValueError, match=rf"labels: {wrong} is not between 0 and 2 \(3 classes\)"):
            trainer().fit([(x, labels)], epochs=1)
        with pytest.raises(ValueError, match=rf"labels: {wrong} is not"):
            trainer().evaluate((x, labels))


def test_other_bad_data():
    run = trainer()
    x, y = next(iter(loader()))
    with pytest.raises(ValueError, match="no labelled samples"):
        run.evaluate([])
    with pytest.raises(ValueError, match="no labelled samples"):
        run.evaluate((x[:0], y[:0]))
    with pytest.raises(ValueError, match="y: 7 labels for 8 images"):
        run.evaluate((x, y[:7]))
    with pytest.raises(TypeError, match="data: expected a loader or a pair"):
        run.evaluate(x)
    with pytest.raises(TypeError, match="labels: expected integers, got dtype float64"):
        run.evaluate((x, y.astype(float)))
    with pytest.raises(ValueError, match=r"labels: expected shape \(N,\)"):
        run.evaluate((x, y[:, None]))
    with pytest.raises(ValueError, match="train_loader: gave no samples in epoch 2"):
        run.fit(iter([(x, y)]), epochs=2)
    assert len(run.history) == 1
    run.classes = ("one", "two")
    with pytest.raises(ValueError, match="classes: 2 names, but the model gives 3"):
        run.evaluate((x, y))


def test_a_model_that_gives_no_logits():
    net = nn.Sequential(nn.Conv2d(1, 3, 3))
    run = Trainer(net, fastcnn.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"expected logits of shape \(8, classes\), got \(8, 3, 4, 4\)"):
        run.fit(loader(), epochs=1)
