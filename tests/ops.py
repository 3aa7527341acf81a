"""One row for each operation of the kernels' interface: its calls, what they change, how exact they are.

Every test that holds for all operations runs over `OPERATIONS`, and a new kernel is one more row.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import op_calls as calls

Arguments = dict[str, Any]

FLOATS = (np.float32, np.float64)


@dataclass(frozen=True)
class Operation:
    """A function of `fastcnn.kernels.reference` and `fastcnn.kernels.cpu`, and calls of it.

    Attributes
    ----------
    name : str
    build : function (rng, dtype, *case) -> arguments by name
    cases : what `build` takes, by a name for messages
    dtypes : dtypes to run in
    updates : arguments that the function changes in place
    any_shape : arguments that may have one axis more than in the cases
    meets_padding : arguments that one of `cpu` and `reference` multiplies with zeros (of padding, or of a
        scattered gradient), and the other doesn't: their NaN may spread further
    terms : function of the arguments; how many terms the longest sum has
    scale : function of the arguments; the largest number on the way to the result, if the result is smaller
    """

    name: str
    build: Callable[..., Arguments]
    cases: dict[str, tuple]
    dtypes: tuple[type, ...] = FLOATS
    updates: tuple[str, ...] = ()
    any_shape: tuple[str, ...] = ()
    meets_padding: tuple[str, ...] = ()
    terms: Callable[[Arguments], int] = field(default=lambda arguments: 1)
    scale: Callable[[Arguments], float] = field(default=lambda arguments: 0.0)

    def calls(self, dtype: type) -> Iterator[tuple[str, Arguments]]:
        """Each case's name and its arguments."""
        for case in self.cases:
            yield case, self.call(case, dtype)

    def call(self, case: str, dtype: type) -> Arguments:
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {case}".encode()))
        return self.build(rng, dtype, *self.cases[case])

    def tolerance(self, arguments: Arguments, result: np.ndarray) -> float:
        """Largest difference that rounding explains.

        Rounding errors of a sum add up like a random walk, to about the root of the number of terms, in units
        of the largest number that was rounded.
        """
        if result.dtype.kind != "f" or not result.size:
            return 0.0
        finite = np.abs(result[np.isfinite(result)])
        size = max(1.0, self.scale(arguments), finite.max(initial=0.0))
        return 8 * np.finfo(result.dtype).eps * np.sqrt(self.terms(arguments)) * size


def _normalized_scale(arguments: Arguments) -> float:
    """Distances from the mean are rounded in units of x itself, then multiplied by inv_std."""
    x, weight = arguments["x"], arguments["weight"]
    if not x.size:
        return 0.0
    inv_std = arguments.get("inv_std")
    if inv_std is None:
        axes = tuple(range(x.ndim - 1))
        var = x.var(axis=axes) if arguments["training"] else arguments["running_var"]
        inv_std = 1 / np.sqrt(var + 1e-5)
    factor = inv_std if weight is None else np.maximum(1, np.abs(weight)) * inv_std
    return float(np.nanmax(np.abs(x)) * np.nanmax(factor) * max(1.0, np.nanmax(inv_std)))


def _taps(arguments: Arguments) -> int:
    return prod(arguments["weight"].shape[:3])


def _pixels(arguments: Arguments) -> int:
    return max(1, prod(arguments["dout"].shape[:3]))


def _kernel_area(arguments: Arguments) -> int:
    return prod(np.broadcast_to(arguments["kernel_size"], 2).tolist())


def _image_area(arguments: Arguments) -> int:
    images = arguments.get("x", arguments.get("images"))
    shape = arguments["x_shape"] if images is None else images.shape
    return shape[1] * shape[2]


def _rows(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: max(1, prod(arguments[name].shape[:-1]))


def _last_axis(name: str) -> Callable[[Arguments], int]:
    return lambda arguments: arguments[name].shape[-1]


OPERATIONS = [
    Operation("im2col", calls.im2col, calls.COLUMNS),
    Operation("col2im", calls.col2im, calls.COLUMNS, terms=_kernel_area),
    Operation("conv2d_forward", calls.conv2d_forward, calls.CONVOLUTIONS, terms=_taps),
    Operation(
        "conv2d_backward_input",
        calls.conv2d_backward_input,
        calls.CONVOLUTIONS,
        meets_padding=("weight",),
        terms=lambda arguments: prod(arguments["weight"].shape[:2]) * arguments["weight"].shape[3],
    ),
    Operation("conv2d_backward_weight", calls.conv2d_backward_weight, calls.CONVOLUTIONS, terms=_pixels),
    Operation("conv2d_backward_bias", calls.dout, calls.CHANNELS, any_shape=("dout",), terms=_rows("dout")),
    Operation("conv2d_pool_forward", calls.conv2d_pool_forward, calls.POOLED_CONVOLUTIONS, terms=_taps),
    Operation(
        "conv2d_pool_backward_input",
        calls.conv2d_pool_backward_input,
        calls.POOLED_CONVOLUTIONS,
        meets_padding=("weight",),
        terms=lambda arguments: prod(arguments["weight"].shape[:2]) * arguments["weight"].shape[3],
    ),
    Operation(
        "conv2d_pool_backward_weight",
        calls.conv2d_pool_backward_weight,
        calls.POOLED_CONVOLUTIONS,
        meets_padding=("x",),
        terms=_pixels,
    ),
    Operation("linear_forward", calls.linear_forward, calls.LINEAR, terms=_last_axis("x")),
    Operation("linear_backward_input", calls.linear_backward_input, calls.LINEAR, terms=_last_axis("dout")),
    Operation("linear_backward_weight", calls.linear_backward_weight, calls.LINEAR, terms=_rows("dout")),
    Operation("max_pool2d_forward", calls.max_pool2d_forward, calls.MAX_POOLS),
    Operation("max_pool2d_backward", calls.max_pool2d_backward, calls.MAX_POOLS, terms=_kernel_area),
    Operation("avg_pool2d_forward", calls.avg_pool2d_forward, calls.AVERAGE_POOLS, terms=_kernel_area),
    Operation("avg_pool2d_backward", calls.avg_pool2d_backward, calls.AVERAGE_POOLS, terms=_kernel_area),
    Operation(
        "adaptive_avg_pool2d_forward",
        calls.adaptive_avg_pool2d_forward,
        calls.ADAPTIVE_POOLS,
        terms=_image_area,
    ),
    Operation(
        "adaptive_avg_pool2d_backward",
        calls.adaptive_avg_pool2d_backward,
        calls.ADAPTIVE_POOLS,
        terms=_image_area,
    ),
    Operation(
        "global_avg_pool2d_forward", calls.global_avg_pool2d_forward, calls.GLOBAL_POOLS, terms=_image_area
    ),
    Operation("global_avg_pool2d_backward", calls.global_avg_pool2d_backward, calls.GLOBAL_POOLS),
    Operation("relu_forward", calls.x, calls.ELEMENTS, any_shape=("x",)),
    Operation("relu_backward", calls.dout_and_y, calls.ELEMENTS),
    Operation("leaky_relu_forward", calls.leaky_relu_forward, calls.ELEMENTS, any_shape=("x",)),
    Operation("leaky_relu_backward", calls.leaky_relu_backward, calls.ELEMENTS),
    Operation("prelu_forward", calls.prelu_forward, calls.CHANNELS, any_shape=("x",)),
    Operation("prelu_backward", calls.prelu_backward, calls.CHANNELS, terms=_rows("dout")),
    Operation(
        "batch_norm_forward",
        calls.batch_norm_forward,
        calls.NORMS,
        updates=("running_mean", "running_var"),
        any_shape=("x",),
        terms=_rows("x"),
        scale=_normalized_scale,
    ),
    Operation(
        "batch_norm_backward",
        calls.batch_norm_backward,
        calls.NORMS,
        terms=_rows("x"),
        scale=_normalized_scale,
    ),
    Operation(
        "batch_norm_pool_forward",
        calls.batch_norm_pool_forward,
        calls.NORM_POOLS,
        updates=("running_mean", "running_var"),
        terms=_rows("x"),
        scale=_normalized_scale,
    ),
    Operation(
        "batch_norm_pool_backward",
        calls.batch_norm_pool_backward,
        calls.NORM_POOLS,
        meets_padding=("x",),
        terms=_rows("x"),
        scale=_normalized_scale,
    ),
    Operation("dropout_forward", calls.dropout("x"), calls.ELEMENTS, any_shape=("x",)),
    Operation("dropout_backward", calls.dropout("dout"), calls.ELEMENTS, any_shape=("dout",)),
    Operation("softmax", calls.x, calls.ROWS, any_shape=("x",), terms=_last_axis("x")),
    Operation("log_softmax", calls.x, calls.ROWS, any_shape=("x",), terms=_last_axis("x")),
    Operation("softmax_backward", calls.dout_and_y, calls.ROWS, terms=_last_axis("dout")),
    Operation("log_softmax_backward", calls.log_softmax_backward, calls.ROWS, terms=_last_axis("dout")),
    Operation("softmax_cross_entropy", calls.softmax_cross_entropy, calls.LOSSES, terms=_last_axis("x")),
    Operation(
        "softmax_cross_entropy_backward",
        calls.softmax_cross_entropy_backward,
        calls.LOSSES,
        terms=_last_axis("x"),
    ),
    Operation("soft_cross_entropy", calls.soft_cross_entropy, calls.LOSSES, terms=_last_axis("x")),
    Operation(
        "soft_cross_entropy_backward", calls.soft_cross_entropy_backward, calls.LOSSES, terms=_last_axis("x")
    ),
    Operation("sgd_update", calls.sgd_update, calls.SGD_STEPS, updates=("param", "velocity")),
    Operation("adam_update", calls.adam_update, calls.ADAM_STEPS, updates=("param", "exp_avg", "exp_avg_sq")),
    Operation("gather_batch", calls.gather_batch, calls.BATCHES, dtypes=(np.uint8, np.float32)),
    Operation(
        "augment_batch", calls.augment_batch, calls.BATCHES, dtypes=(np.uint8, np.float32), terms=_image_area
    ),
]
