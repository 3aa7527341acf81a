"""A training run: its settings, its folder, and the objects that carry it out."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastcnn
from fastcnn import data, models, optim
from fastcnn.nn import CrossEntropyLoss
from fastcnn.train import Callback, Metrics, Trainer, load_checkpoint

from .output import CommandError, to_json

SETTINGS_FILE = "run.json"
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}
# Batches of validation and test images, which need no memory for gradients.
EVALUATION_BATCH = 256

_LEARNING_RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05}
_WEIGHT_DECAYS = {"adam": 0.0, "adamw": 0.01, "sgd": 5e-4}
_MOMENTUM = 0.9
# Share of the steps in which the cosine schedule climbs to the learning rate.
_CLIMB = 0.05


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run; the number of threads does not."""

    data: str
    model: str
    epochs: int
    batch_size: int
    lr: float | None
    optimizer: str
    weight_decay: float | None
    schedule: str
    augment: str | None
    label_smoothing: float
    validation: float
    patience: int | None
    limit_train: int | None
    seed: int
    device: str = "cpu"

    def resolved(self) -> Settings:
        """The same with a value wherever one was left to be chosen."""
        return replace(
            self,
            lr=_LEARNING_RATES[self.optimizer] if self.lr is None else self.lr,
            weight_decay=(_WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay),
            augment=default_augmentation(self.data) if self.augment is None else self.augment,
        )


def check_device(name: str) -> None:
    """Refuse a device that can't be used.

    Raises
    ------
    CommandError
        If that is so, saying why.
    """
    from fastcnn._device import device

    try:
        device(name)
    except (ImportError, RuntimeError) as error:
        raise CommandError(f"--device {name}: {error}") from None


def default_augmentation(name: str) -> str:
    """The preset that suits a data set; none for data at a path, which may be anything."""
    return data.info(name).augmentation if name in data.names() else "none"


def free_folder(settings: Settings) -> tuple[Path, Path | None]:
    """Make a new folder ``runs/DATA-MODEL``, with a number behind it if that one is taken.

    Returns
    -------
    folder, taken
        The folder, and the one that was there already, if any.
    """
    source = settings.data if settings.data in data.names() else Path(settings.data).resolve().stem
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{source}-{settings.model}").strip("-.")
    first = folder = Path("runs") / base
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder, None if folder == first else first
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{base}-{number}")


def newest_folder() -> Path:
    """The run that was written to last, for ``--resume`` without ``--out``.

    Raises
    ------
    CommandError
        If there is none.
    """
    found = [path for path in Path("runs").glob(f"*/{SETTINGS_FILE}") if path.is_file()]
    if not found:
        raise CommandError("there is no run to resume under runs; name its folder with --out")
    return max(found, key=_last_written).parent


def _last_written(settings: Path) -> float:
    checkpoint = settings.with_name("last.json")
    return (checkpoint if checkpoint.exists() else settings).stat().st_mtime


def write_settings(folder: Path, settings: Settings) -> None:
    """Note the settings in the run's folder; data at a path so that they are found from anywhere."""
    settings = replace(settings, data=absolute(settings.data))
    _write(folder / SETTINGS_FILE, {"fastcnn": fastcnn.__version__, "settings": asdict(settings)})


def absolute(name: str) -> str:
    """A data set's name as it is, a path as an absolute one."""
    return name if name in data.names() else str(Path(name).expanduser().resolve())


def _write(path: Path, content: Any) -> None:
    """Write JSON under another name and rename it, so that an older file is replaced whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(to_json(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_settings(folder: Path) -> Settings:
    """The settings of the run in `folder`.

    Raises
    ------
    CommandError
        If there is none, or its file is damaged.
    """
    path = folder / SETTINGS_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**content["settings"])
    except FileNotFoundError:
        raise CommandError(f"{folder}: holds no run to resume ({SETTINGS_FILE} is missing)") from None
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{path}: is damaged ({error})") from None
    if settings.optimizer not in OPTIMIZERS:
        raise CommandError(f"{path}: is damaged (optimizer {settings.optimizer!r})")
    return settings


def changed(before: Settings, asked: dict[str, Any]) -> Settings:
    """The settings of a run to resume, with what the command line asks for anew.

    Only the number of epochs and the patience can change, and the epochs only where the schedule does not
    depend on them: everything else would make it another run.

    Raises
    ------
    CommandError
        If something else is asked to change.
    """
    names = {field.name for field in fields(Settings)}
    for name, value in asked.items():
        if name == "data":
            value = absolute(value)
        if name not in names or value == getattr(before, name):
            continue
        option = "--" + name.replace("_", "-")
        if name not in ("epochs", "patience"):
            raise CommandError(
                f"{option} {value}: the run to resume was started with {getattr(before, name)}, and keeps it"
            )
        if name == "epochs" and before.schedule != "none":
            raise CommandError(
                f"--epochs {value}: the run's {before.schedule} schedule is laid out for {before.epochs}"
            )
        before = replace(before, **{name: value})
    return before


@dataclass(frozen=True)
class Datasets:
    """The three parts of the data."""

    train: data.Dataset
    validation: data.Dataset | None
    test: data.Dataset


def load_datasets(settings: Settings, progress: Any = None) -> Datasets:
    """The images to train on, to choose the best epoch by, and to report on.

    The validation part is the data's own, or else a share of the training images.

    Raises
    ------
    ValueError
        If data are missing, damaged or too few.
    """
    train = data.load(settings.data, "train", progress=progress)
    test = _like(train, data.load(settings.data, "test", progress=progress), "test")
    validation = None
    with contextlib.suppress(data.MissingDataError):
        validation = _like(train, data.load(settings.data, "validation"), "validation")
    if validation is None and settings.validation > 0:
        validation, train = train.split(settings.validation, settings.seed)
    if settings.limit_train is not None and settings.limit_train < len(train):
        train = train.split(settings.limit_train / len(train), settings.seed)[0]
    return Datasets(train, validation, test)


def _like(train: data.Dataset, part: data.Dataset, name: str) -> data.Dataset:
    """`part` with the classes of the training images, of which it may lack the last ones."""
    if part.input_shape != train.input_shape:
        raise CommandError(
            f"{train.name}: its training images are {train.input_shape}, its {name} images {part.input_shape}"
        )
    if part.classes != train.classes[: part.num_classes]:
        raise CommandError(f"{train.name}: its training and its {name} images have different classes")
    return replace(part, classes=train.classes)


@dataclass(frozen=True)
class Run:
    """Everything that trains."""

    trainer: Trainer
    train: data.Loader
    validation: data.Loader | None
    test: data.Loader


def build(settings: Settings, parts: Datasets, callbacks: Iterable[Callback] = ()) -> Run:
    """Make the network, the optimiser, the schedule and the loaders, all seeded.

    Raises
    ------
    ValueError
        If the network does not fit the images, or a setting is out of range.
    """
    fastcnn.manual_seed(settings.seed)
    normalize = parts.train.mean_std()
    model = models.create(
        settings.model, parts.train.input_shape, parts.train.num_classes, seed=settings.seed
    )
    train = data.Loader(
        parts.train,
        settings.batch_size,
        augment=settings.augment,
        rng=np.random.default_rng([settings.seed, 1]),
        normalize=normalize,
        device=settings.device,
    )
    model.to(settings.device)
    validation, test = (
        None if part is None else evaluation_loader(part, normalize, settings.device)
        for part in (parts.validation, parts.test)
    )
    assert test is not None
    optimizer = _optimizer(settings, model)
    trainer = Trainer(
        model,
        optimizer,
        CrossEntropyLoss(label_smoothing=settings.label_smoothing),
        scheduler=_scheduler(settings, optimizer, len(train)),
        callbacks=callbacks,
        classes=parts.train.classes,
        normalize={"mean": normalize[0], "std": normalize[1]},
        model_config=model.config,  # type: ignore[attr-defined]
    )
    return Run(trainer, train, validation, test)


def evaluation_loader(dataset: data.Dataset, normalize: tuple[Any, Any], device: str = "cpu") -> data.Loader:
    """Batches in order, unchanged."""
    return data.Loader(dataset, EVALUATION_BATCH, shuffle=False, normalize=normalize, device=device)


def _optimizer(settings: Settings, model: Any) -> optim.Optimizer:
    kind = getattr(optim, OPTIMIZERS[settings.optimizer])
    extra = {"momentum": _MOMENTUM, "nesterov": True} if settings.optimizer == "sgd" else {}
    return kind(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **extra)


def _scheduler(settings: Settings, optimizer: optim.Optimizer, steps: int) -> Any:
    if settings.schedule == "cosine":
        total = settings.epochs * steps
        return optim.lr_scheduler.CosineWarmupLR(optimizer, total, int(_CLIMB * total))
    if settings.schedule == "step":
        return optim.lr_scheduler.StepLR(optimizer, max(1, settings.epochs // 3))
    return None


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Keep the test's result beside the checkpoints."""
    _write(folder / "metrics.json", metrics.to_dict() | {"classes": list(metrics.classes)})


def load_best(run: Run, folder: Path) -> int | None:
    """Put the best epoch's parameters into the network; its number, None if no epoch was completed."""
    if len(run.trainer.history) == 0:
        return None
    best = load_checkpoint(folder / "best")
    best.restore(run.trainer.model)
    return best.epoch
