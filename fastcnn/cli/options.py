"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads to use. [default: all]", show_default=False)
]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch.")]


def use_threads(threads: int | None) -> int:
    """Set the number of threads, if one is given, and return the number in use."""
    from fastcnn import get_num_threads, set_num_threads

    if threads is not None:
        set_num_threads(threads)
    return get_num_threads()
