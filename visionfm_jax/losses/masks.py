"""Losses of networks that predict a set of masks (Cheng et al. 2022, "Mask2Former"; Kerssies et al. 2025, "EoMT").

Each mask of an image is matched with one query, by the matching of least total cost. Matched queries learn class and
mask, the others that there is nothing. In fp32, for one image; `jax.vmap` gives batches and layers.

All pixels count, where Mask2Former draws 12,544 points: no keys, no gathers, and the losses of each mask under each
query, which the matching needs, are two products of matrices. Logits have places of several pixels. A place's share of
pixels that lie in a mask stands for these pixels, by which the losses are those of a logit for each pixel, the nearest.

Shapes: Q queries, M masks that an image may have, C classes, S places.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from visionfm_jax.losses.detection import match


class Weights(NamedTuple):
    """The weights of the parts of a loss, and of the costs of matching."""

    classes: float
    masks: float
    dice: float
    nothing: float  # of a query without a mask, beside 1 of a query with one


class Truth(NamedTuple):
    """The masks of an image."""

    masks: jax.Array  # (…, M, S): shares of a place's pixels that lie in the mask, 0 to 1
    counted: jax.Array  # (…, S): shares that count, at least those that lie in any mask
    labels: jax.Array  # (…, M)
    present: jax.Array  # (…, M) bool


def mask_losses(logits: jax.Array, truth: Truth) -> tuple[jax.Array, jax.Array]:
    """Of each mask under each query (M, Q): the mean cross-entropy of the pixels, and the dice loss.

    Args:
      logits: (S, Q).
      truth: of the image.
    """
    chex.assert_shape(truth.masks, (None, len(logits)))
    masks, counted = truth.masks, truth.counted[:, None]

    def inside(x: jax.Array) -> jax.Array:
        return jnp.matmul(masks, x, precision=jax.lax.Precision.HIGHEST)

    chances = jax.nn.sigmoid(logits)
    # Of a pixel, softplus(x) - x where it lies in the mask, and softplus(x) elsewhere.
    entropy = (counted * jax.nn.softplus(logits)).sum(0) - inside(logits)
    both = masks.sum(1)[:, None] + (counted * chances).sum(0)
    return entropy / jnp.maximum(counted.sum(), 1e-6), 1 - (2 * inside(chances) + 1) / (both + 1)


def set_losses(
    logits: jax.Array, masks: jax.Array, truth: Truth, weights: Weights, count: jax.Array | None = None
) -> dict[str, jax.Array]:
    """The parts of an image's loss, summed over queries and masks, before they are weighted.

    Args:
      logits: (Q, C + 1); the last: there is nothing.
      masks: (S, Q), logits.
      truth: of the image; M <= Q.
      weights: of the costs by which they are matched, and of queries without a mask.
      count: of `losses.detection.match`.

    Returns:
      `class`, to be divided by the sum of the weights of queries; `mask` and `dice`, by the number of masks.
    """
    entropies, dice = mask_losses(masks, truth)
    chances = jax.nn.softmax(logits, -1)[:, truth.labels].T
    costs = weights.masks * entropies + weights.dice * dice - weights.classes * chances
    query = match(jax.lax.stop_gradient(costs), truth.present, count)
    own = jnp.zeros_like(logits).at[query, truth.labels].max(truth.present.astype(jnp.float32))
    nothing = 1 - own.sum(-1)
    own = own.at[:, -1].set(nothing)
    classes = (1 + (weights.nothing - 1) * nothing) * -(own * jax.nn.log_softmax(logits, -1)).sum(-1)

    def matched(parts: jax.Array) -> jax.Array:
        return jnp.where(truth.present, jnp.take_along_axis(parts, query[:, None], 1)[:, 0], 0).sum()

    return {"class": classes.sum(), "mask": matched(entropies), "dice": matched(dice)}
