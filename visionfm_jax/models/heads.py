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
        self.head = _logits_dense(self.num_classes, self.dtype)

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Images (B, H, W, 3), normalised, to logits (B, C): operands in `dtype`, sums and result in fp32."""
        return self.head(self.features(images, keys))

    def features(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(B, D), fp32, pooled."""
        return self.backbone(images, keys).pooled


def logits_layer(x: jax.Array, num_classes: int, dtype: jnp.dtype, name: str, use_bias: bool = True) -> jax.Array:
    """A classifier of places, of the module being built; (…, D) to (…, C), fp32."""
    layer = _logits_dense(num_classes, dtype, name=name, use_bias=use_bias)
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], num_classes)


def _logits_dense(num_classes: int, dtype: jnp.dtype, **more: Any) -> nn.Dense:
    # Zero, so that the first loss is ln C whatever the network.
    return nn.Dense(num_classes, dtype=dtype, dot_general=_product, kernel_init=nn.initializers.zeros, **more)


def _product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return logits(x, kernel)
