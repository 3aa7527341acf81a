"""What optimisers have in common: parameter groups, flat state, PyTorch's state_dict.

The kernels update flat arrays. A `_Segment` is a run of parameters that lie one after another in a model's
store; the optimiser's own arrays have the same gaps between parameters, so that one kernel call updates a
segment. For a whole model trained by one optimiser there is exactly one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .._device import Device, assign, device_of, host
from ..nn.parameter import Parameter, flat, layout_version, padded_size, runs


class _Segment(NamedTuple):
    first: int  # of the group's parameters
    last: int  # and last + 1
    data: np.ndarray  # flat views
    grad: np.ndarray
    state: dict[str, np.ndarray]


class _Flat:
    """The flat arrays of one group: state by name, and for each parameter how many updates it has had."""

    def __init__(self, parameters: list[Parameter]):
        self.parameters = parameters
        self.steps = [0] * len(parameters)
        self.state: dict[str, np.ndarray] = {}
        self.segments: list[_Segment] = []
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []
        self.version = -1

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters lie elsewhere.
        return self.__dict__ | {"segments": [], "runs": [], "version": -1}

    def offsets(self) -> list[int]:
        sizes = (padded_size(parameter.size, parameter.dtype) for parameter in self.parameters)
        return list(itertools.accumulate(sizes, initial=0))

    def refresh(self) -> None:
        """Find the parameters again if any has moved."""
        if self.version == layout_version():
            return
        dtype, on = self.parameters[0].dtype, self._device()
        if any(parameter.dtype != dtype for parameter in self.parameters):
            raise TypeError("params: float32 and float64 parameters need groups of their own")
        if any(device_of(parameter.memory) is not on for parameter in self.parameters):
            raise TypeError("params: parameters on several devices need groups of their own")
        for name, array in self.state.items():
            if array.dtype != dtype or device_of(array) is not on:
                self.state[name] = self._converted(array, dtype, on)
        self.runs = [flat(self.parameters[first:last]) for first, last in runs(self.parameters)]
        self.segments = self._segments()
        self.version = layout_version()

    def _device(self) -> Device:
        return device_of(self.parameters[0].memory)

    def _converted(self, array: np.ndarray, dtype: np.dtype, on: Device) -> np.ndarray:
        """State in another dtype, whose gaps have other sizes, or on another device."""
        old = [padded_size(parameter.size, array.dtype) for parameter in self.parameters]
        source, converted = host(array), np.zeros(self.offsets()[-1], dtype)
        starts = itertools.accumulate(old, initial=0)
        for parameter, start, offset in zip(self.parameters, starts, self.offsets(), strict=False):
            converted[offset : offset + parameter.size] = source[start : start + parameter.size]
        result = on.zeros(converted.size, dtype)
        assign(result, converted)
        return result

    def _segments(self) -> list[_Segment]:
        """Neighbours that are trained, and have had the same number of updates."""
        offsets = self.offsets()
        segments = []
        kinds = [
            (parameter.requires_grad, steps)
            for parameter, steps in zip(self.parameters, self.steps, strict=True)
        ]
        for begin, end in runs(self.parameters):
            for (trained, _), group in itertools.groupby(range(begin, end), kinds.__getitem__):
                if trained:
                    members = list(group)
                    first, last = members[0], members[-1] + 1
                    where = slice(offsets[first], offsets[last])
                    state = {name: array[where] for name, array in self.state.items()}
                    segments.append(_Segment(first, last, *flat(self.parameters[first:last]), state))
        return segments

    def need(self, names: Iterable[str]) -> None:
        """Have zeros for the state of each name that is new."""
        new = [name for name in names if name not in self.state]
        for name in new:
            self.state[name] = self._device().zeros(self.offsets()[-1], self.parameters[0].dtype)
        if new:
            self.version = -1

    def view(self, name: str, i: int) -> np.ndarray:
        """State of parameter number `i` in PyTorch's shape."""
        parameter = self.parameters[i]
        offset = self.offsets()[i]
        memory = self.state[name][offset : offset + parameter.size].reshape(parameter.memory.shape)
        return parameter.as_shown(memory)


class Optimizer:
    """Base class of optimisers, with torch.optim.Optimizer's interface.

    `param_groups` is a list of dicts with 'params' and the hyper-parameters, which may be changed between
    steps. Frozen parameters (``requires_grad`` False) are left as they are. Unlike PyTorch's, a gradient
    always exists: a parameter that took no part in a step has a gradient of zero, and momentum or weight
    decay still move it.
    """

    param_groups: list[dict[str, Any]]
    # Names in PyTorch's state_dict.
    _state_names: tuple[str, ...] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]):
        if isinstance(params, (Parameter, np.ndarray, Mapping)):
            raise TypeError(f"params: expected a list of Parameters or of dicts, got {type(params).__name__}")
        groups = list(params)
        if not groups:
            raise ValueError("params: the list is empty")
        if not isinstance(groups[0], Mapping):
            groups = [{"params": groups}]
        self.defaults = defaults
        self.param_groups = []
        self._flats: list[_Flat] = []
        for group in groups:
            self.add_param_group(group)

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters with hyper-parameters of their own; what `group` leaves out is taken from the
        defaults.

        Raises
        ------
        TypeError, ValueError
            If a parameter is no Parameter, is in the optimiser already, or a hyper-parameter is out of its
            range.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f"params: expected a dict with 'params', got {group!r}")
        params = group["params"]
        params = [params] if isinstance(params, Parameter) else list(params)
        known = {id(parameter) for other in self.param_groups for parameter in other["params"]}
        for parameter in params:
            if not isinstance(parameter, Parameter):
                raise TypeError(f"params: expected Parameters, got {type(parameter).__name__}")
            if id(parameter) in known:
                raise ValueError(f"params: a parameter of shape {parameter.shape} is there twice")
            known.add(id(parameter))
        if not params:
            raise ValueError("params: the list is empty")
        complete = {**self.defaults, **group, "params": params}
        self._check(complete)
        flat_group = _Flat(params)
        flat_group.refresh()
        self.param_groups.append(complete)
        self._flats.append(flat_group)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise a ValueError if a hyper-parameter is out of its range."""
        raise NotImplementedError

    def _needed(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The state that a group has, by name."""
        return self._state_names

    def _update(
        self, group: dict[str, Any], segment: _Segment, grad: np.ndarray, step: int, zero_grad: bool
    ) -> None:
        """Update `segment` in place; `step` counts its updates from 1."""
        raise NotImplementedError

    def step(self, *, zero_grad: bool = False) -> None:
        """Update every trained parameter from its gradient.

        With `zero_grad` the gradients are set to zero on the way, which saves a pass over them.
        """
        for group, flat_group in zip(self.param_groups, self._flats, strict=True):
            needed = self._needed(group)
            flat_group.need(needed)
            flat_group.refresh()
            for segment in flat_group.segments:
                step = flat_group.steps[segment.first] + 1
                grad = segment.grad
                if group.get("maximize"):
                    on = device_of(grad)
                    grad = on.empty(grad.shape, grad.dtype)
                    on.multiply(segment.grad, -1.0, grad)
                self._update(group, segment, grad, step, zero_grad and grad is segment.grad)
                if zero_grad and grad is not segment.grad:
                    segment.grad.fill(0)
                # Without state there is nothing to count: PyTorch's momentum starts when its buffer does.
                if needed:
                    count = segment.last - segment.first
                    flat_group.steps[segment.first : segment.last] = [step] * count

    def zero_grad(self) -> None:
        """Set every gradient to zero, those of frozen parameters too."""
        for flat_group in self._flats:
            flat_group.refresh()
            for _, grad in flat_group.runs:
                grad.fill(0)

    # State

    def _saved_state(self, flat_group: _Flat, i: int, group: dict[str, Any]) -> dict[str, Any]:
        """What PyTorch keeps of parameter number `i` of a group after its first update."""
        return {
            name: np.array(host(flat_group.view(name, i)), order="C")
            for name in self._needed(group)
            if name in flat_group.state
        }

    def state_dict(self) -> dict[str, Any]:
        """State and hyper-parameters in the form of PyTorch's: parameters are numbered over all groups."""
        state = {}
        groups = []
        number = 0
        for group, flat_group in zip(self.param_groups, self._flats, strict=True):
            flat_group.refresh()
            for i, steps in enumerate(flat_group.steps):
                if steps and (saved := self._saved_state(flat_group, i, group)):
                    state[number + i] = saved
            numbers = list(range(number, number + len(flat_group.steps)))
            groups.append({name: value for name, value in group.items() if name != "params"})
            groups[-1]["params"] = numbers
            number += len(numbers)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take state and hyper-parameters from `state_dict`; nothing is changed unless everything fits.

        Raises
        ------
        ValueError
            If it is no optimiser's, the groups have other sizes, an array another shape, or a hyper-parameter
            is out of its range.
        """
        for name in ("param_groups", "state"):
            if name not in state_dict:
                raise ValueError(f"state_dict: has no {name!r}")
        groups, state = state_dict["param_groups"], state_dict["state"]
        sizes = [len(flat_group.parameters) for flat_group in self._flats]
        loaded_sizes = [len(group["params"]) for group in groups]
        if loaded_sizes != sizes:
            raise ValueError(
                f"state_dict: groups of {loaded_sizes} parameters are not the optimiser's {sizes}"
            )
        merged = []
        for group, own in zip(groups, self.param_groups, strict=True):
            merged.append({**own, **group, "params": own["params"]})
            if isinstance(merged[-1].get("betas"), list):
                merged[-1]["betas"] = tuple(merged[-1]["betas"])
            self._check(merged[-1])
        saved = [[state.get(number, {}) for number in group["params"]] for group in groups]
        self._check_state(saved)
        self.param_groups = merged
        for flat_group, group, entries in zip(self._flats, merged, saved, strict=True):
            self._load_group(flat_group, self._needed(group), entries)

    def _check_state(self, saved: list[list[Mapping[str, Any]]]) -> None:
        for flat_group, entries in zip(self._flats, saved, strict=True):
            for parameter, entry in zip(flat_group.parameters, entries, strict=True):
                for name in self._state_names:
                    if entry.get(name) is not None and np.shape(entry[name]) != parameter.shape:
                        raise ValueError(
                            f"state_dict: {name} of shape {np.shape(entry[name])} is not the parameter's "
                            f"{parameter.shape}"
                        )

    def _load_group(
        self, flat_group: _Flat, names: tuple[str, ...], entries: list[Mapping[str, Any]]
    ) -> None:
        flat_group.state = {}
        flat_group.need(names)
        flat_group.version = -1
        for i, entry in enumerate(entries):
            flat_group.steps[i] = self._loaded_steps(entry)
            for name in names:
                if entry.get(name) is not None:
                    assign(flat_group.view(name, i), host(entry[name]))

    def _loaded_steps(self, entry: Mapping[str, Any]) -> int:
        """How many updates a parameter with this state has had."""
        return int(entry.get("step", 0))

    def __repr__(self) -> str:
        lines = [type(self).__name__ + " ("]
        for i, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {i}")
            lines.extend(f"    {name}: {group[name]}" for name in sorted(group) if name != "params")
        return "\n".join([*lines, ")"])


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a ValueError unless low <= value < high."""
    if not low <= value < high:
        rule = f"not between {low} and {high}" if math.isfinite(high) else f"below {low}, or not finite"
        raise ValueError(f"{name}: {value} is {rule}")
