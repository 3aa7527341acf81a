"""The training loop: epochs, validation, early stopping, checkpoints and what to do when it is cut short."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import _random
from .._device import host
from ..nn import CrossEntropyLoss
from ..optim import clip_grad_norm_
from . import evaluation, files
from .callbacks import Callback, StepInfo
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .files import CheckpointError
from .history import History, lower_is_better
from .interrupts import deferred_interrupt
from .metrics import Metrics, WeightedMean
from .nonfinite import NonFiniteLossError, find_culprit, gradients_finite

_LAST, _BEST, _INTERRUPTED = "last", "best", "interrupted"


@dataclass
class _EpochStart:
    """What an epoch that was cut short must put back before it runs again; parameters go on as they are."""

    step: int
    rates: list[float]
    scheduler: Any


class Trainer:
    """Trains a classifier, and remembers.

    Parameters
    ----------
    model : Module
        Batches go to where its parameters are: move it with ``model.to("cuda")``.
    optimizer : Optimizer
        Over the model's parameters.
    loss_fn : callable, optional
        ``loss_fn(logits, y)`` is the mean loss of a batch and ``loss_fn.backward()`` its gradient; by default
        ``nn.CrossEntropyLoss()``.
    scheduler : optional
        From ``fastcnn.optim.lr_scheduler``.
    scheduler_interval : {"epoch", "step"}, optional
        When to call ``scheduler.step()``; by default after every step where the scheduler has `total_steps`,
        and after every epoch otherwise.
    clip_norm : float, optional
        Scale gradients down to this norm where theirs is larger.
    run_dir : path, optional
        Folder of the run's checkpoints: ``last`` (to resume from), ``best`` (the model of the best epoch)
        and, after Ctrl-C, ``interrupted`` (the model as it was). Without it nothing is written.
    callbacks : iterable of Callback
    classes : sequence of str, optional
        Names of the classes, kept in checkpoints.
    normalize : optional
        How images were normalised (JSON values or arrays), kept in checkpoints.
    model_config : dict, optional
        Arguments of ``fastcnn.models.create`` that build the model, kept in checkpoints; by default the
        model's ``config``, where it has one.

    Attributes
    ----------
    history : History
        Of all completed epochs, also after an interrupt or an error.
    step : int
        Number of steps so far.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss_fn: Any = None,
        *,
        scheduler: Any = None,
        scheduler_interval: Literal["epoch", "step"] | None = None,
        clip_norm: float | None = None,
        run_dir: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        classes: Sequence[str] | None = None,
        normalize: Any = None,
        model_config: Mapping[str, Any] | None = None,
    ):
        if scheduler_interval is None:
            scheduler_interval = "step" if hasattr(scheduler, "total_steps") else "epoch"
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval: {scheduler_interval!r} is neither 'epoch' nor 'step'")
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm: {clip_norm} is not a positive number")
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = CrossEntropyLoss() if loss_fn is None else loss_fn
        self.scheduler = scheduler
        self.clip_norm = clip_norm
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.callbacks = list(callbacks)
        self.classes = None if classes is None else tuple(classes)
        self.normalize = _plain(normalize)
        self.model_config = getattr(model, "config", None) if model_config is None else model_config
        self.history = History()
        self.step = 0
        self._interval = scheduler_interval
        self._parameters = list(model.parameters())
        self._generators: dict[str, np.random.Generator] = {}
        self._unfinished: _EpochStart | None = None
        self._owns_run = False

    def fit(
        self,
        train_loader: Any,
        val_loader: Any = None,
        *,
        epochs: int,
        patience: int | None = None,
        monitor: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> History:
        """Train until the run has `epochs` epochs, those of earlier calls and of a resumed run included.

        Ctrl-C ends it early and loses nothing: the history has every completed epoch and ``interrupted`` set,
        the folder has the checkpoint ``last`` of the last completed epoch and ``interrupted`` of the model as
        it is. A second call goes on with that model, from the start of the unfinished epoch; with `resume` it
        goes back to ``last`` and continues bit for bit as if there had been no interrupt. Afterwards the
        model is in evaluation mode.

        Parameters
        ----------
        train_loader : iterable of ``(x, y)``
            Gives an epoch's batches each time it is iterated: x (N, C, H, W), y (N,) class indices.
        val_loader : loader, or pair of arrays, optional
            Evaluated after each epoch.
        epochs : int
            Number of epochs that the whole run shall have.
        patience : int, optional
            Stop after this many epochs without a better `monitor`.
        monitor : str, optional
            Column of the history that decides which epoch is best: by default "val_loss", or "train_loss"
            without a `val_loader`.
        resume : bool
            Continue the run in `run_dir` from its checkpoint ``last``, bit for bit: model, optimiser with its
            learning rate, scheduler, random generators and history are all taken from there.
        overwrite : bool
            Start afresh in a `run_dir` that holds another run, whose checkpoints are lost.

        Returns
        -------
        History

        Raises
        ------
        FileExistsError
            If `run_dir` holds another run, and neither `resume` nor `overwrite` is set.
        CheckpointError
            If there is no checkpoint to resume from or it doesn't fit. Nothing is changed.
        NonFiniteLossError
            If a loss or gradient is NaN or infinite. Parameters are not updated from it, and ``last`` stays
            as it was.
        ValueError
            If a loader gives no samples, a label is not below the number of logits, or an argument is out of
            range.
        OSError
            If a checkpoint can't be written, as on a full disk. The older one and the history are whole.
        """
        evaluation.check_count("epochs", epochs)
        if patience is not None:
            evaluation.check_count("patience", patience)
        monitor = _monitor(monitor, val_loader is not None)
        self._generators = _find_generators(self.model, train_loader, val_loader)
        self.history.interrupted = self.history.stopped_early = False
        try:
            try:
                self._open_run(resume, overwrite)
                self._run(train_loader, val_loader, epochs, patience, monitor)
            finally:
                self.model.eval()
        except KeyboardInterrupt:
            self.history.interrupted = True
            # Ctrl-C may have come before all layers had changed their mode.
            self.model.eval()
            self._save_interrupted()
        finally:
            for callback in self.callbacks:
                callback.on_fit_end(self)
        return self.history

    def evaluate(self, data: Any, batch_size: int = 256) -> Metrics:
        """Metrics over a loader or a pair ``(x, y)`` of arrays, in the memory of one batch.

        The model's mode is the same afterwards. Errors are those of `fit`.
        """
        return evaluation.evaluate(self.model, self.loss_fn, data, self.classes, batch_size)

    def predict(self, x: NDArray, batch_size: int = 256) -> NDArray:
        """Logits (N, K) of images (N, C, H, W) that are normalised as in training, `batch_size` at a time."""
        return evaluation.predict(self.model, x, batch_size)

    def predict_classes(self, x: NDArray, batch_size: int = 256) -> NDArray[np.int64]:
        """Class index (N,) of each image: the largest logit, the first of equals."""
        return self.predict(x, batch_size).argmax(axis=1)

    def checkpoint(self, *, complete: bool = True, with_optimizer: bool = True) -> Checkpoint:
        """The state of the run as it is now; `complete` tells that no epoch is under way."""
        return Checkpoint.take(
            self.model,
            self.optimizer if with_optimizer else None,
            self.scheduler if with_optimizer else None,
            self._generators if with_optimizer else None,
            epoch=len(self.history),
            step=self.step,
            complete=complete,
            history=self.history,
            model_config=_plain(self.model_config),
            normalize=self.normalize,
            classes=self.classes,
        )

    def _open_run(self, resume: bool, overwrite: bool) -> None:
        """Take up the run in the folder, or claim the folder for this one."""
        if resume:
            if self.run_dir is None:
                raise ValueError("resume: needs a run_dir to resume from")
            self._resume(self.run_dir / _LAST)
        elif self._unfinished is not None:
            self._rewind(self._unfinished)
        if self.run_dir is not None and not self._owns_run and not resume:
            if not overwrite and _holds_run(self.run_dir):
                raise FileExistsError(
                    f"run_dir: {self.run_dir} holds another run (resume continues it, overwrite replaces it)"
                )
            with deferred_interrupt():
                self._save(_LAST, self.checkpoint())
                for name in (_BEST, _INTERRUPTED):
                    files.remove(self.run_dir / name)
                self._owns_run = True
        self._owns_run = True

    def _resume(self, path: Path) -> None:
        saved = load_checkpoint(path)
        if not saved.complete:
            raise CheckpointError(f"{path}: was taken within an epoch, and can't be resumed from")
        for name in ("classes", "normalize"):
            own, theirs = getattr(self, name), getattr(saved, name)
            if own is not None and theirs is not None and own != theirs:
                raise CheckpointError(f"{path}: its {name} is {theirs}, this run's is {own}")
        saved.restore(self.model, self.optimizer, self.scheduler, self._generators)
        self.history, self.step, self._unfinished = saved.history, saved.step, None
        self.history.interrupted = self.history.stopped_early = False

    def _rewind(self, start: _EpochStart) -> None:
        self.step = start.step
        for group, rate in zip(self.optimizer.param_groups, start.rates, strict=True):
            group["lr"] = rate
        if self.scheduler is not None:
            self.scheduler.load_state_dict(start.scheduler)
        self._unfinished = None

    def _run(self, train: Any, val: Any, epochs: int, patience: int | None, monitor: str) -> None:
        for callback in self.callbacks:
            callback.on_fit_start(self, epochs)
        while len(self.history) < epochs:
            best = self.history.best(monitor)
            if patience is not None and best and len(self.history) - best["epoch"] >= patience:
                self.history.stopped_early = True
                return
            row = self._run_epoch(train, val, monitor)
            for callback in self.callbacks:
                callback.on_epoch_end(self, row)

    def _run_epoch(self, train: Any, val: Any, monitor: str) -> dict[str, Any]:
        started = time.perf_counter()
        scheduler_state = None if self.scheduler is None else self.scheduler.state_dict()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._unfinished = _EpochStart(self.step, rates, scheduler_state)
        row = self._train_epoch(train, len(self.history) + 1)
        if val is not None:
            metrics = self.evaluate(val)
            names = ("loss", "accuracy", "precision", "recall", "f1")
            row |= {f"val_{name}": getattr(metrics, name) for name in names}
        row["seconds"] = time.perf_counter() - started
        with deferred_interrupt():
            return self._finish_epoch(row, monitor)

    def _train_epoch(self, train: Any, epoch: int) -> dict[str, Any]:
        """Run all batches; the row of the history as far as they tell."""
        batches = len(train) if hasattr(train, "__len__") else None
        for callback in self.callbacks:
            callback.on_epoch_start(self, epoch, batches)
        self.model.train()
        self.optimizer.zero_grad()
        loss, accuracy, samples, rate = WeightedMean(), WeightedMean(), 0, 0.0
        started = time.perf_counter()
        # A loader's thread must not go on reading ahead after an error or Ctrl-C.
        with contextlib.ExitStack() as stack:
            iterator = iter(train)
            if hasattr(iterator, "close"):
                stack.callback(iterator.close)
            for batch, (x, y) in enumerate(iterator, start=1):
                rate = float(self.optimizer.param_groups[0]["lr"])
                batch_loss, correct, counted = self._train_step(x, y, epoch, batch)
                loss.update(batch_loss, counted)
                accuracy.update(correct / max(counted, 1), counted)
                samples += len(x)
                if self.callbacks:
                    seconds = time.perf_counter() - started
                    means = loss.value, accuracy.value
                    info = StepInfo(
                        epoch, batch, self.step, batches, samples, seconds, batch_loss, *means, rate
                    )
                    for callback in self.callbacks:
                        callback.on_step(self, info)
        if samples == 0:
            raise ValueError(f"train_loader: gave no samples in epoch {epoch} (it is iterated once an epoch)")
        seconds = max(time.perf_counter() - started, 1e-9)
        return {
            "epoch": epoch,
            "train_loss": loss.value,
            "train_accuracy": accuracy.value,
            "lr": rate,
            "images_per_second": samples / seconds,
        }

    def _train_step(self, x: NDArray, y: NDArray, epoch: int, batch: int) -> tuple[float, int, int]:
        """Update the parameters from a batch; its loss, and how many of its labels were hit and counted."""
        # Dropout must draw the same masks should the batch be run again to find out what went wrong.
        random_state = _random.default_generator().bit_generator.state
        x = evaluation.batch_device(self._parameters).array(x)
        logits = evaluation.class_logits(self.model(x), len(x))
        ignore_index = getattr(self.loss_fn, "ignore_index", None)
        labels, counted = evaluation.class_labels(y, logits.shape[1], ignore_index)
        loss = float(self.loss_fn(logits, y))
        if math.isfinite(loss):
            self.model.backward(self.loss_fn.backward(), input_grad=False)
        if not math.isfinite(loss) or not gradients_finite(self._parameters):
            _random.default_generator().bit_generator.state = random_state
            culprit = find_culprit(self.model, self.loss_fn, x, y, backward=True)
            raise NonFiniteLossError(loss, epoch, self.step + 1, batch, culprit)
        if self.clip_norm is not None:
            clip_grad_norm_(self._parameters, self.clip_norm)
        self.optimizer.step(zero_grad=True)
        self.step += 1
        if self.scheduler is not None and self._interval == "step":
            self.scheduler.step()
        hits = host(logits).argmax(axis=1) == labels
        return loss, int(hits.sum()), len(labels) if counted is None else int(counted.sum())

    def _finish_epoch(self, row: dict[str, Any], monitor: str) -> dict[str, Any]:
        if self.scheduler is not None and self._interval == "epoch":
            self.scheduler.step()
        row = self.history.append(row)
        self._unfinished = None
        if self.run_dir is None:
            return row
        best = self.history.best(monitor)
        # The best one first: after a crash between the two the epoch is run again, and saves both.
        if best and best["epoch"] == row["epoch"]:
            self._save(_BEST, self.checkpoint(with_optimizer=False))
        self._save(_LAST, self.checkpoint())
        return row

    def _save(self, name: str, checkpoint: Checkpoint) -> None:
        assert self.run_dir is not None
        save_checkpoint(self.run_dir / name, checkpoint, overwrite=True)

    def _save_interrupted(self) -> None:
        """Keep the model of an unfinished epoch, without letting a failure lose the history."""
        if self.run_dir is None or self._unfinished is None or not self._owns_run:
            return
        try:
            with deferred_interrupt():
                self._save(_INTERRUPTED, self.checkpoint(complete=False))
        except OSError as error:
            warnings.warn(f"the interrupted model was not saved: {error}", RuntimeWarning, stacklevel=3)


def _monitor(monitor: str | None, validates: bool) -> str:
    if monitor is None:
        return "val_loss" if validates else "train_loss"
    lower_is_better(monitor)
    if monitor.startswith("val_") and not validates:
        raise ValueError(f"monitor: {monitor!r} needs a val_loader")
    return monitor


def _plain(value: Any) -> Any:
    """`value` as JSON gives it back: arrays and tuples become lists."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _holds_run(run_dir: Path) -> bool:
    """Whether a folder has a run's checkpoints that are worth anything; one of no epoch is not."""
    if any(files.exists(run_dir / name) for name in (_BEST, _INTERRUPTED)):
        return True
    if not files.exists(run_dir / _LAST):
        return False
    try:
        return load_checkpoint(run_dir / _LAST).epoch > 0
    except CheckpointError:
        return True


def _find_generators(model: Any, train: Any, val: Any) -> dict[str, np.random.Generator]:
    """Every random generator that a run draws from, once each: the default, the loaders' and the layers'."""
    owners = {"train_loader": train, "val_loader": val}
    owners |= {f"model.{name}": module for name, module in model.named_modules()}
    found = {"default": _random.default_generator()}
    for owner_name, owner in owners.items():
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, np.random.Generator) and not any(value is one for one in found.values()):
                found[f"{owner_name}.{name}"] = value
    return found
