"""The largest of 3 x 3 pixels, without a loop over them.

In a loop each pixel waits for the comparison of the one before. Here the largest is found first, which is one
instruction a pixel, and then, all at once, where it is.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .vectors import (
    AS_WRITTEN,
    Vector,
    any_of,
    load_vector,
    prefetch_at,
    store_vector,
)

# Processors foresee steps from one address to the next only, not from one row of an image to another: so many
# elements ahead of the one in work they are told to fetch.
AHEAD = 8192


def _sum(builder: Any, values: list[Any]) -> Any:
    """The sum of vectors, added in pairs."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        odd = values[len(values) // 2 * 2 :]
        values = [builder.fadd(a, b, flags=AS_WRITTEN) for a, b in pairs] + odd
    return values[0]


def _places(builder: Any, first: Any, line: Any, pixel: Any) -> list[list[Any]]:
    """Where the pixels of a window are, row by row, if the first of them is at `first`."""
    rows = [[first]]
    for _ in range(2):
        rows.append([builder.add(rows[-1][0], line)])
    for row in rows:
        for _ in range(2):
            row.append(builder.add(row[-1], pixel))
    return rows


@intrinsic
def largest_of_nine(typing_context, x, y, argmax, source, line, pixel, target, mask):
    """Overwrite y[target] and argmax[target], and on, with the largest of a window's pixels and its number.

    The window's 3 x 3 pixels, from x[source] on, are `line` and `pixel` elements apart. Returns whether that
    may be wrong: if one of them is NaN, or two are infinite.
    """
    vector = Vector(x.dtype, mask.lanes)
    narrow = vector.of(argmax.dtype)

    def codegen(context, builder, signature, values):
        x_data, y_data, argmax_data, first, to_line, to_pixel, place, lanes = values
        rows = _places(builder, first, to_line, to_pixel)
        # Neighbours, two pixels or one away, fetch the others.
        for at in (at for row in rows[:2] for at in row[:2]):
            prefetch_at(builder, x_data, builder.add(at, ir.Constant(at.type, AHEAD)))
        pixels = [load_vector(context, builder, vector, x_data, at, lanes) for row in rows for at in row]
        best = pixels[0]
        for value in pixels[1:]:
            best = builder.select(builder.fcmp_ordered(">", value, best), value, best)
        # The first of the equals comes last. Numbers are as wide as pixels, so that a comparison fits both.
        wide = ir.VectorType(ir.IntType(x.dtype.bitwidth), mask.lanes)
        numbers = [ir.Constant(wide, [k] * mask.lanes) for k in range(len(pixels))]
        where = numbers[-1]
        for value, number in zip(pixels[-2::-1], numbers[-2::-1], strict=True):
            where = builder.select(builder.fcmp_ordered("==", value, best), number, where)
        store_vector(builder, vector, best, y_data, place, lanes)
        number = builder.trunc(where, context.get_value_type(narrow))
        store_vector(builder, narrow, number, argmax_data, place, lanes)
        total = _sum(builder, pixels)
        return any_of(builder, builder.fcmp_unordered("uno", total, total))

    return types.boolean(x, y, argmax, types.intp, types.intp, types.intp, types.intp, mask), codegen
