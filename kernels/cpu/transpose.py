"""Copies between (N, H, W, C) and (N, C, H, W): transposed matrices, a square of vectors at a time.

Few channels, as images have them, would leave most of a square empty: their pixels are taken a vector of each
channel at a time.
"""

from __future__ import annotations

import itertools

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
# Pixels of so many channels are whole vectors, of which each one of the result takes its lanes.
_FEW_CHANNELS = range(2, 10)
# Pixels of one task of theirs.
_STRIP = 4096
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


@intrinsic
def _pixels(typing_context, channels, to_first, x, x0, stride, y, y0, pitch):
    """As many pixels of few channels as a vector has lanes, from (..., C) to (C, ...) if `to_first`, or back.

    Vectors are `stride` apart in x and `pitch` in y.
    """
    signature = types.void(channels, to_first, x, x0, stride, y, y0, pitch)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, x.dtype)
        channels, to_first, source, x0, stride, target, y0, pitch = arguments
        source, target = emit.at(source, x0), emit.at(target, y0)
        i64, many = ir.IntType(64), emit.lanes
        done = builder.append_basic_block("done")
        one_of = builder.switch(builder.add(builder.add(channels, channels), to_first), done)
        for each, is_last in itertools.product(_FEW_CHANNELS, (False, True)):
            one_of.add_case(ir.Constant(i64, 2 * each + is_last), builder.append_basic_block("case"))
            builder.position_at_end(one_of.cases[-1][1])
            shape = (many, each) if is_last else (each, many)
            picks = np.arange(each * many).reshape(shape).T.reshape(each, many).tolist()
            numbers = [ir.Constant(i64, k) for k in range(each)]
            vectors = [emit.load(emit.at(source, builder.mul(stride, k))) for k in numbers]
            for k, chosen in zip(numbers, picks, strict=True):
                emit.store(_picked(emit, vectors, chosen), emit.at(target, builder.mul(pitch, k)))
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@parallel
def _transpose_few(part, parts, x, y, pixels, channels, to_first):
    """Images of few channels, from channels-last to channels-first if `to_first`, or back."""
    keep_out_of_line()
    lanes = lanes_of(x)
    source, target = pointer(x), pointer(y)
    strips = (pixels + _STRIP - 1) // _STRIP
    lo, hi = span(part, parts, x.size // (channels * pixels) * strips)
    for task in range(lo, hi):
        n = task // strips
        first, begin = n * channels * pixels, (task - n * strips) * _STRIP
        end = min(begin + _STRIP, pixels)
        whole = begin + (end - begin) // lanes * lanes
        for p in range(begin, whole, lanes):
            if to_first:
                _pixels(channels, 1, source, first + channels * p, lanes, target, first + p, pixels)
            else:
                _pixels(channels, 0, source, first + p, pixels, target, first + channels * p, lanes)
        for p in range(whole, end):
            for c in range(channels):
                if to_first:
                    y[first + c * pixels + p] = x[first + channels * p + c]
                else:
                    y[first + channels * p + c] = x[first + c * pixels + p]


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
    channels, pixels = min(height, width), max(height, width)
    if channels in _FEW_CHANNELS:
        parts = part_count(matrices * -(-pixels // _STRIP), x.size)
        _transpose_few(parts, x, out.reshape(-1), pixels, channels, int(width == channels))
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
    few = 1 if jobs_only else _FEW
    if array.size >= few and array.ndim > 2 and array.dtype in checks.FLOATS and array.flags.aligned:
        last, first = np.moveaxis(array, 1, -1), np.moveaxis(array, -1, 1)
        for stored, channels in ((last, array.shape[1]), (first, array.shape[-1])):
            if stored.flags.c_contiguous and (channels > 1 or jobs_only):
                shape = stored[0].size // stored.shape[-1], stored.shape[-1]
                if stored is first:
                    shape = channels, stored[0].size // channels
                return _transpose_all(stored, out, *shape)
    if jobs_only:
        raise NotRecordedError("a recording does not see what NumPy copies")
    between_jobs(np.copyto, out, array)
    return None
