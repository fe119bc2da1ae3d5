"""Samples of a dataset: the records that are shown, and what the model sees of them. Shapes: H W image."""

from __future__ import annotations

import numpy as np

from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.sources import Source, read_record


def sample(rows: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the rows, evenly spread: the same ones at every evaluation, whatever the model."""
    return rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64)]


def image_of(source: Source, record: int, transform: EvalTransform) -> np.ndarray:
    """What the model sees of a record, uint8 (H, W, 3)."""
    return transform(read_record(source, record)["image"])
