"""Panoptic quality, against hotcoco and by hand."""

import hotcoco
import numpy as np
import pytest

from visionfm_jax.evals.panoptic import Segments, count, quality

CLASSES = 4


def random_segments(rng, size=40):
    """Rectangles on each other, and some pixels of none."""
    drawn = np.zeros((size, size), int)
    for number in range(1, 9):
        (top, left), (height, width) = rng.integers(0, size - 8, 2), rng.integers(5, 25, 2)
        drawn[top : top + height, left : left + width] = number
    crowd = np.arange(9) == 6  # of several crowds of a class panopticapi sees the last
    return relabelled(drawn, rng.integers(0, CLASSES, 9), crowd)


def relabelled(drawn, labels, crowd):
    """With the numbers of segments that have a pixel, without gaps."""
    ids = np.setdiff1d(np.unique(drawn), [0])
    return Segments(np.where(drawn > 0, np.searchsorted(ids, drawn) + 1, 0), labels[ids - 1], crowd[ids - 1])


def near(truth, rng):
    """The truth moved by a pixel or two, some of its segments of another class or left out."""
    drawn = np.roll(truth.map, rng.integers(-2, 3, 2), (0, 1))
    labels = np.where(rng.random(len(truth.labels)) < 0.85, truth.labels, rng.integers(0, CLASSES, len(truth.labels)))
    drawn[np.isin(drawn, 1 + np.flatnonzero(rng.random(len(labels)) < 0.15))] = 0
    return relabelled(drawn, labels, np.zeros(len(labels), bool))


def dataset(images):
    """As COCO annotations, a mask for each segment."""
    annotations = []
    for i, segments in enumerate(images):
        for s, (label, crowd) in enumerate(zip(segments.labels, segments.crowd, strict=True)):
            mask = np.asfortranarray(segments.map == s + 1).astype(np.uint8)
            numbers = {"id": len(annotations) + 1, "image_id": i, "category_id": int(label), "iscrowd": int(crowd)}
            shape = {"segmentation": hotcoco.mask.encode(mask), "area": float(mask.sum()), "bbox": [0, 0, 1, 1]}
            annotations.append(numbers | shape)
    categories = [{"id": c, "name": str(c), "isthing": c % 2} for c in range(CLASSES)]
    images = [{"id": i, "width": 40, "height": 40} for i in range(len(images))]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_the_numbers_are_those_of_hotcoco():
    rng = np.random.default_rng(0)
    truths = [random_segments(rng) for _ in range(12)]
    guesses = [near(truth, rng) for truth in truths]
    got = quality(sum(count(t, g, CLASSES) for t, g in zip(truths, guesses, strict=True)))
    theirs = hotcoco.panoptic.PanopticEval(hotcoco.COCO(dataset(truths)), hotcoco.COCO(dataset(guesses)))
    theirs.evaluate()
    wanted = theirs.results()["All"]
    for name in ("pq", "sq", "rq"):
        assert got[name].mean() == pytest.approx(wanted[name], abs=1e-12)
    assert 0.1 < got["pq"].mean() < 0.9


def test_a_segment_counts_by_hand():
    truth = np.zeros((1, 30), int)
    truth[0, :10], truth[0, 10:20] = 1, 2  # then 10 pixels of none
    guess = np.zeros((1, 30), int)
    guess[0, :8], guess[0, 8:14], guess[0, 16:30] = 1, 2, 3
    none = np.zeros(3, bool)
    truth = Segments(truth, np.array([0, 1]), none[:2])
    counts = count(truth, Segments(guess, np.array([0, 1, 1]), none), 3)
    # 8 of 10 pixels; 4 of 12; 4 of 14, of which 10 have no true segment, so that it is not wrong.
    np.testing.assert_allclose(counts, [[0.8, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    got = quality(counts)
    np.testing.assert_allclose(got["pq"], [0.8, 0, np.nan])
    perfect = quality(count(truth, truth, 3))
    np.testing.assert_array_equal(perfect["pq"], [1, 1, np.nan])


def test_things_on_a_crowd_of_their_class_are_not_wrong():
    area = np.ones((1, 10), int)
    truth = Segments(area, np.array([1]), np.array([True]))
    for label, wrong in ((1, 0), (0, 1)):
        counts = count(truth, Segments(area, np.array([label]), np.array([False])), 2)
        assert counts.sum() == counts[label, 2] == wrong
