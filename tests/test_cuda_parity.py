"""Every CUDA kernel does what its reference does, for every call of the table in ops.py.

On the simulator the calls are those that it can do in a moment; on a GPU they are all.
"""

import inspect
import re

import cuda_device
import numpy as np
import pytest
from ops import FLOATS, OPERATIONS
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

from fastcnn.kernels import cpu, reference

cuda = cuda_device.module()
pytestmark = cuda_device.marks

every_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def reference_results(operation, arguments):
    """All results of the reference, like `cuda_device.run`'s."""
    copies = {name: array.copy() for name, array in arrays(arguments).items() if name in operation.updates}
    result = getattr(reference, operation.name)(**{**arguments, **copies})
    returned = () if result is None else result if isinstance(result, tuple) else (result,)
    return *returned, *copies.values()


def calls(operation, dtype):
    """Name, arguments and expected results of each call that the device can afford."""
    for case, arguments in operation.calls(dtype):
        if cuda_device.SIMULATED and case == "large":
            continue
        expected = reference_results(operation, arguments)
        if cuda_device.affordable(operation, arguments, expected):
            yield case, arguments, expected


def test_every_kernel_has_a_twin():
    arrays_of_the_device = {"DeviceArray", "as_device", "empty", "from_numpy", "synchronize", "zeros"}
    assert sorted(set(cuda.__all__) - arrays_of_the_device) == sorted(reference.__all__)


@every_operation
def test_signature_is_the_cpu_s(operation):
    ours = inspect.signature(getattr(cuda, operation.name)).parameters.values()
    theirs = inspect.signature(getattr(cpu, operation.name)).parameters.values()
    described = [[(p.name, p.default, p.kind) for p in parameters] for parameters in (ours, theirs)]
    assert described[0] == described[1]
    assert getattr(cuda, operation.name).__doc__


@every_row
def test_same_result_as_the_reference_and_unchanged_inputs(operation, dtype):
    count = 0
    for case, arguments, expected in calls(operation, dtype):
        on_device = cuda_device.moved(arguments)
        actual = cuda_device.run(operation, on_device)
        assert_close(operation, arguments, actual, expected, case)
        for name, array in arrays(arguments).items():
            if name not in operation.updates:
                assert_same_bits([on_device[name].numpy()], [array], f"{case}: {name}")
        count += 1
    assert count > 2


@every_row
def test_nan_spreads_as_in_the_reference(operation, dtype):
    for case, arguments, _ in calls(operation, dtype):
        for name, array in arrays(arguments).items():
            # The parameters of an augmentation may not be NaN.
            if name in (*operation.meets_padding, "params") or array.dtype.kind != "f" or not array.size:
                continue
            if case.startswith(("depthwise", "groups")) and name == MEETS_NO_PADDING.get(operation.name):
                continue
            poisoned = array.copy()
            poisoned.reshape(-1)[array.size // 2] = np.nan
            call = {**arguments, name: poisoned}
            actual = cuda_device.run(operation, call)
            assert_close(operation, arguments, actual, reference_results(operation, call), f"{case}: {name}")


@every_row
def test_out_is_overwritten_and_returned(operation, dtype):
    names = outputs(operation)
    for case, arguments, expected in calls(operation, dtype):
        out = {}
        for name, result in zip(names, expected, strict=False):
            blank = np.full_like(result, np.nan if result.dtype.kind == "f" else 255)
            out[name] = cuda.from_numpy(blank)
        result = getattr(cuda, operation.name)(**cuda_device.moved(arguments), **out)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        assert all(a is b for a, b in zip(returned, out.values(), strict=True)), case
        actual = [array.numpy() for array in returned]
        assert_close(operation, arguments, actual, expected[: len(actual)], case)


@every_row
def test_accumulate_adds_to_out(operation, dtype):
    if "accumulate" not in inspect.signature(getattr(cuda, operation.name)).parameters:
        return
    for case, arguments, expected in calls(operation, dtype):
        # The gradient to the input is overwritten: the first of several results, if one of them.
        kept = 1 if len(expected) > 1 and not operation.name.endswith("backward_weight") else 0
        ones = [cuda.from_numpy(np.ones_like(result)) for result in expected]
        out = dict(zip(outputs(operation), ones, strict=True))
        actual = cuda_device.run(operation, arguments, **out, accumulate=True)
        expected = [*expected[:kept], *(1 + result for result in expected[kept:])]
        assert_close(operation, arguments, actual, expected, case)


@every_row
def test_memory_layout_does_not_change_a_bit(operation, dtype):
    for case, arguments, _ in calls(operation, dtype):
        straight = cuda_device.moved(arguments)
        expected = cuda_device.run(operation, straight)
        strided = cuda_device.moved(arguments)
        for name, array in arrays(arguments).items():
            if name in operation.updates or not array.ndim:
                continue
            backwards = cuda.from_numpy(np.ascontiguousarray(array.T[::-1]))
            strided[name] = backwards[::-1].transpose()
            assert strided[name].shape == array.shape
        assert_same_bits(cuda_device.run(operation, strided), expected, case)
        break


@every_operation
def test_a_numpy_array_is_refused_by_name(operation):
    arguments = operation.call(next(iter(operation.cases)), operation.dtypes[0])
    for name in arrays(arguments):
        call = {**cuda_device.moved(arguments), name: arguments[name]}
        with pytest.raises(TypeError, match=rf"^{name}: .*from_numpy"):
            getattr(cuda, operation.name)(**call)


@every_row
def test_wrong_dtypes_and_ranks_are_refused_by_name(operation, dtype):
    arguments = operation.call(next(iter(operation.cases)), dtype)
    for name, array in arrays(arguments).items():
        is_float = array.dtype.kind == "f" or name == "images"
        for wrong in (np.int64, np.float16, np.complex64) if is_float else (np.float32, bool):
            with pytest.raises(TypeError) as error:
                cuda_device.run(operation, {**arguments, name: array.astype(wrong)})
            assert_names_an_argument(operation, error)
        if name not in operation.any_shape:
            with pytest.raises(ValueError) as error:
                cuda_device.run(operation, {**arguments, name: array[None]})
            assert_names_an_argument(operation, error)


@every_row
def test_wrong_outputs_are_refused_by_name(operation, dtype):
    arguments = operation.call(next(iter(operation.cases)), dtype)
    for name, result in zip(outputs(operation), reference_results(operation, arguments), strict=False):
        for wrong in (result[..., None], result.astype(np.int64)):
            with pytest.raises(ValueError, match=f"^{name}: "):
                cuda_device.run(operation, arguments, **{name: cuda.from_numpy(wrong)})


# The device alone knows these, and a call doesn't wait for it: the results are NaN.
SEEN_BY_THE_DEVICE = ("target: 3", "target: -1", "index: 2", "index: -1")


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses_what_makes_no_sense(name, arguments, message):
    if name == "batch_norm_forward":
        arguments = dict.fromkeys(("weight", "bias", "running_mean", "running_var")) | arguments
    on_device = cuda_device.moved(arguments)
    if message in SEEN_BY_THE_DEVICE:
        result = getattr(cuda, name)(**on_device)
        result = result[0] if isinstance(result, tuple) else result
        assert np.isnan(result.numpy()).any()
        return
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(cuda, name)(**on_device)


@pytest.mark.parametrize("row", EXTREMES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_values_as_in_the_reference(row, dtype):
    x, weight = np.array([row], dtype), np.array([0.5, 1.0, 2.0], dtype)
    target, soft = np.array([1]), np.array([[0.2, 0.0, 0.8]], dtype)
    pixels = x.reshape(1, 1, 3, 1)
    extreme = [
        *((name, (x,)) for name in ("softmax", "log_softmax", "relu_forward", "leaky_relu_forward")),
        *((name, (x, x)) for name in ("relu_backward", "leaky_relu_backward")),
        ("max_pool2d_forward", (pixels, (1, 2), 1)),
        ("avg_pool2d_forward", (pixels, (1, 2), 1)),
        ("dropout_forward", (x, 0.5, 3)),
    ]
    for smoothing in (0.0, 0.1):
        extreme.append(("softmax_cross_entropy", (x, target, weight, -100, smoothing)))
        extreme.append(("soft_cross_entropy", (x, soft, weight, smoothing)))
    for name, arguments in extreme:
        with np.errstate(all="ignore"):
            expected = getattr(reference, name)(*arguments)
        actual = getattr(cuda, name)(*map(cuda_device.moved, arguments))
        pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=8 * np.finfo(dtype).eps, err_msg=name)


@every_operation
def test_repetition_does_not_change_a_bit(operation):
    for case, arguments, _ in calls(operation, operation.dtypes[0]):
        expected = cuda_device.run(operation, arguments)
        assert_same_bits(cuda_device.run(operation, arguments), expected, case)


@pytest.mark.parametrize("name", ["sgd_update", "adam_update"])
def test_zero_grad_clears_the_gradient_in_the_same_pass(name):
    operation = next(operation for operation in OPERATIONS if operation.name == name)
    for case, arguments, _ in calls(operation, np.float32):
        expected = cuda_device.run(operation, arguments)
        on_device = cuda_device.moved(arguments)
        assert_same_bits(cuda_device.run(operation, on_device, zero_grad=True), expected, case)
        assert not on_device["grad"].numpy().any()


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint64])
def test_labels_and_indices_of_any_integers(dtype):
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    target = np.array([2, 0, 1, 1, 2])
    expected, _ = reference.softmax_cross_entropy(x, target)
    losses, _ = cuda.softmax_cross_entropy(cuda.from_numpy(x), cuda.from_numpy(target.astype(dtype)))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_an_unusable_row_of_parameters_is_nan():
    operation = next(operation for operation in OPERATIONS if operation.name == "augment_batch")
    arguments = operation.call("colour", np.uint8)
    arguments["params"][1, 4] = np.nan
    arguments["params"][2, 1] = 1e10
    arguments["index"][3] = 99
    (images,) = cuda_device.run(operation, arguments)
    assert [np.isnan(image).all() for image in images] == [False, True, True, True, False, False, False]
    assert not np.isnan(images[[0, 4, 5, 6]]).any()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "relu_forward"])
def test_out_may_be_the_input(name):
    x = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    on_device = cuda.from_numpy(x)
    getattr(cuda, name)(on_device, out=on_device)
    np.testing.assert_allclose(on_device.numpy(), getattr(reference, name)(x), rtol=1e-5)
