"""IDX files, sound and hostile."""

import gzip
import struct

import numpy as np
import pytest

from fastcnn import data
from fastcnn.data import FormatError, MissingDataError

IMAGES = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
LABELS = np.array([0, 1, 2, 1, 0], np.uint8)


def idx_bytes(array, code=0x08):
    head = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_pair(folder, split="train", images=IMAGES, labels=LABELS, suffix=""):
    folder.mkdir(exist_ok=True, parents=True)
    pack = gzip.compress if suffix else bytes
    (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 0x08), ("i1", 0x09), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_every_type_comes_back(tmp_path, dtype, code, pack):
    array = np.array([[1, 2, 3], [4, 5, 100]], dtype)
    path = tmp_path / "array"
    path.write_bytes(pack(idx_bytes(array, code)))
    read = data.read_idx(path)
    assert read.dtype == array.dtype
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_folder(tmp_path, suffix):
    write_pair(tmp_path, "train", suffix=suffix)
    write_pair(tmp_path, "t10k", IMAGES[:2], LABELS[:2], suffix=suffix)
    train, test = data.load(tmp_path, "train"), data.load(tmp_path, "test")
    np.testing.assert_array_equal(train.images[..., 0], IMAGES)
    np.testing.assert_array_equal(train.labels, LABELS)
    assert train.input_shape == (1, 4, 3)
    assert train.classes == ("0", "1", "2")
    assert train.labels.dtype == np.int64
    assert train.images.flags.c_contiguous
    assert len(test) == 2
    assert test.classes == train.classes


def test_torchvision_layout_and_all_parts(tmp_path):
    write_pair(tmp_path / "MNIST" / "raw", "train")
    write_pair(tmp_path / "MNIST" / "raw", "t10k")
    assert len(data.load(tmp_path / "MNIST", "all")) == 10


def test_gzip_is_told_by_content(tmp_path):
    path = tmp_path / "plain.gz"
    path.write_bytes(idx_bytes(LABELS))
    np.testing.assert_array_equal(data.read_idx(path), LABELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "needs 4 bytes"),
        (b"\0\0\x08", "needs 4 bytes"),
        (b"\x89PNG....", "no IDX header"),
        (b"\0\0\x0a\x01\0\0\0\0", "no IDX header"),
        (b"\0\0\x08\x00", "0 axes"),
        (b"\0\0\x08\xff", "255 axes"),
        (idx_bytes(IMAGES)[:-1], "the file ends after 59"),
        (idx_bytes(IMAGES) + b"x", "more than the 60 bytes"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "more than the limit"),
        (struct.pack(">HBB2I", 0, 8, 2, 60000, 60000) + b"abc", "the file ends after 3"),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_hostile(tmp_path, content, message, pack):
    path = tmp_path / "hostile"
    path.write_bytes(pack(content))
    with pytest.raises(FormatError, match=message) as error:
        data.read_idx(path)
    assert str(path) in str(error.value)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 255, (50, 20), np.uint8)))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(flipped)):
        path = tmp_path / "damaged.gz"
        path.write_bytes(content)
        with pytest.raises(FormatError, match="damaged or cut off"):
            data.read_idx(path)


def test_bomb_is_read_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(LABELS) + bytes(10_000_000)))
    with pytest.raises(FormatError, match="more than the 5 bytes"):
        data.read_idx(path)


def test_pair_that_does_not_fit(tmp_path):
    write_pair(tmp_path, labels=LABELS[:3])
    with pytest.raises(FormatError, match="3 labels for the 5 images"):
        data.load(tmp_path)


def test_labels_for_images_and_images_for_labels(tmp_path):
    write_pair(tmp_path)
    images, labels = sorted(tmp_path.iterdir())
    with pytest.raises(FormatError, match="are no images"):
        data.read_idx_pair(labels, labels)
    with pytest.raises(FormatError, match="are no labels"):
        data.read_idx_pair(images, images)


def test_label_out_of_range(tmp_path):
    write_pair(tmp_path)
    with pytest.raises(ValueError, match=r"label 2 of image 2 is not in \[0, 2\)"):
        data.read_idx_folder(tmp_path, "train", classes=("a", "b"))


def test_missing(tmp_path):
    write_pair(tmp_path)
    with pytest.raises(MissingDataError, match="no test part"):
        data.load(tmp_path, "test")
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(MissingDataError, match="no train labels"):
        data.load(tmp_path)
    with pytest.raises(MissingDataError, match="does not exist"):
        data.read_idx(tmp_path / "nothing")
    with pytest.raises(FormatError, match="can't be read"):
        data.read_idx(tmp_path)
