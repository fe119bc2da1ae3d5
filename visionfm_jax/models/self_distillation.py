"""A backbone with the two heads of self-distillation and the token that stands for hidden patches.

Shapes: B images, H W their size, h w their patches, R rows, D width, K prototypes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.models.backbones import Features, Hidden
from visionfm_jax.models.prototypes import PrototypeHead


class SelfDistilled(nn.Module):
    """The student, and likewise the teacher; the heads' parameters and the mask token stand beside the backbone's."""

    backbone: nn.Module  # a `models.backbones.Backbone`
    embed_width: int
    prototypes: int
    hidden: int  # channels of the heads
    bottleneck: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        self.mask_token = self.param("mask_token", nn.initializers.zeros, (self.embed_width,), jnp.float32)
        sizes = self.prototypes, self.hidden, self.bottleneck, self.dtype
        self.image_head, self.patch_head = PrototypeHead(*sizes), PrototypeHead(*sizes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (B, K) of images (B, H, W, 3) and of their first patch."""
        features = self.encode(images, hidden=jnp.zeros(self._grid(images), bool))
        return self.image_head(features.pooled), self.patch_head(features.normed[:, 0, 0])

    def _grid(self, images: jax.Array) -> tuple[int, int, int]:
        patch = self.backbone.config.patch_size
        return len(images), images.shape[1] // patch, images.shape[2] // patch

    def encode(self, images: jax.Array, keys: jax.Array | None = None, hidden: jax.Array | None = None) -> Features:
        """Features of images (B, H, W, 3), normalised.

        Args:
          images: of any size that the backbone takes.
          keys: (B,), draw which layers a sample leaves out; None: none.
          hidden: (B, h, w) bool, patches that the mask token stands for; None: all are seen.
        """
        return self.backbone(images, keys, None if hidden is None else Hidden(self.mask_token, hidden))

    def image_logits(self, pooled: jax.Array) -> jax.Array:
        """(R, D) to (R, K), fp32."""
        return self.image_head(pooled)

    def patch_logits(self, patches: jax.Array) -> jax.Array:
        """(R, D) to (R, K), fp32."""
        return self.patch_head(patches)
