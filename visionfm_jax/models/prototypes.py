"""A projection head whose outputs are similarities to prototypes (Caron et al. 2021, "DINO", appendix C).

Shapes: D width, K prototypes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.models.layers import dense, l2_normalize, logits


class PrototypeHead(nn.Module):
    """Three layers with GELUs between, then the cosine of the angle to each of K prototypes; (R, D) to (R, K), fp32."""

    prototypes: int
    hidden: int
    bottleneck: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate((self.hidden, self.hidden, self.bottleneck), 1):
            x = nn.gelu(x, approximate=False) if i > 1 else x
            x = dense(x, width, self.dtype, f"fc{i}", kernel_init=nn.initializers.truncated_normal(0.02))
        shape = self.bottleneck, self.prototypes
        prototypes = self.param("prototypes", nn.initializers.normal(self.bottleneck**-0.5), shape, jnp.float32)
        return logits(l2_normalize(x).astype(self.dtype), l2_normalize(prototypes, 0).astype(self.dtype))


def forward_flops(width: int, prototypes: int, hidden: int, bottleneck: int) -> float:
    """FLOPs of one row: matrix products alone, two per multiply-add."""
    return 2.0 * (width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes)
