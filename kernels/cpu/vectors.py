"""Vectors as values in kernels: loads, stores, and what one computes with them.

LLVM turns a loop over a few channels into scalar code and takes long over each loop that it does vectorise.
With these, a kernel says itself what is done by vector. `Vector` is a Numba type: ``a + b``, ``a > b`` and
the functions below work on all lanes. A vector of floats has as many lanes as fit a register; what belongs to
it (masks, bytes, its float64 version) has as many lanes, in as many registers as it takes.

Nothing is checked: an index may leave its array only in lanes that a mask excludes. No operation is reordered
or contracted by the compiler, so that a result is the same wherever the code is inlined.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from .simd import VECTOR_BITS

# Numba gives the flags of its fastmath option to operations that have none of their own. These have, and are
# neither reordered nor contracted: NaN and infinity count, and only the sign of a zero does not.
AS_WRITTEN = ("nsz",)

_I32 = ir.IntType(32)

# Registers of the vectors by which long arrays are taken: fewer would leave the processor waiting for memory.
LONG = 4


class Vector(types.Type):
    """`lanes` values of `element`: a float, an integer, or a boolean, which makes it a mask."""

    def __init__(self, element: Any, lanes: int):
        self.element = element
        self.lanes = lanes
        super().__init__(f"Vector({element}, {lanes})")

    @property
    def shape(self) -> str:
        """LLVM's name of the type, as its intrinsics' names have it."""
        kind = "f" if isinstance(self.element, types.Float) else "i"
        return f"v{self.lanes}{kind}{self.element.bitwidth}"

    def of(self, element: Any) -> Vector:
        """The type of as many lanes of another element."""
        return Vector(element, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        is_mask = vector.element == types.boolean
        element = ir.IntType(1) if is_mask else manager[vector.element].get_data_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _vector_of(pointer: Any) -> Vector:
    return Vector(pointer.dtype, VECTOR_BITS // pointer.dtype.bitwidth)


def _call(builder, name, returned, values):
    function = ir.FunctionType(returned, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)


def splat_vector(builder, scalar, lanes):
    """What `splat` does, for other intrinsics."""
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), None))


@intrinsic
def keep_in_line(typing_context):
    """Have LLVM inline the function that says this."""

    def codegen(context, builder, signature, arguments):
        builder.function.attributes.add("alwaysinline")
        return context.get_dummy_value()

    return types.void(), codegen


# ------------------------------------------------------------------ memory


@intrinsic
def pointer(typing_context, array):
    """Where a contiguous array's elements are. It is valid as long as the array is.

    An array that is handed to another function has its references counted, in the middle of loops, and takes
    seven registers; a pointer is one number.
    """

    def codegen(context, builder, signature, values):
        return context.make_array(array)(context, builder, values[0]).data

    return types.CPointer(array.dtype)(array), codegen  # type: ignore[attr-defined]


@intrinsic
def pointers(typing_context, arrays):
    """Those of a tuple of arrays; see `pointer`."""

    def codegen(context, builder, signature, values):
        each = cgutils.unpack_tuple(builder, values[0])
        data = [
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip(arrays, each, strict=True)
        ]
        return context.make_tuple(builder, signature.return_type, data)

    several = types.UniTuple(types.CPointer(arrays[0].dtype), len(arrays))  # type: ignore[attr-defined]
    return several(arrays), codegen


def load_vector(context, builder, vector, source, index, mask):
    """What `load` does, for other intrinsics."""
    kind = context.get_value_type(vector)
    place = builder.bitcast(builder.gep(source, [index]), kind.as_pointer())
    alignment = ir.Constant(_I32, vector.element.bitwidth // 8)
    arguments = [place, alignment, mask, ir.Constant(kind, None)]
    return _call(builder, f"llvm.masked.load.{vector.shape}.p0", kind, arguments)


@intrinsic
def load(typing_context, source, index, mask):
    """source[index] and on, `source` being a pointer; lanes outside of `mask` are zero and not read."""
    vector = Vector(source.dtype, mask.lanes)

    def codegen(context, builder, signature, values):
        return load_vector(context, builder, vector, *values)

    return vector(source, types.intp, mask), codegen


@intrinsic(prefer_literal=True)
def loads(typing_context, count, source, index, step, mask):
    """A tuple of `count` vectors, `step` elements apart, the first from source[index]; see `load`."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    vector = Vector(source.dtype, mask.lanes)
    many = count.literal_value
    several = types.UniTuple(vector, many)  # type: ignore[attr-defined]

    def codegen(context, builder, signature, values):
        _, pointer, place, distance, lanes = values
        each = []
        for _ in range(many):
            each.append(load_vector(context, builder, vector, pointer, place, lanes))
            place = builder.add(place, distance)
        return context.make_tuple(builder, several, each)

    return several(count, source, types.intp, types.intp, mask), codegen


def store_vector(builder, vector, value, target, index, mask):
    """What `store` does, for other intrinsics."""
    place = builder.bitcast(builder.gep(target, [index]), value.type.as_pointer())
    alignment = ir.Constant(_I32, vector.element.bitwidth // 8)
    _call(builder, f"llvm.masked.store.{vector.shape}.p0", ir.VoidType(), [value, place, alignment, mask])


@intrinsic
def store(typing_context, value, target, index, mask):
    """Write to target[index] and on, `target` being a pointer; lanes outside of `mask` are left alone."""

    def codegen(context, builder, signature, values):
        store_vector(builder, value, *values)
        return context.get_dummy_value()

    return types.void(value, target, types.intp, mask), codegen


@intrinsic
def store_around(typing_context, value, target, index):
    """Write to target[index] and on, around the caches; what is there must begin at a whole register.

    A plain store reads what it overwrites first. Other threads see these stores after a `fence`.
    """

    def codegen(context, builder, signature, values):
        place = builder.bitcast(builder.gep(values[1], [values[2]]), values[0].type.as_pointer())
        written = builder.store(values[0], place)
        written.align = VECTOR_BITS // 8
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(value, target, types.intp), codegen


@intrinsic
def fence(typing_context):
    """Let no access to memory behind this come before one that precedes it."""

    def codegen(context, builder, signature, values):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def prefetch_at(builder, source, index):
    """What `prefetch` does, for other intrinsics."""
    place = builder.bitcast(builder.gep(source, [index]), ir.IntType(8).as_pointer())
    switches = [ir.Constant(_I32, number) for number in (0, 2, 1)]  # to read, to the second level, data
    _call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *switches])


@intrinsic
def prefetch(typing_context, source, index):
    """Have the second-level cache fetch source[index], which need not exist, `source` being a pointer."""

    def codegen(context, builder, signature, values):
        prefetch_at(builder, *values)
        return context.get_dummy_value()

    return types.void(source, types.intp), codegen


def _first_lanes(typing_context, pointer, count, registers):
    mask = Vector(types.boolean, registers * VECTOR_BITS // pointer.dtype.bitwidth)

    def codegen(context, builder, signature, values):
        numbers = ir.Constant(ir.VectorType(_I32, mask.lanes), list(range(mask.lanes)))
        most = ir.Constant(values[1].type, mask.lanes)
        count = builder.select(builder.icmp_signed("<", values[1], most), values[1], most)
        limit = splat_vector(builder, builder.trunc(count, _I32), mask.lanes)
        return builder.icmp_signed("<", numbers, limit)

    return mask(pointer, types.intp), codegen


def _all_lanes(typing_context, pointer, registers):
    mask = Vector(types.boolean, registers * VECTOR_BITS // pointer.dtype.bitwidth)

    def codegen(context, builder, signature, values):
        return ir.Constant(context.get_value_type(mask), [1] * mask.lanes)

    return mask(pointer), codegen


@intrinsic
def first_lanes(typing_context, pointer, count):
    """A mask of the first `count` lanes of a vector of what `pointer` points to."""
    return _first_lanes(typing_context, pointer, count, 1)


@intrinsic
def all_lanes(typing_context, pointer):
    """The mask of every lane of a vector of what `pointer` points to."""
    return _all_lanes(typing_context, pointer, 1)


@intrinsic
def prefetch_vector(typing_context, source, index, mask):
    """As `prefetch`, for source[index] and on, as many elements as `mask` has lanes."""

    def codegen(context, builder, signature, values):
        for k in range(0, mask.lanes, 512 // source.dtype.bitwidth):
            prefetch_at(builder, values[0], builder.add(values[1], ir.Constant(values[1].type, k)))
        return context.get_dummy_value()

    return types.void(source, types.intp, mask), codegen


@intrinsic
def first_long_lanes(typing_context, pointer, count):
    """A mask of the first `count` lanes of a vector of `LONG` registers."""
    return _first_lanes(typing_context, pointer, count, LONG)


@intrinsic
def all_long_lanes(typing_context, pointer):
    """The mask of every lane of a vector of `LONG` registers."""
    return _all_lanes(typing_context, pointer, LONG)


@intrinsic
def lanes_of(typing_context, pointer):
    """Lanes of a vector of what `pointer` points to, or of an array's elements: a constant.

    An array's `itemsize` is none for Numba: each loop over vectors would begin with a division.
    """
    count = VECTOR_BITS // pointer.dtype.bitwidth

    def codegen(context, builder, signature, values):
        return ir.Constant(ir.IntType(64), count)

    return types.intp(pointer), codegen


@intrinsic
def zeros(typing_context, pointer):
    """Zero in every lane of a vector of what `pointer` points to."""
    vector = _vector_of(pointer)

    def codegen(context, builder, signature, values):
        return ir.Constant(context.get_value_type(vector), None)

    return vector(pointer), codegen


@intrinsic
def splat(typing_context, scalar, mask):
    """`scalar` in as many lanes as `mask` has."""
    vector = Vector(scalar, mask.lanes)

    def codegen(context, builder, signature, values):
        return splat_vector(builder, values[0], vector.lanes)

    return vector(scalar, mask), codegen


@intrinsic
def like(typing_context, vector, scalar):
    """`scalar`, converted to the elements of `vector`, in each of its lanes."""

    def codegen(context, builder, signature, values):
        value = context.cast(builder, values[1], scalar, vector.element)
        return splat_vector(builder, value, vector.lanes)

    return vector(vector, scalar), codegen


# ------------------------------------------------------------------ arithmetic


def _register(function, result, emit):
    """Give a Python operator a meaning for two vectors of one type."""

    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(result(args[0]), *args)
            return None

    @lower_builtin(function, Vector, Vector)
    def lower(context, builder, sig, values):
        return emit(builder, sig.args[0], *values)


def _is_float(vector):
    return isinstance(vector.element, types.Float)


def _arithmetic(float_name, integer_name):
    def emit(builder, vector, a, b):
        if _is_float(vector):
            return getattr(builder, float_name)(a, b, flags=AS_WRITTEN)
        return getattr(builder, integer_name)(a, b)

    return emit


def _comparison(symbol):
    def emit(builder, vector, a, b):
        if not _is_float(vector):
            return builder.icmp_signed(symbol, a, b)
        # As in Python, NaN is unequal to everything, and all other comparisons with it are false.
        compare = builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered
        return compare(symbol, a, b)

    return emit


def _same(vector):
    return vector


def _mask_of(vector):
    return vector.of(types.boolean)


_register(operator.add, _same, _arithmetic("fadd", "add"))
_register(operator.sub, _same, _arithmetic("fsub", "sub"))
_register(operator.mul, _same, _arithmetic("fmul", "mul"))
_register(operator.truediv, _same, _arithmetic("fdiv", "sdiv"))
_register(operator.and_, _same, _arithmetic("", "and_"))
_register(operator.or_, _same, _arithmetic("", "or_"))
_register(operator.xor, _same, _arithmetic("", "xor"))
for _operator, _symbol in (
    (operator.gt, ">"),
    (operator.le, "<="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _register(_operator, _mask_of, _comparison(_symbol))


@intrinsic
def select(typing_context, mask, a, b):
    """Lane by lane, a where `mask` is true, else b."""

    def codegen(context, builder, signature, values):
        return builder.select(*values)

    return a(mask, a, a), codegen


@intrinsic
def steps(typing_context, size, mask):
    """0, `size`, twice `size` and so on, in as many lanes as `mask` has; `size` is an int32."""
    vector = Vector(size, mask.lanes)

    def codegen(context, builder, signature, values):
        numbers = ir.Constant(context.get_value_type(vector), list(range(vector.lanes)))
        return builder.mul(numbers, splat_vector(builder, values[0], vector.lanes))

    return vector(size, mask), codegen


def compressed(builder, shape, value, mask):
    """What `compress` does, for other intrinsics."""
    undefined = ir.Constant(value.type, ir.Undefined)
    return _call(builder, f"llvm.experimental.vector.compress.{shape}", value.type, [value, mask, undefined])


@intrinsic
def compress(typing_context, a, mask):
    """The lanes of `a` that are in `mask`, moved to the front; behind them is anything."""

    def codegen(context, builder, signature, values):
        return compressed(builder, a.shape, *values)

    return a(a, mask), codegen


def lanes_in(builder, mask):
    """What `count` does, for other intrinsics."""
    bits = ir.IntType(mask.type.count)
    number = _call(builder, f"llvm.ctpop.i{mask.type.count}", bits, [builder.bitcast(mask, bits)])
    return builder.zext(number, ir.IntType(64))


@intrinsic
def count(typing_context, mask):
    """How many lanes are in `mask`."""

    def codegen(context, builder, signature, values):
        return lanes_in(builder, values[0])

    return types.intp(mask), codegen


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, values):
        return _call(builder, f"llvm.fma.{a.shape}", values[0].type, list(values))

    return a(a, a, a), codegen


@intrinsic
def root(typing_context, a):
    """The square root of each lane."""

    def codegen(context, builder, signature, values):
        return _call(builder, f"llvm.sqrt.{a.shape}", values[0].type, list(values))

    return a(a), codegen


@intrinsic
def wide(typing_context, a):
    """A vector of floats in float64."""
    vector = a.of(types.float64)

    def codegen(context, builder, signature, values):
        if a.element == types.float64:
            return values[0]
        return builder.fpext(values[0], context.get_value_type(vector))

    return vector(a), codegen


def any_of(builder, mask):
    """Whether a mask is true in a lane."""
    bits = ir.IntType(mask.type.count)
    return builder.icmp_unsigned("!=", builder.bitcast(mask, bits), ir.Constant(bits, 0))


def _folded(builder, value, lanes, combine):
    """Upper half with lower half, until one lane is left."""
    while lanes > 1:
        lanes //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        lower, upper = (
            builder.shuffle_vector(
                value, undefined, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes)))
            )
            for first in (0, lanes)
        )
        value = combine(lower, upper)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic
def total(typing_context, a):
    """The sum of all lanes, always added in the same order."""

    def codegen(context, builder, signature, values):
        def added(lower, upper):
            return builder.fadd(lower, upper, flags=AS_WRITTEN)

        return _folded(builder, values[0], a.lanes, added)

    return a.element(a), codegen


@intrinsic
def largest(typing_context, a):
    """The largest lane, if none is NaN."""

    def codegen(context, builder, signature, values):
        def larger(lower, upper):
            return builder.select(builder.fcmp_ordered(">", lower, upper), lower, upper)

        return _folded(builder, values[0], a.lanes, larger)

    return a.element(a), codegen
