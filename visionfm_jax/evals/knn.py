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
from visionfm_jax.evals.beats import beat
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.gallery import GalleryEval
from visionfm_jax.evals.kinds import KnnConfig
from visionfm_jax.evals.metrics import TIE
from visionfm_jax.models.layers import l2_normalize

PIXELS = 32  # side to which larger images are averaged for the baseline: ImageNet's pixels are 200 GB otherwise
QUERIES, GALLERY = 2**12, 2**15  # compared at a time: 512 MiB of similarities


class KnnEval(GalleryEval):
    """The `evals.eval.Eval` of features: top1, the share of images whose neighbours in the gallery vote for their
    class, and `pixels_top1`, the same by raw pixels (of images of at most 32 x 32) in place of features.

    An image whose features are not finite, and one whose vote is a tie, is never right.

    Attributes:
      protocol: 8 hex digits of what was measured: datasets, preprocessing, neighbours.
      details: after a run, for JSON: protocol and its settings.
    """

    def __init__(self, config: KnnConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.settings |= {"neighbours": config.neighbours, "temperature": config.temperature}
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
        config = self.config
        guess = vote(gallery, labels, queries, self.source.num_classes, config.neighbours, config.temperature)
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


def vote(
    gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int, neighbours: int, temperature: float
) -> np.ndarray:
    """The class (Q,) for which the nearest of the gallery have most weight, as by scikit-learn's KNeighborsClassifier.

    A neighbour's weight is exp(cosine / temperature). Rows of the gallery that are not finite are no neighbours. It is
    -1 where nothing can be told: the query is not finite, there is no neighbour, two classes have most weight, or all
    of the gallery is equally near, as of a model whose features are constant.

    Args:
      gallery, queries: (N, D) and (Q, D), on the host; of both only a block is on the device at a time.
      labels: (N,) below `classes`.
      classes: C.
      neighbours: k; all that there are if these are fewer.
      temperature: of the cosine.

    Raises:
      Stopped: as `beats.beat`.
    """
    usable = np.isfinite(queries).all(1)
    out = np.full(len(queries), -1)
    k = min(neighbours, len(gallery))
    for first in range(0, len(queries) if k else 0, QUERIES):
        rows = slice(first, first + QUERIES)
        block = jnp.asarray(np.where(usable[rows, None], queries[rows], 0), jnp.float32)
        scores, indices = jnp.full((len(block), k), -jnp.inf), jnp.zeros((len(block), k), jnp.int32)
        farthest = jnp.full(len(block), jnp.inf)
        for start in range(0, len(gallery), GALLERY):
            here = jnp.asarray(gallery[start : start + GALLERY], jnp.float32)
            scores, indices, farthest = _nearer(scores, indices, farthest, block, here, start)
            beat()
        nearest = scores[:, :1]
        weights = jnp.exp((scores - jnp.where(jnp.isfinite(nearest), nearest, 0)) / temperature)  # 1 for the nearest
        number = jnp.arange(len(block))
        votes = jnp.zeros((len(block), classes)).at[number[:, None], jnp.asarray(labels)[indices]].add(weights)
        guess, most = votes.argmax(1), votes.max(1)
        second = votes.at[number, guess].set(0).max(1)
        told = (most - second > TIE * most) & ((nearest[:, 0] - farthest > TIE) | (len(gallery) == 1))
        out[rows] = np.where(usable[rows] & told, guess, -1)
    return out


@jax.jit
def _nearer(
    scores: jax.Array,
    indices: jax.Array,
    farthest: jax.Array,
    queries: jax.Array,
    gallery: jax.Array,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best k of those so far (Q, k) and a block of the gallery whose first row is number `start`.

    And the least score (Q,) of all so far.
    """
    new = jnp.dot(l2_normalize(queries), l2_normalize(gallery).T, precision=jax.lax.Precision.HIGHEST)
    finite = jnp.isfinite(gallery).all(1)
    farthest = jnp.minimum(farthest, jnp.where(finite, new, jnp.inf).min(1))
    new = jnp.where(finite, new, -jnp.inf)
    numbers = jnp.broadcast_to(start + jnp.arange(len(gallery), dtype=jnp.int32), new.shape)
    scores, at = jax.lax.top_k(jnp.concatenate([scores, new], 1), scores.shape[1])
    return scores, jnp.take_along_axis(jnp.concatenate([indices, numbers], 1), at, 1), farthest
