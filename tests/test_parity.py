"""Every CPU kernel does what its reference does, for every call of the table in ops.py."""

import inspect
import re
import tracemalloc

import numpy as np
import pytest
from guarded import before_a_gap
from ops import OPERATIONS
from parity import (
    EXTREMES,
    MEETS_NO_PADDING,
    REFUSED,
    arrays,
    assert_close,
    assert_names_an_argument,
    assert_same_bits,
    every_row,
    outputs,
)

import fastcnn
from fastcnn.kernels import cpu, reference


def run(module, operation, arguments, **more):
    """All results of a call: what it returns, and what it changes, which are copies of what was given."""
    updated = {name: arguments[name].copy() for name in operation.updates if arguments.get(name) is not None}
    result = getattr(module, operation.name)(**{**arguments, **updated}, **more)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    return *returned, *updated.values()


def test_the_table_has_every_kernel():
    names = sorted(operation.name for operation in OPERATIONS)
    assert names == sorted(reference.__all__)
    assert names == sorted(cpu.__all__)


@every_row
def test_signature_is_the_reference_s_and_what_is_more_is_keyword_only(operation, dtype):
    ours = inspect.signature(getattr(cpu, operation.name)).parameters.values()
    theirs = inspect.signature(getattr(reference, operation.name)).parameters.values()
    shared = [parameter for parameter in ours if parameter.kind is not parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in shared] == [(p.name, p.default) for p in theirs]


@every_row
def test_same_result_as_the_reference_and_unchanged_inputs(operation, dtype, scratch):
    for case, arguments in operation.calls(dtype):
        kept = {name: array.copy() for name, array in arrays(arguments).items()}
        whole = {name: array for name, array in kept.items() if arguments[name].flags.c_contiguous}
        arguments = {**arguments, **{name: before_a_gap(array) for name, array in whole.items()}}
        actual = run(cpu, operation, arguments)
        scratch.check(case)
        for name, array in arrays(arguments).items():
            assert_same_bits([array], [kept[name]], f"{case}: {name}")
        assert_close(operation, arguments, actual, run(reference, operation, arguments), case)


@pytest.fixture
def without_winograd():
    """Winograd's algorithm spreads NaN to whole tiles; test_winograd.py has its rules."""
    fastcnn.set_winograd(False)
    yield
    fastcnn.set_winograd(True)


@every_row
def test_nan_spreads_as_in_the_reference(operation, dtype, without_winograd):
    for case, arguments in operation.calls(dtype):
        for name, array in arrays(arguments).items():
            # The parameters of an augmentation may not be NaN.
            if name in (*operation.meets_padding, "params") or array.dtype.kind != "f" or not array.size:
                continue
            if name == MEETS_NO_PADDING.get(operation.name):
                continue
            poisoned = array.copy()
            poisoned.reshape(-1)[array.size // 2] = np.nan
            call = {**arguments, name: poisoned}
            expected = run(reference, operation, call)
            assert_close(operation, arguments, run(cpu, operation, call), expected, f"{case}: {name}")


def transposed(array):
    return np.asfortranarray(array)


def strided(array):
    wide = np.repeat(np.repeat(array, 2, axis=0), 3, axis=-1) if array.ndim else array
    return wide[::2, ..., ::3] if array.ndim > 1 else wide[::6]


def reversed_in_memory(array):
    return np.flip(np.flip(array).copy())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    view = memory.view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def foreign_bytes(array):
    return array.astype(array.dtype.newbyteorder())


LAYOUTS = (transposed, strided, reversed_in_memory, read_only, unaligned, foreign_bytes)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@every_row
def test_memory_layout_does_not_change_a_bit(operation, dtype, layout):
    for case, arguments in operation.calls(dtype):
        moved = {
            name: layout(array) for name, array in arrays(arguments).items() if name not in operation.updates
        }
        expected = run(cpu, operation, arguments)
        assert_same_bits(run(cpu, operation, {**arguments, **moved}), expected, case)
        for name, array in moved.items():
            assert np.array_equal(array, arguments[name]), f"{case}: {name}"


@every_row
def test_out_is_overwritten_and_returned(operation, dtype):
    names = outputs(operation)
    for case, arguments in operation.calls(dtype):
        expected = run(cpu, operation, arguments)
        assert len(names) == len(expected) - sum(arguments.get(n) is not None for n in operation.updates)
        out = {}
        for name, result in zip(names, expected, strict=False):
            out[name] = np.full_like(result, np.nan if result.dtype.kind == "f" else 255)
        actual = run(cpu, operation, arguments, **out)
        assert all(a is b for a, b in zip(actual, out.values(), strict=False)), case
        assert_same_bits(actual, expected, case)


@every_row
def test_accumulate_adds_to_out(operation, dtype):
    if "accumulate" not in inspect.signature(getattr(cpu, operation.name)).parameters:
        return
    for case, arguments in operation.calls(dtype):
        expected = run(cpu, operation, arguments)
        # The gradient to the input is overwritten: the first of several results, if one of them.
        kept = 1 if len(expected) > 1 and not operation.name.endswith("backward_weight") else 0
        out = {name: np.ones_like(result) for name, result in zip(outputs(operation), expected, strict=True)}
        actual = run(cpu, operation, arguments, **out, accumulate=True)
        expected = [*expected[:kept], *(1 + result for result in expected[kept:])]
        assert_close(operation, arguments, actual, expected, case)


@every_row
def test_threads_and_repetition_do_not_change_a_bit(operation, dtype, team):
    arguments = operation.call("large", dtype)
    team(1)
    expected = run(cpu, operation, arguments)
    for count in (1, 2, 2):
        team(count)
        assert_same_bits(run(cpu, operation, arguments), expected, f"{count} threads")


@every_row
def test_wrong_dtypes_are_refused_by_name(operation, dtype):
    arguments = operation.call("large", dtype)
    for name, array in arrays(arguments).items():
        is_float = array.dtype.kind == "f" or name == "images"
        for wrong in (np.int64, np.float16, np.complex64) if is_float else (np.float32, bool):
            call = {**arguments, name: array.astype(wrong)}
            with pytest.raises(TypeError) as error:
                run(cpu, operation, call)
            assert_names_an_argument(operation, error)


@every_row
def test_mixed_dtypes_are_refused_by_name(operation, dtype):
    arguments = operation.call("large", dtype)
    floats = {name: array for name, array in arrays(arguments).items() if array.dtype.kind == "f"}
    for name, array in floats.items():
        if len(floats) == 1 or name == "images":
            continue
        call = {**arguments, name: array.astype(np.float32 if array.dtype == np.float64 else np.float64)}
        with pytest.raises(TypeError) as error:
            run(cpu, operation, call)
        assert_names_an_argument(operation, error)


@every_row
def test_wrong_ranks_are_refused_by_name(operation, dtype):
    arguments = operation.call("large", dtype)
    for name, array in arrays(arguments).items():
        if name in operation.any_shape:
            continue
        for wrong in (array[None], array[..., 0]):
            with pytest.raises(ValueError) as error:
                run(cpu, operation, {**arguments, name: wrong})
            assert_names_an_argument(operation, error)


@every_row
def test_wrong_outputs_are_refused_by_name(operation, dtype):
    arguments = operation.call("large", dtype)
    for name, result in zip(outputs(operation), run(cpu, operation, arguments), strict=False):
        wrong = [result[..., None], result.astype(np.int64), np.repeat(result, 2, axis=0)[::2]]
        for out in (*wrong, read_only(result)):
            with pytest.raises(ValueError) as error:
                run(cpu, operation, arguments, **{name: out})
            assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])
def test_both_refuse_what_makes_no_sense(module, name, arguments, message):
    if name == "batch_norm_forward":
        arguments = dict.fromkeys(("weight", "bias", "running_mean", "running_var")) | arguments
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(module, name)(**arguments)


@pytest.mark.parametrize("row", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_values_as_in_the_reference(row, dtype):
    x, weight = np.array([row], dtype), np.array([0.5, 1.0, 2.0], dtype)
    target, soft = np.array([1]), np.array([[0.2, 0.0, 0.8]], dtype)
    pixels = x.reshape(1, 1, 3, 1)
    calls = [
        *((name, (x,)) for name in ("softmax", "log_softmax", "relu_forward", "leaky_relu_forward")),
        *((name, (x, x)) for name in ("relu_backward", "leaky_relu_backward")),
        ("max_pool2d_forward", (pixels, (1, 2), 1)),
        ("avg_pool2d_forward", (pixels, (1, 2), 1)),
        ("dropout_forward", (x, 0.5, 3)),
    ]
    for smoothing in (0.0, 0.1):
        calls.append(("softmax_cross_entropy", (x, target, weight, -100, smoothing)))
        calls.append(("soft_cross_entropy", (x, soft, weight, smoothing)))
    for name, arguments in calls:
        with np.errstate(all="ignore"):
            expected = getattr(reference, name)(*arguments)
        actual = getattr(cpu, name)(*arguments)
        np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(dtype).eps, err_msg=name)


def test_a_mean_far_from_zero_costs_no_accuracy():
    x = (1e6 + np.random.default_rng(0).standard_normal((3000, 5))).astype(np.float32)
    none = dict.fromkeys(("weight", "bias", "running_mean", "running_var"))
    _, mean, inv_std = cpu.batch_norm_forward(x, **none, training=True)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(inv_std, 1 / np.sqrt(x.var(axis=0, dtype=np.float64) + 1e-5), rtol=1e-6)


def test_running_statistics_may_be_strided_but_not_read_only():
    wide = np.zeros((5, 2), np.float32)
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    cpu.batch_norm_forward(x, None, None, wide[:, 0], None, True, 1.0)
    np.testing.assert_allclose(wide[:, 0], x.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert not wide[:, 1].any()
    with pytest.raises(ValueError, match=r"^running_var: "):
        cpu.batch_norm_forward(x, None, None, None, read_only(wide[:, 0]), True)


@pytest.mark.parametrize("name", ["sgd_update", "adam_update"])
def test_zero_grad_clears_the_gradient_in_the_same_pass(name):
    operation = next(operation for operation in OPERATIONS if operation.name == name)
    arguments = operation.call("large", np.float32)
    expected = run(cpu, operation, arguments)
    arguments["grad"] = arguments["grad"].copy()
    assert_same_bits(run(cpu, operation, arguments, zero_grad=True), expected, name)
    assert not arguments["grad"].any()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_a_call_with_out_allocates_nothing_of_the_input_s_size(operation):
    arguments = operation.call("large", operation.dtypes[-1])
    results = run(cpu, operation, arguments)
    names = outputs(operation)
    out = dict(zip(names, results, strict=False))
    function = getattr(cpu, operation.name)
    for name in operation.updates:
        arguments[name] = arguments[name].copy()
    function(**arguments, **out)
    tracemalloc.start()
    try:
        function(**arguments, **out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32_768
