"""Cross-entropy of the words of texts.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp


def word_losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p of each token, (B, T), of logits (B, T, V), fp32, and ids (B, T)."""
    chex.assert_rank(logits, 3)
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    right = jnp.take_along_axis(logits, tokens[..., None], 2)[..., 0]
    return jax.nn.logsumexp(logits, 2) - right


def mean_over(losses: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mean of the chosen ones of each row, (B, T) to (B,); 0 where there is none.

    The mean of a text's words is taken before that over texts: a batch cut into micro-batches has the same loss.
    """
    return jnp.where(chosen, losses, 0).sum(1) / jnp.maximum(chosen.sum(1), 1)


def caption_loss(logits: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Mean -log p of every token after the first, that of the end among them and padding not, (B,).

    Args:
      logits: (B, T, V), fp32; those at a token are for the next one.
      tokens: (B, T).
      lengths: (B,), tokens of each text, with those of begin and end.
    """
    later = jnp.arange(1, tokens.shape[1])[None] < lengths[:, None]
    return mean_over(word_losses(logits[:, :-1], tokens[:, 1:]), later)
