"""Average precision as COCO counts it (Lin et al. 2014), by hotcoco, which gives pycocotools' numbers.

Of boxes or, where objects have them, of masks. Shapes: N objects of an image, D predictions for it, C classes, T
thresholds of IoU (0.5 to 0.95), R levels of recall (0 to 1 by 0.01).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hotcoco import COCO, COCOeval
from hotcoco import mask as rle
from hotcoco.primitives import bbox_iou

# COCO's 12 numbers, in its order. By size: an object's area below 32^2, up to 96^2, above, pixels.
METRICS = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip


class Truth(NamedTuple):
    """The objects of an image.

    Attributes:
      boxes: (N, 4) float64, left, top, right, bottom, pixels of the image.
      labels: (N,) integers below C.
      crowd: (N,) bool: an area of many objects. What is found there is neither right nor wrong.
      areas: (N,) float64, pixels, by which COCO calls an object small, medium or large.
      masks: N, as runs of pixels (`hotcoco.mask.encode`); None: boxes are compared.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None


class Found(NamedTuple):
    """What was predicted for an image.

    Attributes:
      boxes: (D, 4) float64, as of `Truth`.
      labels: (D,) integers below C.
      scores: (D,) finite.
      masks: D, where those of `Truth` are.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None


class Coco(NamedTuple):
    """Counted over a set of images; NaN where there is no object to be found.

    Attributes:
      metrics: the numbers of `METRICS`.
      classes: (C,) AP of each class.
      curves: (T, R) precision at each level of recall, the mean over the classes that occur.
    """

    metrics: dict[str, float]
    classes: np.ndarray
    curves: np.ndarray


def coco(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> Coco:
    """Count; of an image's predictions of a class the 100 of the highest score.

    Args:
      truths: of each image.
      found: of each image.
      classes: C.
    """
    boxes, labels, crowd, areas = (np.concatenate(parts) for parts in zip(*(t[:4] for t in truths), strict=True))
    masks = None if truths[0].masks is None else [mask for t in truths for mask in t.masks]
    truth = COCO.from_arrays(
        [{"id": i, "width": 0, "height": 0} for i in range(len(truths))],  # nothing depends on them
        [{"id": c, "name": str(c)} for c in range(classes)],
        np.repeat(np.arange(len(truths)), [len(t.labels) for t in truths]),
        labels.astype(np.int64),
        corner_and_size(boxes),
        area=areas,
        iscrowd=crowd,
        segmentation=masks,
    )
    image = np.repeat(np.arange(len(found)), [len(f.labels) for f in found])
    boxes, labels, scores = (np.concatenate(parts) for parts in zip(*(f[:3] for f in found), strict=True))
    if masks is None:
        results = np.column_stack([image, corner_and_size(boxes), scores, labels]).astype(np.float64)
    else:  # without boxes, so that the area of a prediction is that of its mask
        names = "image_id", "category_id", "score", "segmentation"
        columns = image.tolist(), labels.tolist(), scores.tolist(), (mask for f in found for mask in f.masks)
        results = [dict(zip(names, one, strict=True)) for one in zip(*columns, strict=True)]
    counted = COCOeval(truth, truth.load_res(results), "bbox" if masks is None else "segm")
    counted.evaluate()
    counted.accumulate()
    counted.summary_lines()  # fills `stats`; `summarize` would print as well
    stats = np.asarray(counted.stats)
    precision = np.asarray(counted.eval["precision"])[..., 0, -1]  # (T, R, C) of all sizes, 100 boxes; -1: no object
    there = precision[0, 0] >= 0
    by_class = np.where(there, precision.mean((0, 1)), np.nan)
    curves = precision[..., there].mean(-1) if there.any() else np.full(precision.shape[:2], np.nan)
    return Coco(dict(zip(METRICS, np.where(stats < 0, np.nan, stats).tolist(), strict=True)), by_class, curves)


def match(truth: Truth, found: Found, least: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Each prediction, by descending score, and the free object of its class on which it lies best.

    Args:
      least: IoU from which a box is right.

    Returns:
      Per predicted box (D,) the object, -1 where it is wrong, -2 where it lies on a crowd and does not count; per
      object (N,) the predicted box, -1 where it was missed.
    """
    of_box, of_object = np.full(len(found.labels), -1), np.full(len(truth.labels), -1)
    if not len(of_object):
        return of_box, of_object
    if truth.masks is None:
        iou = bbox_iou(corner_and_size(found.boxes), corner_and_size(truth.boxes), truth.crowd)
    else:
        iou = np.reshape(rle.iou(found.masks, truth.masks, truth.crowd.tolist()), (len(of_box), len(of_object)))
    iou = np.where((iou >= least) & (found.labels[:, None] == truth.labels), iou, 0)
    for box in np.argsort(-found.scores, kind="stable"):
        free = np.where((of_object < 0) & ~truth.crowd, iou[box], 0)
        if free.max() > 0:
            of_box[box] = free.argmax()
            of_object[of_box[box]] = box
        elif iou[box, truth.crowd].any():
            of_box[box] = -2
    return of_box, of_object


def best_score(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """The least score to show: that at which the harmonic mean of precision and recall over all images is highest.

    Args:
      scores: of all predicted boxes.
      right: bool, whether each is.
      objects: number of them.
    """
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        return 0.0
    f1 = 2 * right[order].cumsum() / (np.arange(1, len(order) + 1) + objects)
    return float(scores[order[f1.argmax()]])


def corner_and_size(boxes: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom (N, 4) to left, top, width, height, as COCO has them."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
