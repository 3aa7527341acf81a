"""``fastcnn evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import text
from .options import Checkpoint, Json, Split, SplitName, Threads, use_threads
from .output import CommandError, Output, guarded
from .waiting import compile_first, downloads


@guarded
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="A data set's name, or a path. [default: what it was trained on]",
            show_default=False,
        ),
    ] = None,
    split: Split = SplitName.test,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure a trained network on images.

    It prints the confusion matrix, precision, recall and F1 of each class, loss and accuracy.
    """
    from fastcnn import nn
    from fastcnn.data import load
    from fastcnn.train import evaluate as measure

    from .loading import load_network

    out = Output(json)
    use_threads(threads)
    network = load_network(checkpoint)
    name = data or _trained_on(network.path.parent)
    with downloads(out) as progress:
        dataset = load(name, split.value, progress=progress)
    if dataset.classes != network.classes[: dataset.num_classes]:
        raise CommandError(
            f"{name}: its classes ({_listed(dataset.classes)}) are not the network's "
            f"({_listed(network.classes)})"
        )
    loader = network.loader(dataset, batch_size)
    compile_first(out, network.model, network.input_shape, len(network.classes), training=False)
    metrics = measure(network.model, nn.CrossEntropyLoss(), loader, network.classes)
    out.say(f"{network.path} on {name}, {split.value} part:\n")
    out.say(text.metrics(metrics))
    out.result(
        {
            "checkpoint": str(network.path),
            "data": name,
            "split": split.value,
            "classes": list(network.classes),
        }
        | metrics.to_dict()
    )


def _trained_on(folder: Path) -> str:
    from .run import SETTINGS_FILE, read_settings

    if not (folder / SETTINGS_FILE).exists():
        raise CommandError(f"{folder}: does not tell what the network was trained on; give --data")
    return read_settings(folder).data


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
