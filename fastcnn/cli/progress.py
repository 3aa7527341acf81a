"""What a user sees while a network trains."""

from __future__ import annotations

from typing import Any

from ..train.callbacks import Callback, StepInfo
from .output import Output


class TrainingProgress(Callback):
    """A line for each epoch and, on a terminal, a bar with rate, loss and accuracy below them.

    Parameters
    ----------
    out : Output
    epochs : int
        Number of epochs of the whole run.
    """

    def __init__(self, out: Output, epochs: int):
        self._out = out
        self._epochs = epochs
        self._bar: Any = None
        self._task: Any = None

    def on_fit_start(self, trainer: Any, epochs: int) -> None:
        self._out.say("epoch  train loss  accuracy  val loss  accuracy  learning rate  images/s  seconds")
        if self._out.live:
            self._bar = _training_bar(self._out)
            self._bar.start()

    def on_epoch_start(self, trainer: Any, epoch: int, batches: int | None) -> None:
        if self._bar is not None:
            name = f"epoch {epoch}/{self._epochs}"
            self._task = self._bar.add_task(name, total=batches, loss="", accuracy="", rate="")

    def on_step(self, trainer: Any, info: StepInfo) -> None:
        if self._bar is None:
            return
        texts = {
            "loss": f"loss {info.loss:.4f}",
            "accuracy": f"accuracy {info.accuracy:.2%}",
            "rate": f"{info.samples / max(info.seconds, 1e-9):,.0f} images/s",
        }
        # The last batch is followed by validation: say so rather than stand at 100%.
        if info.batch == info.batches:
            texts["rate"] = "validating"
        self._bar.update(self._task, completed=info.batch, **texts)

    def on_epoch_end(self, trainer: Any, row: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.remove_task(self._task)
            self._bar.console.print(epoch_line(row, self._epochs))
        else:
            self._out.say(epoch_line(row, self._epochs))

    def on_fit_end(self, trainer: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One row of the history, in the columns of the line that `TrainingProgress` prints first."""
    val_loss = "-" if row.get("val_loss") is None else f"{row['val_loss']:.4f}"
    val_accuracy = "-" if row.get("val_accuracy") is None else f"{row['val_accuracy']:.2%}"
    return (
        f"{row['epoch']}/{epochs}".rjust(5)
        + f"  {row['train_loss']:10.4f}  {row['train_accuracy']:8.2%}  {val_loss:>8}  {val_accuracy:>8}"
        + f"  {row['lr']:13.2e}  {row['images_per_second']:8,.0f}  {row['seconds']:7.1f}"
    )


def _training_bar(out: Output) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    fields = [TextColumn("{task.fields[" + name + "]}") for name in ("loss", "accuracy", "rate")]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        *fields,
        console=out.console(),
        transient=True,
    )
