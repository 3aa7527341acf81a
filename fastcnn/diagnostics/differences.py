"""Gradients against central differences, at single entries and along random directions.

The scalar that is differentiated is ``L = sum(layer(x) * dout)`` with a random `dout`, whose gradient is what
``layer.backward(dout)`` returns. Networks are smooth only piecewise. A step across a kink is first made
shorter; if the slopes to the left and to the right differ even at the shortest step, no derivative exists at
that point and it is left out and counted. A wrong ``backward`` can't hide there: the slopes come from
``forward`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .fixed import FixedFunction
from .report import CheckRow

_SHRINK = (1.0, 1e-1, 1e-2, 1e-3)
# A step across a kink puts the slope off by about as much as left and right differ. At a smooth point they
# differ by the curvature times the step, a tiny share of the error of a wrong gradient.
_KINK = 1e-2
_ROUNDING = 32 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class _Slope:
    error: float
    ok: bool
    kink: bool


def check_input_gradient(
    layer: Any, x: np.ndarray, *, samples: int = 20, rng: Any = 0, step: float = 1e-5, tolerance: float = 1e-6
) -> CheckRow:
    """Compare ``layer.backward`` with central differences at random entries of the input.

    For ``L = sum(layer(x) * dout)`` and an entry k, (L(x + h e_k) - L(x - h e_k)) / 2h should equal dx[k].
    Only the tested entries are compared.

    Parameters
    ----------
    layer : Module
        In double precision; `layer.training` is left as it is.
    x : ndarray of float64
        The layer's input, such as (N, C, H, W).
    samples : int
        Number of entries to test.
    rng : int or Generator
        Draws the entries and `dout`.
    step : float
        The first h, in units of the root mean square of `x`.
    tolerance : float
        Largest error, relative to the gradient, of a test that passes.

    Returns
    -------
    CheckRow
        Of kind ``IN``.
    """
    rng = np.random.default_rng(rng)
    x = np.array(x, np.float64)
    with FixedFunction(layer) as function:
        y = function(x)
        dout = rng.standard_normal(y.shape)
        dx = function.backward(x, dout)
        if dx.shape != x.shape:
            return CheckRow("IN", function.name, ok=False, max_err=np.inf)
        test = _Test(lambda: function(x), y, dout, samples, rng, step, tolerance)
        return CheckRow("IN", function.name, *test.entries(x, dx))


def check_parameter_gradient(
    layer: Any,
    x: np.ndarray,
    parameter: str,
    *,
    samples: int = 20,
    rng: Any = 0,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> CheckRow:
    """Compare a parameter's gradient with central differences at random entries of the parameter.

    Arguments are those of `check_input_gradient`; `parameter` is a name from ``layer.named_parameters()``.

    Returns
    -------
    CheckRow
        Of kind ``PAR``.

    Raises
    ------
    ValueError
        If the layer has no such parameter.
    """
    rng = np.random.default_rng(rng)
    x = np.array(x, np.float64)
    named = dict(layer.named_parameters())
    if parameter not in named:
        raise ValueError(f"parameter: {parameter!r} is not one of {sorted(named)}")
    theta = named[parameter]
    with FixedFunction(layer) as function:
        y = function(x)
        dout = rng.standard_normal(y.shape)
        function.backward(x, dout)
        grad = np.array(theta.grad)
        test = _Test(lambda: function(x), y, dout, samples, rng, step, tolerance)
        found = test.entries(theta.data, grad)
        index = list(named).index(parameter)
        return CheckRow("PAR", function.name, *found, parameter=parameter, index=index)


def check_vector_jacobian(
    layer: Any,
    x: np.ndarray,
    *,
    wrt: str = "input",
    samples: int = 2,
    rng: Any = 0,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> CheckRow:
    """Compare <dx, v> with (L(x + h v) - L(x - h v)) / 2h for random directions v.

    It looks at all entries at once, so that an error anywhere shows. Real activations can lie exactly on a
    kink (the zeros of a ReLU tie in the max-pool behind it); then `x` is moved by a hundredth of its size
    in a random direction, which is almost surely off every kink, and counted as skipped.

    Parameters
    ----------
    wrt : {"input", "parameters"}
        What is moved: `x`, or all parameters together.
    samples : int
        Number of directions.

    Other parameters are those of `check_input_gradient`.

    Returns
    -------
    CheckRow
        Of kind ``VJP``.
    """
    if wrt not in ("input", "parameters"):
        raise ValueError(f"wrt: {wrt!r} is neither 'input' nor 'parameters'")
    rng = np.random.default_rng(rng)
    x = np.array(x, np.float64)
    errors: list[float] = []
    moved, passed = 0, True
    with FixedFunction(layer) as function:
        while len(errors) < samples and moved <= 3 * samples:
            slope = _along_direction(function, x, wrt, rng, step, tolerance)
            if slope.kink:
                moved += 1
                x += 1e-2 * _size(x) * rng.standard_normal(x.shape)
            else:
                errors.append(slope.error)
                passed &= slope.ok
    worst = max(errors, default=np.inf)
    return CheckRow("VJP", function.name, passed and len(errors) > 0, worst, len(errors), moved)


def _along_direction(
    function: FixedFunction, x: np.ndarray, wrt: str, rng: np.random.Generator, step: float, tolerance: float
) -> _Slope:
    y = function(x)
    dout = rng.standard_normal(y.shape)
    dx = function.backward(x, dout)
    if wrt == "input":
        arrays, grads = [x], [dx]
    else:
        arrays = [p.data for p in function.layer.parameters()]
        grads = [np.array(p.grad) for p in function.layer.parameters()]
    if any(a.shape != g.shape for a, g in zip(arrays, grads, strict=True)):
        return _Slope(np.inf, ok=False, kink=False)
    start = [a.copy() for a in arrays]
    directions = [_size(a) * rng.standard_normal(a.shape) for a in arrays]

    def move(distance: float) -> None:
        for array, origin, direction in zip(arrays, start, directions, strict=True):
            array[...] = origin + distance * direction

    analytic = sum(float(np.vdot(g, v)) for g, v in zip(grads, directions, strict=True))
    scale = np.sqrt(sum(float(np.sum((g * v) ** 2)) for g, v in zip(grads, directions, strict=True)))
    test = _Test(lambda: function(x), y, dout, 1, rng, step, tolerance)
    return test.slope(move, analytic, scale, step)


class _Test:
    """Slopes of ``L = sum(evaluate() * dout)`` as something that `evaluate` depends on is moved."""

    def __init__(
        self,
        evaluate: Callable[[], np.ndarray],
        y: np.ndarray,
        dout: np.ndarray,
        samples: int,
        rng: np.random.Generator,
        step: float,
        tolerance: float,
    ):
        self.evaluate, self.y, self.dout = evaluate, y, dout
        self.samples, self.rng, self.step, self.tolerance = samples, rng, step, tolerance

    def entries(self, values: np.ndarray, gradient: np.ndarray) -> tuple[bool, float, int, int]:
        """Compare `gradient` at random entries of `values`: (ok, largest error, tested, skipped)."""
        scale = _rms(gradient)
        step = self.step * _size(values)
        errors: list[float] = []
        skipped, passed = 0, True
        # A layer can be at a kink nearly everywhere (a pool over a dead region): look on, but not for ever.
        for flat in self.rng.permutation(values.size)[: 10 * self.samples]:
            index = np.unravel_index(flat, values.shape)
            origin = values[index]

            def move(distance: float, index: Any = index, origin: Any = origin) -> None:
                values[index] = origin + distance

            slope = self.slope(move, float(gradient[index]), scale, step)
            if slope.kink:
                skipped += 1
                continue
            errors.append(slope.error)
            passed &= slope.ok
            if len(errors) == self.samples:
                break
        return passed and len(errors) > 0, max(errors, default=np.inf), len(errors), skipped

    def slope(self, move: Callable[[float], None], analytic: float, scale: float, step: float) -> _Slope:
        """Compare `analytic` with the central difference along `move`; shorten the step at kinks."""
        best = error = np.inf
        left = right = noise = 0.0
        for shrink in _SHRINK:
            h = step * shrink
            move(h)
            ahead = self.evaluate()
            move(-h)
            behind = self.evaluate()
            move(0.0)
            right = float(np.sum((ahead - self.y) * self.dout)) / h
            left = float(np.sum((self.y - behind) * self.dout)) / h
            moving = np.where(ahead != behind, self.y * self.dout, 0.0)
            noise = _ROUNDING * float(np.sqrt(np.sum(moving**2))) / h
            central = (left + right) / 2
            error = abs(central - analytic)
            if error <= self.tolerance * max(abs(central), abs(analytic), scale) + noise:
                return _Slope(error, ok=True, kink=False)
            best = np.fmin(best, error)
        kink = abs(right - left) > _KINK * error + 2 * noise
        return _Slope(float(best), ok=False, kink=kink)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _size(values: np.ndarray) -> float:
    """Root mean square; 1 for an array of zeros, such as a bias at the start."""
    return _rms(values) or 1.0
