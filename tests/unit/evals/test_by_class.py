"""Counting guesses by class, beside a naive loop."""

import json

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from visionfm_jax.evals.by_class import IN_FULL, by_class


def test_counts_are_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    labels = rng.choice(9, 300, p=[0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05, 0])  # the last has no image
    guess = np.where(rng.random(300) < 0.6, labels, rng.integers(-1, 9, 300))
    got = by_class(labels, guess, 9)
    matrix = np.zeros((9, 9), int)
    for label, found in zip(labels, guess, strict=True):
        if found >= 0:
            matrix[label, found] += 1
    assert got.cells.tolist() == [[c, g, matrix[c, g]] for c in range(9) for g in range(9) if matrix[c, g]]
    np.testing.assert_array_equal(got.images, np.bincount(labels, minlength=9))
    np.testing.assert_allclose(got.accuracy[:8], np.diag(matrix)[:8] / np.bincount(labels))
    assert np.isnan(got.accuracy[8])
    with pytest.warns(UserWarning, match="not in y_true"):  # a guess of -1
        assert got.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, guess))
    assert got.majority == np.bincount(labels).max() / 300


def test_always_the_largest_class_scores_the_majority_and_no_balance():
    labels = np.repeat([0, 1, 2], [70, 20, 10])
    got = by_class(labels, np.zeros(100, int), 3)
    assert (labels == 0).mean() == got.majority == 0.7
    assert got.balanced_accuracy == pytest.approx(1 / 3)


def test_of_many_classes_the_most_frequent_confusions_are_kept():
    C = 21_841
    rng = np.random.default_rng(0)
    labels = rng.integers(0, C, 60_000)
    guess = np.where(np.arange(60_000) % 2, labels, rng.integers(0, C, 60_000))
    labels[:7], guess[:7] = 5, 20_000  # the most frequent one
    got = by_class(labels, guess, C).details([str(i) for i in range(C)])
    assert len(got["classes"]) == C
    assert "confusion" not in got
    assert got["columns_of_confusion"] == ["class", "guess", "images"]
    assert got["most_confused"][0] == [5, 20_000, 7]
    assert len(got["most_confused"]) == IN_FULL
    assert all(c != g for c, g, _ in got["most_confused"])
    json.dumps(got, allow_nan=False)
