"""What kernels written as LLVM instructions share: the loop that sums in registers, and turned squares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

_I64 = ir.IntType(64)


def memory(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The pointer to an array's elements."""
    return context.make_array(kind)(context, builder, array).data


def _not_unrolled(module: Any) -> Any:
    """The attribute of a loop that LLVM shall not unroll: it would read two k at once, and spill."""
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, disable)
    return loop


def sum_loop(
    emit: Any, first: Any, last: Any, start: Sequence[Any], step: Callable, unrolls: bool = True
) -> list[Any]:
    """The loop of k from `first` to `last` over ``values = step(k, values)``; returns the final values.

    These are sums, and pointers that move on with k. `step` may itself be a loop.
    """
    builder = emit.builder
    entry = builder.block
    loop = builder.append_basic_block("sum.k")
    end = builder.append_basic_block("sum.end")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, end)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    values = [builder.phi(value.type) for value in start]
    new = step(k, values)
    done = builder.block
    next_k = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(first, entry)
    k.add_incoming(next_k, done)
    for phi, begin, value in zip(values, start, new, strict=True):
        phi.add_incoming(begin, entry)
        phi.add_incoming(value, done)
    branch = builder.cbranch(builder.icmp_signed("<", next_k, last), loop, end)
    if not unrolls:
        branch.set_metadata("llvm.loop", _not_unrolled(builder.module))

    builder.position_at_end(end)
    results = [builder.phi(value.type) for value in start]
    for phi, begin, value in zip(results, start, new, strict=True):
        phi.add_incoming(begin, entry)
        phi.add_incoming(value, done)
    return results


def transposed(emit: Any, rows: Sequence[Any]) -> list[Any]:
    """The rows of a square of vectors, transposed: a perfect shuffle for each halving of their number."""
    many = emit.lanes
    order = [lane // 2 + many * (lane % 2) for lane in range(2 * many)]
    kind = ir.VectorType(ir.IntType(32), many)
    halves = [ir.Constant(kind, order[half * many : (half + 1) * many]) for half in (0, 1)]
    rows = list(rows)
    for _ in range(many.bit_length() - 1):
        pairs = zip(rows[: many // 2], rows[many // 2 :], strict=True)
        rows = [emit.builder.shuffle_vector(a, b, half) for a, b in pairs for half in halves]
    return rows
