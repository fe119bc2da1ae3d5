"""Scaled dot-product attention by JAX's own kernels.

Shapes: B batch, T tokens, N heads, K head dim.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str) -> jax.Array:
    """softmax(q kᵀ / √K) v with fp32 logits and softmax (Vaswani et al. 2017).

    Args:
      q, k, v: (B, T, N, K).
      implementation: "xla", anywhere; or "cudnn", fused on NVIDIA GPUs, for 16-bit inputs. cuDNN's training
        kernel takes even lengths only: an odd T is lengthened by one token that no query sees.

    Returns:
      (B, T, N, K) in the dtype of q.
    """
    T = q.shape[1]
    if implementation == "xla" or T % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
    q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
    lengths = jnp.full(q.shape[:1], T, jnp.int32)
    y = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation=implementation
    )
    return y[:, :T]
