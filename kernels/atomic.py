"""Atomic words of memory, waiting, and calling a kernel through an address: what `threads` is made of."""

from __future__ import annotations

import os
import platform

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.types.containers import BaseTuple
from numba.extending import intrinsic

# Where a control block keeps the address of the job's function, that of its arguments, and the number of its
# parts; and the arguments themselves.
JOB = 16
ARGUMENTS = 40
ARGUMENT_WORDS = 512
_NAP_MICROSECONDS = 30

_I64 = ir.IntType(64)
_I32 = ir.IntType(32)
_POINTER = ir.IntType(8).as_pointer()


def _word(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def atomic_load(typing_context, array, index):
    """array[index] of an int64 array, not before anything that another thread stored ahead of it."""

    def codegen(context, builder, signature, arguments):
        return builder.load_atomic(_word(context, builder, array, *arguments), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def atomic_store(typing_context, array, index, value):
    """array[index] = value, after everything stored ahead of it."""

    def codegen(context, builder, signature, arguments):
        place = _word(context, builder, array, arguments[0], arguments[1])
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def atomic_add(typing_context, array, index, value):
    """array[index] += value; returns what was there."""

    def codegen(context, builder, signature, arguments):
        place = _word(context, builder, array, arguments[0], arguments[1])
        return builder.atomic_rmw("add", place, arguments[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def atomic_swap_if(typing_context, array, index, expected, value):
    """array[index] = value if `expected` is there; returns whether it was."""

    def codegen(context, builder, signature, arguments):
        place = _word(context, builder, array, arguments[0], arguments[1])
        result = builder.cmpxchg(place, arguments[2], arguments[3], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), codegen


def naming(kinds):
    """An intrinsic that names the items of a tuple: `kinds` has classes and kinds of their items, or None.

    Numba takes a microsecond for each look at a named tuple, and a fraction of it for another. The memory of
    both is the same.
    """

    @intrinsic
    def named(typing_context, items):
        kind = BaseTuple.from_types(_named_types(items.types, kinds))

        def codegen(context, builder, signature, values):
            return _renamed(context, builder, values[0], items, kind)

        return kind(items), codegen

    return named


def _named_types(plain, kinds):
    return tuple(
        one if kind is None else BaseTuple.from_types(_named_types(one.types, kind[1]), kind[0])
        for one, kind in zip(plain, kinds, strict=True)
    )


def _renamed(context, builder, value, plain, named):
    """The value of type `plain`, as the type `named`, whose items have the same memory or are renamed too."""
    if plain == named:
        return value
    items = [
        _renamed(context, builder, item, before, after)
        for item, before, after in zip(
            cgutils.unpack_tuple(builder, value), plain.types, named.types, strict=True
        )
    ]
    return context.make_tuple(builder, named, items)


def _external(builder, returned, name, values):
    function = ir.FunctionType(returned, [value.type for value in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), values)


@intrinsic
def pause(typing_context):
    """Tell the processor that this is a waiting loop."""

    def codegen(context, builder, signature, arguments):
        if platform.machine() in ("x86_64", "AMD64"):
            _external(builder, ir.VoidType(), "llvm.x86.sse2.pause", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def processor(typing_context):
    """The number of the processor that runs this; -1 where the system doesn't tell."""

    def codegen(context, builder, signature, arguments):
        if platform.system() != "Linux":
            return ir.Constant(_I64, -1)
        return builder.sext(_external(builder, _I32, "sched_getcpu", []), _I64)

    return types.int64(), codegen


@intrinsic
def nap(typing_context):
    """Give the processor away for a moment, so that a thread without one can finish its part."""

    def codegen(context, builder, signature, arguments):
        if os.name == "posix":
            _external(builder, _I32, "usleep", [ir.Constant(_I32, _NAP_MICROSECONDS)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prepare(typing_context, control, parts, body, arguments_tuple):
    """Write the job ``body(part, parts, *arguments)`` to the control block.

    The caller must keep the arrays among the arguments alive as long as the job may be done.
    """
    parameters = (types.intp, types.intp, *arguments_tuple.types)
    called = body.get_call_type(typing_context, parameters, {})

    def codegen(context, builder, signature, values):
        compiled = body.dispatcher.get_compile_result(called)
        context.active_code_library.add_linking_library(compiled.library)
        arguments = _borrowed(context, builder, arguments_tuple, values[3])
        if context.get_abi_sizeof(arguments.type) > 8 * ARGUMENT_WORDS:
            raise TypeError(f"{body.dispatcher.py_func.__name__}: more arguments than a control block holds")
        place = _word(context, builder, control, values[0], ir.Constant(_I64, ARGUMENTS))
        kept = builder.bitcast(place, arguments.type.as_pointer())
        builder.store(arguments, kept)
        job = _trampoline(context, builder.module, compiled.fndesc, called, kept.type)
        content = (builder.ptrtoint(job, _I64), builder.ptrtoint(kept, _I64), values[1])
        for i, value in enumerate(content):
            place = _word(context, builder, control, values[0], ir.Constant(_I64, JOB + i))
            builder.store(value, place)
        return context.get_dummy_value()

    return types.void(control, parts, body, arguments_tuple), codegen


def _borrowed(context, builder, kind, value):
    """An argument whose arrays own nothing: a job may be done again when Numba's owner of them is gone."""
    if isinstance(kind, BaseTuple):
        items = [
            _borrowed(context, builder, item, builder.extract_value(value, i))
            for i, item in enumerate(kind.types)
        ]
        return context.make_tuple(builder, kind, items)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = ir.Constant(array.meminfo.type, None)
    array.parent = ir.Constant(array.parent.type, None)
    return array._getvalue()


def _trampoline(context, module, description, called, kept):
    """A C function (arguments, part, parts) that does one part and returns whether it failed."""
    shape = ir.FunctionType(_I32, [_POINTER, _I64, _I64])
    function = ir.Function(module, shape, f"fastcnn.part.{description.unique_name}")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    pointer, part, parts = function.args
    values = cgutils.unpack_tuple(builder, builder.load(builder.bitcast(pointer, kept)))
    status, _ = context.call_internal_no_propagate(builder, description, called, [part, parts, *values])
    builder.ret(builder.zext(status.is_error, _I32))
    return function


@intrinsic
def run_part(typing_context, control, part):
    """Do one part of the job in the control block; returns 1 if it failed, else 0."""

    def codegen(context, builder, signature, values):
        places = [_word(context, builder, control, values[0], ir.Constant(_I64, JOB + i)) for i in range(3)]
        job, kept, parts = (builder.load(place) for place in places)
        shape = ir.FunctionType(_I32, [_POINTER, _I64, _I64])
        function = builder.inttoptr(job, shape.as_pointer())
        failed = builder.call(function, [builder.inttoptr(kept, _POINTER), values[1], parts])
        return builder.zext(failed, _I64)

    return types.int64(control, types.int64), codegen
