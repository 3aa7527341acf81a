"""Where NaN or infinity comes from: a batch run again, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._device import device_of, host
from ..nn import Parameter, Sequential
from ..nn.parameter import flat, runs


class NonFiniteLossError(ArithmeticError):
    """The loss or a gradient became NaN or infinite.

    Attributes
    ----------
    loss : float
        The loss of the batch.
    epoch, step, batch : int
        Counted from 1; 0 where a batch belongs to no epoch or step.
    layer : str or None
        Name of the first layer whose output, parameter or gradient is not finite.
    what : str
        What of that layer is not finite.
    """

    def __init__(self, loss: float, epoch: int, step: int, batch: int, culprit: Culprit):
        where = f"step {step} (epoch {epoch}, batch {batch})" if step else f"batch {batch} of an evaluation"
        happened = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        super().__init__(f"{where}: {happened}; first not finite: {culprit.text()}")
        self.loss, self.epoch, self.step, self.batch = loss, epoch, step, batch
        self.layer, self.what = culprit.layer, culprit.what


class Culprit(NamedTuple):
    """The first thing that is not finite."""

    layer: str | None
    kind: str
    what: str

    def text(self) -> str:
        """The finding in words."""
        if self.layer is None:
            return self.what
        return f"{self.what} of " + (f"layer {self.layer!r} ({self.kind})" if self.layer else self.kind)


def gradients_finite(parameters: Sequence[Parameter]) -> bool:
    """Whether no gradient holds NaN or infinity."""
    grads = [flat(parameters[first:last])[1] for first, last in runs(parameters)]
    return all(device_of(grad).is_finite(grad) for grad in grads)


def _leaves(name: str, module: Any) -> Iterator[tuple[str, Any]]:
    """The layers in the order in which they run; what is no Sequential counts as one layer."""
    if not isinstance(module, Sequential):
        yield name, module
        return
    names = {id(child): child_name for child_name, child in module.named_children()}
    for child in module:
        child_name = names[id(child)]
        yield from _leaves(f"{name}.{child_name}" if name else child_name, child)


def _finite(array: NDArray) -> bool:
    return bool(np.isfinite(host(array)).all())


def _in_forward(layers: list[tuple[str, Any]], x: NDArray) -> tuple[Culprit | None, NDArray]:
    if not _finite(x):
        return Culprit(None, "", "the images of the batch"), x
    for name, layer in layers:
        kind = type(layer).__name__
        for key, parameter in layer.named_parameters():
            if not _finite(parameter.data):
                return Culprit(name, kind, f"parameter {key!r}"), x
        x = layer(x)
        if not _finite(x):
            return Culprit(name, kind, "the output"), x
    return None, x


def _in_backward(layers: list[tuple[str, Any]], dout: NDArray) -> Culprit | None:
    if not _finite(dout):
        return Culprit(None, "", "the gradient of the loss")
    for name, layer in reversed(layers):
        kind = type(layer).__name__
        dout = layer.backward(dout)
        for key, parameter in layer.named_parameters():
            if not _finite(parameter.grad):
                return Culprit(name, kind, f"the gradient of parameter {key!r}")
        if not _finite(dout):
            return Culprit(name, kind, "the gradient of the input")
    return None


def _in_whole_backward(model: Any, dout: NDArray) -> Culprit | None:
    """As `_in_backward` where a layer runs twice, and can't go back through one of its runs by itself."""
    model.backward(dout, input_grad=False)
    for key, parameter in reversed(list(model.named_parameters())):
        if not _finite(parameter.grad):
            return Culprit("", type(model).__name__, f"the gradient of parameter {key!r}")
    return None


def find_culprit(model: Any, loss_fn: Any, x: NDArray, y: NDArray, backward: bool) -> Culprit:
    """Run a batch again, layer by layer, in the mode that the model is in.

    Parameters and running statistics are put back afterwards; gradients are zero.

    Parameters
    ----------
    model : Module
    loss_fn : callable with ``backward()``
    x, y : arrays
        The batch.
    backward : bool
        Whether to go back through the layers where nothing is found forward.
    """
    state = model.state_dict()
    layers = list(_leaves("", model))
    try:
        with np.errstate(all="ignore"):
            culprit, logits = _in_forward(layers, x)
            if culprit is None and not math.isfinite(loss_fn(logits, y)):
                culprit = Culprit(None, "", "the loss itself, of finite outputs (is every label ignored?)")
            if culprit is None and backward:
                model.zero_grad()
                if len({id(layer) for _, layer in layers}) == len(layers):
                    culprit = _in_backward(layers, loss_fn.backward())
                else:
                    loss_fn(model(x), y)
                    culprit = _in_whole_backward(model, loss_fn.backward())
    finally:
        model.load_state_dict(state)
        model.zero_grad()
    return culprit or Culprit(None, "", "nothing, when the batch is run again")
