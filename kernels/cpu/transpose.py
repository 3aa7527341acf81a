"""Copies between (N, H, W, C) and (N, C, H, W): transposed matrices, a square of vectors at a time."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .. import checks
from ..jit import keep_out_of_line
from ..threads import NotRecordedError, between_jobs, parallel, part_count, recording, span
from .loops import transposed
from .simd import lanes
from .tile import Emitter
from .vectors import lanes_of, pointer

# Below so many elements NumPy's copy is done before a kernel has begun.
_FEW = 4096
# With fewer channels, vectors are too empty; but 3, which most images have, are another matter.
_MANY = 10
# The next matrix is fetched while one of so many elements is copied; of larger ones, so many squares ahead.
_NEAR = 4096
_AHEAD = 4


@intrinsic(prefer_literal=True)
def _square(typing_context, whole, x, x0, stride, y, y0, pitch, rows, columns, ahead):
    """y[y0 + j * pitch + i] = x[x0 + i * stride + j] for i < rows, j < columns.

    The literal `whole` says that these are as many as a vector has lanes. If not, caches fetch the squares
    that lie so many elements `ahead` in x and in y: to write some lanes of a vector to a line that no cache
    has takes several times as long.
    """
    if not isinstance(whole, types.IntegerLiteral):
        return None
    signature = types.void(whole, x, x0, stride, y, y0, pitch, rows, columns, ahead)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        _, source, x0, stride, target, y0, pitch, rows, columns, ahead = arguments
        source, target = emit.at(source, x0), emit.at(target, y0)
        i64, zero = ir.IntType(64), ir.Constant(ir.IntType(64), 0)

        def place(base, step, number):
            return emit.at(base, builder.mul(step, ir.Constant(i64, number)))

        def vector(base, step, number, limit, count):
            """Where a row begins, and its lanes in use: none, of the first, where there is no such row."""
            if whole.literal_value:
                return place(base, step, number), None
            inside = builder.icmp_signed("<", ir.Constant(i64, number), limit)
            there = builder.select(inside, place(base, step, number), base)
            return there, emit.mask(builder.select(inside, count, zero), 0)

        numbers = range(emit.lanes)
        if not whole.literal_value:
            to_read, to_write = cgutils.unpack_tuple(builder, ahead)
            for i in numbers:
                emit.prefetch(emit.at(place(source, stride, i), to_read), to_write=False)
                emit.prefetch(emit.at(place(target, pitch, i), to_write), to_write=True)
        square = [emit.load(*vector(source, stride, i, rows, columns)) for i in numbers]
        for j, column in enumerate(transposed(emit, square)):
            emit.store(column, *vector(target, pitch, j, columns, rows))
        return context.get_dummy_value()

    return signature, codegen


def _picked(emit, vectors, picks):
    """A vector of the elements `picks`, counted through all `vectors`."""
    many = emit.lanes
    i32 = ir.IntType(32)
    result = vectors[0]
    for number, vector in enumerate(vectors):
        order = [
            many + pick % many if pick // many == number else lane if number else pick % many
            for lane, pick in enumerate(picks)
        ]
        order = ir.Constant(ir.VectorType(i32, many), order)
        result = emit.builder.shuffle_vector(result, vector, order)
    return result


@intrinsic(prefer_literal=True)
def _three(typing_context, to_first, x, x0, stride, y, y0, pitch):
    """As many pixels of 3 channels as a vector has lanes, from (..., 3) to (3, ...) or back."""
    if not isinstance(to_first, types.IntegerLiteral):
        return None
    signature = types.void(to_first, x, x0, stride, y, y0, pitch)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        _, source, x0, stride, target, y0, pitch = arguments
        source, target = emit.at(source, x0), emit.at(target, y0)
        many = emit.lanes
        picks = [divmod(k, 3)[1] * many + divmod(k, 3)[0] for k in range(3 * many)]
        if to_first.literal_value:
            picks = [3 * (k % many) + k // many for k in range(3 * many)]
        numbers = [ir.Constant(ir.IntType(64), number) for number in range(3)]
        vectors = [emit.load(emit.at(source, builder.mul(stride, number))) for number in numbers]
        for number in numbers:
            chosen = picks[number.constant * many : (number.constant + 1) * many]
            place = emit.at(target, builder.mul(pitch, number))
            emit.store(_picked(emit, vectors, chosen), place)
        return context.get_dummy_value()

    return signature, codegen


@parallel
def _transpose_three(part, parts, x, y, pixels, to_first):
    """Images of 3 channels, from channels-last to channels-first if `to_first`, or back."""
    keep_out_of_line()
    lanes = lanes_of(x)
    source, target = pointer(x), pointer(y)
    whole = pixels // lanes * lanes
    lo, hi = span(part, parts, x.size // (3 * pixels))
    for n in range(lo, hi):
        first = 3 * n * pixels
        if to_first:
            for p in range(0, whole, lanes):
                _three(1, source, first + 3 * p, lanes, target, first + p, pixels)
        else:
            for p in range(0, whole, lanes):
                _three(0, source, first + p, pixels, target, first + 3 * p, lanes)
        for p in range(whole, pixels):
            for c in range(3):
                if to_first:
                    y[first + c * pixels + p] = x[first + 3 * p + c]
                else:
                    y[first + 3 * p + c] = x[first + c * pixels + p]


@parallel
def _transpose(part, parts, x, y, height, width):
    """y[n, j, i] = x[n, i, j] of matrices of `height` x `width`; a task is a strip of columns of one."""
    keep_out_of_line()
    lanes = lanes_of(x)
    source, target = pointer(x), pointer(y)
    strips = (width + lanes - 1) // lanes
    ahead = height * width, height * width
    if height * width > _NEAR:
        # Along the longer side.
        step = _AHEAD * lanes
        ahead = (step * width, step) if height >= width else (step, step * height)
    lo, hi = span(part, parts, x.size // (height * width) * strips)
    for task in range(lo, hi):
        n = task // strips
        j = (task - n * strips) * lanes
        first = n * height * width
        columns = min(lanes, width - j)
        for i in range(0, height, lanes):
            rows = min(lanes, height - i)
            s, t = first + i * width + j, first + j * height + i
            if rows == lanes and columns == lanes:
                _square(1, source, s, width, target, t, height, rows, columns, ahead)
            else:
                _square(0, source, s, width, target, t, height, rows, columns, ahead)


def _transpose_all(x: np.ndarray, out: np.ndarray, height: int, width: int) -> None:
    """Copy matrices of `height` x `width`, of which one is the channels, to `out`."""
    x = checks.contiguous(x).reshape(-1)
    matrices = x.size // (height * width)
    if min(height, width) == 3:
        _transpose_three(
            part_count(matrices, x.size), x, out.reshape(-1), max(height, width), int(width == 3)
        )
    else:
        strips = matrices * -(-width // lanes(x.dtype))
        _transpose(part_count(strips, x.size), x, out.reshape(-1), height, width)


def copy(array: np.ndarray, out: np.ndarray) -> None:
    """Overwrite `out`, a contiguous array of the shape and dtype of `array`, with `array`.

    Faster than NumPy where `array` shows channels-last memory as (N, C, ...) or the other way round.
    """
    under_way = recording()
    # Otherwise the copy would be NumPy's, which a recording without calls does not see.
    jobs_only = under_way is not None and not under_way.calls
    few, many = (1, 1) if jobs_only else (_FEW, _MANY)
    if array.size >= few and array.ndim > 2 and array.dtype in checks.FLOATS and array.flags.aligned:
        last, first = np.moveaxis(array, 1, -1), np.moveaxis(array, -1, 1)
        for stored, channels in ((last, array.shape[1]), (first, array.shape[-1])):
            if stored.flags.c_contiguous and (channels == 3 or channels >= many):
                shape = stored[0].size // stored.shape[-1], stored.shape[-1]
                if stored is first:
                    shape = channels, stored[0].size // channels
                return _transpose_all(stored, out, *shape)
    if jobs_only:
        raise NotRecordedError("a recording does not see what NumPy copies")
    between_jobs(np.copyto, out, array)
    return None
