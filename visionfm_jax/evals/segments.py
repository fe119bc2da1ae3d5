"""Panoptic quality of predicted segments on held-out images. Shapes: Q queries, h w places, H W image, C classes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from visionfm_jax.config import Config
from visionfm_jax.data.fields import NoFields
from visionfm_jax.data.sample import Placement
from visionfm_jax.errors import DataError
from visionfm_jax.evals.base import OpenedEval, names_of
from visionfm_jax.evals.detection import small_image
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import PanopticConfig
from visionfm_jax.evals.masks import chances, known_of, layers, on_image
from visionfm_jax.evals.panoptic import COUNTS, Segments, count, quality
from visionfm_jax.evals.sampling import sample
from visionfm_jax.parallel.mesh import of_all_hosts

PICTURED = 8  # images, and as many of the worst


class Compared(NamedTuple):
    """An image that has been looked at."""

    record: int
    counts: np.ndarray  # (C, 4), of `panoptic.count`
    lost: int  # masks that are not finite
    truth: Segments
    guess: Segments


class PanopticEval(OpenedEval):
    """The `evals.eval.Eval` of segments: panoptic quality `pq`, `sq` and `rq`, at the size of the original images.

    Means over the classes that occur or are predicted; likewise `pq_things` and `pq_stuff`, where a source says by
    `things` which classes are which; if it does not, all are things. Masks that are not finite are no segments, and
    counted as `not_finite`. Each image is counted by one host.

    Attributes:
      details: after a run, for JSON: protocol and its settings, quality and number of segments of each class.
      pictured: after a run, on host 0: images with their segments and the predicted ones, and the worst ones, of this
        host's.
    """

    config: PanopticConfig

    def __init__(self, config: PanopticConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        run.task.fields(run).check(self.source)
        self.classes = names_of(self.source, run.task.num_classes)
        things = tuple(getattr(self.source, "things", ()))
        self.things = np.array([*things, *[True] * (len(self.classes) - len(things))])
        fields = ("least_score", "least_visible")
        self.settings |= {name: getattr(config, name) for name in fields} | {"classes": len(self.classes)}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        rows = self.batch_size // self.hosts
        own = slice(self.host * rows, (self.host + 1) * rows)
        counts, images, lost = np.zeros((len(self.classes), len(COUNTS))), 0, 0
        records = np.arange(len(self.source))
        shown, worst = set(sample(records[records % self.batch_size < rows], PICTURED).tolist()), []
        kept: list[Compared] = []
        with ThreadPoolExecutor(self.run_config.data.threads) as pool:
            for batch in self.batches(self.source, NoFields()):
                out = {name: values[own] for name, values in predict(batch, "segments").items()}
                keep = np.flatnonzero(out["mask"] > 0)
                parts = (out[name][keep] for name in ("record", "masks", "scores", "mask_labels"))
                for one in pool.map(self._compare, *parts):
                    if one is None:
                        continue
                    counts, images, lost = counts + one.counts, images + 1, lost + one.lost
                    if self.host == 0:
                        kept += [one] if one.record in shown else []
                        bisect.insort(worst, one, key=_share)
                        del worst[PICTURED:]
        numbers = np.array([*counts.ravel(), images, lost], np.float64)
        of_hosts = np.array(of_all_hosts(numbers.view(np.int64).tolist()), np.int64).view(np.float64)
        *counts, images, lost = of_hosts.sum(0).tolist()
        if not images:
            raise DataError(f"{self.source.name}: none of its records could be read; see the log for the reasons")
        if lost and self.host == 0:
            logging.warning("%s: %d predicted masks are not finite", self.config.name, lost)
        counts = np.reshape(counts, (len(self.classes), len(COUNTS)))
        of_class = quality(counts)
        self.describe(
            classes=[
                {"name": name, "thing": bool(thing), "segments": int(right + missed)}
                | {k: None if np.isnan(v[i]) else float(v[i]) for k, v in of_class.items()}
                for i, (name, thing, (_, right, _, missed)) in enumerate(
                    zip(self.classes, self.things, counts, strict=True)
                )
            ]
        )
        if self.host == 0:
            self.pictured = {
                "segments": [self._drawn(one) for one in kept],
                "worst_segments": [self._drawn(one) for one in worst],
                "class_names": self.classes,
            }
        means = {name: _mean(values) for name, values in of_class.items()}
        parts = {"pq_things": self.things, "pq_stuff": ~self.things}
        means |= {name: _mean(of_class["pq"][which]) for name, which in parts.items() if not self.things.all()}
        return {**means, "images": images, "not_finite": lost}

    def _compare(self, record: np.int32, masks: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Compared | None:
        """An image; None: it is damaged."""
        if (known := known_of(self, int(record))) is None:
            return None
        number = np.zeros(known.masks.shape[1:], np.int32)
        for i, mask in enumerate(known.masks, 1):
            number[mask] = i
        truth = Segments(number, known.labels, known.crowd)
        guess, lost = found_on(
            masks, scores, labels, known.placement, number.shape, self.things, self.config.least_score,
            self.config.least_visible,
        )  # fmt: skip
        return Compared(int(record), count(truth, guess, len(self.classes)), lost, truth, guess)

    def _drawn(self, one: Compared) -> dict[str, Any]:
        image, _ = small_image(self, one.record)
        parts = {
            name: layers((s.map == i for i in range(1, len(s.labels) + 1)), s.labels, image.shape[:2])
            for name, s in (("truth", one.truth), ("found", one.guess))
        }
        return {"key": self.source.key(one.record), "image": image, "share": _share(one), **parts}


def found_on(
    masks: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    placement: Placement,
    size: tuple[int, int],
    things: np.ndarray,
    least_score: float,
    least_visible: float,
) -> tuple[Segments, int]:
    """What a task's "segments" of an image are at its pixels, and how many masks are not finite.

    Args:
      masks: (Q, h, w), logits.
      scores: (Q,).
      labels: (Q,); C stands for nothing.
      placement: of the image on the canvas.
      size: (H, W) of the image.
      things, least_visible: as of `segments_of`.
      least_score: of a mask.
    """
    finite = np.isfinite(scores) & np.isfinite(masks).all((1, 2))
    keep = np.flatnonzero(finite & (labels < len(things)) & (scores > least_score))
    on = np.stack([*on_image(masks[keep], placement, size)]) if len(keep) else masks[:0]
    return segments_of(on, scores[keep], labels[keep], things, size, least_visible), int((~finite).sum())


def segments_of(
    logits: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    things: np.ndarray,
    size: tuple[int, int],
    least_visible: float,
) -> Segments:
    """Masks that may overlap, cut into segments (Cheng et al. 2022, "Mask2Former").

    A pixel is that mask's of which chance times score is highest, if its chance is 1/2 or more. Masks of which less
    than `least_visible` is left are dropped; those of a class of stuff are one segment.

    Args:
      logits: (K, H, W).
      scores: (K,).
      labels: (K,).
      things: (C,) bool; else stuff.
      size: (H, W).
      least_visible: share.
    """
    number, kept = np.zeros(size, np.int32), []
    inside = chances(logits)
    best = (scores[:, None, None] * inside).argmax(0) if len(logits) else number
    for k, label in enumerate(labels.tolist()):
        own, whole = best == k, inside[k] >= 0.5
        seen = own & whole
        if not seen.any() or own.sum() < least_visible * whole.sum():
            continue
        if things[label] or label not in kept:
            kept.append(label)
            number[seen] = len(kept)
        else:
            number[seen] = kept.index(label) + 1
    return Segments(number, np.array(kept, int), np.zeros(len(kept), bool))


def _share(one: Compared) -> float:
    """The quality of an image by itself, over its segments of all classes."""
    iou, right, wrong, missed = one.counts.sum(0)
    return float(iou / (right + (wrong + missed) / 2)) if right + wrong + missed else 1.0


def _mean(values: np.ndarray) -> float:
    there: Sequence[float] = values[~np.isnan(values)]
    return float(np.mean(there)) if len(there) else math.nan
