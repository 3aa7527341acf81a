"""The checks of a layer, and of a model layer by layer on the activations that each layer really gets."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastcnn import nn

from .columns import check_adjoint, check_dx_path, check_row_order
from .differences import check_input_gradient, check_parameter_gradient, check_vector_jacobian
from .fixed import FixedFunction
from .report import CheckReport, CheckRow


class _LossLayer(nn.Module):
    """A loss with its target, as a layer of one output."""

    def __init__(self, loss: Any, target: np.ndarray):
        super().__init__()
        self.loss, self.target = loss, target

    def forward(self, x: np.ndarray) -> np.ndarray:
        return np.array([self.loss(x, self.target)], np.float64)

    def backward(self, dout: np.ndarray, input_grad: bool = True) -> np.ndarray:
        return self.loss.backward() * dout[0]


def check_layer(layer: Any, x: np.ndarray, *, samples: int = 20, rng: Any = 0) -> CheckReport:
    """Run every test that fits a layer.

    They are ``IN``, ``PAR`` for each parameter, ``VJP``, and for a Conv2d also ``ROW``, ``DX`` and ``ADJ``.

    Parameters
    ----------
    layer : Module
        Any layer; a copy in double precision is tested, in the mode (training or evaluation) that it is in.
    x : ndarray
        The layer's input, such as (N, C, H, W).
    samples : int
        Number of entries to test in each array.
    rng : int or Generator
        Draws entries, directions and output gradients.

    Returns
    -------
    CheckReport
    """
    rows = _layer_rows(double_copy(layer), np.array(x, np.float64), samples, np.random.default_rng(rng))
    return CheckReport(list(rows))


def check_model(
    model: Any,
    x: np.ndarray,
    target: np.ndarray | None = None,
    loss: Any = None,
    *,
    samples: int = 20,
    rng: Any = 0,
    on_row: Callable[[CheckRow], None] | None = None,
) -> CheckReport:
    """Check a model layer by layer, each on the output of the one before, then the model as a whole.

    A copy in double precision is tested, in training mode: batch statistics in BatchNorm, a fixed mask in
    dropout. `model` itself, its running statistics and the random generator are left as they are.

    Parameters
    ----------
    model : Module
        Nested Sequentials are taken apart; other containers, such as Residual, are tested as one layer.
    x : ndarray
        A batch, such as (N, C, H, W); real data show more than random numbers.
    target : ndarray, optional
        Labels for `loss`.
    loss : Module, optional
        Tested after the last layer where `target` is given; CrossEntropyLoss if None.
    samples : int
        Number of entries to test in each array.
    rng : int or Generator
        Draws entries, directions and output gradients.
    on_row : callable, optional
        Called with each row as soon as it is there.

    Returns
    -------
    CheckReport

    Raises
    ------
    ValueError
        If `x` is empty.
    """
    x = np.array(x, np.float64)
    if x.size == 0:
        raise ValueError(f"x: shape {x.shape} holds no element to check")
    model = double_copy(model)
    model.train()
    report = CheckReport()
    for row in _model_rows(model, x, target, loss, samples, np.random.default_rng(rng)):
        report.rows.append(row)
        if on_row is not None:
            on_row(row)
    return report


def double_copy(module: Any) -> Any:
    """A copy of a module in double precision."""
    return copy.deepcopy(module).double()


def _model_rows(
    model: Any, x: np.ndarray, target: np.ndarray | None, loss: Any, samples: int, rng: np.random.Generator
) -> Iterator[CheckRow]:
    activation, number = x, 0
    for number, layer in enumerate(_layers(model), 1):
        for row in _layer_rows(layer, activation, samples, rng):
            yield dataclasses.replace(row, layer=number - 1)
        with FixedFunction(layer) as function:
            activation = function(activation)
    if target is not None:
        last = _LossLayer(loss or nn.CrossEntropyLoss(), np.asarray(target))
        row = check_input_gradient(last, activation, samples=samples, rng=rng)
        yield dataclasses.replace(row, layer=number, name=type(last.loss).__name__)
    row = check_vector_jacobian(model, x, rng=rng)
    yield dataclasses.replace(row, layer=None, parameter="input")
    if any(True for _ in model.parameters()):
        row = check_vector_jacobian(model, x, wrt="parameters", rng=rng)
        yield dataclasses.replace(row, layer=None, parameter="parameters")


def _layers(model: Any) -> Iterator[Any]:
    if isinstance(model, nn.Sequential):
        for child in model:
            yield from _layers(child)
    else:
        yield model


def _layer_rows(layer: Any, x: np.ndarray, samples: int, rng: np.random.Generator) -> Iterator[CheckRow]:
    yield check_input_gradient(layer, x, samples=samples, rng=rng)
    for name, _ in layer.named_parameters():
        yield check_parameter_gradient(layer, x, name, samples=samples, rng=rng)
    yield check_vector_jacobian(layer, x, rng=rng)
    # Other paddings than zeros are no part of im2col.
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros":
        yield check_row_order(layer, x)
        yield check_dx_path(layer, x, rng=rng)
        yield check_adjoint(layer, x, rng=rng)
