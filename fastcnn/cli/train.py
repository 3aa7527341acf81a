"""``fastcnn train``."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import text
from .options import Json, Threads, use_threads
from .output import CommandError, Interrupted, Output, command_line, guarded
from .text import counted
from .waiting import compile_first, downloads

if TYPE_CHECKING:
    from .run import Datasets, Run, Settings

_DEFAULT_EPOCHS = 15


class OptimizerName(StrEnum):
    adam = "adam"
    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(StrEnum):
    cosine = "cosine"
    step = "step"
    none = "none"


class DeviceName(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class AugmentName(StrEnum):
    light = "light"
    digits = "digits"
    none = "none"


@guarded
def train(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="A data set's name (see fastcnn data list), or a path.")
    ] = "digits",
    model: Annotated[str, typer.Option(metavar="NAME", help="The network: see fastcnn info.")] = "emotion",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = _DEFAULT_EPOCHS,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a training step.")] = 64,
    lr: Annotated[
        float | None,
        typer.Option(help="Largest learning rate. [default: 0.001, 0.05 with sgd]", show_default=False),
    ] = None,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="How gradients become steps.")
    ] = OptimizerName.adam,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Pull of the weights to zero. [default: 0, 0.01 with adamw, 0.0005 with sgd]",
            show_default=False,
        ),
    ] = None,
    schedule: Annotated[
        ScheduleName,
        typer.Option(help="Learning rate: a climb and a cosine, a tenth after each third, or constant."),
    ] = ScheduleName.cosine,
    augment: Annotated[
        AugmentName | None,
        typer.Option(
            help="Changes to training images. [default: what suits the data set; none for a path]",
            show_default=False,
        ),
    ] = None,
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=1, help="Share of each label given to all classes.")
    ] = 0.0,
    validation: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of the training images held back to choose the best epoch by, where the data set "
            "has no such part of its own.",
        ),
    ] = 0.0,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many epochs without a better one.")
    ] = None,
    limit_train: Annotated[
        int | None, typer.Option(min=1, help="Train on this many images only.", metavar="N")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Start of all random numbers.")] = 0,
    device: Annotated[
        DeviceName, typer.Option(help="What computes: the CPU, or a CUDA device (needs fastcnn[cuda]).")
    ] = DeviceName.cpu,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run. [default: a new one, runs/DATA-MODEL]", show_default=False, metavar="DIR"
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or else the newest under runs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    json: Json = False,
) -> None:
    """Train a network, and keep the best epoch.

    Without any option this trains the emotion diary's network on the digits that come with fastcnn. Ctrl-C
    ends a run and keeps it: --resume continues it, bit for bit.
    """
    from .run import Settings

    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite exclude each other")
    if overwrite and out is None:
        raise typer.BadParameter("--overwrite needs --out; without it each run gets a new folder")
    given = {name: value for name, value in context.params.items() if name in Settings.__dataclass_fields__}
    given = {name: str(value) if isinstance(value, StrEnum) else value for name, value in given.items()}
    asked = {name: given[name] for name in given if _is_explicit(context, name)}
    output = Output(json)
    used = use_threads(threads)
    folder = out
    if resume:
        folder, settings = _take_up(out, asked)
    else:
        _check_folder(out, overwrite)
        settings = Settings(**given).resolved()
    _train(output, settings, folder, used, resume, overwrite)


def _is_explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _take_up(out: Path | None, asked: dict[str, Any]) -> tuple[Path, Settings]:
    from .run import changed, newest_folder, read_settings

    folder = newest_folder() if out is None else out
    return folder, changed(read_settings(folder), asked)


def _check_folder(out: Path | None, overwrite: bool) -> None:
    """Refuse a folder with something in it before any work is done."""
    if out is None or overwrite:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(
            f"{out}: exists already; --overwrite replaces the run in it, --resume continues it, "
            "or choose another"
        )


def _train(
    out: Output, settings: Settings, folder: Path | None, threads: int, resume: bool, overwrite: bool
) -> None:
    from .progress import TrainingProgress
    from .run import build, check_device, free_folder, load_datasets, write_settings

    check_device(settings.device)
    with downloads(out) as progress:
        parts = load_datasets(settings, progress)
    run = build(settings, parts, [TrainingProgress(out, settings.epochs)])
    _announce(out, settings, parts, run, threads)
    if settings.device == "cpu":
        compile_first(
            out,
            run.trainer.model,
            parts.train.input_shape,
            parts.train.num_classes,
            optimizer=type(run.trainer.optimizer).__name__,
            augment=settings.augment != "none",
            image_dtype=str(parts.train.images.dtype),
        )
    if folder is None:
        folder, taken = free_folder(settings)
        if taken:
            out.say(f"{taken} holds an earlier run; this one goes to {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, settings)
    run.trainer.run_dir = folder
    seconds = _fit(out, run, settings, folder, resume, overwrite)
    _report(out, run, settings, folder, seconds)


def _announce(out: Output, settings: Settings, parts: Datasets, run: Run, threads: int) -> None:
    channels, height, width = parts.train.input_shape
    weights = sum(parameter.data.size for parameter in run.trainer.model.parameters())
    held = f", {len(parts.validation):,} to choose the epoch" if parts.validation else ""
    out.say(
        f"Data {settings.data}: {len(parts.train):,} images to train on{held}, {len(parts.test):,} to test; "
        f"{channels}x{height}x{width}, {parts.train.num_classes} classes, augmentation {settings.augment}"
    )
    out.say(
        f"Network {settings.model}: {weights:,} parameters; {settings.optimizer}, learning rate "
        f"{settings.lr:g} ({settings.schedule}), batches of {settings.batch_size}, "
        f"{counted(threads, 'thread') if settings.device == 'cpu' else 'on the CUDA device'}"
    )


def _fit(out: Output, run: Run, settings: Settings, folder: Path, resume: bool, overwrite: bool) -> float:
    """Train, and return the seconds it took."""
    from fastcnn.train import NonFiniteLossError

    started = time.perf_counter()
    try:
        history = run.trainer.fit(
            run.train,
            run.validation,
            epochs=settings.epochs,
            patience=settings.patience,
            resume=resume,
            overwrite=overwrite,
        )
    except NonFiniteLossError as error:
        raise CommandError(
            f"{error}. A smaller --lr may help; {folder} keeps the run up to its last whole epoch"
        ) from None
    if history.interrupted:
        again = command_line("train", "--resume", "--out", str(folder))
        raise Interrupted(
            f"{len(history)} of {settings.epochs} epochs are done and saved in {folder}. "
            f"Continue with: {again}",
            {"interrupted": True, "run": str(folder), "epochs": len(history), "resume": again},
        )
    if history.stopped_early:
        out.say(f"Stopped early: no better epoch for {counted(settings.patience or 0, 'epoch')}.")
    return time.perf_counter() - started


def _report(out: Output, run: Run, settings: Settings, folder: Path, seconds: float) -> None:
    """Test the best epoch, and tell where everything is."""
    from .run import load_best, write_metrics

    epoch = load_best(run, folder)
    judged = "" if run.validation is not None else " (by training loss)"
    metrics = run.trainer.evaluate(run.test)
    write_metrics(folder, metrics)
    out.say(f"\nTrained in {seconds:.1f} s. The best epoch, {epoch}{judged}, on the test images:\n")
    out.say(text.metrics(metrics))
    example = ["--data", settings.data, "--index", "0"]
    predict = command_line("predict", str(folder), *example)
    out.say(f"\nSaved in {folder}. Use it on pictures, or on a test image:\n  {predict}")
    out.result(
        {
            "run": str(folder),
            "checkpoint": str(folder / "best.safetensors"),
            "settings": asdict(settings),
            "epochs": len(run.trainer.history),
            "best_epoch": epoch,
            "seconds": seconds,
            "history": list(run.trainer.history.rows()),
            "test": metrics.to_dict() | {"classes": list(metrics.classes)},
            "predict": predict,
        }
    )
