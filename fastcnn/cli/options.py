"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads to use. [default: all]", show_default=False)
]


def use_threads(threads: int | None) -> int:
    """Set the number of threads, if one is given, and return the number in use."""
    from fastcnn import get_num_threads, set_num_threads

    if threads is not None:
        set_num_threads(threads)
    return get_num_threads()


class SplitName(StrEnum):
    """Parts of a data set."""

    train = "train"
    validation = "validation"
    test = "test"
    all = "all"


Split = Annotated[SplitName, typer.Option(help="Part of the data set.")]
Checkpoint = Annotated[
    Path, typer.Argument(help="A run's folder, or one of its checkpoints.", show_default=False)
]
