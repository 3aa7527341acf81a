"""Arrays of the device: NumPy's views, no silent copies, memory used again, foreign arrays in place."""

import copy
import gc
import importlib
import pickle
import threading
import weakref

import cuda_device
import numpy as np
import pytest

cuda = cuda_device.module()
pool = importlib.import_module("fastcnn.kernels.cuda.pool")
pytestmark = cuda_device.marks

VIEWS = [
    lambda a: a.transpose(0, 2, 3, 1),
    lambda a: a.transpose((3, 1, 0, 2)),
    lambda a: a.transpose(),
    lambda a: a.T,
    lambda a: a[1],
    lambda a: a[-1, ..., 2],
    lambda a: a[:, ::-1, 1:3],
    lambda a: a[None, :, 1, ::2, None],
    lambda a: a[..., 4:1:-2],
    lambda a: a[2:0, :, 5:],
    lambda a: a[:, :, 3:9],
    lambda a: a.reshape(6, -1),
    lambda a: a.reshape((-1,)),
    lambda a: a.transpose(0, 2, 3, 1).reshape(8, 15),
    lambda a: a[:, 1:2].transpose(3, 1, 2, 0)[::-1],
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8, np.int64, np.uint16])
@pytest.mark.parametrize("view", VIEWS)
def test_views_are_numpy_s(view, dtype):
    host = np.arange(120).astype(dtype).reshape(2, 3, 4, 5)
    device = cuda.from_numpy(host)
    ours, theirs = view(device), view(host)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert ours.ndim == theirs.ndim
    assert ours.size == theirs.size
    assert ours.nbytes == theirs.nbytes
    assert ours.flags.c_contiguous == theirs.flags.c_contiguous
    assert np.array_equal(ours.numpy(), theirs)


def test_a_view_shares_memory_and_a_copy_does_not():
    host = np.zeros((3, 4), np.float32)
    device = cuda.from_numpy(host)
    other = device.copy()
    device[:, 1:3] = 5
    device.T[0] = np.array([1, 2, 3])
    device[2, 3:] = cuda.from_numpy(np.array([7], np.float32))
    host[:, 1:3] = 5
    host.T[0] = [1, 2, 3]
    host[2, 3:] = 7
    assert np.array_equal(device.numpy(), host)
    assert not other.numpy().any()
    assert device.reshape(12).pointer == device.pointer


@pytest.mark.parametrize(
    "shape", [(2, 9, 5, 7), (1, 8, 8, 1), (3, 33, 2, 20), (2, 40, 70), (11, 9), (2, 3, 5, 4)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_channels_first_and_last(shape, dtype):
    host = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    device = cuda.from_numpy(host)
    last = np.moveaxis(host, 1, -1)
    axes = (0, *range(2, host.ndim), 1)
    moved = device.transpose(axes).copy()
    assert moved.is_contiguous
    assert np.array_equal(moved.numpy(), last)
    back = moved.transpose(np.argsort(axes).tolist())
    assert np.array_equal(back.copy().numpy(), host)
    # A part of the images, and a target with strides.
    assert np.array_equal(device[::2].transpose(axes).numpy(), last[::2])
    target = cuda.zeros(shape, dtype).transpose(axes)
    target[...] = moved
    assert np.array_equal(target.numpy(), last)


def test_which_copies_are_transposed_matrices():
    from fastcnn.kernels.cuda.strided import _matrices

    assert _matrices([(2, 315, 315), (35, 9, 1), (9, 1, 35)]) == (2, 35, 9)
    assert _matrices([(35, 9, 1), (9, 1, 35)]) == (1, 35, 9)
    # Every second image; a part of each; few columns; not a matrix.
    assert _matrices([(2, 315, 630), (35, 9, 1), (9, 1, 35)]) is None
    assert _matrices([(2, 315, 400), (35, 9, 1), (9, 1, 40)]) is None
    assert _matrices([(2, 105, 105), (35, 3, 1), (3, 1, 35)]) is None
    assert _matrices([(40, 1, 3)]) is None


def test_copies_of_python_s_are_arrays_of_the_device():
    array = cuda.from_numpy(np.arange(3.0))
    for twin in (copy.copy(array), copy.deepcopy(array)):
        assert isinstance(twin, cuda.DeviceArray)
        assert twin.pointer != array.pointer
        assert np.array_equal(twin.numpy(), array.numpy())
    assert np.array_equal(pickle.loads(pickle.dumps(array)), [0, 1, 2])


@pytest.mark.parametrize("dtype", [object, "U3", "M8[s]", np.complex128, np.longdouble])
def test_dtypes_that_no_device_has_are_refused(dtype):
    for make in (lambda: cuda.empty(2, dtype), lambda: cuda.from_numpy(np.zeros(2, dtype))):
        with pytest.raises(TypeError, match=r"^dtype: "):
            make()


@pytest.mark.parametrize("wide", ["float32", "float64", "int64"])
@pytest.mark.parametrize("kind", ["uint8", "int32", "uint64", "float32", "float64"])
def test_other_dtypes(kind, wide):
    host = np.array([[0, 1, 200], [3, 4, 5]], kind)
    device = cuda.from_numpy(host)
    result = device.T.astype(wide)
    assert result.dtype == wide
    assert np.array_equal(result.numpy(), host.T.astype(wide))
    assert (device.astype(wide, copy=False) is device) == (kind == wide)
    assert device.astype(wide).pointer != device.pointer
    with pytest.raises(TypeError, match=rf"^dtype: {kind} does not become float16"):
        device.astype(np.float16)


def test_a_truth_is_not_guessed():
    with pytest.raises(TypeError, match=r"numpy\(\)"):
        bool(cuda.zeros(1))


def test_negative_sizes_are_refused():
    for shape in (-1, (2, -3)):
        with pytest.raises(ValueError, match=r"^shape: .*negative"):
            cuda.zeros(shape)


def test_a_copy_onto_itself_reads_first():
    host = np.arange(40.0).reshape(8, 5)
    device = cuda.from_numpy(host)
    device[1:] = device[:-1]
    host[1:] = host[:-1].copy()
    assert np.array_equal(device.numpy(), host)
    square = cuda.from_numpy(np.arange(100.0).reshape(10, 10))
    square[...] = square.T
    assert np.array_equal(square.numpy(), np.arange(100.0).reshape(10, 10).T)


def test_zeros_fill_and_item():
    array = cuda.zeros((2, 3), np.float64)
    assert not array.numpy().any()
    array.fill(2.5)
    assert (array.numpy() == 2.5).all()
    assert array[1, 2].item() == 2.5
    assert cuda.zeros(()).item() == 0
    assert cuda.zeros((0, 4)).numpy().shape == (0, 4)


def test_numpy_writes_where_it_is_told():
    device = cuda.from_numpy(np.arange(6.0).reshape(2, 3))
    out = np.empty((3, 2))
    assert device.numpy(out.T) is not None
    assert np.array_equal(out.T, device.numpy())
    with pytest.raises(ValueError, match=r"^out: "):
        device.numpy(out)
    with pytest.raises(ValueError, match=r"^out: must be writable"):
        device.numpy(np.broadcast_to(np.zeros(3), (2, 3)))


def test_numpy_never_copies_by_itself():
    device = cuda.zeros(3)
    with pytest.raises(TypeError, match=r"numpy\(\)"):
        np.asarray(device)
    with pytest.raises(TypeError):
        np.ones(3, np.float32) + device


@pytest.mark.parametrize("key", [(slice(None), 3), -3, (0, 0, 0), (..., ...)])
def test_wrong_indices_are_refused(key):
    with pytest.raises(IndexError):
        cuda.zeros((2, 3))[key]


def test_wrong_shapes_are_refused():
    array = cuda.zeros((2, 3))
    for shape in ((4, 2), (-1, -1), (-1, 4)):
        with pytest.raises(ValueError, match="does not become"):
            array.reshape(shape)
    with pytest.raises(ValueError, match=r"^axes: "):
        array.transpose(0, 0)
    with pytest.raises(ValueError, match=" is not "):
        array[0] = np.zeros(2)
    with pytest.raises(TypeError, match=r"^index: "):
        array["x"]


class Foreign:
    """What CuPy's and PyTorch's arrays show of themselves, and no more."""

    def __init__(self, array, read_only=False):
        self.array = array
        interface = dict(array.__cuda_array_interface__)
        interface["data"] = (array.pointer, read_only)
        self.__cuda_array_interface__ = interface


def test_a_foreign_array_is_used_in_place():
    device = cuda.from_numpy(np.array([[-1, 2, -3], [4, -5, 6]], np.float32))
    foreign = Foreign(device)
    assert cuda.as_device(foreign).pointer == device.pointer
    out = cuda.zeros((2, 3))
    cuda.relu_forward(foreign, out=Foreign(out))
    assert np.array_equal(out.numpy(), [[0, 2, 0], [4, 0, 6]])
    strided = Foreign(device.T[::-1])
    assert np.array_equal(cuda.relu_forward(strided).numpy(), np.maximum(device.numpy().T[::-1], 0))
    with pytest.raises(ValueError, match=r"^out: must be C-contiguous and writable"):
        cuda.relu_forward(device, out=Foreign(out, read_only=True))


def test_foreign_arrays_that_no_kernel_can_read_are_refused():
    device = cuda.from_numpy(np.arange(9, dtype=np.uint8))
    foreign = Foreign(device)
    interface = foreign.__cuda_array_interface__
    foreign.__cuda_array_interface__ = interface | {
        "typestr": "<f4",
        "shape": (2,),
        "data": (device.pointer + 1, False),
    }
    with pytest.raises(ValueError, match=r"^x: the address .* is no multiple of the 4 bytes of float32"):
        cuda.relu_forward(foreign)
    foreign.__cuda_array_interface__ = interface | {"typestr": ">u2", "shape": (2,)}
    with pytest.raises(TypeError, match=r"^x: dtype >u2 is of the other byte order"):
        cuda.relu_forward(foreign)


def test_memory_is_used_again_only_when_nobody_holds_it():
    shape = (3, 1231)
    array = cuda.empty(shape)
    pointer = array.pointer
    row = array[1]
    del array
    assert cuda.empty(shape).pointer != pointer
    del row
    assert pointer in {cuda.empty(shape).pointer for _ in range(2)}


def test_the_driver_s_memory_outlives_a_cycle_that_held_it():
    # The collector of garbage calls the finalizers of all that is in a cycle before any `__del__`.
    array = cuda.empty(5 * 1231)
    pointer, freed, cycle = array.pointer, [], {"array": array}
    cycle["itself"] = cycle
    weakref.finalize(pool._pool.owners[pointer], freed.append, pointer)
    del array, cycle
    gc.collect()
    assert not freed
    assert cuda.empty(5 * 1231).pointer == pointer


def test_threads_that_never_used_the_device_may():
    host = np.arange(-3, 3, dtype=np.float32)
    results = []

    def work():
        for _ in range(5):
            results.append(cuda.relu_forward(cuda.from_numpy(host)).numpy())
            cuda.synchronize()

    # On the simulator one at a time: its barriers and its module `cuda` are the process's.
    threads = [threading.Thread(target=work) for _ in range(1 if cuda_device.SIMULATED else 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 5 * len(threads)
    assert all(np.array_equal(result, host.clip(0)) for result in results)
