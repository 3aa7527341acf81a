"""CIFAR-10 and CIFAR-100 in both versions, and pickles that mean harm."""

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile

import numpy as np
import pytest

from fastcnn import data
from fastcnn.data import FormatError, MissingDataError
from fastcnn.data.safe_pickle import read_pickle

RNG = np.random.default_rng(7)
PER_FILE = 6
PLANES = RNG.integers(0, 256, (6 * PER_FILE, 3072), np.uint8)
LABELS = {10: RNG.integers(0, 10, 6 * PER_FILE), 100: RNG.integers(0, 100, 6 * PER_FILE)}
NAMES = {classes: [f"class{i}" for i in range(classes)] for classes in (10, 100)}


def parts(classes):
    """File stem -> rows."""
    if classes == 10:
        stems = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        return {stem: slice(i * PER_FILE, (i + 1) * PER_FILE) for i, stem in enumerate(stems)}
    return {"train": slice(0, 5 * PER_FILE), "test": slice(5 * PER_FILE, 6 * PER_FILE)}


def binary_files(classes):
    coarse = [] if classes == 10 else [np.zeros(len(PLANES), np.uint8)]
    records = np.column_stack([*coarse, LABELS[classes].astype(np.uint8), PLANES])
    files = {f"{stem}.bin": records[rows].tobytes() for stem, rows in parts(classes).items()}
    meta = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    return files | {meta: ("\n".join(NAMES[classes]) + "\n\n").encode()}


def python2_pickle(value):
    """Protocol 2 as Python 2 wrote it: str as (SHORT_)BINSTRING, arrays by numpy.core.multiarray."""
    out = bytearray(b"\x80\x02")

    def put(value):
        if isinstance(value, (str, bytes)):
            raw = value.encode() if isinstance(value, str) else value
            out.extend(b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<i", len(raw)))
            out.extend(raw)
        elif isinstance(value, int):
            out.extend(b"K" + bytes([value]))
        elif isinstance(value, list):
            out.extend(b"](")
            for entry in value:
                put(entry)
            out.extend(b"e")
        elif isinstance(value, dict):
            out.extend(b"}(")
            for key, entry in value.items():
                put(key)
                put(entry)
            out.extend(b"u")
        else:
            out.extend(b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR")
            out.extend(
                b"(K\x01"
                + b"M"
                + struct.pack("<H", value.shape[0])
                + b"M"
                + struct.pack("<H", value.shape[1])
            )
            out.extend(
                b"\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            )
            out.extend(b"\x89")
            put(value.tobytes())
            out.extend(b"tb")

    put(value)
    return bytes(out) + b"."


def python_files(classes, dump=python2_pickle):
    key = "labels" if classes == 10 else "fine_labels"
    files = {
        stem: dump({"data": PLANES[rows], key: LABELS[classes][rows].tolist(), "batch_label": "one"})
        for stem, rows in parts(classes).items()
    }
    meta = ("batches.meta", "label_names") if classes == 10 else ("meta", "fine_label_names")
    return files | {meta[0]: dump({meta[1]: NAMES[classes]})}


def write_folder(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tar_bytes(files, prefix):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{prefix}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["binary", "python"])
@pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive's folder"])
def test_every_form(tmp_path, classes, version, form):
    files = binary_files(classes) if version == "binary" else python_files(classes)
    if form in ("folder", "parent"):
        folder = write_folder(tmp_path / f"cifar-{classes}-batches-{version}", files)
        path = folder if form == "folder" else tmp_path
    else:
        path = tmp_path / f"cifar-{classes}-{version}.tar.gz"
        path.write_bytes(tar_bytes(files, f"cifar-{classes}-{version}"))
        path = path if form == "archive" else tmp_path
    train, test = data.load(path, "train"), data.load(path, "test")
    both = np.concatenate([train.images, test.images])
    np.testing.assert_array_equal(both.transpose(0, 3, 1, 2).reshape(-1, 3072), PLANES)
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), LABELS[classes])
    assert len(test) == PER_FILE
    assert train.input_shape == (3, 32, 32)
    assert train.classes == tuple(NAMES[classes])


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_today(tmp_path, protocol):
    def dump(value):
        return pickle.dumps(value, protocol)

    train = data.read_cifar(write_folder(tmp_path, python_files(10, dump)), "train")
    np.testing.assert_array_equal(train.labels, LABELS[10][: 5 * PER_FILE])


def test_folder_with_both_sets(tmp_path):
    for classes in (10, 100):
        write_folder(tmp_path / f"cifar-{classes}-batches", binary_files(classes))
        assert data.load(f"cifar{classes}", "test", root=tmp_path).num_classes == classes


def test_names_without_meta(tmp_path):
    files = binary_files(10)
    del files["batches.meta.txt"]
    assert data.read_cifar(write_folder(tmp_path, files), "test").classes[3] == "cat"


class Payload:
    """Runs a command when a trusting unpickler meets it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hostile_pickles(mark):
    """Name -> pickle."""
    innocent = {b"labels": [1]}
    tuples = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"K\x01s."
    return {
        "os.system": pickle.dumps({b"data": Payload(mark)}, 2),
        "os.system in protocol 4": pickle.dumps({b"data": Payload(mark)}, 4),
        "eval": b"\x80\x02cbuiltins\neval\n(U\x04exittR.",
        "getattr through numpy": b"\x80\x02cnumpy\nsave\n(U\x01xtR.",
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "object array": pickle.dumps({b"data": np.array([Payload(mark)], object)}, 2),
        "instance": pickle.dumps({b"data": io.BytesIO()}, 2),
        "old opcodes": pickle.dumps({"data": Payload(mark)}, 0),
        "persistent id": b"\x80\x02U\x01xQ.",
        "extension": b"\x80\x02\x82\x01.",
        "changes a name": b"\x80\x02c_codecs\nencode\n}U\x08__name__U\x01xsb.",
        "builds by the class": b"\x80\x02cnumpy\nndarray\n(K\x01tR.",
        "a million tuples": tuples,
        "memo bomb": b"\x80\x02}r\xff\xff\xff\x7f.",
        "length that lies": b"\x80\x04B\xff\xff\xff\x7fabc.",
        "list": pickle.dumps([1, 2], 2),
        "nothing": b"",
        "text": b"hello",
        "cut off": pickle.dumps(innocent, 2)[:-3],
        "unhashable key": b"\x80\x02}]K\x01s.",
        "int key": pickle.dumps({1: 2}, 2),
    }


@pytest.mark.parametrize("name", hostile_pickles(""))
def test_hostile_pickle(tmp_path, name):
    mark = tmp_path / "executed"
    content = hostile_pickles(mark)[name]
    with pytest.raises(FormatError, match="pickle") as error:
        read_pickle("some/file", content)
    assert "some/file" in str(error.value)
    assert len(str(error.value)) < 400
    folder = write_folder(tmp_path / "cifar", python_files(10) | {"test_batch": content})
    with pytest.raises(FormatError, match="test_batch"):
        data.load(folder, "test")
    assert not mark.exists()


def test_the_payload_would_have_worked(tmp_path):
    mark = tmp_path / "executed"
    pickle.loads(hostile_pickles(mark)["os.system"])
    assert mark.exists()


@pytest.mark.parametrize("dtype", ["u1", "i8", ">i4", "f4", "f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_come_back(dtype, order):
    array = np.asarray(np.arange(6).reshape(2, 3), dtype, order=order)
    read = read_pickle("file", pickle.dumps({b"a": array, "b": [1, None, True], "c": (1, {"d": b"e"})}, 2))
    np.testing.assert_array_equal(read["a"], array)
    assert read["b"] == [1, None, True]
    assert read["c"][1]["d"] == b"e"


def test_array_that_lies_about_its_shape():
    content = python2_pickle({"data": np.zeros((3, 4), np.uint8)})
    for wrong in (b"M\x04\x00M\x04\x00", b"M\xff\xffM\xff\xff"):
        with pytest.raises(FormatError, match="shape"):
            read_pickle("file", content.replace(b"M\x03\x00M\x04\x00", wrong))
    with pytest.raises(FormatError, match="dtype 'O8'"):
        read_pickle("file", content.replace(b"U\x02u1", b"U\x02O8"))


def test_python2_pickle_is_one():
    content = python2_pickle({"labels": [1, 2], "data": np.arange(6, dtype=np.uint8).reshape(2, 3)})
    assert {opcode.name for opcode, _, _ in pickletools.genops(content)} >= {
        "SHORT_BINSTRING",
        "GLOBAL",
        "BUILD",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [1, 2]}, "2 labels for 6 images"),
        ({"labels": [1, 2, 3, 4, 5, 10]}, r"label 10 is not in \[0, 10\)"),
        ({"labels": ["a"] * 6}, "no list of ints"),
        ({"labels": 3}, "no list of ints"),
        ({"data": [1, 2]}, "no uint8 array"),
        ({"data": np.zeros((6, 3071), np.uint8)}, "no uint8 array"),
    ],
)
def test_python_batch_that_does_not_fit(tmp_path, change, message):
    batch = {"data": PLANES[:6], "labels": [0] * 6} | change
    folder = write_folder(tmp_path, {"test_batch": python2_pickle(batch)})
    with pytest.raises(FormatError, match=message):
        data.read_cifar(folder, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are not a whole number of records"),
        (bytes(3074), "3074 bytes are not a whole number"),
        (b"\x0a" + bytes(3072), r"label 10 is not in \[0, 10\)"),
    ],
)
def test_binary_batch_that_does_not_fit(tmp_path, content, message):
    folder = write_folder(tmp_path, {"test_batch.bin": content})
    with pytest.raises(FormatError, match=message):
        data.read_cifar(folder, "test")


def test_wrong_number_of_names(tmp_path):
    folder = write_folder(tmp_path, binary_files(10) | {"batches.meta.txt": b"cat\ndog\n"})
    with pytest.raises(FormatError, match="names 2 classes"):
        data.read_cifar(folder, "test")


def test_damaged_archives(tmp_path):
    whole = tar_bytes(binary_files(10), "cifar-10-batches-bin")
    path = tmp_path / "cifar-10-binary.tar.gz"
    for content in (whole[: len(whole) // 2], b"not a tar", b"", gzip.compress(b"x" * 5000)):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"cifar-10-binary\.tar\.gz"):
            data.read_cifar(path, "train")


def test_archive_bomb(tmp_path, monkeypatch):
    from fastcnn.data import cifar

    monkeypatch.setattr(cifar, "_ARCHIVE_LIMIT", 1 << 20)
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(tar_bytes({"big": bytes(3 << 20)} | binary_files(10), "x"))
    with pytest.raises(FormatError, match="unfolds to more than the limit"):
        data.read_cifar(path, "train")
    path.write_bytes(tar_bytes({f"f{i}": b"" for i in range(1100)}, "x"))
    with pytest.raises(FormatError, match="more than 1000 files"):
        data.read_cifar(path, "train")


def test_archive_writes_nothing(tmp_path):
    files = binary_files(10) | {"../../escaped": b"x"}
    path = tmp_path / "a" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    path.write_bytes(tar_bytes(files, "."))
    data.read_cifar(path, "test")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", path.name]


def test_missing_part(tmp_path):
    files = binary_files(10)
    del files["test_batch.bin"]
    with pytest.raises(MissingDataError, match="no test part"):
        data.read_cifar(write_folder(tmp_path, files), "test")
