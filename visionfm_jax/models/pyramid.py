"""Maps at other resolutions, made of one (Li et al. 2022, "ViTDet": the simple feature pyramid).

Shapes: B batch, h w a map, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.models.layers import dense, layer_norm

EPS = 1e-6


class Rescale(nn.Module):
    """A map (B, h, w, D) at 2^level its resolution, `level` > 0 or < 0, or as it is.

    Transposed convolutions of 2 x 2 pixels, or convolutions with stride 2, whose windows do not overlap: products of
    matrices; a norm and GELU between two. Odd sides are lengthened before they are halved.
    """

    level: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        for i in range(abs(self.level)):
            if i:
                x = nn.gelu(layer_norm(self.dtype, f"norm{i}", EPS)(x), approximate=False)
            if self.level > 0:
                x = dense(x, 4 * D, self.dtype, f"up{i}")
                x = rearrange(x, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)
            else:
                x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
                x = dense(rearrange(x, "b (h p) (w q) d -> b h w (p q d)", p=2, q=2), D, self.dtype, f"down{i}")
        return x


def rescaled(side: int, level: int) -> int:
    """The side of a map of `side` after `Rescale`."""
    return side << level if level > 0 else -(-side >> -level)


def forward_flops(places: int, level: int, width: int) -> float:
    """FLOPs of `Rescale` on a map of so many places: matrix products alone, two per multiply-add."""
    steps = range(level) if level > 0 else range(1, 1 - level)
    return sum(2.0 * places * 4.0 ** (i if level > 0 else 1 - i) * (4 if level > 0 else 1) * width**2 for i in steps)
