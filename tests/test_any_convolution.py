"""Convolutions of all kinds, drawn at random once and for all: there is more than one way to do each pass.

Which way is taken follows from kernel, stride, dilation, groups, channels, filters, and images together, so
that tables of a few of these don't meet every pair of way and edge.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest
from guarded import before_a_gap

from fastcnn.kernels import cpu, reference

# Of the largest result: Winograd's bound with float32.
TOLERANCE = {np.float32: 3e-5, np.float64: 1e-12}
LAYERS = 600
# What the reference can do in a moment.
MOST_MULTIPLY_ADDS = 2e7


class Case(NamedTuple):
    dtype: type
    image: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pool_size: tuple[int, int]
    threads: int

    def out(self):
        """Rows and columns of the convolution's result."""
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                self.image[1:3], self.weight[:2], self.stride, self.padding, self.dilation, strict=True
            )
        )

    def __str__(self):
        sides = "-".join(f"{a}x{b}" for a, b in (self.stride, self.padding, self.dilation, self.pool_size))
        shapes = "-".join("x".join(map(str, shape)) for shape in (self.image, self.weight))
        return f"{np.dtype(self.dtype)}-{shapes}-{sides}-by{self.groups}"


def drawn(rng):
    """A case, which may be impossible."""

    def pair(most_often, *others):
        if rng.random() < 0.8:
            return (int(rng.choice(most_often)),) * 2
        return int(rng.choice(others)), int(rng.choice(others))

    groups = int(rng.choice([1, 1, 1, 2, 3, 4, 8]))
    channels = int(rng.choice([1, 2, 3, 4, 8, 10, 16, 17, 20, 32, 33, 48, 64]))
    filters = int(rng.choice([1, 2, 3, 4, 8, 10, 16, 17, 20, 31, 32, 48, 64]))
    if rng.random() < 0.1:
        groups, channels, filters = int(rng.choice([8, 16, 17, 33])), 1, int(rng.choice([1, 1, 2, 3]))
    kernel = pair([1, 2, 3, 3, 3, 4, 5, 6, 7], 1, 2, 3, 4, 5, 7)
    size = pair([2, 4, 5, 7, 8, 12, 13, 16, 21, 28], 1, 3, 6, 9, 14, 27, 40)
    return Case(
        np.float32 if rng.random() < 0.85 else np.float64,
        (int(rng.choice([1, 1, 2, 3, 5, 8, 16, 17, 33])), *size, groups * channels),
        (*kernel, channels, groups * filters),
        pair([1, 1, 1, 2, 3], 1, 2, 3),
        tuple(int(rng.choice([0, 1, k // 2, k - 1])) for k in kernel),
        pair([1, 1, 1, 2, 3], 1, 2, 3),
        groups,
        pair([1, 2, 2, 3, 4], 1, 2, 3),
        int(rng.integers(1, 3)),
    )


def possible(case):
    """Whether there are results, and not too many."""
    out = case.out()
    if min(out) < 1:
        return False
    return case.image[0] * math.prod(out) * math.prod(case.weight) <= MOST_MULTIPLY_ADDS


def some_cases():
    rng = np.random.default_rng(20)
    cases = []
    while len(cases) < LAYERS:
        case = drawn(rng)
        if possible(case):
            cases.append(case)
    return cases


@pytest.mark.parametrize("case", some_cases(), ids=str)
def test_every_pass(case, team, scratch):
    team(case.threads)
    rng = np.random.default_rng(0)
    tolerance = TOLERANCE[case.dtype]
    settings = case.stride, case.padding, case.dilation, case.groups
    kernel, pool_size = case.weight[:2], case.pool_size

    def some(*shape):
        return before_a_gap(rng.standard_normal(shape).astype(case.dtype))

    def check(name, *arguments):
        """The reference's results, which the kernel's are compared with."""
        exact = [
            np.float64(value) if isinstance(value, np.ndarray) and value.dtype != np.uint8 else value
            for value in arguments
        ]
        expected, actual = getattr(reference, name)(*exact), getattr(cpu, name)(*arguments)
        if not isinstance(expected, tuple):
            expected, actual = (expected,), (actual,)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == theirs.shape
            # Which of two nearly equal values was the largest is the kernel's to say.
            if theirs.dtype != np.uint8:
                largest = np.abs(theirs).max(initial=0)
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * largest, err_msg=name)
        scratch.check(name)
        return actual

    x, weight, bias = some(*case.image), some(*case.weight), some(case.weight[3])
    (y,) = check("conv2d_forward", x, weight, bias, *settings)
    dout = some(*y.shape)
    check("conv2d_backward_input", dout, weight, x.shape, *settings)
    check("conv2d_backward_weight", dout, x, kernel, *settings)
    if any(size > side for size, side in zip(pool_size, y.shape[1:3], strict=True)):
        return
    y, argmax = check("conv2d_pool_forward", x, weight, bias, pool_size, True, *settings)
    dout, argmax = some(*y.shape), before_a_gap(argmax)
    check("conv2d_pool_backward_input", dout, argmax, weight, x.shape, pool_size, *settings)
    check("conv2d_pool_backward_weight", dout, argmax, x, kernel, pool_size, *settings)
