"""``fastcnn warmup``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, Threads, use_threads
from .output import CommandError, Output, guarded
from .train import OptimizerName
from .waiting import compile_first, short_path


@guarded
def warmup(
    model: Annotated[str, typer.Option(metavar="NAME", help="The network, or all.")] = "emotion",
    data: Annotated[
        str, typer.Option(metavar="NAME", help="The data set's name, for the size of its images.")
    ] = "digits",
    optimizer: Annotated[OptimizerName, typer.Option(help="The optimiser.")] = OptimizerName.adam,
    double: Annotated[bool, typer.Option("--double", help="For float64, as fastcnn check uses it.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(min=0, help="Processes to compile in; 0: this one. [default: all CPUs, at most 4]"),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compile a network's kernels now.

    Training and running it then starts at once.
    """
    from fastcnn.data import info
    from fastcnn.kernels.jit import cache_directory
    from fastcnn.models import names

    from .run import OPTIMIZERS

    out = Output(json)
    use_threads(threads)
    if model != "all" and model not in names():
        raise CommandError(f"--model {model}: is none of {', '.join(names())}, all")
    entry = info(data)
    compiled, seconds, cached = 0, 0.0, True
    for name in names() if model == "all" else [model]:
        result = compile_first(
            out,
            name,
            entry.input_shape,
            len(entry.classes) or 100,
            dtype="float64" if double else "float32",
            optimizer=OPTIMIZERS[optimizer.value],
            processes=processes,
            strict=True,
        )
        compiled, seconds = compiled + result.compiled, seconds + result.seconds
        cached = cached and result.cached
    if cached:
        out.say(f"Everything is compiled already, in {short_path(cache_directory().parent)}.")
    out.result({"compiled": compiled, "seconds": seconds, "cached": cached, "cache": str(cache_directory())})
