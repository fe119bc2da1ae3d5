"""Classification losses. Shapes: B batch, C classes."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy with label smoothing (Szegedy et al. 2016), in nats.

    Args:
      logits: (B, C), taken in fp32.
      labels: (B,), class ids.
      smoothing: the share of the target spread evenly over all C classes.

    Returns:
      (B,).
    """
    chex.assert_rank([logits, labels], [2, 1])
    logits = logits.astype(jnp.float32)
    # Without the (B, C) target: -Σ t log p = logsumexp - (1 - s) logit[label] - s mean(logits).
    normaliser = jax.nn.logsumexp(logits, -1)
    target = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
    return normaliser - (1 - smoothing) * target - smoothing * logits.mean(-1)


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """One-vs-all binary cross-entropy, summed over classes (Beyer et al. 2020, section 3.2), in nats.

    Args, Returns: as `softmax_cross_entropy`; smoothing moves every target by the same share towards 1/C.
    """
    chex.assert_rank([logits, labels], [2, 1])
    C = logits.shape[-1]
    targets = jax.nn.one_hot(labels, C) * (1 - smoothing) + smoothing / C
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(-1)
