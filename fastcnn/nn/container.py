"""Sequential and Residual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, overload

import numpy as np

from .._device import device_of
from .._grad_mode import is_grad_enabled
from ._arrays import contiguous, floats, inverse, memory_order
from .activation import ReLU
from .fusion import Plan, Run, get_fusion, is_exactly
from .module import Module, structure_version
from .replay import Replay, layer_by_layer


def trainable(module: Module) -> bool:
    """Whether a backward pass through `module` has any gradient to compute but the input's."""
    return any(parameter.requires_grad for _, parameter in module.named_parameters())


class _Container(Module):
    """A module whose children run one after another, as `_order` has them.

    A child may come more than once: what it remembers of each call is put back before the backward pass of
    that call.
    """

    # Identities of children that share a module with another call, and the structure in which they do.
    _shared: tuple[int, set[int]]

    def _order(self) -> list[Module]:
        raise NotImplementedError

    def _repeated(self) -> set[int]:
        """Identities of children that share a module with another call; any module's change may add some."""
        version, repeated = self._shared
        if version != structure_version():
            version, order = structure_version(), self._order()
            calls = Counter(id(module) for child in order for module in child.modules())
            repeated = {
                id(child) for child in order if any(calls[id(module)] > 1 for module in child.modules())
            }
            self.__dict__["_shared"] = version, repeated
        return repeated

    def _changed(self) -> None:
        """Forget which children are repeated, and gather all parameters in one store."""
        self.__dict__["_shared"] = -1, set()
        self.parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Module) and "_shared" in self.__dict__:
            self._changed()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._changed()

    def _tape_of(self, child: Module) -> list | None:
        return child._tape() if is_grad_enabled() and id(child) in self._repeated() else None

    @staticmethod
    def _rewind(tape: list | None) -> None:
        for module, saved in tape or ():
            module.__dict__["_saved"] = saved


class Sequential(_Container):
    """Layers one after another.

    Parameters
    ----------
    *layers : Module, or one dict of them
        A dict (OrderedDict) gives the layers names instead of numbers.

    Notes
    -----
    Indices, slices, ``len``, ``append``, ``insert`` and ``extend`` work as in PyTorch. The constructor
    moves all parameters and gradients next to each other into two flat arrays.
    """

    def __init__(self, *layers: Any):
        super().__init__()
        self._plan = Plan()
        self._replay = Replay((Sequential, Residual))
        named: Iterable[tuple[str, Any]]
        if len(layers) == 1 and isinstance(layers[0], dict):
            named = layers[0].items()
        else:
            named = ((str(i), layer) for i, layer in enumerate(layers))
        for name, layer in named:
            if not isinstance(layer, Module):
                raise TypeError(f"layers: {name} is a {type(layer).__name__}, no Module")
            self.add_module(name, layer)
        self._changed()

    def _order(self) -> list[Module]:
        return [layer for layer in self._modules.values() if layer is not None]

    # torch.nn.Sequential's list interface

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._order())

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: Any) -> Module:
        if isinstance(index, slice):
            return Sequential(dict(list(self._modules.items())[index]))
        return self._order()[self._position(index)]

    def __setitem__(self, index: int, layer: Module) -> None:
        setattr(self, list(self._modules)[self._position(index)], layer)

    def __delitem__(self, index: int | slice) -> None:
        names = list(self._modules)
        doomed = names[index] if isinstance(index, slice) else [names[self._position(index)]]
        self._rebuild([layer for name, layer in self._modules.items() if name not in doomed])

    def _position(self, index: Any) -> int:
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
            raise TypeError(f"index: expected an int or a slice, got {index!r}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: {index} is out of range for {len(self)} layers")
        return int(index) % len(self)

    def _rebuild(self, layers: list[Any]) -> None:
        """Hold `layers`, numbered from 0."""
        for name in list(self._modules):
            delattr(self, name)
        del self.__dict__["_shared"]
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)
        self._changed()

    def append(self, layer: Module) -> Sequential:
        """Add a layer behind the last."""
        self.add_module(str(len(self)), layer)
        return self

    def extend(self, layers: Iterable[Module]) -> Sequential:
        """Add layers behind the last."""
        for layer in layers:
            self.append(layer)
        return self

    def insert(self, index: int, layer: Module) -> Sequential:
        """Add a layer before number `index`; all are numbered anew."""
        if not isinstance(layer, Module):
            raise TypeError(f"layer: {type(layer).__name__} is no Module")
        if not -len(self) <= index <= len(self):
            raise IndexError(f"index: {index} is out of range for {len(self)} layers")
        layers = self._order()
        layers.insert(index, layer)
        self._rebuild(layers)
        return self

    # Running

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape after the last layer of an input of `input_shape`, both without the batch's axis."""
        for layer in self:
            input_shape = layer.output_shape(input_shape)
        return tuple(input_shape)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_plan": Plan(), "_replay": Replay((Sequential, Residual))}

    def _runs(self, layers: list[Module]) -> list[tuple[int, int, Run | None]]:
        return self._plan.runs(layers, lambda layer: id(layer) in self._repeated())

    def forward(self, input: np.ndarray) -> Any:
        """Run the layers, first to last; some of them in one pass, see `set_fusion`.

        What is known of an input's shape from earlier calls is used again, see `replay`.
        """
        y = self._replay.forward(self, input)
        return layer_by_layer(self, input) if y is None else y

    def _run(self, input: np.ndarray) -> Any:
        # What is interrupted on the way must not be followed by a backward pass.
        self._forget()
        x: Any = input
        del input
        layers = self._order()
        kept = []
        runs = self._runs(layers)
        for first, _, run in runs:
            if run is None:
                x = layers[first](x)
                kept.append(self._tape_of(layers[first]))
            else:
                x, saved = run.forward(x)
                kept.append(saved)
        self._keep(layers, runs, kept)
        return x

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Run the layers' backward passes, last to first.

        Without `input_grad` it stops at the first layer with anything to train, whose input gradient is not
        computed either.
        """
        played = self._replay.backward(self, dout, input_grad)
        return self._run_backward(dout, input_grad) if played is None else played[0]

    def _run_backward(self, dout: np.ndarray, input_grad: bool) -> np.ndarray | None:
        layers, runs, kept = self._kept()
        kept = list(kept)
        stop = -1
        if not input_grad:
            stop = next((i for i, layer in enumerate(layers) if trainable(layer)), len(layers))
        grad: Any = dout
        del dout
        for first, last, run in reversed(runs):
            if last <= stop:
                for layer in layers[first:last]:
                    for module in layer.modules():
                        module._forget()
            elif run is None:
                self._rewind(kept.pop())
                grad = layers[first].backward(grad, input_grad=first > stop)
            else:
                grad = run.backward(grad, kept, first > stop)
            # Not before: a gradient of a wrong shape leaves everything as it was.
            self._forget()
        self._forget()
        return grad if input_grad else None


class Residual(_Container):
    """y = activation(body(x) + shortcut(x)), a skip connection.

    He et al., "Deep residual learning for image recognition" (2016), equations 1 and 2.

    Parameters
    ----------
    body : Module
    shortcut : Module, optional
        The identity where it is None; its output must have the shape of the body's.
    activation : Module, optional
    """

    body: Module
    shortcut: Module | None
    activation: Module | None

    def __init__(self, body: Module, shortcut: Module | None = None, activation: Module | None = None):
        super().__init__()
        for name, module in (("body", body), ("shortcut", shortcut), ("activation", activation)):
            if not isinstance(module, Module) and (module is not None or name == "body"):
                raise TypeError(f"{name}: {type(module).__name__} is no Module")
            self.add_module(name, module)
        self._changed()

    def _order(self) -> list[Module]:
        return [module for module in (self.body, self.shortcut, self.activation) if module is not None]

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the body's output, without the batch's axis."""
        return self.body.output_shape(input_shape)

    def forward(self, input: np.ndarray) -> np.ndarray:
        # A recorded pass has one memory for what a network keeps, which a second call would overwrite.
        return layer_by_layer(self, input) if self._repeated() else self._run(input)

    def _run(self, input: np.ndarray) -> np.ndarray:
        self._forget()
        input = floats("input", input)
        body = self.body(input)
        tapes = [self._tape_of(self.body)]
        if self.shortcut is None:
            skip = input
        else:
            skip = self.shortcut(input)
            tapes.append(self._tape_of(self.shortcut))
        if skip.shape != body.shape or skip.dtype != body.dtype:
            raise ValueError(
                f"shortcut: {skip.dtype} {skip.shape} is not the body's {body.dtype} {body.shape}"
            )
        if self.activation is None:
            y = _sum(body, skip)
        elif get_fusion() and is_exactly(self.activation, ReLU):
            y = _sum(body, skip, least=0)
            self.activation._keep_output(y)
            tapes.append(self._tape_of(self.activation))
        else:
            y = self.activation(_sum(body, skip))
            tapes.append(self._tape_of(self.activation))
        self._keep(tapes)
        return y

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray | None:
        """Add the gradients that come through the body and past it."""
        (tapes,) = self._kept()
        tapes = list(tapes)
        inner = input_grad or trainable(self.body) or (self.shortcut is not None and trainable(self.shortcut))
        if self.activation is not None:
            self._rewind(tapes.pop())
            dout = self.activation.backward(dout, input_grad=inner)
        if not inner:
            for module in self.modules():
                module._forget()
            return None
        skip = dout
        if self.shortcut is not None:
            self._rewind(tapes.pop())
            skip = self.shortcut.backward(dout, input_grad=input_grad)
        self._rewind(tapes.pop())
        body = self.body.backward(dout, input_grad=input_grad)
        self._forget()
        return _sum(body, skip) if input_grad else None


def _sum(a: np.ndarray, b: np.ndarray, least: float = -np.inf) -> np.ndarray:
    """max(a + b, least) in the order of a's memory."""
    order = memory_order(a)
    shape = a.transpose(order).shape
    on = device_of(a)
    total = on.empty(shape, a.dtype)
    on.add(contiguous(a.transpose(order)), contiguous(b.transpose(order)), total, least)
    return total.transpose(inverse(order))
