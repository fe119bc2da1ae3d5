"""Average precision of predicted boxes on held-out images. Shapes: B batch, Q predictions of an image, H W image."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from absl import logging

from visionfm_jax.config import Config
from visionfm_jax.data.images import opened
from visionfm_jax.data.sample import Placement, areas, clip_boxes, upright_boxes
from visionfm_jax.data.sources import read_record
from visionfm_jax.evals.base import OpenedEval, names_of
from visionfm_jax.evals.coco import Coco, Found, Truth, best_score, coco, match
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import BoxesConfig
from visionfm_jax.evals.sampling import sample
from visionfm_jax.parallel.agreement import from_first

PICTURED = 12  # images, and as many of the worst
SIDE = 480  # pixels, of the longer side of what is drawn


class Known(NamedTuple):
    """The part of a record that is compared with predictions, and the place of its image on the canvas."""

    truth: Truth
    placement: Placement
    size: tuple[int, int]


class BoxesEval(OpenedEval):
    """The `evals.eval.Eval` of boxes: COCO's 12 numbers (`coco.METRICS`), in pixels of the original images.

    Crowds are as COCO has them; objects are large or small by the annotated area. Boxes and scores that are not finite
    are left out, so they are never right, and counted as `not_finite`. Numbers of objects of which there are none are
    NaN. Process 0 reads the annotations, once, and counts for all.

    Attributes:
      details: after a run, on host 0, for JSON: protocol and its settings, AP and number of objects of each class.
      pictured: after a run, on host 0: images with objects and predictions, the worst ones, precision over recall.
    """

    drawn_as = "boxes"  # of `telemetry.pictures.KINDS`

    def __init__(self, config: BoxesConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.fields = run.task.fields(run)
        self.fields.check(self.source)
        self.classes = names_of(self.source, run.task.num_classes)
        self.settings |= {"classes": len(self.classes)}
        self._known: dict[int, Known] = {}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        parts = []
        for batch in self.batches(self.source, self.fields):
            out = predict(batch, "boxes")
            keep = out["mask"] > 0
            parts.append([out[name][keep] for name in ("record", "boxes", "scores", "box_labels")])
        arrays = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return from_first(lambda: self._count(*arrays))

    def _count(
        self, records: np.ndarray, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray
    ) -> dict[str, float]:
        finite = np.isfinite(scores) & np.isfinite(boxes).all(-1)
        if lost := int((~finite).sum()):
            logging.warning("%s: %d of %d predicted boxes are not finite", self.config.name, lost, finite.size)
        known = [self._read(record) for record in records.tolist()]
        found = [
            Found(on_image(box[use], k.placement, k.size), label[use], score[use].astype(np.float64))
            for k, box, label, score, use in zip(known, boxes, labels, scores, finite, strict=True)
        ]
        return self._scores(records, [k.truth for k in known], found, lost)

    def _scores(self, records: np.ndarray, truths: list[Truth], found: list[Found], lost: int) -> dict[str, float]:
        counted = coco(truths, found, len(self.classes))
        objects = np.bincount(np.concatenate([t.labels[~t.crowd] for t in truths]), minlength=len(self.classes))
        self.describe(
            classes=[
                {"name": name, "objects": int(count), "ap": float(ap) if count else None}
                for name, count, ap in zip(self.classes, objects, counted.classes, strict=True)
            ]
        )
        if self.host == 0:
            self.pictured = self._pictures(records, truths, found, counted)
        sums = {"images": float(len(records)), "objects": float(objects.sum()), "not_finite": float(lost)}
        return {**counted.metrics, **sums}

    def _read(self, record: int) -> Known:
        """What is known of a record; read once, as it does not change."""
        if record not in self._known:
            entry = read_record(self.source, record)
            with opened(entry["image"], self.transform.max_pixels) as picture:
                boxes = np.asarray(entry["boxes"], np.float64).reshape(-1, 4)
                boxes = upright_boxes(boxes, picture)
                placement, size = self.transform.placement(picture), picture.size
            crowd = np.asarray(entry.get("box_crowd", np.zeros(len(boxes))), bool)
            area = np.asarray(entry.get("box_areas", areas(boxes)), np.float64)
            truth = Truth(boxes, np.asarray(entry["box_labels"], int), crowd, area)
            self._known[record] = Known(truth, placement, size)
        return self._known[record]

    def _pictures(self, records: np.ndarray, truths: list[Truth], found: list[Found], counted: Coco) -> dict[str, Any]:
        """What `telemetry.pictures` draws."""
        matched = [match(t, f) for t, f in zip(truths, found, strict=True)]
        of_box = np.concatenate([m[0] for m in matched])
        scores = np.concatenate([f.scores for f in found])[of_box > -2]
        least = best_score(scores, of_box[of_box > -2] >= 0, sum(int((~t.crowd).sum()) for t in truths))
        share = []  # of an image's objects and shown boxes that are right
        for truth, one, (box, _) in zip(truths, found, matched, strict=True):
            shown = box[one.scores >= least]
            both = (shown > -2).sum() + (~truth.crowd).sum()
            share.append(2 * (shown >= 0).sum() / both if both else 1.0)

        def drawn(i: int) -> dict[str, Any]:
            return self._drawn(int(records[i]), truths[i], found[i], matched[i], least, float(share[i]))

        spread = sample(np.arange(len(records)), PICTURED)
        worst = np.argsort(share, kind="stable")[:PICTURED]
        return {
            self.drawn_as: [drawn(i) for i in spread],
            f"worst_{self.drawn_as}": [drawn(i) for i in worst],
            "least_score": least,
            "class_names": self.classes,
            "precision": {"AP50": counted.curves[0], "AP75": counted.curves[5], "AP": counted.curves.mean(0)},
        }

    def _drawn(self, record: int, truth: Truth, found: Found, matched: tuple, least: float, share: float) -> dict:
        image, scale = small_image(self, record)
        (of_box, of_object), shown = matched, found.scores >= least
        return {
            "key": self.source.key(record),
            "image": image,
            "share": share,
            "truth": {
                "boxes": truth.boxes * scale,
                "labels": truth.labels,
                "crowd": truth.crowd,
                "found": np.isin(of_object, np.flatnonzero(shown)),
            },
            "found": {
                "boxes": found.boxes[shown] * scale,
                "labels": found.labels[shown],
                "scores": found.scores[shown],
                "matched": of_box[shown],
            },
        }


def small_image(opened_eval: OpenedEval, record: int) -> tuple[np.ndarray, float]:
    """The image of a record, uint8 (H, W, 3), with at most `SIDE` pixels along its longer side, and its scale."""
    with opened(read_record(opened_eval.source, record)["image"], opened_eval.transform.max_pixels) as picture:
        scale = min(1.0, SIDE / max(picture.size))
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        (image,) = picture.parts([((0, 0, *picture.size), size)], exact=True)
    return image, scale


def on_image(boxes: np.ndarray, placement: Placement, size: tuple[int, int]) -> np.ndarray:
    """Boxes (Q, 4) of the canvas on the image of (H, W) pixels, float64, clipped to it."""
    left, top, right, bottom = boxes.astype(np.float64).T
    (top, bottom), (left, right) = (
        np.sort([axis.on_image(low), axis.on_image(high)], 0)
        for axis, low, high in ((placement.rows, top, bottom), (placement.columns, left, right))
    )
    return clip_boxes(np.stack([left, top, right, bottom], 1), size)
