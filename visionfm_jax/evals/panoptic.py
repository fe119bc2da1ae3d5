"""Panoptic quality (Kirillov et al. 2019), as panopticapi counts it. Shapes: H W image, N segments, C classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COUNTS = ("iou", "right", "wrong", "missed")  # columns of `count`: sum of IoUs, and numbers of segments


class Segments(NamedTuple):
    """An image cut into segments.

    Attributes:
      map: (H, W) integers: 0 where there is none, else 1 + the number of the segment in `labels`.
      labels: (N,) classes.
      crowd: (N,) bool, of the truth: an area of many things of a class. A segment of that class, most of which lies
        there, counts neither as right nor as wrong.
    """

    map: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray


def count(truth: Segments, guess: Segments, classes: int) -> np.ndarray:
    """`COUNTS` of an image by class, float64 (C, 4), which are summed over a set.

    A predicted segment is right if its IoU with a true one of its class is above 0.5, which one can be at most; pixels
    that have no true segment do not count for it.

    Args:
      truth, guess: of the same (H, W).
      classes: C.
    """
    of_truth, of_guess = len(truth.labels) + 1, len(guess.labels) + 1
    cells = truth.map.astype(np.int64) * of_guess + guess.map
    shared = np.bincount(cells.ravel(), minlength=of_truth * of_guess).reshape(of_truth, of_guess)
    area, void, inner = shared.sum(0)[1:], shared[0, 1:], shared[1:, 1:]
    same = truth.labels[:, None] == guess.labels
    union = shared.sum(1)[1:, None] + area - inner - void
    iou = np.where(same & ~truth.crowd[:, None], inner / np.maximum(union, 1), 0)
    matched = iou > 0.5
    excused = void + np.where(same & truth.crowd[:, None], inner, 0).sum(0)
    wrong = (area > 0) & ~matched.any(0) & ~(excused > 0.5 * area)
    missed = ~truth.crowd & ~matched.any(1)
    return np.stack(
        [
            np.bincount(guess.labels, (iou * matched).sum(0), classes),
            np.bincount(guess.labels, matched.any(0), classes),
            np.bincount(guess.labels, wrong, classes),
            np.bincount(truth.labels, missed, classes),
        ],
        1,
    )


def quality(counts: np.ndarray) -> dict[str, np.ndarray]:
    """(C,) each, NaN for classes of which there is neither truth nor guess: `pq`, and its factors `sq`, `rq`.

    Args:
      counts: (C, 4), summed over the set.
    """
    iou, right, wrong, missed = counts.T
    there = right + wrong + missed > 0
    rq = np.where(there, right / np.maximum(right + (wrong + missed) / 2, 0.5), np.nan)
    sq = np.where(there, iou / np.maximum(right, 1), np.nan)
    return {"pq": sq * rq, "sq": sq, "rq": rq}
