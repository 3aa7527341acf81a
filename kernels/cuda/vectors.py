"""Four neighbouring elements at a time: one instruction of 16 bytes, where Numba alone makes four of 4.

Nothing is checked: the array must be C-contiguous, and element `index` aligned to 16 bytes.
"""

from __future__ import annotations

from .arrays import DeviceArray
from .jit import SIMULATED, device_function

# Elements of a vector, and the bytes that its address is a multiple of.
LANES = 4
ALIGNMENT = 16


def is_aligned(*arrays: DeviceArray) -> bool:
    """Whether the first elements of C-contiguous arrays can be read by vectors."""
    return not any(array.pointer % ALIGNMENT for array in arrays)


if SIMULATED:

    def load4(array, index):
        """The elements of a one-dimensional array from `index` on, as a tuple."""
        return array[index], array[index + 1], array[index + 2], array[index + 3]

    def store4(array, index, values):
        """Overwrite the elements of a one-dimensional array from `index` on with a tuple."""
        for lane in range(LANES):
            array[index + lane] = values[lane]

else:
    from llvmlite import ir
    from numba.cuda import types
    from numba.cuda.extending import intrinsic

    def _pointer(context, builder, array_type, array, index):
        """The address of element `index` as that of a vector."""
        data = context.make_array(array_type)(context, builder, value=array).data
        element = context.get_data_type(array_type.dtype)
        vector = ir.VectorType(element, LANES)
        return builder.bitcast(builder.gep(data, [index]), vector.as_pointer()), vector

    @intrinsic
    def load4(typingctx, array, index):
        """The elements of a one-dimensional array from `index` on, as a tuple."""
        result = types.UniTuple(array.dtype, LANES)

        def codegen(context, builder, signature, arguments):
            address, _ = _pointer(context, builder, signature.args[0], *arguments)
            loaded = builder.load(address, align=ALIGNMENT)
            lanes = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), k)) for k in range(LANES)]
            return context.make_tuple(builder, result, lanes)

        return result(array, types.intp), codegen

    @intrinsic
    def store4(typingctx, array, index, values):
        """Overwrite the elements of a one-dimensional array from `index` on with a tuple."""

        def codegen(context, builder, signature, arguments):
            array, index, values = arguments
            address, vector = _pointer(context, builder, signature.args[0], array, index)
            packed = ir.Constant(vector, ir.Undefined)
            for lane in range(LANES):
                value = builder.extract_value(values, lane)
                packed = builder.insert_element(packed, value, ir.Constant(ir.IntType(32), lane))
            builder.store(packed, address, align=ALIGNMENT)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.UniTuple(array.dtype, LANES)), codegen


@device_function
def load8(array, index):
    """Twice as many."""
    return load4(array, index) + load4(array, index + LANES)


@device_function
def store8(array, index, values):
    """Overwrite as many with a tuple."""
    store4(array, index, values[:LANES])
    store4(array, index + LANES, values[LANES:])
