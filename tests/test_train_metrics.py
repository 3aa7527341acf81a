"""Metrics against hand-computed numbers, scikit-learn where it is installed, and their edge cases."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn.train import Confusion, Metrics, accuracy, confusion_matrix, f1, precision, recall
from fastcnn.train.metrics import WeightedMean

# Class 0: twice right, once taken for 1. Class 1: once right, once taken for 2. Class 3: nowhere.
TRUE = np.array([0, 0, 0, 1, 1])
PREDICTED = np.array([0, 0, 1, 1, 2])
MATRIX = np.array([[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_confusion_matrix_has_true_rows_and_predicted_columns():
    np.testing.assert_array_equal(confusion_matrix(TRUE, PREDICTED, 4), MATRIX)
    np.testing.assert_array_equal(confusion_matrix(TRUE, PREDICTED), MATRIX[:3, :3])


def test_scores_by_hand():
    assert accuracy(MATRIX) == 3 / 5
    np.testing.assert_allclose(precision(MATRIX), [1, 1 / 2, 0, 0])
    np.testing.assert_allclose(recall(MATRIX), [2 / 3, 1 / 2, 0, 0])
    np.testing.assert_allclose(f1(MATRIX), [4 / 5, 1 / 2, 0, 0])
    # The macro average leaves out class 3, which is neither true nor predicted anywhere.
    assert precision(MATRIX, "macro") == pytest.approx(1.5 / 3)
    assert recall(MATRIX, "weighted") == pytest.approx((2 / 3 * 3 + 1 / 2 * 2) / 5)
    assert f1(MATRIX, "micro") == pytest.approx(3 / 5)


@pytest.mark.parametrize("score", [precision, recall, f1])
def test_zero_division_is_what_the_caller_says(score):
    assert score(MATRIX)[3] == 0.0
    assert score(MATRIX, zero_division=1.0)[3] == 1.0
    empty = np.zeros((3, 3), np.int64)
    for average in ("macro", "micro", "weighted"):
        assert score(empty, average) == 0.0
        assert score(empty, average, zero_division=0.5) == 0.5
    assert accuracy(empty, zero_division=1.0) == 1.0


@pytest.mark.parametrize("average", [None, "macro", "micro", "weighted"])
@pytest.mark.parametrize("zero_division", [0.0, 1.0])
def test_scores_agree_with_scikit_learn(average, zero_division):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 5, 20):
        true, predicted = rng.integers(0, classes, (2, 30))
        labels = np.arange(classes) if average is None else None
        options = {"average": average, "zero_division": zero_division, "labels": labels}
        matrix = confusion_matrix(true, predicted, classes)
        for own, name in ((precision, "precision"), (recall, "recall"), (f1, "f1")):
            expected = getattr(sklearn, f"{name}_score")(true, predicted, **options)
            np.testing.assert_allclose(own(matrix, average, zero_division), expected, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=40), st.data())
def test_batches_add_up_to_the_whole(classes, pairs, data):
    pairs = [(t % classes, p % classes) for t, p in pairs]
    cut = data.draw(st.integers(0, len(pairs)))
    confusion = Confusion(classes)
    for part in (pairs[:cut], pairs[cut:]):
        confusion.update([t for t, _ in part], [p for _, p in part])
    assert confusion.total == len(pairs)
    for t in range(classes):
        for p in range(classes):
            assert confusion.matrix[t, p] == pairs.count((t, p))
    for score in (precision, recall, f1):
        assert np.isfinite(score(confusion.matrix)).all()


def test_confusion_refuses_and_keeps_what_it_had():
    confusion = Confusion(3)
    confusion.update(np.array([2], np.uint8), [1])
    before = confusion.matrix.copy()
    with pytest.raises(ValueError, match=r"true: class 3 is not between 0 and 2"):
        confusion.update([0, 3], [0, 0])
    with pytest.raises(ValueError, match=r"predicted: class -1"):
        confusion.update([0, 1], [0, -1])
    with pytest.raises(ValueError, match=r"predicted: 1 classes for 2"):
        confusion.update([0, 1], [0])
    with pytest.raises(TypeError, match=r"true: expected integer .* float64"):
        confusion.update([0.0], [0])
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        confusion.update([[0]], [0])
    np.testing.assert_array_equal(confusion.matrix, before)


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_classes: 0"):
        Confusion(0)
    with pytest.raises(TypeError, match="num_classes"):
        Confusion(2.0)
    with pytest.raises(ValueError, match="num_classes: must be given"):
        confusion_matrix([], [])
    with pytest.raises(ValueError, match="average: 'mean'"):
        precision(MATRIX, "mean")
    with pytest.raises(ValueError, match=r"expected shape \(K, K\), got \(2, 3\)"):
        recall(np.zeros((2, 3), int))
    with pytest.raises(TypeError, match="integer counts"):
        f1(np.eye(2))
    with pytest.raises(ValueError, match="negative"):
        accuracy(-np.eye(2, dtype=int))


def test_weighted_mean_counts_samples_not_batches():
    mean = WeightedMean()
    assert mean.value == 0.0
    mean.update(float("nan"), 0)
    mean.update(1.0, 3)
    mean.update(5.0, 1)
    assert mean.value == 2.0


def test_metrics_as_plain_values():
    metrics = Metrics(0.5, MATRIX, ("a", "b", "c", "d"))
    content = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert content["samples"] == 5
    assert content["accuracy"] == metrics.accuracy == 0.6
    assert content["confusion"] == MATRIX.tolist()
    assert content["per_class"][1] == {
        "class": "b",
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "support": 2,
    }
