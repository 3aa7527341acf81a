"""``fastcnn check``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import text
from .options import Json, Threads, use_threads
from .output import FAILED, Output, guarded
from .waiting import compile_first, downloads

if TYPE_CHECKING:
    from fastcnn.diagnostics import CheckReport


@guarded
def check(
    model: Annotated[str, typer.Option(metavar="NAME", help="The network, or all.")] = "emotion",
    data: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="Data whose images are sent through it.")
    ] = "digits",
    images: Annotated[int, typer.Option(min=2, help="Number of images.")] = 4,
    samples: Annotated[int, typer.Option(min=1, help="Entries to test in each array.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Start of all random numbers.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check a network's gradients layer by layer.

    Real images are sent through it, and each layer gets the output of the one before, in double precision.
    The tests are IN, gradient of the input against central differences; PAR, gradient of a parameter; VJP,
    the input's gradient along random directions; and for a convolution ROW, order of im2col's rows; DX, the
    input's gradient by col2im; ADJ, col2im as the adjoint of im2col. The exit code is 1 if one fails.
    """
    from fastcnn.data import load
    from fastcnn.models import names

    out = Output(json)
    use_threads(threads)
    with downloads(out) as progress:
        dataset = load(data, "test", progress=progress)
    reports = {
        name: _check_one(out, name, dataset, images, samples, seed)
        for name in (names() if model == "all" else [model])
    }
    ok = all(report.ok for report in reports.values())
    failures = sum(len(report.failures) for report in reports.values())
    tests = sum(len(report) for report in reports.values())
    verdict = "all passed" if ok else f"{failures} failed"
    out.say(f"{text.counted(tests, 'test')}, {verdict}.")
    out.result({"ok": ok, "models": {name: report.as_dict() for name, report in reports.items()}})
    if not ok:
        raise typer.Exit(FAILED)


def _check_one(out: Output, name: str, dataset: Any, images: int, samples: int, seed: int) -> CheckReport:
    import numpy as np

    from fastcnn import models
    from fastcnn.data import Loader
    from fastcnn.diagnostics import check_model

    model = models.create(name, dataset.input_shape, dataset.num_classes, seed=seed)
    compile_first(
        out,
        model,
        dataset.input_shape,
        dataset.num_classes,
        dtype="float64",
        optimizer=None,
        augment=False,
    )
    rng = np.random.default_rng(seed)
    chosen = dataset.subset(rng.permutation(len(dataset))[:images])
    x, y = next(iter(Loader(chosen, images, shuffle=False, normalize=dataset.mean_std())))
    out.say(f"{name} on {text.counted(len(chosen), 'image')} of {dataset.name}:")
    return check_model(model, x, y, samples=samples, rng=rng, on_row=out.say)
