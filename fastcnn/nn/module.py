"""Module: what every layer and every network is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from .._device import Device, assign, device, device_of, host, is_array
from .._grad_mode import is_grad_enabled
from .parameter import FLOATS, Parameter, consolidate, flat, runs


class LoadResult(NamedTuple):
    """What `Module.load_state_dict` found too little and too much."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class _Structure:
    """Counts the changes of any module's attributes, for those who remember what modules are like."""

    version = 0
    # One step for each change, also where two threads make one at once.
    _changes = itertools.count(1)

    @classmethod
    def change(cls) -> None:
        """Tell that a module was changed: afterwards, lest somebody takes what it was for what it is."""
        cls.version = next(cls._changes)


def structure_version() -> int:
    """A number that changes when any module gets, changes or loses an attribute other than `training`."""
    return _Structure.version


# Of one forward pass, or of one place in memory: not part of a copy or a pickle.
_OWN_ONLY = {"_saved": None, "_consolidated": ()}


def _converted(array: np.ndarray, dtype: np.dtype | None, on: Device | None) -> np.ndarray:
    """`array` in another dtype, or on another device."""
    place = device_of(array) if on is None else on
    return place.array(array if dtype is None else host(array).astype(dtype))


class Module:
    """Base class of layers and networks, with torch.nn.Module's names.

    A subclass calls ``super().__init__()``, assigns parameters and modules to attributes, and writes
    ``forward`` and ``backward(dout, input_grad=True)``. Backward adds to its parameters' gradients and
    returns the gradient of the input, or None where `input_grad` is False.

    Each backward pass uses up what the forward pass before it kept. A module that a hand-written forward
    calls twice must therefore be two modules; `Sequential` and `Residual` take care of repeated ones
    themselves. The input and the result may be part of what is kept: don't overwrite them before the backward
    pass. A layer's settings can be assigned at any time and count from its next forward pass on; what it kept
    of the last one is forgotten.
    """

    training: bool
    _parameters: dict[str, Parameter | None]
    _buffers: dict[str, np.ndarray | None]
    _modules: dict[str, Module | None]
    _not_saved: set[str]
    # How each setting of a layer is checked, and what is stored of it, whenever it is assigned: in the
    # constructor and later. A subclass lists its own, to which those of its bases are added.
    _setting_checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._setting_checks = dict(
            setting
            for base in reversed(cls.__mro__)
            for setting in vars(base).get("_setting_checks", {}).items()
        )

    def __init__(self) -> None:
        self.__dict__.update(
            training=True, _parameters={}, _buffers={}, _modules={}, _not_saved=set(), **_OWN_ONLY
        )

    # Attributes

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (Parameter, Module)):
            self._register(name, value)
            return
        if name in type(self)._setting_checks:
            value = type(self)._setting_checks[name](name, value)
            # A backward pass needs the settings of its forward pass.
            self.__dict__["_saved"] = None
        if name in (self.__dict__.get("_parameters") or ()):
            self._expect(name, value, "Parameter", isinstance(value, Parameter))
            self._parameters[name] = value
        elif name in (self.__dict__.get("_modules") or ()):
            self._expect(name, value, "Module", isinstance(value, Module))
            self._modules[name] = value
        elif name in (self.__dict__.get("_buffers") or ()):
            self._expect(name, value, "NumPy array", is_array(value))
            self._buffers[name] = value
        object.__setattr__(self, name, value)
        if name != "training":
            _Structure.change()

    @staticmethod
    def _expect(name: str, value: Any, kind: str, fits: bool) -> None:
        if value is not None and not fits:
            raise TypeError(f"{name}: expected a {kind} or None, got {type(value).__name__}")

    def _register(self, name: str, value: Parameter | Module) -> None:
        if "_parameters" not in self.__dict__:
            raise AttributeError(f"{name}: assigned before {type(self).__name__} called super().__init__()")
        target: dict[str, Any] = self._parameters if isinstance(value, Parameter) else self._modules
        for registry in (self._parameters, self._buffers, self._modules):
            if registry is not target:
                registry.pop(name, None)
        target[name] = value
        object.__setattr__(self, name, value)
        _Structure.change()

    def __delattr__(self, name: str) -> None:
        for registry in (self._parameters, self._buffers, self._modules):
            registry.pop(name, None)
        self._not_saved.discard(name)
        object.__delattr__(self, name)
        _Structure.change()

    def register_parameter(self, name: str, parameter: Parameter | None) -> None:
        """Make `parameter` an attribute; None keeps its place (a layer without bias)."""
        if parameter is None:
            self._parameters[name] = None
        setattr(self, name, parameter)

    def register_buffer(self, name: str, array: np.ndarray | None, persistent: bool = True) -> None:
        """Make `array` an attribute that is state but no parameter; in the state_dict if `persistent`."""
        if self.__dict__.get(name) is not None and name not in self._buffers:
            raise KeyError(f"name: attribute {name!r} already exists")
        self._buffers[name] = None
        setattr(self, name, array)
        (self._not_saved.discard if persistent else self._not_saved.add)(name)

    def add_module(self, name: str, module: Module | None) -> None:
        """Make `module` an attribute and a child."""
        if not isinstance(name, str) or not name or "." in name:
            raise KeyError(f"name: {name!r} must be a string without dots, and not empty")
        if hasattr(self, name) and name not in self._modules:
            raise KeyError(f"name: attribute {name!r} already exists")
        if module is None:
            self._modules[name] = None
        elif not isinstance(module, Module):
            raise TypeError(f"module: {type(module).__name__} is no Module")
        setattr(self, name, module)

    register_module = add_module

    # Running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no backward")

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the output for an input of `input_shape`, both without the axis of the batch."""
        raise NotImplementedError(f"{type(self).__name__} has no output_shape")

    def _keep(self, *values: Any) -> None:
        """Remember what backward needs; nothing inside ``no_grad()``."""
        self.__dict__["_saved"] = values if is_grad_enabled() else None

    def _kept(self) -> tuple:
        """What the last forward pass remembered."""
        saved = self.__dict__["_saved"]
        if saved is None:
            raise RuntimeError(
                f"{type(self).__name__}: backward needs a forward before it; each forward serves one "
                "backward, and none inside no_grad()"
            )
        return saved

    def _forget(self) -> None:
        """Let go of what forward remembered, so that its memory can be used again."""
        self.__dict__["_saved"] = None

    def _tape(self) -> list[tuple[Module, Any]]:
        """What this module and all below it remember of their last forward pass."""
        return [(module, module.__dict__["_saved"]) for module in self.modules()]

    # The tree

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """The modules one level below, each once, with their names."""
        seen = set()
        for name, module in self._modules.items():
            if module is not None and id(module) not in seen:
                seen.add(id(module))
                yield name, module

    def children(self) -> Iterator[Module]:
        """The modules one level below, each once."""
        for _, module in self.named_children():
            yield module

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, each once, with dotted names."""
        yield from self._walk(prefix, set())

    def _walk(self, prefix: str, seen: set[int]) -> Iterator[tuple[str, Module]]:
        if id(self) in seen:
            return
        seen.add(id(self))
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                yield from module._walk(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """This module and all below it, each once."""
        for _, module in self.named_modules():
            yield module

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Every parameter once, with its dotted name."""
        seen = set()
        for path, module in self.named_modules(prefix):
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield (f"{path}.{name}" if path else name), parameter

    def parameters(self) -> list[Parameter]:
        """Every parameter once; they are moved into one flat store if they are not yet in one."""
        parameters = tuple(parameter for _, parameter in self.named_parameters())
        # Only once for a list, lest two models that share layers take them from each other all the time.
        if parameters != self.__dict__["_consolidated"]:
            consolidate(parameters)
            self.__dict__["_consolidated"] = parameters
        return list(parameters)

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """Every buffer, such as running statistics, with its dotted name."""
        for path, module in self.named_modules(prefix):
            for name, array in module._buffers.items():
                if array is not None:
                    yield (f"{path}.{name}" if path else name), array

    def buffers(self) -> Iterator[np.ndarray]:
        """Every buffer, such as running statistics."""
        for _, array in self.named_buffers():
            yield array

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call `function` with every module below this one, and last with this one."""
        for module in self.children():
            module.apply(function)
        function(self)
        return self

    # Modes

    def train(self, mode: bool = True) -> Self:
        """Switch this module and all below it to training (dropout on, batch statistics in use)."""
        self.training = bool(mode)
        for module in self.children():
            module.train(mode)
        return self

    def eval(self) -> Self:
        """Switch this module and all below it to evaluation."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Train all parameters, or freeze them."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad = requires_grad
        return self

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        parameters = self.parameters()
        for first, last in runs(parameters):
            flat(parameters[first:last])[1].fill(0)

    def double(self) -> Self:
        """Convert parameters and buffers to float64."""
        return self._convert(np.dtype(np.float64))

    def float(self) -> Self:
        """Convert parameters and buffers to float32."""
        return self._convert(np.dtype(np.float32))

    def to(self, device_name: str) -> Self:
        """Move parameters, gradients and buffers to 'cuda' or back to 'cpu'.

        An optimiser of the parameters follows with its state. Counters, such as BatchNorm's of its batches,
        stay on the CPU, where layers read them.

        Raises
        ------
        ValueError
            If there is no device of this name.
        ImportError, RuntimeError
            If fastcnn[cuda] is not installed, or no CUDA device can be used.
        """
        return self._convert(on=device(device_name))

    def _convert(self, dtype: np.dtype | None = None, on: Device | None = None) -> Self:
        consolidate(self.parameters(), dtype, on)
        for module in self.modules():
            module._forget()
            for name, array in module._buffers.items():
                if array is not None and array.dtype in FLOATS:
                    setattr(module, name, _converted(array, dtype, on))
        return self

    # State

    def _entries(self) -> Iterator[tuple[str, Parameter | np.ndarray]]:
        """Every name of the state_dict with what it stands for, in PyTorch's order."""
        for name, parameter in self._parameters.items():
            if parameter is not None:
                yield name, parameter
        for name, array in self._buffers.items():
            if array is not None and name not in self._not_saved:
                yield name, array
        for name, module in self._modules.items():
            if module is not None:
                for below, entry in module._entries():
                    yield f"{name}.{below}", entry

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters and buffers, C-contiguous, under PyTorch's keys in PyTorch's shapes."""
        return {
            name: np.array(host(entry.data if isinstance(entry, Parameter) else entry), order="C")
            for name, entry in self._entries()
        }

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> LoadResult:
        """Copy values in from `state_dict`; nothing is changed unless everything fits.

        Parameters
        ----------
        state_dict : dict of arrays
            As `state_dict` returns it, or PyTorch's (tensors on the CPU).
        strict : bool
            Whether missing and unexpected keys are errors.

        Returns
        -------
        LoadResult
            ``missing_keys`` and ``unexpected_keys``.

        Raises
        ------
        TypeError
            If `state_dict` is no mapping.
        RuntimeError
            If keys are missing or unexpected, or shapes or dtypes don't fit; all of them are listed.
        """
        if not hasattr(state_dict, "keys"):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        entries = dict(self._entries())
        missing = [name for name in entries if name not in state_dict]
        unexpected = [name for name in state_dict if name not in entries]
        problems = []
        if strict and missing:
            problems.append("missing keys: " + ", ".join(missing))
        if strict and unexpected:
            problems.append("unexpected keys: " + ", ".join(map(str, unexpected)))
        values = {name: host(state_dict[name]) for name in entries if name in state_dict}
        for name, value in values.items():
            entry = entries[name]
            if value.shape != entry.shape:
                problems.append(f"{name}: shape {value.shape} is not the module's {entry.shape}")
            elif value.dtype.kind not in ("f" if entry.dtype.kind == "f" else "iu"):
                problems.append(f"{name}: dtype {value.dtype} does not fit the module's {entry.dtype}")
        if problems:
            raise RuntimeError(f"state_dict: does not fit {type(self).__name__}:\n  " + "\n  ".join(problems))
        for name, value in values.items():
            entry = entries[name]
            assign(entry.data if isinstance(entry, Parameter) else entry, value)
        return LoadResult(missing, unexpected)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | _OWN_ONLY

    # Printing

    def extra_repr(self) -> str:
        """What stands between the parentheses for a layer without children."""
        return ""

    def __repr__(self) -> str:
        lines = [f"({name}): " + repr(module).replace("\n", "\n  ") for name, module in self._modules.items()]
        extra = self.extra_repr()
        name = type(self).__name__
        if not lines:
            return f"{name}({extra})"
        return "\n  ".join([f"{name}(", *([extra] if extra else []), *lines]) + "\n)"
