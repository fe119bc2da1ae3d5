"""Frozen features judged by their nearest neighbours (Wu et al. 2018, "Instance Discrimination", section 3.4).

Shapes: B batch, Q queries, N images of the gallery, D features, C classes, k neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from visionfm_jax.config import Config
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.gallery import GalleryEval
from visionfm_jax.evals.kinds import KnnConfig
from visionfm_jax.models.layers import l2_normalize

NEIGHBOURS, TEMPERATURE = 20, 0.07
PIXELS = 32  # side to which larger images are averaged for the baseline: ImageNet's pixels are 200 GB otherwise
QUERIES, GALLERY = 2**12, 2**15  # compared at a time: 512 MiB of similarities


class KnnEval(GalleryEval):
    """The `evals.eval.Eval` of features: top1, the share of images whose neighbours in the gallery vote for their
    class, and `pixels_top1`, the same by raw pixels (of images of at most 32 x 32) in place of features.

    An image whose features are not finite is never right.

    Attributes:
      protocol: 8 hex digits of what was measured: datasets, preprocessing, neighbours.
      details: after a run, for JSON: protocol and its settings.
    """

    def __init__(self, config: KnnConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.settings |= {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE}
        self._of_pixels: float | None = None  # which training does not change

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        more = _pixels if self._of_pixels is None else lambda batch: {}
        queries, gallery = self.read(predict, [self.source], more), self.read(predict, self.gallery, more)
        top1 = self._top1(gallery["features"], gallery["label"], queries["features"], queries["label"])
        if self._of_pixels is None:
            self._of_pixels = self._top1(gallery["pixels"], gallery["label"], queries["pixels"], queries["label"])
        self.describe()
        return {"top1": top1, "pixels_top1": self._of_pixels}

    def _top1(self, gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, right: np.ndarray) -> float:
        guess = vote(gallery, labels, queries, self.source.num_classes)
        return float((guess == right).mean())


def _pixels(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"pixels": shrunk(batch["image"])}


def shrunk(images: np.ndarray) -> np.ndarray:
    """Images (B, H, W, 3), uint8, as rows (B, P) of pixels; sides longer than `PIXELS` averaged to that."""
    height, width = images.shape[1:3]
    if max(height, width) > PIXELS:
        size, box = (min(width, PIXELS), min(height, PIXELS)), Image.Resampling.BOX
        images = np.stack([np.asarray(Image.fromarray(image).resize(size, box)) for image in images])
    return images.reshape(len(images), -1)


def vote(gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int) -> np.ndarray:
    """The class (Q,) for which the nearest of the gallery have most weight; -1 where a query is not finite.

    A neighbour's weight is exp(cosine / temperature). Rows of the gallery that are not finite are no neighbours.

    Args:
      gallery, queries: (N, D) and (Q, D), on the host; of both only a block is on the device at a time.
      labels: (N,) below `classes`.
      classes: C.
    """
    usable = np.isfinite(queries).all(1)
    out = np.full(len(queries), -1)
    k = min(NEIGHBOURS, len(gallery))
    for first in range(0, len(queries) if k else 0, QUERIES):
        rows = slice(first, first + QUERIES)
        block = jnp.asarray(np.where(usable[rows, None], queries[rows], 0), jnp.float32)
        scores, indices = jnp.full((len(block), k), -jnp.inf), jnp.zeros((len(block), k), jnp.int32)
        for start in range(0, len(gallery), GALLERY):
            scores, indices = _nearer(
                scores, indices, block, jnp.asarray(gallery[start : start + GALLERY], jnp.float32), start
            )
        weights, of = jnp.exp(scores / TEMPERATURE), jnp.asarray(labels)[indices]
        votes = jnp.zeros((len(block), classes)).at[jnp.arange(len(block))[:, None], of].add(weights)
        out[rows] = np.where(usable[rows], votes.argmax(1), -1)
    return out


@jax.jit
def _nearer(
    scores: jax.Array, indices: jax.Array, queries: jax.Array, gallery: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best k of those so far (Q, k) and a block of the gallery whose first row is number `start`."""
    new = jnp.dot(l2_normalize(queries), l2_normalize(gallery).T, precision=jax.lax.Precision.HIGHEST)
    new = jnp.where(jnp.isfinite(gallery).all(1), new, -jnp.inf)
    numbers = jnp.broadcast_to(start + jnp.arange(len(gallery), dtype=jnp.int32), new.shape)
    scores, at = jax.lax.top_k(jnp.concatenate([scores, new], 1), scores.shape[1])
    return scores, jnp.take_along_axis(jnp.concatenate([indices, numbers], 1), at, 1)
