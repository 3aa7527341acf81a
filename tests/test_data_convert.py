"""Conversion to the emotion diary's NPZ file."""

import json
import resource
import struct

import numpy as np
import pytest
from PIL import Image

from fastcnn import data
from fastcnn.data import DataError, WriteError

RNG = np.random.default_rng(11)
IMAGES = RNG.integers(0, 256, (5, 4, 3), np.uint8)
LABELS = np.array([0, 1, 2, 1, 0], np.uint8)
FACES = RNG.integers(0, 256, (6, 48, 48), np.uint8)
EMOTIONS = [0, 6, 3, 3, 1, 5]
USAGE = [*["Training"] * 3, "PublicTest", *["PrivateTest"] * 2]
CIFAR = RNG.integers(0, 10, (6, 3073), np.uint8)


def write_idx(folder, split="train", images=IMAGES, labels=LABELS):
    folder.mkdir(exist_ok=True)
    for kind, array in (("images", images), ("labels", labels)):
        head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / f"{split}-{kind}-idx{array.ndim}-ubyte").write_bytes(head + array.tobytes())
    return folder


def write_fer2013(path):
    rows = (
        f"{emotion},{' '.join(map(str, face.ravel()))},{usage}"
        for emotion, face, usage in zip(EMOTIONS, FACES, USAGE, strict=True)
    )
    path.write_text("\n".join(["emotion,pixels,Usage", *rows]))
    return path


def picture(height=8, width=6, colour=False):
    return RNG.integers(0, 256, (height, width, 3) if colour else (height, width), np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def contents(path):
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def test_folder_with_corrupt_files(tmp_path):
    root = tmp_path / "faces"
    happy = save(root / "happy" / "1.png", picture(60, 40))
    save(root / "angry" / "1.png", picture(50, 50, colour=True))
    (root / "angry" / "2.png").write_bytes(b"broken")
    done = data.convert(root, tmp_path / "faces.npz", size=48, mode="grey")
    arrays = contents(tmp_path / "faces.npz")
    assert arrays["x"].shape == (2, 1, 48, 48)
    assert arrays["x"].dtype == np.float32
    assert arrays["y"].dtype == np.int64
    assert arrays["y"].tolist() == [0, 1]
    assert arrays["classes"].tolist() == ["angry", "happy"]
    resized = Image.fromarray(happy).resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(arrays["x"][1, 0], np.asarray(resized, np.float32) / np.float32(255))
    assert [entry.path for entry in done.skipped] == [str(root / "angry" / "2.png")]
    assert json.loads(json.dumps(done.summary()))["images"] == {"all": 2}


def test_fer2013_keeps_its_parts(tmp_path):
    source = write_fer2013(tmp_path / "fer2013.csv")
    done = data.convert(source, tmp_path / "out.npz")
    arrays = contents(tmp_path / "out.npz")
    np.testing.assert_array_equal(arrays["x"][:, 0] * np.float32(255), FACES[:3])
    assert arrays["y_test"].tolist() == EMOTIONS[4:]
    assert arrays["x_validation"].shape == (1, 1, 48, 48)
    assert done.images == {"train": 3, "validation": 1, "test": 2}
    for split in ("train", "validation", "test"):
        there, back = data.load(source, split), data.load(tmp_path / "out.npz", split)
        np.testing.assert_array_equal(back.images, (there.images / np.float32(255)).astype(np.float32))
        np.testing.assert_array_equal(back.labels, there.labels)
        assert back.classes == there.classes


def test_one_part(tmp_path):
    source = write_fer2013(tmp_path / "fer2013.csv")
    done = data.convert(source, tmp_path / "out.npz", split="test")
    assert set(contents(tmp_path / "out.npz")) == {"x", "y", "classes"}
    assert done.images == {"test": 2}


def test_idx(tmp_path):
    write_idx(tmp_path / "idx", "train")
    write_idx(tmp_path / "idx", "t10k", IMAGES[:2], LABELS[:2])
    data.convert(tmp_path / "idx", tmp_path / "out.npz")
    arrays = contents(tmp_path / "out.npz")
    np.testing.assert_allclose(arrays["x"][:, 0] * 255, IMAGES, rtol=1e-6)
    assert arrays["x_test"].shape == (2, 1, 4, 3)


def test_cifar_colour_and_grey(tmp_path):
    source = tmp_path / "cifar-10-batches-bin"
    source.mkdir()
    (source / "data_batch_1.bin").write_bytes(CIFAR.tobytes())
    data.convert(source, tmp_path / "colour.npz", split="train")
    colour = contents(tmp_path / "colour.npz")["x"]
    np.testing.assert_allclose(colour.reshape(-1, 3072) * 255, CIFAR[:, 1:], rtol=1e-6)
    done = data.convert(source, tmp_path / "grey.npz", split="train", mode="grey", size=(16, 20))
    assert done.input_shape == (1, 16, 20)
    assert contents(tmp_path / "grey.npz")["x"].shape == (6, 1, 16, 20)


def test_floats(tmp_path):
    data.convert("digits", tmp_path / "digits.npz", split="test")
    done = data.convert(tmp_path / "digits.npz", tmp_path / "small.npz", size=14, mode="rgb")
    small = data.load(tmp_path / "small.npz", "all")
    assert done.input_shape == small.input_shape == (3, 14, 14)
    blocks = data.load("digits", "test").images.reshape(1000, 14, 2, 14, 2).mean(axis=(2, 4)) / 255
    assert abs(small.images[..., 0] - blocks).mean() < 0.05
    grey = data.convert(tmp_path / "small.npz", tmp_path / "grey.npz", mode="grey")
    assert grey.input_shape == (1, 14, 14)
    np.testing.assert_allclose(
        data.load(tmp_path / "grey.npz", "all").images[..., 0], small.images[..., 0], atol=1e-6
    )


def test_train_and_test_folders_have_the_same_classes(tmp_path):
    for part, names in (("train", "abc"), ("test", "bc")):
        for name in names:
            save(tmp_path / "in" / part / name / "1.png", picture())
    data.convert(tmp_path / "in", tmp_path / "out.npz")
    arrays = contents(tmp_path / "out.npz")
    assert arrays["classes"].tolist() == ["a", "b", "c"]
    assert arrays["y_test"].tolist() == [1, 2]
    assert data.load(tmp_path / "in", "test").labels.tolist() == [1, 2]


def test_nothing_is_overwritten_unasked(tmp_path):
    write_idx(tmp_path / "idx")
    path = tmp_path / "out.npz"
    path.write_bytes(b"precious")
    with pytest.raises(DataError, match="exists already"):
        data.convert(tmp_path / "idx", path)
    assert path.read_bytes() == b"precious"
    data.convert(tmp_path / "idx", path, overwrite=True)
    assert contents(path)["x"].shape == (5, 1, 4, 3)


@pytest.mark.parametrize("older", [None, b"precious"])
def test_full_disk(tmp_path, older):
    out = tmp_path / "out"
    out.mkdir()
    path = out / "digits.npz"
    if older:
        path.write_bytes(older)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="could not be written"):
            data.convert("digits", path, split="test", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in out.iterdir()] == (["digits.npz"] if older else [])
    assert not older or path.read_bytes() == older


def test_interrupted(tmp_path, monkeypatch):
    def interrupt(*args, **arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.convert("digits", tmp_path / "digits.npz")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path):
    write_idx(tmp_path / "idx")
    source, target = tmp_path / "idx", tmp_path / "out.npz"
    with pytest.raises(ValueError, match=r"destination: .* does not end in \.npz"):
        data.convert(source, tmp_path / "out.txt")
    for size, error in (
        (0, ValueError),
        (99999, ValueError),
        (1.5, TypeError),
        ((1, 2, 3), TypeError),
        ("a", TypeError),
    ):
        with pytest.raises(error, match="size"):
            data.convert(source, target, size=size)
    with pytest.raises(ValueError, match="mode: 'sepia'"):
        data.convert(source, target, mode="sepia")
    with pytest.raises(ValueError, match="split: 'dev'"):
        data.convert(source, target, split="dev")
    with pytest.raises(DataError, match="no test part"):
        data.convert(source, target, split="test")
    with pytest.raises(DataError, match="does not exist"):
        data.convert(tmp_path / "none", target)
    with pytest.raises(WriteError, match="could not be written"):
        data.convert(source, tmp_path / "none" / "out.npz")
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(struct.pack(">HBB", 0, 8, 3))
    with pytest.raises(DataError, match="IDX header"):
        data.convert(source, target)
    assert not target.exists()
