"""What a checkpoint holds, and how it gets back into live objects: wholly or not at all."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import files
from .files import CheckpointError
from .history import History
from .state import pack, same, unpack

_FORMAT = "fastcnn checkpoint"
_VERSION = 1
_CONTENT = ("model", "optimizer", "scheduler", "generators")


@dataclass
class Checkpoint:
    """The state of a training run.

    Attributes
    ----------
    model : dict of arrays
        The model's ``state_dict()``.
    optimizer, scheduler : dict or None
        ``{"class": name, "state": state_dict()}``.
    generators : dict
        State of each random generator's bit generator, by the generator's name.
    epoch : int
        Number of completed epochs.
    step : int
        Number of steps so far.
    complete : bool
        Whether it was taken between two epochs. Only such a one can be resumed from bit for bit.
    history : History
    model_config : dict or None
        Arguments of ``fastcnn.models.create`` that build the model.
    normalize : JSON values or None
        How images were normalised.
    classes : tuple of str, or None
        Names of the classes.
    """

    model: Mapping[str, NDArray]
    optimizer: Mapping[str, Any] | None = None
    scheduler: Mapping[str, Any] | None = None
    generators: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    complete: bool = True
    history: History = field(default_factory=History)
    model_config: Mapping[str, Any] | None = None
    normalize: Any = None
    classes: tuple[str, ...] | None = None

    @classmethod
    def take(
        cls,
        model: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        generators: Mapping[str, np.random.Generator] | None = None,
        **rest: Any,
    ) -> Checkpoint:
        """The state of live objects; `rest` are the other attributes."""
        states = {name: g.bit_generator.state for name, g in (generators or {}).items()}
        return cls(model.state_dict(), _owned(optimizer), _owned(scheduler), states, **rest)

    def restore(
        self,
        model: Any,
        optimizer: Any = None,
        scheduler: Any = None,
        generators: Mapping[str, np.random.Generator] | None = None,
    ) -> None:
        """Put the state back into live objects of the same kinds, or into none of them.

        Raises
        ------
        CheckpointError
            If the checkpoint is of another model, optimiser, scheduler or set of generators, or lacks one of
            them. Nothing is changed.
        """
        _check_model(self.model, model.state_dict())
        states: list[tuple[Any, Any]] = [(model, self.model)]
        for name, live in (("optimizer", optimizer), ("scheduler", scheduler)):
            if live is not None:
                states.append((live, _state_for(name, getattr(self, name), live)))
        spare = _check_generators(self.generators, generators) if generators is not None else {}
        before = [(live, copy.deepcopy(live.state_dict())) for live, _ in states]
        try:
            for live, state in states:
                live.load_state_dict(copy.deepcopy(state))
                # What a loader fills in or casts is not what was saved.
                if not same(live.state_dict(), state):
                    raise ValueError(f"{type(live).__name__} did not take its state as it was saved")
        except BaseException as error:
            for live, state in before:
                live.load_state_dict(state)
            if isinstance(error, Exception):
                raise CheckpointError(f"checkpoint: does not fit ({error})") from error
            raise
        for name, state in spare.items():
            generators[name].bit_generator.state = state  # type: ignore[index]


def _owned(live: Any) -> dict[str, Any] | None:
    return None if live is None else {"class": type(live).__name__, "state": live.state_dict()}


def _check_model(saved: Mapping[str, NDArray], live: Mapping[str, NDArray]) -> None:
    for keys, text in ((live.keys() - saved.keys(), "lacks"), (saved.keys() - live.keys(), "has an extra")):
        if keys:
            raise CheckpointError(f"checkpoint: is of another model: it {text} {sorted(keys)[0]!r}")
    for key, array in live.items():
        kinds = [(np.shape(a), np.asarray(a).dtype.newbyteorder("=")) for a in (saved[key], array)]
        if kinds[0] != kinds[1]:
            (shape, dtype), (own_shape, own_dtype) = kinds
            raise CheckpointError(
                f"checkpoint: is of another model: {key!r} has shape {shape} and dtype {dtype}, "
                f"the model's has {own_shape} and {own_dtype}"
            )


def _state_for(name: str, saved: Mapping[str, Any] | None, live: Any) -> Any:
    if saved is None:
        raise CheckpointError(f"checkpoint: holds no {name}")
    if saved["class"] != type(live).__name__:
        raise CheckpointError(f"checkpoint: its {name} is {saved['class']}, not {type(live).__name__}")
    return saved["state"]


def _check_generators(
    saved: Mapping[str, Any], live: Mapping[str, np.random.Generator]
) -> dict[str, Mapping[str, Any]]:
    """The saved states, each tried on a spare bit generator of the live one's type."""
    if saved.keys() != live.keys():
        raise CheckpointError(
            f"checkpoint: its random generators are {sorted(saved)}, this run's are {sorted(live)}"
        )
    states = {}
    for name, generator in live.items():
        spare = type(generator.bit_generator)(0)
        try:
            spare.state = saved[name]
        except Exception as error:
            raise CheckpointError(f"checkpoint: generator {name!r} can't take its state ({error})") from error
        states[name] = spare.state
    return states


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint, *, overwrite: bool = False) -> None:
    """Write ``NAME.safetensors`` and ``NAME.json``.

    A crash or a full disk at any point leaves the older checkpoint of that name whole.

    Parameters
    ----------
    path : path
        ``NAME``, with or without one of the two endings.
    checkpoint : Checkpoint
    overwrite : bool
        Replace files of that name.

    Raises
    ------
    FileExistsError
        If there is a file of that name and `overwrite` is false.
    OSError
        If the files can't be written.
    TypeError
        If a state holds what neither JSON nor safetensors can.
    """
    if not overwrite and files.exists(path):
        raise FileExistsError(f"{files.base_path(path)}: a checkpoint of this name exists (see overwrite)")
    arrays: dict[str, NDArray] = {}
    content = {name: pack(getattr(checkpoint, name), name, arrays) for name in _CONTENT}
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
        "complete": checkpoint.complete,
        "model_config": pack(checkpoint.model_config, "model_config", arrays),
        "normalize": pack(checkpoint.normalize, "normalize", arrays),
        "classes": None if checkpoint.classes is None else list(checkpoint.classes),
        "history": checkpoint.history.to_dict(),
        **content,
    }
    files.write(path, header, arrays)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : path
        ``NAME``, with or without ``.safetensors`` or ``.json``.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, damaged, of another format or of a newer version.
    """
    header, arrays = files.read(path)
    try:
        return _from_header(header, arrays)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{files.pair(path)[1]}: is not a valid checkpoint ({error})") from error


def _from_header(header: Mapping[str, Any], arrays: Mapping[str, NDArray]) -> Checkpoint:
    if header.get("format") != _FORMAT:
        raise ValueError(f"format: expected {_FORMAT!r}, got {header.get('format')!r}")
    if header.get("version") != _VERSION:
        raise ValueError(f"version: expected {_VERSION}, got {header.get('version')!r}")
    for name in ("epoch", "step"):
        if type(header[name]) is not int or header[name] < 0:
            raise ValueError(f"{name}: expected a count, got {header[name]!r}")
    if not isinstance(header["complete"], bool):
        raise ValueError(f"complete: expected true or false, got {header['complete']!r}")
    history = History.from_dict(header["history"])
    if len(history) != header["epoch"]:
        raise ValueError(f"epoch: {header['epoch']} with a history of {len(history)} epochs")
    return Checkpoint(
        **{name: _checked(name, unpack(header[name], arrays)) for name in _CONTENT},
        epoch=header["epoch"],
        step=header["step"],
        complete=header["complete"],
        history=history,
        model_config=_dict_or_none("model_config", unpack(header["model_config"], arrays)),
        normalize=unpack(header["normalize"], arrays),
        classes=_class_names(header["classes"]),
    )


def _dict_or_none(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object or null, got {value!r}")
    return value


def _checked(name: str, value: Any) -> Any:
    """`value` as the attribute `name` of a Checkpoint; its inner state is for the live object to judge."""
    if name in ("model", "generators") and not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    if name == "model" and not all(isinstance(array, np.ndarray) for array in value.values()):
        raise ValueError("model: expected arrays only")
    whole = value is None or (
        isinstance(value, dict) and set(value) == {"class", "state"} and isinstance(value["class"], str)
    )
    if name in ("optimizer", "scheduler") and not whole:
        raise ValueError(f"{name}: expected its class and its state")
    return value


def _class_names(names: Sequence | None) -> tuple[str, ...] | None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"classes: expected a list of names, got {names!r}")
    return None if names is None else tuple(names)
