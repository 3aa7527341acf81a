"""What a user sees while something has to be done first: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import text
from .output import Output


@contextlib.contextmanager
def counting(out: Output, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Progress of something that counts: call the result with (done, total, what is being done).

    On a terminal it is one line that redraws itself, elsewhere a line for each call.
    """
    if not out.live:

        def plain(done: int, total: int, what: str) -> None:
            out.say(f"{title} {done}/{total}" + (f": {what}" if what else ""))

        yield plain
        return

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
        console=out.console(),
        transient=True,
    )
    task = bar.add_task(title, total=None, what="")

    def live(done: int, total: int, what: str) -> None:
        # Not before: often there is nothing to wait for.
        bar.start()
        bar.update(task, completed=done, total=total, what=what)

    try:
        yield live
    finally:
        bar.stop()


@contextlib.contextmanager
def downloads(out: Output) -> Iterator[Callable[[str, int, int], None]]:
    """Progress of downloads: call the result with (file, bytes so far, bytes in all)."""
    if not out.live:
        named: set[str] = set()

        def plain(name: str, done: int, total: int) -> None:
            if name not in named:
                named.add(name)
                out.say(f"Downloading {name} ({text.size(total)})")

        yield plain
        return

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=out.console(), transient=True)
    tasks: dict[str, Any] = {}

    def live(name: str, done: int, total: int) -> None:
        bar.start()
        if name not in tasks:
            tasks[name] = bar.add_task(f"Downloading {name}", total=total)
        bar.update(tasks[name], completed=done)

    try:
        yield live
    finally:
        bar.stop()


def compile_first(out: Output, *arguments: Any, strict: bool = False, **options: Any) -> Any:
    """Run `fastcnn.warmup.warmup` and show how far it is; silent where all is compiled.

    A failure ends the command only if `strict`: kernels can also be compiled when they are first called.
    """
    from fastcnn.kernels.jit import cache_directory
    from fastcnn.warmup import WarmupError, warmup

    with counting(out, "Compiling kernels") as report:
        begun = False

        def progress(done: int, total: int, what: str) -> None:
            nonlocal begun
            if not begun:
                out.say("Compiling kernels for this machine, which is needed once and takes up to a minute.")
                begun = True
            report(done, total, what)

        try:
            result = warmup(*arguments, progress=progress, **options)
        except WarmupError as error:
            if strict:
                raise
            out.say(f"warning: {error}; kernels will be compiled when they are needed")
            return None
    if result.compiled:
        place = short_path(cache_directory().parent)
        out.say(f"Compiled {result.compiled} kernels in {result.seconds:.1f} s; they are kept in {place}.")
    return result


def short_path(path: Path) -> str:
    """`path` with ``~`` for the user's home."""
    with contextlib.suppress(ValueError, RuntimeError):
        return str(Path("~") / path.relative_to(Path.home()))
    return str(path)
