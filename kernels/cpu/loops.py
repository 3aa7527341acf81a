"""What the tiles beside `tile` share: the loop that sums in registers, written as LLVM instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

_I64 = ir.IntType(64)


def memory(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """The pointer to an array's elements."""
    return context.make_array(kind)(context, builder, array).data


def sum_loop(emit: Any, first: Any, last: Any, start: Sequence[Any], step: Callable) -> list[Any]:
    """The loop of k from `first` to `last` over ``sums = step(k, sums)``; returns the final sums."""
    builder = emit.builder
    entry = builder.block
    loop = builder.append_basic_block("sum.k")
    end = builder.append_basic_block("sum.end")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, end)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [builder.phi(emit.vector) for _ in start]
    new = step(k, sums)
    next_k = builder.add(k, ir.Constant(_I64, 1))
    k.add_incoming(first, entry)
    k.add_incoming(next_k, loop)
    for phi, begin, value in zip(sums, start, new, strict=True):
        phi.add_incoming(begin, entry)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", next_k, last), loop, end)

    builder.position_at_end(end)
    results = [builder.phi(emit.vector) for _ in start]
    for phi, begin, value in zip(results, start, new, strict=True):
        phi.add_incoming(begin, entry)
        phi.add_incoming(value, loop)
    return results
