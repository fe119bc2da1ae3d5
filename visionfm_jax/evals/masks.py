"""Predicted masks on the images they are of. Shapes: K masks, h w places at which they have logits, H W image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from absl import logging

from visionfm_jax.data.fields import check_box_labels
from visionfm_jax.data.images import DamagedImage, opened
from visionfm_jax.data.sample import Placement, Sample
from visionfm_jax.data.sources import read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.segmentation import axis_weights


class Known(NamedTuple):
    """The objects of a record on its upright image, and the place of the image on the canvas."""

    masks: np.ndarray  # (N, H, W) bool
    boxes: np.ndarray  # (N, 4)
    labels: np.ndarray  # (N,)
    crowd: np.ndarray  # (N,) bool
    areas: np.ndarray  # (N,), as annotated, else of the masks
    placement: Placement


def known_of(opened_eval: OpenedEval, record: int) -> Known | None:
    """What is known of a record of an eval; None: it is damaged, which is logged."""
    source = opened_eval.source
    try:
        entry = read_record(source, record)
        with opened(entry.get("image"), opened_eval.transform.max_pixels) as picture:
            sample = Sample.of(entry, picture, picture.size, exact=True)
            placement = opened_eval.transform.placement(picture)
        masks, objects = sample.masks, sample.objects
        if masks is None or sample.boxes is None or "box_labels" not in objects:
            raise DamagedRecord("it has no masks, no boxes or no box_labels")
        labels = np.asarray(objects["box_labels"])
        check_box_labels(labels, opened_eval.run_config.task.num_classes)
    except (DamagedImage, DamagedRecord) as error:
        logging.warning("%s: record %s is damaged and left out: %s", source.name, source.key(record), error)
        return None
    masks = masks.astype(bool)
    crowd = np.asarray(objects.get("box_crowd", np.zeros(len(labels))), bool)
    area = np.asarray(objects.get("box_areas", masks.sum((1, 2))), np.float64)
    return Known(masks, sample.boxes.astype(np.float64), labels.astype(int), crowd, area, placement)


def on_image(masks: np.ndarray, placement: Placement, size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The logits of each mask at the pixels of the image, fp32 (H, W): linear between places, -inf where none is seen.

    Args:
      masks: (K, h, w), of places that divide the canvas evenly.
      placement: of the image on the canvas.
      size: (H, W).
    """
    (((rows, of_rows),), ((columns, of_columns),)) = (
        axis_weights([axis], length, places)
        for axis, length, places in zip(placement[:2], size, masks.shape[1:], strict=True)
    )
    for mask in masks:
        out = np.full(size, -np.inf, np.float32)
        out[rows, columns] = of_rows @ mask.astype(np.float32) @ of_columns.T
        yield out


def chances(logits: np.ndarray) -> np.ndarray:
    """Their sigmoid, without overflow."""
    return (1 + np.tanh(logits / 2)) / 2


def layers(masks: Iterable[np.ndarray], labels: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """What `telemetry.pictures.segments` draws, of masks (H, W) from the bottom to the top, resized to `size`.

    Returns:
      `map`, integers of that size: 0 where there is no mask, else 1 + its number; `labels`.
    """
    out = np.zeros(size, np.int32)
    for number, mask in enumerate(masks, 1):
        rows, columns = (((np.arange(n) + 0.5) * of / n).astype(int) for n, of in zip(size, mask.shape, strict=True))
        out[mask[rows[:, None], columns] > 0] = number
    return {"map": out, "labels": np.asarray(labels)}
