"""Sums of weighted runs, held in registers: what sparse gradients and products of few rows consist of.

    target[t0 + c] += sum over i of values[i] * source[s0 + offsets[i] + c]

Neighbouring c lie in the lanes of vectors, as many vectors as the run is long.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from ..jit import kernel
from .simd import VECTOR_BITS
from .tile import Emitter
from .vectors import keep_in_line

# Runs are summed so many vectors at a time.
_MOST_VECTORS = 8
# Sums that a processor can start before the first is done: shorter runs are summed in several chains.
_CHAINS = 4


@intrinsic(prefer_literal=True)
def _add_weighted(typing_context, vectors, values, offsets, first, count, source, s0, target, t0, columns):
    """target[t0 + c] += sum over i of values[first + i] * source[s0 + offsets[first + i] + c], c < columns.

    All but the last of `vectors` vectors are whole; `source` is read in whole vectors.
    """
    if not isinstance(vectors, types.IntegerLiteral):
        return None
    many = vectors.literal_value
    chains = max(1, _CHAINS // many)
    signature = types.void(vectors, values, offsets, first, count, source, s0, target, t0, columns)

    def codegen(context, builder, signature, arguments):
        emit = Emitter(context, builder, source.dtype)
        i64 = ir.IntType(64)

        def at(position, *offset):
            array = context.make_array(signature.args[position])(context, builder, arguments[position])
            return emit.at(array.data, *offset)

        first, count, columns = arguments[3], arguments[4], arguments[9]
        weights, places = at(1, first), at(2, first)
        runs, result = at(5, arguments[6]), at(7, arguments[8])
        lanes = [ir.Constant(i64, v * emit.lanes) for v in range(many)]
        masks = [None] * (many - 1) + [emit.mask(columns, many - 1)]
        sums = [emit.load(emit.at(result, lane), mask) for lane, mask in zip(lanes, masks, strict=True)]
        sums += [ir.Constant(emit.vector, None)] * (many * (chains - 1))

        def loop(begin, step, sums):
            """Entries from `begin` on, `step` at once while there are so many: where it ended, the sums."""
            entry = builder.block
            head, body, end = (builder.append_basic_block(name) for name in ("sum.if", "sum.do", "sum.end"))
            builder.branch(head)
            builder.position_at_end(head)
            i = builder.phi(i64)
            i.add_incoming(begin, entry)
            phis = [builder.phi(emit.vector) for _ in sums]
            following = builder.add(i, ir.Constant(i64, step))
            builder.cbranch(builder.icmp_signed("<=", following, count), body, end)
            builder.position_at_end(body)
            new = list(phis)
            for chain in range(step):
                entry_i = builder.add(i, ir.Constant(i64, chain))
                weight = emit.broadcast(builder.load(emit.at(weights, entry_i)))
                run = emit.at(runs, builder.sext(builder.load(emit.at(places, entry_i)), i64))
                for v in range(many):
                    k = chain * many + v
                    new[k] = emit.multiply_add(weight, emit.load(emit.at(run, lanes[v])), phis[k])
            for phi, begun, done in zip(phis, sums, new, strict=True):
                phi.add_incoming(begun, entry)
                phi.add_incoming(done, builder.block)
            i.add_incoming(following, builder.block)
            builder.branch(head)
            builder.position_at_end(end)
            return i, phis

        i, sums = loop(ir.Constant(i64, 0), chains, sums)
        if chains > 1:
            sums = [_total(builder, [sums[chain * many + v] for chain in range(chains)]) for v in range(many)]
            _, sums = loop(i, 1, sums)
        for value, lane, mask in zip(sums, lanes, masks, strict=True):
            emit.store(value, emit.at(result, lane), mask)
        return context.get_dummy_value()

    return signature, codegen


def _total(builder, terms):
    total = terms[0]
    for term in terms[1:]:
        total = builder.fadd(total, term)
    return total


@kernel
def add_runs(values, offsets, first, count, source, s0, target, t0, run):
    """target[t0 : t0 + run] += the weighted sum of `count` runs of the source, from entry `first` on."""
    keep_in_line()
    lanes = VECTOR_BITS // (8 * source.itemsize)
    while run > _MOST_VECTORS * lanes:
        _add_weighted(8, values, offsets, first, count, source, s0, target, t0, 8 * lanes)
        s0 += 8 * lanes
        t0 += 8 * lanes
        run -= 8 * lanes
    vectors = (run + lanes - 1) // lanes
    if vectors == 1:
        _add_weighted(1, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 2:
        _add_weighted(2, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 3:
        _add_weighted(3, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 4:
        _add_weighted(4, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 5:
        _add_weighted(5, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 6:
        _add_weighted(6, values, offsets, first, count, source, s0, target, t0, run)
    elif vectors == 7:
        _add_weighted(7, values, offsets, first, count, source, s0, target, t0, run)
    else:
        _add_weighted(8, values, offsets, first, count, source, s0, target, t0, run)
