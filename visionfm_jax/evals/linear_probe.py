"""Frozen features judged by a linear classifier on them (Radford et al. 2021, "CLIP", appendix A).

Shapes: N images of the gallery, Q held-out ones, D features, C classes.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from visionfm_jax.config import Config
from visionfm_jax.errors import DataError
from visionfm_jax.evals.beats import beat
from visionfm_jax.evals.by_class import by_class
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.gallery import GalleryEval
from visionfm_jax.evals.kinds import LinearProbeConfig
from visionfm_jax.evals.logistic import (
    BATCH,
    EPOCHS,
    ITERATIONS,
    MOMENTUM,
    STEPS,
    TOLERANCE,
    Linear,
    fit,
    fit_by_sgd,
    zeros,
)

PENALTIES = tuple(10.0**power for power in range(-4, 5))  # that L-BFGS tries
RATES = tuple(10.0 ** (power / 2) for power in range(-6, 3))  # that SGD tries
KEPT = 5  # every fifth image of the gallery chooses between them, unless `shots` limits those that are learned from
DRAWS = 5  # of a few images
AT_ONCE = 2**15  # rows that are classified, or squared
MAX_NUMBERS = 2**32  # of the gallery's features: 16 GiB on one device


class LinearProbeEval(GalleryEval):
    """The `evals.eval.Eval` of a logistic regression on frozen features.

    top1 and balanced_accuracy, the mean over classes. The penalty on the weights, or the learning rate of SGD, is the
    one that does best on a part of the gallery that the classifier has not seen; then it is fitted to all of it. With
    `shots` the classifier learns from so many images of each class, the scores are means over `DRAWS` choices of them,
    and top1_std is the standard deviation of top1 between these. An image whose features are not finite is never right.
    """

    def __init__(self, config: LinearProbeConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.settings |= {"shots": config.shots, "draws": DRAWS if config.shots else 1, "solver": config.solver}
        self.settings |= {
            "choose": "as many shots, right, loss" if config.shots else f"1 in {KEPT}, right, loss",
            "scale": "mean, overall rms",
        }
        if config.solver == "sgd":
            self.settings |= {"rates": RATES, "batch": BATCH, "epochs": EPOCHS, "steps": STEPS, "momentum": MOMENTUM}
        else:
            self.settings |= {"penalties": PENALTIES, "iterations": ITERATIONS, "tolerance": TOLERANCE}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        gallery, held_out = self.read(predict, self.gallery), self.read(predict, [self.source])
        # All in float32, and in place where it can be: the features of ImageNet are gigabytes.
        x, queries = (rows.pop("features").astype(np.float32, copy=False) for rows in (gallery, held_out))
        use, finite = (np.isfinite(rows).all(1) for rows in (x, queries))
        if not use.any():
            raise DataError("no image of the gallery has finite features; is the run in order?")
        by_sgd = self.config.solver == "sgd"
        if use.sum() * x.shape[1] > MAX_NUMBERS and not by_sgd:
            raise DataError(
                f"{use.sum():,} images of {x.shape[1]:,} features in the gallery are more than fit on a device "
                f"({MAX_NUMBERS:,} numbers); set solver='sgd', or shots, or a smaller gallery"
            )
        x, y = (x, gallery["label"]) if use.all() else (x[use], gallery["label"][use])
        queries[~finite] = 0
        mean, rms = moments(x)
        for rows in (x, queries):
            rows -= mean
            rows /= rms
        found, classes = [], self.source.num_classes
        for draw in range(DRAWS if self.config.shots else 1):
            learn, choose = split(y, self.config.shots, draw)
            chosen = probe_by_sgd if by_sgd else probe
            classifier, best = chosen(x, y, learn, choose, classes, final=not self.config.shots)
            guess = np.where(finite, _guess(classifier, queries), -1)
            counted = by_class(held_out["label"], guess, classes)
            top1 = float((guess == held_out["label"]).mean())
            found.append({"top1": top1, "balanced_accuracy": counted.balanced_accuracy})
            found[-1]["learning_rate" if by_sgd else "penalty"] = best
        self.describe(draws=found)
        scores = {name: statistics.mean(one[name] for one in found) for name in ("top1", "balanced_accuracy")}
        spread = {"top1_std": statistics.stdev(one["top1"] for one in found)} if len(found) > 1 else {}
        return scores | spread


def moments(x: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean row, float32 (D,), of (N, D), and the root mean square of what is left without it.

    By these, features of any scale are made alike, so that a penalty means the same.
    """
    mean = x.mean(0, dtype=np.float64)
    squares = sum(float(((x[i : i + AT_ONCE] - mean) ** 2).sum()) for i in range(0, len(x), AT_ONCE))
    return mean.astype(np.float32), math.sqrt(squares / x.size) or 1.0


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
    best, kept = (Merit(-1.0, 0.0), 1.0), {}
    weights, seen = zeros(x.shape[1], classes), (jnp.asarray(x[learn]), y[learn])
    for penalty in sorted(PENALTIES if len(choose) else (1.0,), reverse=True):  # from which the next is not far
        weights = kept[penalty] = fit(*seen, penalty, weights)
        beat()
        best = max(best, (_merit(weights, x, y, choose), penalty))  # of equals the greater penalty
    weights, penalty = kept[best[1]], best[1]
    del seen  # the device need not hold both
    return (fit(x, y, penalty, weights) if final else weights), penalty


def probe_by_sgd(
    x: np.ndarray, y: np.ndarray, learn: np.ndarray, choose: np.ndarray, classes: int, final: bool
) -> tuple[Linear, float]:
    """As `probe`, of the learning rate that does best; where there are no rows to choose by, it is 0.1."""
    rates = RATES if len(choose) else (0.1,)
    found = fit_by_sgd(x, y, learn, rates, classes)
    merits = [_merit(one, x, y, choose) for one in found]
    best = merits.index(max(merits))  # of equals the lower rate
    if final:
        [found[best]] = fit_by_sgd(x, y, np.arange(len(x)), rates[best : best + 1], classes)
    return found[best], rates[best]


class Merit(NamedTuple):
    """By which classifiers are compared: of as many right, as is usual of few rows, the smaller loss decides."""

    right: float  # share of the rows
    gain: float  # minus the mean loss; -inf where it is not finite


def _merit(classifier: Linear, x: np.ndarray, y: np.ndarray, rows: np.ndarray) -> Merit:
    """On these rows; nothing without rows."""
    if not len(rows):
        return Merit(0.0, 0.0)
    right, loss = 0, 0.0
    for first in range(0, len(rows), AT_ONCE):
        some = rows[first : first + AT_ONCE]
        logits = classifier(x[some])
        right += int((_best(np.asarray(logits)) == y[some]).sum())
        loss += float(optax.softmax_cross_entropy_with_integer_labels(logits, y[some]).sum())
    return Merit(right / len(rows), -loss / len(rows) if math.isfinite(loss) else -math.inf)


def _guess(classifier: Linear, x: np.ndarray) -> np.ndarray:
    """The class (N,) of each row, some at a time; -1 where the classifier is not finite."""
    return np.concatenate([_best(np.asarray(classifier(x[i : i + AT_ONCE]))) for i in range(0, len(x), AT_ONCE)])


def _best(logits: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(logits).all(1), logits.argmax(1), -1)
