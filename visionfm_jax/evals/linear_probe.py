"""Frozen features judged by a linear classifier on them (Radford et al. 2021, "CLIP", appendix A).

Shapes: N images of the gallery, Q held-out ones, D features, C classes.
"""

from __future__ import annotations

import statistics

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.errors import DataError
from visionfm_jax.evals.by_class import by_class
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.gallery import GalleryEval
from visionfm_jax.evals.kinds import LinearProbeConfig
from visionfm_jax.evals.logistic import Linear, fit, zeros

PENALTIES = tuple(10.0**power for power in range(-4, 5))  # that are tried
KEPT = 5  # every fifth image of the gallery chooses the penalty, unless `shots` limits those that are learned from
DRAWS = 5  # of a few images
MAX_NUMBERS = 2**32  # of the gallery's features: 16 GiB on one device


class LinearProbeEval(GalleryEval):
    """The `evals.eval.Eval` of a logistic regression on frozen features.

    top1 and balanced_accuracy, the mean over classes. The penalty on the weights is the one that does best on a part of
    the gallery that the classifier has not seen; then it is fitted to all of it. With `shots` the classifier learns
    from so many images of each class, and the scores are means over `DRAWS` choices of them. An image whose features
    are not finite is never right.
    """

    def __init__(self, config: LinearProbeConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.settings |= {"shots": config.shots, "penalties": PENALTIES, "draws": DRAWS if config.shots else 1}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        gallery, held_out = self.read(predict, self.gallery), self.read(predict, [self.source])
        use, finite = (np.isfinite(rows["features"]).all(1) for rows in (gallery, held_out))
        if not use.any():
            raise DataError("no image of the gallery has finite features; is the run in order?")
        mean, rms = moments(gallery["features"][use])
        x, queries = (((rows["features"] - mean) / rms).astype(np.float32) for rows in (gallery, held_out))
        x, y, queries = x[use], gallery["label"][use], np.where(finite[:, None], queries, 0)
        if x.size > MAX_NUMBERS:
            raise DataError(
                f"{len(x):,} images of {x.shape[1]:,} features in the gallery are more than fit on a device "
                f"({MAX_NUMBERS:,} numbers); set shots, or a smaller gallery"
            )
        found, classes = [], self.source.num_classes
        for draw in range(DRAWS if self.config.shots else 1):
            learn, choose = split(y, self.config.shots, draw)
            classifier, penalty = probe(x, y, learn, choose, classes, final=not self.config.shots)
            guess = np.where(finite, np.asarray(classifier(queries)).argmax(1), -1)
            counted = by_class(held_out["label"], guess, classes)
            top1 = float((guess == held_out["label"]).mean())
            found.append({"top1": top1, "balanced_accuracy": counted.balanced_accuracy, "penalty": penalty})
        self.describe(draws=found)
        return {name: statistics.mean(one[name] for one in found) for name in ("top1", "balanced_accuracy")}


def moments(x: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean row (D,) of (N, D), and the root mean square of what is left without it.

    By these, features of any scale are made alike, so that a penalty means the same.
    """
    mean = x.mean(0, dtype=np.float64)
    return mean, float(np.sqrt(np.mean((x - mean) ** 2))) or 1.0


def split(labels: np.ndarray, shots: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from, and rows that choose the penalty.

    Without `shots` these are four fifths and one fifth, every fifth row of each class; with it, so many of each class
    each, drawn anew for every `draw`, as far as there are.
    """
    learn, choose = [], []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if shots:
            rows = np.random.default_rng([draw, int(label)]).permutation(rows)
            learn.append(rows[:shots])
            choose.append(rows[shots : 2 * shots])
        else:
            chosen = np.arange(len(rows)) % KEPT == KEPT - 1
            learn.append(rows[~chosen])
            choose.append(rows[chosen])
    return np.concatenate(learn), np.concatenate(choose)


def probe(
    x: np.ndarray, y: np.ndarray, learn: np.ndarray, choose: np.ndarray, classes: int, final: bool
) -> tuple[Linear, float]:
    """The classifier of the penalty that does best on the rows `choose`, fitted to `learn`, and the penalty.

    Args:
      x, y: features (N, D) and labels (N,).
      learn, choose: row numbers; where there are none to choose by, the penalty is 1.
      classes: C.
      final: fit that classifier once more, to both.
    """
    best, kept = (-1.0, 1.0), {}
    weights = zeros(x.shape[1], classes)
    for penalty in sorted(PENALTIES if len(choose) else (1.0,), reverse=True):  # from which the next is not far
        weights = kept[penalty] = fit(x[learn], y[learn], penalty, weights)
        right = float((np.asarray(weights(x[choose])).argmax(1) == y[choose]).mean()) if len(choose) else 0.0
        best = max(best, (right, penalty))  # of equals the greater penalty
    weights, penalty = kept[best[1]], best[1]
    return (fit(x, y, penalty, weights) if final else weights), penalty
