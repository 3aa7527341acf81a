"""NPZ files, sound and hostile."""

import io
import zipfile

import numpy as np
import pytest

from fastcnn import data
from fastcnn.data import FormatError, MissingDataError

RNG = np.random.default_rng(9)
X = RNG.integers(0, 256, (6, 5, 4), np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def write(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def npy_bytes(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), allow_pickle=allow_pickle)
    return buffer.getvalue()


def write_members(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("names", [("x", "y"), ("X", "y"), ("images", "labels")])
def test_whole(tmp_path, names):
    path = write(tmp_path / "a.npz", **{names[0]: X, names[1]: Y}, classes=np.array(["a", "b", "c"]))
    read = data.read_npz(path)
    np.testing.assert_array_equal(read.images[..., 0], X)
    np.testing.assert_array_equal(read.labels, Y)
    assert read.classes == ("a", "b", "c")


@pytest.mark.parametrize("names", ["x_{} y_{}", "X_{} y_{}", "{}_images {}_labels"])
def test_parts(tmp_path, names):
    x, y = names.split()
    train, test = (
        {x.format("train"): X, y.format("train"): Y},
        {x.format("test"): X[:2], y.format("test"): Y[:2]},
    )
    path = write(tmp_path / "a.npz", **train, **test)
    assert len(data.load(path, "train")) == 6
    assert len(data.load(path, "test")) == 2
    with pytest.raises(MissingDataError, match="no validation part"):
        data.load(path, "validation")


def test_x_and_y_beside_a_test_part_are_the_train_part(tmp_path):
    path = write(tmp_path / "a.npz", x=X, y=Y, x_test=X[:3], y_test=Y[:3])
    assert [len(data.load(path, split)) for split in ("train", "test")] == [6, 3]


def test_a_part_without_the_last_class(tmp_path):
    path = write(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:2], y_test=Y[:2])
    assert data.load(path, "test").classes == ("0", "1", "2")


def test_layouts(tmp_path):
    colour = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)
    for x in (colour, colour.transpose(0, 3, 1, 2)):
        read = data.read_npz(write(tmp_path / "a.npz", x=x, y=Y[:, None]))
        np.testing.assert_array_equal(read.images, colour)
        assert read.images.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_floats(tmp_path, dtype):
    read = data.read_npz(write(tmp_path / "a.npz", x=(X / 255).astype(dtype), y=Y))
    assert read.images.dtype == np.float32
    np.testing.assert_allclose(read.images[..., 0], X / 255, atol=1e-3)


@pytest.mark.parametrize("dtype", ["i2", "i8", ">u4"])
def test_integers(tmp_path, dtype):
    read = data.read_npz(write(tmp_path / "a.npz", x=X.astype(dtype), y=Y.astype("u1")))
    assert read.images.dtype == np.uint8
    np.testing.assert_array_equal(read.images[..., 0], X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.astype(float)}, r"float images must lie in \[0, 1\]"),
        ({"x": np.full((6, 5, 4), np.nan)}, r"float images must lie in \[0, 1\], got nan"),
        ({"x": X.astype(int) - 1}, "integers must lie in 0 to 255"),
        ({"x": X[0]}, r"images of shape \(5, 4\) are none of"),
        ({"x": np.zeros((6, 5, 5, 7), np.uint8)}, "are none of"),
        ({"x": X.astype(complex)}, "neither integers nor floats"),
        ({"x": X[:0], "y": Y[:0]}, "holds no image"),
        ({"y": Y[:4]}, "6 images but 4 labels"),
        ({"y": Y / 1.0}, "no ints"),
        ({"y": np.eye(6, dtype=int)}, "no ints"),
        ({"y": Y - 1}, r"label -1 of image 0 is not in \[0, 2\)"),
        ({"y": Y + 2**40}, "is not below"),
        ({"y": Y + 10**6}, "no array named classes"),
        ({"classes": np.array(["a", "b"])}, r"label 2 of image 2 is not in \[0, 2\)"),
        ({"classes": np.array(["a", "b", "a"])}, "are not all different"),
        ({"classes": np.arange(3)}, "no strings"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, change, message):
    path = write(tmp_path / "a.npz", **({"x": X, "y": Y} | change))
    with pytest.raises(FormatError, match=message) as error:
        data.read_npz(path)
    assert str(path) in str(error.value)


class Payload:
    executed = False

    def __reduce__(self):
        return setattr, (Payload, "executed", True)


def test_objects_are_refused(tmp_path):
    objects = np.array([Payload()], object)
    path = write_members(tmp_path / "a.npz", x=npy_bytes(objects, allow_pickle=True), y=npy_bytes(Y))
    with pytest.raises(FormatError, match="x has"):
        data.read_npz(path)
    assert not Payload.executed


def test_headers_that_lie(tmp_path):
    good = npy_bytes(X)
    for wrong in (b"(9, 5, 4)", b"(6, 5, 3)", b"(-6, 5, 4)", b"(6, 'a', 4)", b"[6, 5, 4]"):
        content = good.replace(b"(6, 5, 4)", wrong)
        assert content != good
        path = write_members(tmp_path / "a.npz", x=content, y=npy_bytes(Y))
        with pytest.raises(FormatError, match="x "):
            data.read_npz(path)
    huge = good.replace(b"(6, 5, 4), }       ", b"(99999999, 5, 4), }")
    assert huge != good
    for content in (huge, b"", b"\x93NUMPY\x09\x00", b"garbage", good[:40], good + b"x"):
        path = write_members(tmp_path / "a.npz", x=content, y=npy_bytes(Y))
        with pytest.raises(FormatError, match="x "):
            data.read_npz(path)


def test_bomb(tmp_path, monkeypatch):
    from fastcnn.data import binary

    monkeypatch.setattr(binary, "LIMIT_BYTES", 1 << 20)
    path = write(tmp_path / "a.npz", x=np.zeros((2000, 32, 32), np.uint8), y=np.zeros(2000, int))
    with pytest.raises(FormatError, match="more than the limit of 1048576"):
        data.read_npz(path)


def test_damaged_file(tmp_path):
    path = write(tmp_path / "a.npz", x=X, y=Y)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 4] ^= 0xFF
    for content in (b"", b"PK\x03\x04 not really", whole[:-30], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"a\.npz"):
            data.read_npz(path)


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match="does not exist"):
        data.read_npz(tmp_path / "none.npz")
    with pytest.raises(MissingDataError, match=r"it has weights"):
        data.read_npz(write(tmp_path / "a.npz", weights=X))
