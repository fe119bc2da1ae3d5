"""Contrastive losses between images and texts, computed for one device's rows against all rows.

Shapes: B rows of this device, G rows of all devices, D width of the joint space.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp


class Targets(NamedTuple):
    """The rows that belong together: row i of this device's and row `own[i]` of all, or partly `other[i]`.

    Mixup (Zhang et al. 2018) of pairs is ours to define: an image mixed of two belongs to both texts, and each text to
    both mixed images, by the shares of the mixture.
    """

    own: jax.Array  # (B,) int
    other: jax.Array | None = None  # (B,) int; None: nothing is mixed
    share: jax.Array | None = None  # (B,), of `own`


def clip_loss(
    images: jax.Array,
    texts: jax.Array,
    all_images: jax.Array,
    all_texts: jax.Array,
    scale: jax.Array,
    targets: Targets,
) -> jax.Array:
    """The mean of both directions' cross-entropies (Radford et al. 2021, figure 3).

    Its mean over all devices' rows is the loss of the global batch; no device holds more than B x G logits at once
    in either direction.

    Args:
      images, texts: (B, D), of length 1.
      all_images, all_texts: (G, D), all devices' rows in the order of the global batch.
      scale: (), or (B, 1) of equal values, the inverse temperature, positive.
      targets: which of the G rows belong to the B.

    Returns:
      (B,), fp32.
    """
    chex.assert_equal_shape([images, texts])
    chex.assert_equal_shape([all_images, all_texts])
    forth = _cross_entropy(_logits(images, all_texts, scale), targets)
    back = _cross_entropy(_logits(texts, all_images, scale), targets)
    return (forth + back) / 2


def sigmoid_loss(
    images: jax.Array, all_texts: jax.Array, scale: jax.Array, bias: jax.Array, targets: Targets
) -> jax.Array:
    """Every pair judged for itself (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training").

    Args:
      images: (B, D), of length 1.
      all_texts: (G, D), of length 1.
      scale, bias: (), or (B, 1) of equal values, of the logits.
      targets: as for `clip_loss`.

    Returns:
      (B,), fp32: for each image, the sum over all texts.
    """
    chex.assert_rank([images, all_texts], 2)
    logits = _logits(images, all_texts, scale) + bias
    G = logits.shape[1]
    match = jax.nn.one_hot(targets.own, G)
    if targets.other is not None:
        share = targets.share[:, None]
        match = share * match + (1 - share) * jax.nn.one_hot(targets.other, G)
    return -(match * jax.nn.log_sigmoid(logits) + (1 - match) * jax.nn.log_sigmoid(-logits)).sum(1)


def _logits(rows: jax.Array, columns: jax.Array, scale: jax.Array) -> jax.Array:
    """(B, G), fp32 to the last bit: differences of large logits decide."""
    return scale * jnp.dot(rows, columns.T, precision=jax.lax.Precision.HIGHEST)


def _cross_entropy(logits: jax.Array, targets: Targets) -> jax.Array:
    def of(index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, index[:, None], 1)[:, 0]

    right = of(targets.own)
    if targets.other is not None:
        right = targets.share * right + (1 - targets.share) * of(targets.other)
    return jax.nn.logsumexp(logits, 1) - right
