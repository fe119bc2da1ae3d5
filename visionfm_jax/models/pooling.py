"""Attention pooling: the tokens of an image to one vector.

Shapes: B batch, S tokens, D width, M width of the MLP.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.models.decoder import CrossAttention
from visionfm_jax.models.layers import Mlp, layer_norm


class AttentionPool(nn.Module):
    """One learned query that looks at all tokens, and an MLP (Zhai et al. 2022, section 3.1); (B, S, D) to (B, D)."""

    heads: int
    mlp: int
    dtype: jnp.dtype
    epsilon: float  # of the norm
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, x.shape[-1]), jnp.float32).astype(self.dtype)
        y, _ = CrossAttention(self.heads, self.dtype, "xla", name="attn")(jnp.tile(probe, (x.shape[0], 1, 1)), x)
        mlp = Mlp(self.mlp, self.dtype, activation=self.activation, name="mlp")
        return (y + mlp(layer_norm(self.dtype, "norm", self.epsilon)(y)))[:, 0]


def forward_flops(tokens: int, width: int, mlp: int) -> float:
    """FLOPs of one image: matrix products alone, two per multiply-add."""
    return 2.0 * (tokens * (2 * width**2 + 2 * width) + 2 * width**2 + 2 * width * mlp)
