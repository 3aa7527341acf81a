"""The record of a training run, epoch by epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "val_precision",
    "val_recall",
    "val_f1",
    "lr",
    "seconds",
    "images_per_second",
)
_REQUIRED = ("epoch", "train_loss", "train_accuracy", "lr", "seconds", "images_per_second")
_FLAGS = ("interrupted", "stopped_early")
_MONITORS = tuple(name for name in COLUMNS if name.startswith(("train_", "val_")))


def lower_is_better(monitor: str) -> bool:
    """Whether the best value of a column is its smallest.

    Raises
    ------
    ValueError
        If `monitor` is not a loss or score of `COLUMNS`.
    """
    if monitor not in _MONITORS:
        raise ValueError(f"monitor: {monitor!r} is none of {', '.join(_MONITORS)}")
    return monitor.endswith("loss")


def _number(name: str, value: Any) -> float | int | None:
    if value is None and name not in _REQUIRED:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return value


class History:
    """Losses and scores of each completed epoch.

    ``history["val_loss"]`` is the list of a column, ``history.rows()`` gives one dict an epoch; `COLUMNS`
    names the columns. The training loss and accuracy are those of the batches as they were trained on.
    Without validation the ``val_`` columns hold None.

    Attributes
    ----------
    interrupted : bool
        Whether the last call of ``fit`` was ended by Ctrl-C.
    stopped_early : bool
        Whether the last call of ``fit`` ran out of patience.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list] = {name: [] for name in COLUMNS}
        self.interrupted = False
        self.stopped_early = False

    def __len__(self) -> int:
        """Number of completed epochs."""
        return len(self._columns["epoch"])

    def __getitem__(self, column: str) -> list:
        """The values of a column, one an epoch."""
        if column not in self._columns:
            raise KeyError(f"{column!r} is none of {', '.join(COLUMNS)}")
        return list(self._columns[column])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"History({len(self)} epochs, interrupted={self.interrupted})"

    def append(self, row: dict[str, float | int | None]) -> dict[str, float | int | None]:
        """Add an epoch; columns left out are None.

        Returns
        -------
        dict
            The row with all columns.

        Raises
        ------
        ValueError
            If a column is unknown, a required one missing, a value not finite, or the epoch not the next one;
            the history stays as it was.
        """
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"row: {sorted(unknown)[0]!r} is none of {', '.join(COLUMNS)}")
        values = {name: _number(name, row.get(name)) for name in COLUMNS}
        if values["epoch"] != len(self) + 1:
            raise ValueError(f"epoch: {values['epoch']} does not follow {len(self)}")
        for name, value in values.items():
            self._columns[name].append(value)
        return values

    def rows(self) -> Iterator[dict[str, Any]]:
        """One dict an epoch, in order."""
        for values in zip(*self._columns.values(), strict=True):
            yield dict(zip(COLUMNS, values, strict=True))

    def best(self, monitor: str) -> dict[str, Any] | None:
        """The row of the best epoch by a loss or score, the first of equals; None where no epoch has it."""
        sign = 1 if lower_is_better(monitor) else -1
        rows = [row for row in self.rows() if row[monitor] is not None]
        return min(rows, key=lambda row: sign * row[monitor], default=None)

    def to_dict(self) -> dict[str, Any]:
        """Columns and flags as plain Python values."""
        return {
            **{flag: getattr(self, flag) for flag in _FLAGS},
            "columns": {name: self[name] for name in COLUMNS},
        }

    @classmethod
    def from_dict(cls, content: Any) -> History:
        """The inverse of `to_dict`.

        Raises
        ------
        ValueError
            If `content` is not what `to_dict` gives.
        """
        columns = content.get("columns") if isinstance(content, dict) else None
        if not isinstance(columns, dict) or not all(isinstance(values, list) for values in columns.values()):
            raise ValueError("history: expected a dict with lists as 'columns'")
        if set(columns) != set(COLUMNS) or len({len(values) for values in columns.values()}) != 1:
            raise ValueError(f"history: expected equally long columns {', '.join(COLUMNS)}")
        history = cls()
        for flag in _FLAGS:
            if not isinstance(content.get(flag), bool):
                raise ValueError(f"history: {flag!r} must be true or false, got {content.get(flag)!r}")
            setattr(history, flag, content[flag])
        for values in zip(*(columns[name] for name in COLUMNS), strict=True):
            history.append(dict(zip(COLUMNS, values, strict=True)))
        return history

    def to_json(self) -> str:
        """The history as a JSON object."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> History:
        """The inverse of `to_json`; raises ValueError for anything else."""
        return cls.from_dict(json.loads(text))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw loss and accuracy over the epochs into a picture file.

        Raises
        ------
        ImportError
            Without matplotlib (the extra ``fastcnn[plot]``).
        ValueError
            Before the first epoch.
        """
        if not len(self):
            raise ValueError("history: there is no epoch to plot")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("History.plot needs matplotlib: pip install 'fastcnn[plot]'") from error
        figure = Figure(figsize=(10, 4), layout="constrained")
        for axes, score in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for part in ("train", "val"):
                values = self._columns[f"{part}_{score}"]
                if any(value is not None for value in values):
                    axes.plot(self._columns["epoch"], values, marker=".", label=part)
            axes.set(xlabel="epoch", ylabel=score)
            axes.legend()
        figure.savefig(path)
