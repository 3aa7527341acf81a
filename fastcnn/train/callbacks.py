"""What a training loop tells whoever listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass(frozen=True, slots=True)
class StepInfo:
    """Where training stands after a step.

    Attributes
    ----------
    epoch, batch, step : int
        Counted from 1; `batch` within the epoch, `step` over the whole run.
    batches : int or None
        Number of batches of an epoch, where the loader knows it.
    samples : int
        Images of this epoch so far.
    seconds : float
        Time of this epoch so far.
    batch_loss : float
        Loss of this step's batch.
    loss, accuracy : float
        Means over the epoch so far, from the outputs of the training steps themselves.
    lr : float
        Learning rate that the step used.
    """

    epoch: int
    batch: int
    step: int
    batches: int | None
    samples: int
    seconds: float
    batch_loss: float
    loss: float
    accuracy: float
    lr: float


class Callback:
    """Does nothing at every event; override what you need.

    An exception raised in an event ends ``fit``; KeyboardInterrupt ends it as Ctrl-C does.
    """

    def on_fit_start(self, trainer: Trainer, epochs: int) -> None:
        """Before the first epoch; ``len(trainer.history)`` of the `epochs` are done already."""

    def on_epoch_start(self, trainer: Trainer, epoch: int, batches: int | None) -> None:
        """Before the first batch of `epoch`, counted from 1; `batches` is their number where it is known."""

    def on_step(self, trainer: Trainer, info: StepInfo) -> None:
        """After the parameters were updated from a batch."""

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After validation and checkpoints; `row` is the epoch's row of the history."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch, an interrupt or an error, even one before `on_fit_start`."""
