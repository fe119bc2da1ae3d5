"""Guesses against labels, class by class. Shapes: N images, C classes, K pairs of class and guess that occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.sampling import image_of, sample

# Classes up to which details hold every pair of class and guess; above, as many of the most frequent confusions: of
# 21,841 classes every pair would be as long as the dataset.
IN_FULL = 1000
PICTURED = 64  # images


@dataclass(frozen=True)
class ByClass:
    """Counts of how images of each class were classified.

    Attributes:
      images: (C,) int64, how many there are of each class.
      accuracy: (C,) share of them that was guessed right; NaN where there is none.
      cells: (K, 3) int64: class, guess, how many images, in order; images without a guess are in none.
    """

    images: np.ndarray
    accuracy: np.ndarray
    cells: np.ndarray

    @property
    def balanced_accuracy(self) -> float:
        """Mean of `accuracy` over the classes that occur; 1 / their number for one and the same guess."""
        return float(np.nanmean(self.accuracy))

    @property
    def majority(self) -> float:
        """The largest class's share of the images: top1 of always guessing it."""
        return float(self.images.max() / self.images.sum())

    def details(self, names: Sequence[str]) -> dict[str, Any]:
        """For JSON: every class's images and accuracy, and [class, guess, images] of all pairs, or the most frequent
        confusions.
        """
        classes = [
            {"name": name, "images": int(count), "top1": float(share) if count else None}
            for name, count, share in zip(names, self.images, self.accuracy, strict=True)
        ]
        columns = {"columns_of_confusion": ["class", "guess", "images"]}  # classes by their place in `classes`, from 0
        if len(names) <= IN_FULL:
            return {"classes": classes, **columns, "confusion": self.cells.tolist()}
        wrong = self.cells[self.cells[:, 0] != self.cells[:, 1]]
        most = wrong[np.argsort(-wrong[:, 2], kind="stable")][:IN_FULL]
        return {"classes": classes, **columns, "most_confused": most.tolist()}


def by_class(labels: np.ndarray, guess: np.ndarray, classes: int) -> ByClass:
    """Count.

    Args:
      labels: (N,) integers in [0, C), N at least 1.
      guess: (N,) integers in [0, C); -1: none, which is wrong.
      classes: C.
    """
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[labels == guess], minlength=classes)
    accuracy = np.divide(right, images, out=np.full(classes, np.nan), where=images > 0)
    pairs = labels.astype(np.int64) * classes + guess
    pairs, counts = np.unique(pairs[guess >= 0], return_counts=True)
    return ByClass(images, accuracy, np.stack([pairs // classes, pairs % classes, counts], 1))


class LabelledEval(OpenedEval):
    """The base of the evals of labelled images: their details and pictures.

    Attributes:
      classes: the names, one a class.
    """

    classes: Sequence[str]

    def by_class(self, labels: np.ndarray, guess: np.ndarray, records: np.ndarray) -> dict[str, float]:
        """Fill `details`, and on host 0 `pictured`; the metrics over classes.

        Args:
          labels, guess: as those of `by_class`.
          records: (N,) their numbers in `source`.
        """
        counted = by_class(labels, guess, len(self.classes))
        self.describe(**counted.details(self.classes))
        if self.host == 0:
            rows = sample(np.arange(len(labels)), PICTURED)
            self.pictured = {
                "image": np.stack([image_of(self.source, int(records[r]), self.transform) for r in rows]),
                "label": labels[rows],
                "guess": guess[rows],
                "confusion": counted.cells,
                "class_names": self.classes,
            }
        images = float(len(labels))
        return {"balanced_accuracy": counted.balanced_accuracy, "majority": counted.majority, "images": images}
