"""The data set itself: checks, subsets, splits, statistics."""

import json

import numpy as np
import pytest

import fastcnn
from fastcnn.data import DataError, Dataset

RNG = np.random.default_rng(1)
COUNTS = [13, 8, 21, 5]
LABELS = RNG.permutation(np.repeat(np.arange(4), COUNTS))
IMAGES = RNG.integers(0, 256, (len(LABELS), 6, 5, 3), np.uint8)
CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def dataset():
    return Dataset(IMAGES, LABELS, CLASSES, "letters")


def rows_of(part):
    """Which images of IMAGES a part holds."""
    return [int(np.flatnonzero((image == IMAGES).all(axis=(1, 2, 3)))[0]) for image in part.images]


def test_properties(dataset):
    assert len(dataset) == 47
    assert dataset.input_shape == (3, 6, 5)
    assert dataset.num_classes == 4
    assert dataset.class_counts().tolist() == COUNTS
    assert repr(dataset) == "<Dataset letters: 47 images 6x5x3 uint8, 4 classes>"


def test_arrays_are_brought_into_shape():
    dataset = Dataset(IMAGES.transpose(0, 2, 1, 3), LABELS.astype(np.int8), list(CLASSES))
    assert dataset.images.flags.c_contiguous
    assert dataset.labels.dtype == np.int64
    assert dataset.classes == CLASSES


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": IMAGES.astype(float)}, TypeError, "float64 are neither uint8 nor float32"),
        ({"images": IMAGES[..., 0]}, DataError, r"\(47, 6, 5\) are not \(N, H, W, C\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, DataError, "holds no image"),
        ({"images": IMAGES[:, :0]}, DataError, "holds no image"),
        ({"images": IMAGES.astype(np.float32)}, DataError, r"must lie in \[0, 1\], got 0.0 to 255.0"),
        ({"images": np.full(IMAGES.shape, np.nan, np.float32)}, DataError, r"must lie in \[0, 1\], got nan"),
        ({"labels": LABELS / 1.0}, TypeError, "float64 are no integers"),
        ({"labels": LABELS[:, None]}, DataError, r"labels of shape \(47, 1\)"),
        ({"labels": LABELS[1:]}, DataError, "47 images but 46 labels"),
        ({"labels": LABELS + 1}, DataError, r"label 4 of image \d+ is not in \[0, 4\)"),
        ({"labels": LABELS - 1}, DataError, r"label -1 of image \d+ is not in \[0, 4\)"),
        ({"classes": ("a", "a", "b", "c")}, DataError, "not all different"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        Dataset(**({"images": IMAGES, "labels": LABELS, "classes": CLASSES} | change))


def test_subset(dataset):
    part = dataset.subset([3, 1, 3])
    assert rows_of(part) == [3, 1, 3]
    assert part.labels.tolist() == LABELS[[3, 1, 3]].tolist()
    assert part.classes == CLASSES
    for wrong in ([], [47], [-1], [[1, 2]]):
        with pytest.raises(DataError, match="indices"):
            dataset.subset(wrong)
    with pytest.raises(TypeError, match="indices: dtype float64"):
        dataset.subset([0.5])


def test_balanced(dataset):
    part = dataset.balanced(5, np.random.default_rng(0))
    assert part.class_counts().tolist() == [5] * 4
    rows = rows_of(part)
    assert rows == sorted(set(rows))
    assert rows_of(dataset.balanced(5, 0)) == rows
    assert rows_of(dataset.balanced(5, 1)) != rows
    with pytest.raises(DataError, match="per_class: 6 is more than the 5 images of class 'd' in letters"):
        dataset.balanced(6, 0)
    with pytest.raises(DataError, match="per_class: 0"):
        dataset.balanced(0, 0)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8, 0.99])
def test_split_shares_every_class(dataset, fraction):
    first, second = dataset.split(fraction, np.random.default_rng(0))
    rows = rows_of(first) + rows_of(second)
    assert sorted(rows) == list(range(47))
    assert len(first) == min(round(47 * fraction), 46)
    assert (abs(first.class_counts() - fraction * np.array(COUNTS)) < 1).all()
    assert rows_of(dataset.split(fraction, 0)[0]) == rows_of(first)


def test_split_that_leaves_nothing(dataset):
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(DataError, match="fraction"):
            dataset.split(fraction, 0)
    assert [len(part) for part in dataset.split(0.001, 0)] == [1, 46]
    with pytest.raises(DataError, match="its one image can't be split"):
        dataset.subset([0]).split(0.5, 0)


def test_default_generator(dataset):
    fastcnn.manual_seed(3)
    first = rows_of(dataset.balanced(2))
    assert rows_of(dataset.balanced(2)) != first
    fastcnn.manual_seed(3)
    assert rows_of(dataset.balanced(2)) == first


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_mean_std(monkeypatch, kind):
    from fastcnn.data import dataset as module

    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * 90 * 10)
    scaled = IMAGES / 255
    images = IMAGES if kind == "uint8" else scaled.astype(np.float32)
    mean, std = Dataset(images, LABELS, CLASSES).mean_std()
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("value", [np.uint8(77), np.float32(0.3)])
def test_constant_images_have_a_deviation_to_divide_by(value):
    mean, std = Dataset(np.full((9, 7, 5, 1), value), np.zeros(9, int), ("a",)).mean_std()
    np.testing.assert_allclose(mean, 77 / 255 if value > 1 else 0.3, rtol=1e-6)
    assert std.tolist() == [1.0]


def test_summary_is_json(dataset):
    summary = json.loads(json.dumps(dataset.summary()))
    assert summary["classes"] == dict(zip(CLASSES, COUNTS, strict=True))
    assert summary["input_shape"] == [3, 6, 5]
    assert len(summary["mean"]) == 3
