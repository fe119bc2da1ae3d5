"""Average precision of predicted masks on held-out images. Shapes: K predictions of an image, h w places, H W image."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging
from hotcoco import mask as rle

from visionfm_jax.data.fields import NoFields
from visionfm_jax.data.sample import Placement
from visionfm_jax.errors import DataError
from visionfm_jax.evals.coco import Found, Truth
from visionfm_jax.evals.detection import BoxesEval, small_image
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import InstancesConfig
from visionfm_jax.evals.masks import chances, known_of, layers, on_image
from visionfm_jax.parallel.agreement import from_first


class InstancesEval(BoxesEval):
    """The `evals.eval.Eval` of masks: COCO's 12 numbers (`coco.METRICS`), at the size of the original images.

    A mask is where its logit, resized, is above 0; its score is the chance of its class times the mean chance of its
    pixels (Cheng et al. 2022, "Mask2Former"). All else is as `BoxesEval` has it.
    """

    config: InstancesConfig
    drawn_as = "segments"

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        made = []
        with ThreadPoolExecutor(self.run_config.data.threads) as pool:
            for batch in self.batches(self.source, NoFields()):
                out = predict(batch, "masks")
                if self.host == 0:
                    keep = np.flatnonzero(out["mask"] > 0)
                    parts = (out[name][keep] for name in ("record", "masks", "scores", "mask_labels"))
                    made += [one for one in pool.map(self._one, *parts) if one is not None]
        return from_first(lambda: self._count_all(made))

    def _count_all(self, made: list[tuple[int, Truth, Found, int]]) -> dict[str, float]:
        if not made:
            raise DataError(f"{self.source.name}: none of its records could be read; see the log for the reasons")
        records, truths, found, lost = zip(*made, strict=True)
        if sum(lost):
            logging.warning("%s: %d predicted masks are not finite", self.config.name, sum(lost))
        return self._scores(np.array(records), [*truths], [*found], sum(lost))

    def _one(
        self, record: np.int32, masks: np.ndarray, scores: np.ndarray, labels: np.ndarray
    ) -> tuple[int, Truth, Found, int] | None:
        """A record, what is known of it, what was found, and how many masks are not finite; None: it is damaged."""
        if (known := known_of(self, int(record))) is None:
            return None
        truth = Truth(known.boxes, known.labels, known.crowd, known.areas, [rle.encode(m) for m in known.masks])
        found, lost = instances_of(masks, scores, labels, known.placement, known.masks.shape[1:])
        return int(record), truth, found, lost

    def _drawn(self, record: int, truth: Truth, found: Found, matched: tuple, least: float, share: float) -> dict:
        image, _ = small_image(self, record)
        shown = np.flatnonzero(found.scores >= least)
        shown = shown[np.argsort(found.scores[shown], kind="stable")]  # the highest on top
        return {
            "key": self.source.key(record),
            "image": image,
            "share": share,
            "truth": layers(map(rle.decode, truth.masks), truth.labels, image.shape[:2]),
            "found": layers((rle.decode(found.masks[i]) for i in shown), found.labels[shown], image.shape[:2]),
        }


def instances_of(
    masks: np.ndarray, scores: np.ndarray, labels: np.ndarray, placement: Placement, size: tuple[int, int]
) -> tuple[Found, int]:
    """What a task's "masks" of an image are at its pixels, and how many masks are not finite.

    Args:
      masks: (K, h, w), logits.
      scores: (K,), of the class.
      labels: (K,).
      placement: of the image on the canvas.
      size: (H, W) of the image.
    """
    finite = np.isfinite(scores) & np.isfinite(masks).all((1, 2))
    kept, packed = [], []
    for i, one in zip(np.flatnonzero(finite), on_image(masks[finite], placement, size), strict=True):
        inside = one > 0
        if inside.any():
            kept.append((labels[i], scores[i] * chances(one[inside]).mean(dtype=np.float64)))
            packed.append(rle.encode(inside))
    labels, scores = np.array(kept, np.float64).reshape(-1, 2).T
    return Found(boxes_of(packed), labels.astype(int), scores, packed), int((~finite).sum())


def boxes_of(packed: Sequence[dict[str, Any]]) -> np.ndarray:
    """(N, 4) float64, left, top, right and bottom edge of each mask, as COCO packs them."""
    boxes = np.array([rle.to_bbox(mask) for mask in packed], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes
