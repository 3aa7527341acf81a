"""Sums of weighted runs, held in registers: what sparse gradients and products of few rows consist of.

    target[t0 + c] += sum over i of values[i] * source[s0 + offsets[i] + c]

Neighbouring c lie in the lanes of vectors, as many vectors as the run is long.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import kernel
from .loops import sum_loop
from .simd import VECTOR_BITS
from .tile import Emitter
from .vectors import keep_in_line

# Runs are summed so many vectors at a time.
_MOST_VECTORS = 8
# Sums that a processor can start before the first is done: shorter runs are summed in several chains.
_CHAINS = 4
# Sums of several rows that fit the registers beside what they are multiplied with.
_REGISTERS = 18 if VECTOR_BITS == 512 else 12


@intrinsic(prefer_literal=True)
def _add_weighted(
    typing_context,
    rows,
    vectors,
    values,
    offsets,
    first,
    count,
    source,
    s0,
    source_step,
    target,
    t0,
    target_step,
    columns,
):
    """For r < rows, c < columns: target[t0 + r * target_step + c] += sum over i of
    values[first + i] * source[s0 + r * source_step + offsets[first + i] + c].

    All but the last of `vectors` vectors are whole; `source` is read in whole vectors.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (rows, vectors)):
        return None
    many, high = vectors.literal_value, rows.literal_value
    size = many * high
    chains = max(1, _CHAINS // size)
    numbers = (first, count, source, s0, source_step, target, t0, target_step, columns)
    signature = types.void(rows, vectors, values, offsets, *numbers)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, source.dtype)
        i64 = ir.IntType(64)

        def at(position, *offset):
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            return emit.at(array.data, *offset)

        def steps(pointer, step):
            pointers = [pointer]
            for _ in range(high - 1):
                pointers.append(emit.at(pointers[-1], step))
            return pointers

        first, count, columns = arguments[4], arguments[5], arguments[12]
        weights, places = at(2, first), at(3, first)
        sources = steps(at(6, arguments[7]), arguments[8])
        lanes = [ir.Constant(i64, v * emit.lanes) for v in range(many)]
        masks = ([None] * (many - 1) + [emit.mask(columns, many - 1)]) * high
        results = [emit.at(row, lane) for row in steps(at(9, arguments[10]), arguments[11]) for lane in lanes]
        sums = [emit.load(place, mask) for place, mask in zip(results, masks, strict=True)]
        sums += [ir.Constant(emit.vector, None)] * (size * (chains - 1))

        def add(i, sums):
            """The sums with the entry `i` added."""
            weight = emit.broadcast(builder.load(emit.at(weights, i)))
            offset = builder.sext(builder.load(emit.at(places, i)), i64)
            runs = [emit.at(row, offset, lane) for row in sources for lane in lanes]
            return [
                emit.multiply_add(weight, emit.load(run), total)
                for run, total in zip(runs, sums, strict=True)
            ]

        def add_several(k, sums):
            """An entry to the sums of each chain."""
            first = builder.mul(k, ir.Constant(i64, chains))
            entries = [builder.add(first, ir.Constant(i64, chain)) for chain in range(chains)]
            return [
                total
                for chain, i in enumerate(entries)
                for total in add(i, sums[chain * size : (chain + 1) * size])
            ]

        zero = ir.Constant(i64, 0)
        if chains == 1:
            sums = sum_loop(emit, zero, count, sums, add)
        else:
            rounds = builder.sdiv(count, ir.Constant(i64, chains))
            sums = sum_loop(emit, zero, rounds, sums, add_several)
            sums = [_total(builder, sums[k::size]) for k in range(size)]
            sums = sum_loop(emit, builder.mul(rounds, ir.Constant(i64, chains)), count, sums, add)
        for value, place, mask in zip(sums, results, masks, strict=True):
            emit.store(value, place, mask)
        return context.get_dummy_value()

    return signature, codegen


def _total(builder, terms):
    total = terms[0]
    for term in terms[1:]:
        # A flag of its own, lest Numba give it those that let LLVM reorder the sum.
        total = builder.fadd(total, term, flags=("nsz",))
    return total


@kernel
def add_runs(values, offsets, first, count, source, s0, target, t0, run):
    """target[t0 : t0 + run] += the weighted sum of `count` runs of the source, from entry `first` on."""
    keep_in_line()
    lanes = VECTOR_BITS // (8 * source.itemsize)
    while run > _MOST_VECTORS * lanes:
        _add_weighted(1, 8, values, offsets, first, count, source, s0, 0, target, t0, 0, 8 * lanes)
        s0 += 8 * lanes
        t0 += 8 * lanes
        run -= 8 * lanes
    vectors = (run + lanes - 1) // lanes
    if vectors == 1:
        _add_weighted(1, 1, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 2:
        _add_weighted(1, 2, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 3:
        _add_weighted(1, 3, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 4:
        _add_weighted(1, 4, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 5:
        _add_weighted(1, 5, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 6:
        _add_weighted(1, 6, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    elif vectors == 7:
        _add_weighted(1, 7, values, offsets, first, count, source, s0, 0, target, t0, 0, run)
    else:
        _add_weighted(1, 8, values, offsets, first, count, source, s0, 0, target, t0, 0, run)


@kernel
def add_rows_of_runs(
    values, offsets, first, count, source, s0, source_step, target, t0, target_step, rows, run
):
    """`add_runs` for `rows` rows, whose sources and targets lie a step apart; several at once if they fit.

    Entries are then read once for all, and short runs keep the processor busy.
    """
    keep_in_line()
    lanes = VECTOR_BITS // (8 * source.itemsize)
    vectors = (run + lanes - 1) // lanes
    while rows > 0:
        done = 1
        if rows >= 5 and vectors <= _REGISTERS // 5:
            done = 5
            if vectors == 1:
                _add_weighted(
                    5, 1, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            elif vectors == 2:
                _add_weighted(
                    5, 2, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            else:
                done = 1
        elif rows >= 3 and vectors <= _REGISTERS // 3:
            done = 3
            if vectors == 1:
                _add_weighted(
                    3, 1, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            elif vectors == 2:
                _add_weighted(
                    3, 2, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            elif vectors == 4:
                _add_weighted(
                    3, 4, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            elif vectors == 6:
                _add_weighted(
                    3, 6, values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
                )
            else:
                done = 1
        if done == 1:
            add_runs(values, offsets, first, count, source, s0, target, t0, run)
        s0 += done * source_step
        t0 += done * target_step
        rows -= done
