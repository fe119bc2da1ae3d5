"""Losses of segmentation. Shapes: B batch, H W image, C classes."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def labelled(class_map: jax.Array, num_classes: int) -> jax.Array:
    """Which pixels (B, H, W) have a class: those that have none hold 255, 65535 or -1, as `sources.record.ignored`."""
    return (class_map >= 0) & (class_map < num_classes)


def pixel_cross_entropy(logits: jax.Array, class_map: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the labelled pixels of an image, summed, in nats; and how many of them have the best logit.

    Args:
      logits: (B, H, W, C), taken in fp32.
      class_map: (B, H, W), integers; what is no class does not count.

    Returns:
      (B,), (B,), fp32.
    """
    chex.assert_rank(logits, 4)
    chex.assert_shape(class_map, logits.shape[:3])
    logits, valid = logits.astype(jnp.float32), labelled(class_map, logits.shape[-1])
    # Not a gather, whose derivative would be a scatter: this is fused with the sum.
    own = jnp.arange(logits.shape[-1]) == class_map[..., None]
    losses = jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0).sum(-1)
    right = logits.argmax(-1) == class_map
    return jnp.where(valid, losses, 0).sum((1, 2)), (right & valid).sum((1, 2), dtype=jnp.float32)
