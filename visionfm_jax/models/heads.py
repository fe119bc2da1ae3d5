"""Heads on a backbone. Shapes: B batch, H W image, D pooled channels, C classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.models.layers import logits


class Classifier(nn.Module):
    """A backbone and a linear layer on its pooled features, whose parameters stand beside the backbone's as "head"."""

    backbone: nn.Module  # a `models.backbones.Backbone`
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        # Zero, so that the first loss is ln C whatever the network.
        self.head = nn.Dense(
            self.num_classes, dtype=self.dtype, dot_general=_product, kernel_init=nn.initializers.zeros
        )

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Images (B, H, W, 3), normalised, to logits (B, C): operands in `dtype`, sums and result in fp32."""
        return self.head(self.features(images, keys))

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(B, D), fp32, pooled."""
        return self.backbone(images, keys).pooled


def _product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return logits(x, kernel)
