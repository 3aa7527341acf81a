"""What augmentation draws."""

import numpy as np
import pytest

from fastcnn.data import PRESETS, Augmentation, Dataset, Loader
from fastcnn.data.augmentation import augmentation

COUNT = 20_000
FULL = Augmentation(flip=True, shift=3, brightness=0.1, contrast=0.2, noise=0.05, cutout=6)


@pytest.fixture(scope="module")
def params():
    return FULL.draw(np.random.default_rng(0), COUNT, 28, 20)


def test_shape_and_seed(params):
    assert params.shape == (COUNT, 9)
    assert params.dtype == np.float32
    np.testing.assert_array_equal(params, FULL.draw(np.random.default_rng(0), COUNT, 28, 20))


def test_half_are_flipped(params):
    assert set(np.unique(params[:, 0])) == {0, 1}
    assert abs(params[:, 0].mean() - 0.5) < 0.02


@pytest.mark.parametrize("column", [1, 2])
def test_every_shift_is_as_likely(params, column):
    values, counts = np.unique(params[:, column], return_counts=True)
    assert values.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert abs(counts / COUNT - 1 / 7).max() < 0.015


@pytest.mark.parametrize(("column", "low", "high"), [(3, -0.1, 0.1), (4, 0.8, 1.2), (5, 0, 0.05)])
def test_amounts_fill_their_range(params, column, low, high):
    values = params[:, column]
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high + 1e-6
    assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)


def test_cutout_is_about_any_point_in_half_of_the_images(params):
    assert set(np.unique(params[:, 8])) == {0, 6}
    assert abs((params[:, 8] == 6).mean() - 0.5) < 0.02
    for column, size in ((6, 28), (7, 20)):
        assert np.unique(params[:, column]).tolist() == list(range(-3, size - 3))


def test_columns_are_independent(params):
    varying = params[:, [0, 1, 2, 3, 4, 5, 6, 7, 8]]
    correlation = np.corrcoef(varying.T) - np.eye(9)
    assert abs(correlation).max() < 0.03


def test_one_setting_leaves_the_others_draws_alone(params):
    other = Augmentation(flip=True, shift=3, contrast=0.2).draw(np.random.default_rng(0), COUNT, 28, 20)
    np.testing.assert_array_equal(other[:, [0, 1, 2, 4]], params[:, [0, 1, 2, 4]])
    assert not other[:, [3, 5, 8]].any()


def test_nothing_to_do():
    rows = Augmentation().draw(np.random.default_rng(0), 50, 8, 8)
    assert not Augmentation().active
    assert not rows[:, [0, 1, 2, 3, 5, 8]].any()
    assert (rows[:, 4] == 1).all()
    assert augmentation("none") is None
    assert augmentation(None) is None


def test_presets():
    assert augmentation("light") is PRESETS["light"]
    assert PRESETS["light"].flip
    assert not PRESETS["digits"].flip
    with pytest.raises(ValueError, match="augment: 'heavy' is none of none, light, digits"):
        augmentation("heavy")
    with pytest.raises(TypeError, match="augment: expected an Augmentation"):
        augmentation(3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"flip": 1}, TypeError),
        ({"shift": 1.5}, TypeError),
        ({"shift": True}, TypeError),
        ({"shift": -1}, ValueError),
        ({"cutout": -1}, ValueError),
        ({"brightness": -0.1}, ValueError),
        ({"noise": float("nan")}, ValueError),
        ({"contrast": 1.5}, ValueError),
    ],
)
def test_bad_settings(arguments, error):
    with pytest.raises(error, match=next(iter(arguments))):
        Augmentation(**arguments)


def one_image(image, **settings):
    """`image` as a loader augments it, 200 times, raw pixels."""
    dataset = Dataset(np.repeat(image[None], 200, axis=0), np.zeros(200, int), ("a",))
    x, _ = next(iter(Loader(dataset, 200, augment=Augmentation(**settings), rng=0)))
    return x.transpose(0, 2, 3, 1) * 255


def test_images_are_really_changed():
    image = np.random.default_rng(1).integers(0, 256, (9, 7, 1), np.uint8)
    flipped = one_image(image, flip=True)
    same = np.isclose(flipped, image, atol=1e-3).all(axis=(1, 2, 3))
    mirrored = np.isclose(flipped, image[:, ::-1], atol=1e-3).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 60 < mirrored.sum() < 140
    cut = one_image(image + np.uint8(image == 0), cutout=4)
    zeros = (cut == 0).sum(axis=(1, 2, 3))
    assert 60 < (zeros == 0).sum() < 140
    assert zeros.max() == 16


def test_shift_is_a_crop_of_the_padded_image():
    image = np.random.default_rng(1).integers(1, 256, (9, 7, 3), np.uint8)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = {padded[i : i + 9, j : j + 7].tobytes() for i in range(5) for j in range(5)}
    shifted = one_image(image, shift=2).round().astype(np.uint8)
    assert {crop.tobytes() for crop in shifted} == crops
