"""Scaled dot-product attention by JAX's own kernels.

Shapes: B batch, T tokens, N heads, K head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(scale q kᵀ + bias) v with fp32 logits and softmax (Vaswani et al. 2017).

    Args:
      q, k, v: (B, T, N, K).
      implementation: "xla", anywhere; or "cudnn", fused on NVIDIA GPUs, for 16-bit inputs. cuDNN's training
        kernel takes even lengths only: an odd T is lengthened by one token that no query sees.
      bias: (1, N, T, T), fp32; cuDNN takes it in the dtype of q.
      scale: None: 1 / √K.
      causal: a token sees itself and those before it.

    Returns:
      (B, T, N, K) in the dtype of q.
    """
    T = q.shape[1]
    attend = functools.partial(
        jax.nn.dot_product_attention, scale=scale, is_causal=causal, implementation=implementation
    )
    if implementation == "xla" and q.dtype == jnp.float16:
        # XLA's CPU compiler has no products of fp16 that add up in fp32.
        return jax.lax.platform_dependent(q, k, v, bias, cpu=functools.partial(_widened, attend), default=attend)
    if implementation == "xla":
        return attend(q, k, v, bias)
    bias = None if bias is None else bias.astype(q.dtype)
    if T % 2 == 0:
        return attend(q, k, v, bias)
    q, k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (q, k, v))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, 1), (0, 1)))
    lengths = T + 0 * q[:, 0, 0, 0].astype(jnp.int32)  # of q, as jax 0.10's rule for vmap wants them batched like it
    y = attend(q, k, v, bias, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    return y[:, :T]


def _widened(attend: Callable[..., jax.Array], *inputs: jax.Array | None) -> jax.Array:
    """`attend` in fp32, its result in the dtype of the first input."""
    return attend(*(a if a is None else a.astype(jnp.float32) for a in inputs)).astype(inputs[0].dtype)
