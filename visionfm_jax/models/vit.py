"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

Shapes: B batch, H W image, P patch, T tokens, D width, C classes, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.config import ViTConfig
from visionfm_jax.models.layers import Block, Prepare, as_is, dense, layer_norm, logits, named_size, scan_blocks


class Size(NamedTuple):
    """Width D, layers L, heads N, width of the MLP."""

    width: int
    depth: int
    heads: int
    mlp: int


# Ti S: Touvron et al. 2021 (DeiT); B L H: Dosovitskiy et al. 2021, table 1; g: Zhai et al. 2022, table 2.
# P ("pico") is ours, for machines without an accelerator.
SIZES = {
    "P": Size(96, 6, 3, 384),
    "Ti": Size(192, 12, 3, 768),
    "S": Size(384, 12, 6, 1536),
    "B": Size(768, 12, 12, 3072),
    "L": Size(1024, 24, 16, 4096),
    "H": Size(1280, 32, 16, 5120),
    "g": Size(1408, 40, 16, 6144),
}


def size_of(config: ViTConfig) -> Size:
    """The row of `SIZES`.

    Raises:
      ConfigError: no such size.
    """
    return named_size(SIZES, config.size, "model.size")


class ViT(nn.Module):
    """An image classifier.

    Pooling "gap" is the mean of the patch tokens and then the norm; "cls" is the norm and then the class token:
    the two forms for which trained weights exist.
    """

    config: ViTConfig
    num_classes: int
    dtype: jnp.dtype = jnp.float32  # of activations and matrix products; norms, softmax and logits are fp32
    prepare: Prepare = as_is

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3), normalised, to logits (B, C), fp32."""
        config, size = self.config, size_of(self.config)
        x = self.tokens(images)
        block = Block(
            size.heads,
            size.mlp,
            self.dtype,
            config.attention,
            config.norm_eps,
            activation=config.activation,
            parent=None,
        )
        x = scan_blocks(self, [block], size.depth, x, prepare=self.prepare, remat=config.remat)
        norm = layer_norm(jnp.float32, "norm", config.norm_eps)
        x = norm(x[:, 0]) if config.pool == "cls" else norm(x.mean(1, dtype=jnp.float32))
        return self.head(x)

    def tokens(self, images: jax.Array) -> jax.Array:
        """Patch and position embedding, and the class token if there is one; (B, H, W, 3) to (B, T, D)."""
        width, P = size_of(self.config).width, self.config.patch_size
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=P, q=P)
        x = dense(patches, width, self.dtype, "embed")
        if self.config.pool == "cls":
            cls = self.param("cls_token", nn.initializers.zeros, (width,))
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (len(x), 1, width)), x], 1)
        # Of the size of a sine-cosine table and of the patch embedding: beside 0.02 a small model is blind to position
        # for its first hundreds of steps.
        pos = self.param("pos_embed", nn.initializers.normal(0.5), x.shape[1:])
        return x + pos.astype(x.dtype)

    def head(self, x: jax.Array) -> jax.Array:
        """Logits (B, C) of pooled features (B, D): operands in `dtype`, sums and result in fp32.

        Zero at initialisation, so that the first loss is ln C whatever the network.
        """

        def product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
            return logits(x, kernel)

        head = nn.Dense(
            self.num_classes, dtype=self.dtype, dot_general=product, kernel_init=nn.initializers.zeros, name="head"
        )
        return head(x)


def forward_flops(config: ViTConfig, num_classes: int) -> float:
    """FLOPs of one image's forward pass: matrix products alone, two per multiply-add."""
    size = size_of(config)
    patches = (config.image_size // config.patch_size) ** 2
    T, D = patches + (config.pool == "cls"), size.width
    layer = T * (4 * D * D + 2 * D * size.mlp) + 2 * T * T * D
    return 2.0 * (patches * 3 * config.patch_size**2 * D + size.depth * layer + D * num_classes)
