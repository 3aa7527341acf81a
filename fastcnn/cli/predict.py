"""``fastcnn predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import text
from .options import Checkpoint, Json, Split, SplitName, Threads, use_threads
from .output import FAILED, CommandError, Output, describe, guarded
from .waiting import compile_first, downloads

if TYPE_CHECKING:
    from .loading import Network, Picture


@guarded
def predict(
    checkpoint: Checkpoint,
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures, or .npy and .npz files with arrays of images.", show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME|PATH", help="Take images of a data set instead.", show_default=False),
    ] = None,
    index: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Which of its images; may be repeated. [default: 0]", show_default=False),
    ] = None,
    split: Split = SplitName.test,
    top: Annotated[int, typer.Option(min=1, help="Classes to name for each image, the likeliest first.")] = 3,
    invert: Annotated[
        bool, typer.Option("--invert", help="Swap black and white; digits are white on black.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Name the class of pictures, with its probability."""
    from .loading import load_network

    if bool(files) == (data is not None):
        raise typer.BadParameter("give either files or --data")
    if index and data is None:
        raise typer.BadParameter("--index needs --data")
    out = Output(json)
    use_threads(threads)
    network = load_network(checkpoint)
    rows: list[dict[str, Any]]
    if data is not None:
        pictures, labels = _from_data(out, data, split.value, index or [0])
        rows = [
            {"source": picture.source, "true": label} for picture, label in zip(pictures, labels, strict=True)
        ]
    else:
        pictures, rows = _from_files(files or [], network, invert)
    if pictures:
        compile_first(out, network.model, network.input_shape, len(network.classes), training=False)
        found = iter(_classify(network, pictures, top))
        rows = [row if "error" in row else row | next(found) for row in rows]
    for row in rows:
        out.say(_line(row))
    out.result({"checkpoint": str(network.path), "predictions": rows})
    if any("error" in row for row in rows):
        raise typer.Exit(FAILED)


def _from_data(out: Output, name: str, split: str, indices: list[int]) -> tuple[list[Picture], list[str]]:
    from fastcnn.data import load

    from .loading import Picture

    with downloads(out) as progress:
        dataset = load(name, split, progress=progress)
    if max(indices) >= len(dataset):
        raise CommandError(f"--index {max(indices)}: the {split} part of {name} has {len(dataset):,} images")
    pictures = [Picture(f"{name} {split} image {i}", dataset.images[i]) for i in indices]
    return pictures, [dataset.classes[dataset.labels[i]] for i in indices]


def _from_files(
    files: list[Path], network: Network, invert: bool
) -> tuple[list[Picture], list[dict[str, Any]]]:
    """The pictures that could be read, and a row for each of them and each file that could not."""
    from .loading import read_pictures

    pictures: list[Picture] = []
    rows: list[dict[str, Any]] = []
    for path in files:
        try:
            found = read_pictures(path, network.input_shape, invert)
        # One bad file among many must not hide the others; Pillow raises nearly anything on one.
        except Exception as error:
            message = describe(error)
            rows.append({"source": str(path), "error": message.removeprefix(f"{path}: ")})
            continue
        pictures += found
        rows += [{"source": picture.source} for picture in found]
    return pictures, rows


def _classify(network: Network, pictures: list[Picture], top: int) -> list[dict[str, Any]]:
    """For each picture its class, its probability, and the likeliest classes."""
    import numpy as np

    from fastcnn.data import Dataset

    rows: list[dict[str, Any]] = [{} for _ in pictures]
    for dtype in (np.uint8, np.float32):
        chosen = [i for i, picture in enumerate(pictures) if picture.pixels.dtype == dtype]
        if not chosen:
            continue
        sizes = {pictures[i].pixels.shape for i in chosen}
        if len(sizes) > 1:
            raise CommandError(f"images of different sizes: {sorted(sizes)}")
        images = np.stack([pictures[i].pixels for i in chosen])
        labels = np.zeros(len(chosen), np.int64)
        dataset = Dataset(images, labels, network.classes, pictures[chosen[0]].source)
        for i, probabilities in zip(chosen, _probabilities(network, dataset), strict=True):
            order = np.argsort(-probabilities, kind="stable")[:top]
            best = [{"class": network.classes[k], "probability": float(probabilities[k])} for k in order]
            rows[i] = best[0] | {"top": best}
    return rows


def _probabilities(network: Network, dataset: Any) -> Any:
    """Softmax of the network's outputs, (N, K)."""
    import numpy as np

    from fastcnn import no_grad

    with no_grad():
        logits = np.concatenate([network.model(x) for x, _ in network.loader(dataset)]).astype(np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['source']}: error: {row['error']}"
    best, *others = row["top"]
    line = f"{row['source']}: {best['class']} ({best['probability']:.2%})"
    if others:
        line += ", then " + ", ".join(f"{one['class']} ({one['probability']:.2%})" for one in others)
    if "true" in row:
        line += f"; it is {text.shortened(row['true'])}"
    return line
