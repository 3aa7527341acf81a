"""Folders of images by class."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from fastcnn import data
from fastcnn.data import DataError, FormatError, MissingDataError

RNG = np.random.default_rng(5)


def picture(height=8, width=6, colour=False):
    return RNG.integers(0, 256, (height, width, 3) if colour else (height, width), np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


@pytest.fixture
def faces(tmp_path):
    """{"class/file": array} of three classes, written out of order."""
    root = tmp_path / "faces"
    files = {
        name: picture()
        for name in ("sad/b.png", "sad/a.png", "angry/1.png", "happy/x.bmp", "happy/deep/y.png")
    }
    return root, {name: save(root / name, array) for name, array in files.items()}


def test_sorted_classes_and_files(faces):
    root, files = faces
    read = data.read_folder(root)
    assert read.classes == ("angry", "happy", "sad")
    assert read.labels.tolist() == [0, 1, 1, 2, 2]
    order = ["angry/1.png", "happy/deep/y.png", "happy/x.bmp", "sad/a.png", "sad/b.png"]
    np.testing.assert_array_equal(read.images[..., 0], [files[name] for name in order])
    assert read.name == "faces"
    assert read.skipped == ()


def test_corrupt_files_are_skipped_and_named(faces):
    root, _ = faces
    whole = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(whole, "png")
    bad = {
        "sad/cut.png": whole.getvalue()[:600],
        "sad/empty.jpg": b"",
        "happy/text.png": b"no image at all",
        "happy/notes.txt": b"hello",
        "angry/liar.gif": b"GIF89a\xff\xff\xff\xff" + bytes(20),
    }
    for name, content in bad.items():
        (root / name).write_bytes(content)
    (root / "sad" / ".hidden").write_bytes(b"")
    read = data.read_folder(root)
    assert len(read) == 5
    assert sorted(entry.path for entry in read.skipped) == sorted(str(root / name) for name in bad)
    assert all(entry.reason for entry in read.skipped)
    assert len(read.summary()["skipped"]) == 5


def test_decompression_bomb_is_skipped(faces, monkeypatch):
    root, _ = faces
    save(root / "sad" / "bomb.png", np.zeros((100, 100), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = data.read_folder(root)
    assert [entry.path for entry in read.skipped] == [str(root / "sad" / "bomb.png")]
    assert "bomb" in read.skipped[0].reason


def test_grey_and_colour(tmp_path):
    grey = save(tmp_path / "a" / "grey.png", picture())
    colour = save(tmp_path / "b" / "colour.png", picture(colour=True))
    read = data.read_folder(tmp_path)
    np.testing.assert_array_equal(read.images[0], np.repeat(grey[..., None], 3, axis=-1))
    np.testing.assert_array_equal(read.images[1], colour)
    luma = data.read_folder(tmp_path, mode="grey").images[1, ..., 0]
    np.testing.assert_allclose(luma, colour @ [0.299, 0.587, 0.114], atol=1)
    assert data.read_folder(tmp_path, mode="rgb").input_shape == (3, 8, 6)
    with pytest.raises(ValueError, match="mode: 'cmyk' is none of"):
        data.read_folder(tmp_path, mode="cmyk")


def test_other_kinds_of_pixels(tmp_path):
    deep = RNG.integers(0, 65536, (8, 6), np.uint16)
    (tmp_path / "a").mkdir()
    Image.fromarray(deep).save(tmp_path / "a" / "1-deep.png")
    Image.fromarray(picture() > 127).save(tmp_path / "a" / "2-bits.png")
    Image.fromarray(picture(colour=True)).convert("P").save(tmp_path / "a" / "3-palette.png")
    read = data.read_folder(tmp_path)
    assert not read.skipped
    np.testing.assert_array_equal(read.images[0, ..., 0], deep >> 8)
    assert set(np.unique(read.images[1])) <= {0, 255}


def test_sizes(faces):
    root, _ = faces
    save(root / "sad" / "c.png", picture(9, 6))
    with pytest.raises(FormatError, match="6 x 9 pixels, the first image has 6 x 8"):
        data.read_folder(root)
    assert data.read_folder(root, size=(5, 4)).input_shape == (1, 5, 4)


def test_resize_keeps_flat_areas(tmp_path):
    save(tmp_path / "a" / "flat.png", np.full((40, 30), 77, np.uint8))
    assert (data.read_folder(tmp_path, size=(7, 9)).images == 77).all()


def test_train_and_test_folders(tmp_path):
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("no", "yes"):
            for i in range(count):
                save(tmp_path / part / name / f"{i}.png", picture())
    assert len(data.load(tmp_path, "train")) == 6
    assert len(data.load(tmp_path, "validation")) == 4
    assert len(data.load(tmp_path, "test")) == 2
    assert len(data.load(tmp_path, "all")) == 12


def test_val_serves_as_test(tmp_path):
    for part in ("training", "valid"):
        save(tmp_path / part / "a" / "1.png", picture())
    assert len(data.load(tmp_path, "test")) == 1
    with pytest.raises(MissingDataError, match="no validation part"):
        data.load(tmp_path, "validation")


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("car", "train"):
        for i in range(5):
            save(tmp_path / name / f"{i}.png", picture())
    train, test = data.load(tmp_path, "train"), data.load(tmp_path, "test")
    assert train.classes == ("car", "train")
    assert (len(train), len(test)) == (8, 2)


def test_given_classes(faces):
    root, _ = faces
    read = data.read_folder(root, classes=("sad", "bored", "happy", "angry"))
    assert read.labels.tolist() == [3, 2, 2, 0, 0]
    with pytest.raises(DataError, match="class 'angry' is none of sad, happy"):
        data.read_folder(root, classes=("sad", "happy"))


def test_nothing_to_read(tmp_path):
    with pytest.raises(MissingDataError, match="is no folder"):
        data.read_folder(tmp_path / "none")
    with pytest.raises(MissingDataError, match="no folders of images"):
        data.read_folder(tmp_path)
    with pytest.raises(MissingDataError, match="no data that can be read"):
        data.load(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 1 files is a readable image"):
        data.read_folder(tmp_path)
