"""``fastcnn data``: list, info, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import text
from .options import Json, SplitName
from .output import Output, guarded
from .waiting import downloads

data = typer.Typer(help="Look at data sets, and convert them.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME|PATH", help="A data set's name, or a path.")]


@data.command("list")
@guarded
def list_names(json: Json = False) -> None:
    """List the data sets that can be named, and where they are."""
    from fastcnn.data import find, info, names

    out = Output(json)
    entries = []
    for name in names():
        entry, place = info(name), find(name)
        entries.append(
            {
                "name": name,
                "title": entry.title,
                "input_shape": list(entry.input_shape),
                "train": entry.train,
                "test": entry.test,
                "augmentation": entry.augmentation,
                "licence": entry.licence,
                "homepage": entry.homepage,
                "path": None if place is None else str(place),
            }
        )
    out.say(text.table([["name", "train", "test", "size", "where", "what"], *map(_row, entries)], "<>>><"))
    out.result({"datasets": entries})


def _row(entry: dict[str, Any]) -> list[object]:
    where = "here" if entry["path"] else "not here yet"
    if entry["name"] == "digits":
        where = "built in"
    size = "x".join(map(str, entry["input_shape"]))
    return [entry["name"], f"{entry['train']:,}", f"{entry['test']:,}", size, where, entry["title"]]


@data.command("info")
@guarded
def show(
    name: Name = "digits",
    split: Annotated[SplitName, typer.Option(help="Part of the data set.")] = SplitName.all,
    json: Json = False,
) -> None:
    """Describe a data set: sizes, classes, mean and deviation, files that can't be read."""
    from fastcnn.data import load

    out = Output(json)
    with downloads(out) as progress:
        summary = load(name, split.value, progress=progress).summary()
    channels, height, width = summary["input_shape"]
    out.say(f"{summary['name']}: {summary['images']:,} images, {split.value} part")
    out.say(f"size       {width} x {height} pixels, {text.counted(channels, 'channel')}, {summary['dtype']}")
    for what in ("mean", "std"):
        out.say(f"{what:<10} " + ", ".join(f"{value:.4f}" for value in summary[what]) + " of 1")
    rows: list[list[object]] = [["class", "images"]]
    rows += [[text.shortened(name), f"{count:,}"] for name, count in summary["classes"].items()]
    out.say("\n" + text.table(rows, "<>"))
    _say_skipped(out, summary["skipped"])
    out.result(summary)


@data.command()
@guarded
def convert(
    source: Name,
    destination: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="N|HxW", help="Resize to N x N, or to H x W, pixels.", show_default=False),
    ] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Write one channel.")] = False,
    rgb: Annotated[bool, typer.Option("--rgb", help="Write three channels.")] = False,
    split: Annotated[SplitName, typer.Option(help="Part to write.")] = SplitName.all,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: Json = False,
) -> None:
    """Write images as a compressed NPZ file, x (N, C, H, W) float32 in [0, 1] and y (N,) int64.

    Files that can't be read are left out, counted and named.
    """
    from fastcnn.data import convert as convert_data

    if grey and rgb:
        raise typer.BadParameter("--grey and --rgb exclude each other")
    out = Output(json)
    mode = "grey" if grey else "rgb" if rgb else None
    with downloads(out) as progress:
        summary = convert_data(
            source,
            destination,
            size=_pixels(size),
            mode=mode,
            split=split.value,
            overwrite=overwrite,
            progress=progress,
        ).summary()
    parts = ", ".join(f"{count:,} {part}" for part, count in summary["images"].items())
    shape = "x".join(map(str, summary["input_shape"]))
    _say_skipped(out, summary["skipped"])
    out.say(
        f"{summary['destination']}: {parts} images of {shape} in {len(summary['classes'])} classes, "
        f"{text.size(summary['file_bytes'])}"
    )
    out.result(summary)


def _pixels(size: str | None) -> int | tuple[int, int] | None:
    if size is None:
        return None
    words = size.lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{size!r} is neither N nor HxW", param_hint="--size")
    numbers = [int(word) for word in words]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _say_skipped(out: Output, skipped: list[dict[str, str]]) -> None:
    if skipped:
        out.say(f"{text.counted(len(skipped), 'file')} left out:")
    for entry in skipped:
        out.say(f"  {entry['path']}: {entry['reason']}")
