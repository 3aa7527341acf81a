"""Every CPU kernel does what its reference does, for every call of the table in ops.py."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fastcnn.kernels import cpu, jit, reference

sys.path.insert(0, str(Path(__file__).parent))

from ops import OPERATIONS

ROWS = [
    pytest.param(operation, dtype, id=f"{operation.name}-{np.dtype(dtype)}")
    for operation in OPERATIONS
    for dtype in operation.dtypes
]
every_row = pytest.mark.parametrize(("operation", "dtype"), ROWS)


def arrays(arguments):
    return {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}


def run(module, operation, arguments, **more):
    """All results of a call: what it returns, and what it changes, which are copies of what was given."""
    updated = {name: arguments[name].copy() for name in operation.updates if arguments.get(name) is not None}
    result = getattr(module, operation.name)(**{**arguments, **updated}, **more)
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    return *returned, *updated.values()


def assert_close(operation, arguments, actual, expected, message):
    assert len(actual) == len(expected), message
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, message
        assert ours.shape == theirs.shape, message
        tolerance = operation.tolerance(arguments, theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance, err_msg=message)


def assert_same_bits(actual, expected, message):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype, message
        assert ours.tobytes() == theirs.tobytes(), message


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
def test_same_result_as_the_reference_and_unchanged_inputs(operation, dtype):
    for case, arguments in operation.calls(dtype):
        kept = {name: array.copy() for name, array in arrays(arguments).items()}
        actual = run(cpu, operation, arguments)
        for name, array in arrays(arguments).items():
            assert_same_bits([array], [kept[name]], f"{case}: {name}")
        assert_close(operation, arguments, actual, run(reference, operation, arguments), case)


@every_row
def test_nan_spreads_as_in_the_reference(operation, dtype):
    for case, arguments in operation.calls(dtype):
        for name, array in arrays(arguments).items():
            # The parameters of an augmentation may not be NaN.
            if name in (*operation.meets_padding, "params") or array.dtype.kind != "f" or not array.size:
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


def outputs(operation):
    """Names of the arguments that results can be written to, in the order of the results."""
    parameters = inspect.signature(getattr(cpu, operation.name)).parameters
    return [name for name in parameters if name == "out" or name.startswith("out_")]


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
        # The gradient to the input, the first result where there are several, is overwritten.
        kept = 1 if len(expected) > 1 else 0
        out = {name: np.ones_like(result) for name, result in zip(outputs(operation), expected, strict=True)}
        actual = run(cpu, operation, arguments, **out, accumulate=True)
        expected = [*expected[:kept], *(1 + result for result in expected[kept:])]
        assert_close(operation, arguments, actual, expected, case)


@pytest.fixture
def threads():
    before = jit.get_num_threads()
    yield jit.set_num_threads
    jit.set_num_threads(before)


@every_row
def test_threads_and_repetition_do_not_change_a_bit(operation, dtype, threads):
    arguments = operation.call("large", dtype)
    threads(1)
    expected = run(cpu, operation, arguments)
    for count in (1, 2, 2):
        threads(count)
        assert_same_bits(run(cpu, operation, arguments), expected, f"{count} threads")


def assert_names_an_argument(operation, error):
    """The message begins with the name of an argument, or names."""
    match = re.match(r"(\w+)(, \w+)*: ", str(error.value))
    assert match, error.value
    assert match[1] in inspect.signature(getattr(cpu, operation.name)).parameters, error.value


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
