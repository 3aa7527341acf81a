"""Sums of weighted runs, held in registers: what sparse gradients and products of few rows consist of.

    target[t0 + c] += sum over i of values[i] * source[s0 + offsets[i] + c]

Neighbouring c lie in the lanes of vectors, as many vectors as the run is long.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..jit import kernel
from .loops import sum_loop
from .simd import VECTOR_BITS
from .tile import Emitter
from .vectors import keep_in_line, lanes_of

_I64 = ir.IntType(64)

# Runs are summed so many vectors at a time.
_MOST_VECTORS = 8
# Sums that a processor can start before the first is done: shorter runs are summed in several chains.
_CHAINS = 4
# Sums of several rows that fit the registers beside what they are multiplied with.
_REGISTERS = 18 if VECTOR_BITS == 512 else 12


@intrinsic(prefer_literal=True)
def _add_weighted(typing_context, rows, vectors, operands):
    """For r < rows, c < columns: target[t0 + r * target_step + c] += sum over i of
    values[first + i] * source[s0 + r * source_step + offsets[first + i] + c].

    All but the last of `vectors` vectors are whole; `source` is read in whole vectors.
    """
    if not all(isinstance(literal, types.IntegerLiteral) for literal in (rows, vectors)):
        return None
    many, high = vectors.literal_value, rows.literal_value

    def codegen(context, builder, signature, arguments):
        kinds = operands.types
        emit = Emitter(context, builder, kinds[4].dtype)

        def data(kind, value):
            return context.make_array(kind)(context, builder, value).data

        values, offsets, first, count, source, s0, source_step, target, t0, target_step, columns = [
            data(kind, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(kinds, cgutils.unpack_tuple(builder, arguments[2]), strict=True)
        ]
        lanes = [ir.Constant(_I64, v * emit.lanes) for v in range(many)]
        masks = ([None] * (many - 1) + [emit.mask(columns, many - 1)]) * high
        places = [emit.at(row, lane) for row in _rows(emit, target, t0, target_step, high) for lane in lanes]
        sums = [emit.load(place, mask) for place, mask in zip(places, masks, strict=True)]
        sources = _rows(emit, source, s0, source_step, high)

        def add(i, sums):
            """The sums with the entry `i` added."""
            weight = emit.broadcast(builder.load(emit.at(values, first, i)))
            offset = builder.sext(builder.load(emit.at(offsets, first, i)), _I64)
            runs = [emit.at(row, offset, lane) for row in sources for lane in lanes]
            return [
                emit.multiply_add(weight, emit.load(run), total)
                for run, total in zip(runs, sums, strict=True)
            ]

        for value, place, mask in zip(_in_chains(emit, count, sums, add), places, masks, strict=True):
            emit.store(value, place, mask)
        return context.get_dummy_value()

    return types.void(rows, vectors, operands), codegen


def _rows(emit, base, start, step, count):
    """Pointers to so many rows that lie a step apart."""
    pointers = [emit.at(base, start)]
    for _ in range(count - 1):
        pointers.append(emit.at(pointers[-1], step))
    return pointers


def _in_chains(emit, count, sums, add):
    """The sums after `add` of all `count` entries; few are summed in several chains, added up at the end."""
    builder, size = emit.builder, len(sums)
    zero, chains = ir.Constant(_I64, 0), max(1, _CHAINS // size)
    if chains == 1:
        return sum_loop(emit, zero, count, sums, add)
    many = ir.Constant(_I64, chains)

    def add_several(k, sums):
        """An entry to the sums of each chain."""
        first = builder.mul(k, many)
        entries = [builder.add(first, ir.Constant(_I64, chain)) for chain in range(chains)]
        return [
            total
            for chain, i in enumerate(entries)
            for total in add(i, sums[chain * size : (chain + 1) * size])
        ]

    rounds = builder.sdiv(count, many)
    empty = [ir.Constant(emit.vector, None)] * (size * (chains - 1))
    sums = sum_loop(emit, zero, rounds, sums + empty, add_several)
    sums = [_total(builder, sums[k::size]) for k in range(size)]
    return sum_loop(emit, builder.mul(rounds, many), count, sums, add)


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
    lanes = lanes_of(source)
    while run > _MOST_VECTORS * lanes:
        whole = values, offsets, first, count, source, s0, 0, target, t0, 0, 8 * lanes
        _add_weighted(1, 8, whole)
        s0 += 8 * lanes
        t0 += 8 * lanes
        run -= 8 * lanes
    vectors = (run + lanes - 1) // lanes
    operands = values, offsets, first, count, source, s0, 0, target, t0, 0, run
    if vectors == 1:
        _add_weighted(1, 1, operands)
    elif vectors == 2:
        _add_weighted(1, 2, operands)
    elif vectors == 3:
        _add_weighted(1, 3, operands)
    elif vectors == 4:
        _add_weighted(1, 4, operands)
    elif vectors == 5:
        _add_weighted(1, 5, operands)
    elif vectors == 6:
        _add_weighted(1, 6, operands)
    elif vectors == 7:
        _add_weighted(1, 7, operands)
    else:
        _add_weighted(1, 8, operands)


@kernel
def add_rows_of_runs(
    values, offsets, first, count, source, s0, source_step, target, t0, target_step, rows, run
):
    """`add_runs` for `rows` rows, whose sources and targets lie a step apart; several at once if they fit.

    Entries are then read once for all, and short runs keep the processor busy.
    """
    keep_in_line()
    lanes = lanes_of(source)
    vectors = (run + lanes - 1) // lanes
    while rows > 0:
        operands = values, offsets, first, count, source, s0, source_step, target, t0, target_step, run
        done = 1
        if rows >= 5 and vectors <= min(_REGISTERS // 5, 2):
            done = 5
            if vectors == 1:
                _add_weighted(5, 1, operands)
            else:
                _add_weighted(5, 2, operands)
        elif rows >= 3 and vectors <= _REGISTERS // 3 and vectors in (1, 2, 4, 6):
            done = 3
            if vectors == 1:
                _add_weighted(3, 1, operands)
            elif vectors == 2:
                _add_weighted(3, 2, operands)
            elif vectors == 4:
                _add_weighted(3, 4, operands)
            else:
                _add_weighted(3, 6, operands)
        else:
            add_runs(values, offsets, first, count, source, s0, target, t0, run)
        s0 += done * source_step
        t0 += done * target_step
        rows -= done
