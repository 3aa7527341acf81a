"""Metrics as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A wider matrix is no help on a terminal; --json has it whole.
_MOST_COLUMNS = 24
_LONGEST_NAME = 16


def table(rows: Sequence[Sequence[object]], align: str = "") -> str:
    """Columns of text; `align` has "<" or ">" for each column, the last of them for all that follow."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = max((len(row) for row in cells), default=0)
    align = (align or "<") + (align or "<")[-1] * columns
    widths = [max((len(row[i]) for row in cells if i < len(row)), default=0) for i in range(columns)]
    lines = [
        "  ".join(f"{cell:{align[i]}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in cells
    ]
    return "\n".join(lines)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix, rows true and columns predicted."""
    if len(classes) > _MOST_COLUMNS:
        return f"Confusion matrix: {len(classes)} classes are too many to print; --json has it."
    names = [shortened(name) for name in classes]
    numbers = [[count or "." for count in row] for row in matrix]
    # Long names would make the columns wide: number the columns then.
    wide = max(map(len, names)) > 5
    heads = [str(i) for i in range(len(names))] if wide else names
    labels = [f"{i} {name}" for i, name in enumerate(names)] if wide else names
    rows: list[list[object]] = [["", *heads]]
    rows += [[label, *row] for label, row in zip(labels, numbers, strict=True)]
    return "Confusion matrix (rows: true class, columns: predicted)\n" + table(rows, "<>")


def scores(per_class: Sequence[dict[str, Any]], averages: dict[str, float], samples: int) -> str:
    """Precision, recall and F1 of each class, and their averages."""
    rows: list[list[object]] = [["class", "precision", "recall", "F1", "images"]]
    for row in per_class:
        values = [f"{row[name]:.2%}" for name in ("precision", "recall", "f1")]
        rows.append([shortened(row["class"]), *values, row["support"]])
    rows.append(["average", *(f"{averages[name]:.2%}" for name in ("precision", "recall", "f1")), samples])
    return table(rows, "<>")


def shortened(name: str) -> str:
    """A class's name, cut if it is long."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def metrics(result: Any) -> str:
    """All that a `fastcnn.train.Metrics` has to tell."""
    averages = {name: getattr(result, name) for name in ("precision", "recall", "f1")}
    return "\n\n".join(
        [
            confusion(result.confusion.tolist(), result.classes),
            scores(result.per_class(), averages, result.samples),
            f"Loss {result.loss:.4f}, accuracy {result.accuracy:.2%} "
            f"({round(result.accuracy * result.samples):,} of {result.samples:,} images)",
        ]
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 thread", "2 threads"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def size(count: float) -> str:
    """A number of bytes in the largest unit that leaves at least 1."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
