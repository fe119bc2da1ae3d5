"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") in the dialects of public weights.

    image (B, H, W, 3) -> patches (B, T, D) -> behind the class token and registers, with positions -> blocks
                       -> pooled (B, D) -> logits (B, C)

What differs between AugReg, DeiT-3, DINOv2, DINOv3, CLIP and SigLIP is a field of `ViTConfig` each, with a table of
their values in BUILD.md.

Shapes: B batch, H W image, P patch, h w patches of an image, T tokens, D width, N heads, K head dim, C classes,
L layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.config import ViTConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.models import pooling
from visionfm_jax.models.layers import Block, Prepare, as_is, dense, layer_norm, logits, named_size, scan_blocks
from visionfm_jax.models.positions import resize_table, rotation


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
    """The row of `SIZES`, with what the configuration gives as a number in its place.

    Raises:
      ConfigError: no such size, or a width that its heads cannot share.
    """
    named = named_size(SIZES, config.size, "model.size")
    size = Size(*(getattr(config, name) or number for name, number in named._asdict().items()))
    unit = size.heads * (4 if config.rope_theta else 1)
    if size.width % unit:
        why = " whose channels rotary positions take in fours" if config.rope_theta else ""
        raise ConfigError(
            f"config.model.width = {size.width}: must be a multiple of {unit}, for {size.heads} heads{why}; set "
            "config.model.width or config.model.heads"
        )
    return size


class ViT(nn.Module):
    """An image classifier; without classes, a network of features."""

    config: ViTConfig
    num_classes: int  # 0: no head
    dtype: jnp.dtype = jnp.float32  # of activations and matrix products; norms, softmax and logits are fp32
    prepare: Prepare = as_is

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Images (B, H, W, 3), normalised, to logits (B, C), fp32; without classes to features (B, D), fp32.

        `keys` (B,) draw which blocks a sample leaves out; None: none (evaluation).

        Raises:
          ConfigError: a side of the images is no multiple of the patch.
        """
        config = self.config
        x = self.tokens(images)
        if config.pre_norm:
            x = layer_norm(self.dtype, "norm_pre", config.norm_eps)(x)
        x = self.pooled(self.encode(x, grid_of(config, images.shape[1:3]), keys))
        return self.head(x) if self.num_classes else x

    def tokens(self, images: jax.Array) -> jax.Array:
        """(B, H, W, 3) to (B, T, D): the class token, registers and patches, and their positions."""
        config, width, P = self.config, size_of(self.config).width, self.config.patch_size
        grid = grid_of(config, images.shape[1:3])
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=P, q=P)
        x = dense(patches, width, self.dtype, "embed", use_bias=config.patch_bias)
        first = [self.param("cls_token", nn.initializers.zeros, (width,))[None]] if config.has_class_token else []
        if config.registers:
            first.append(self.param("registers", nn.initializers.normal(0.02), (config.registers, width)))
        if first:
            own = jnp.concatenate(first).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(own, (len(x), *own.shape)), x], 1)
        return x if config.pos_embed == "none" else x + self.positions(grid).astype(x.dtype)

    def positions(self, grid: tuple[int, int]) -> jax.Array:
        """(T, D) for an image of (h, w) patches; zeros for tokens that have no row in the table."""
        config, width = self.config, size_of(self.config).width
        side = (config.pos_image_size or config.image_size) // config.patch_size
        first = {"patches": 0, "class": int(config.has_class_token), "all": first_tokens(config)}[config.pos_embed]
        # Of the size of a sine-cosine table and of the patch embedding: beside 0.02 a small model is blind to position
        # for its first hundreds of steps.
        table = self.param("pos_embed", nn.initializers.normal(0.5), (first + side**2, width))
        if grid != (side, side):
            resized = resize_table(table[first:].reshape(side, side, width), grid, config.pos_resize)
            table = jnp.concatenate([table[:first], resized.reshape(-1, width)])
        missing = first_tokens(config) - first
        rows = table[:first], jnp.zeros((missing, width), table.dtype), table[first:]
        return jnp.concatenate(rows) if missing else table

    def encode(self, x: jax.Array, grid: tuple[int, int], keys: jax.Array | None) -> jax.Array:
        """The blocks; (B, T, D) to (B, T, D)."""
        config, size = self.config, size_of(self.config)
        turn, each = None, None
        if config.rope_theta:
            turn = rotation(grid, first_tokens(config), size.width // size.heads, config.rope_theta)
        if keys is not None and config.drop_path:
            layer = jnp.arange(size.depth)
            each = {"layer": layer, "rate": config.drop_path * layer / max(size.depth - 1, 1)}
        block = Block(
            size.heads, size.mlp, self.dtype, config.attention, config.norm_eps, activation=config.activation,
            biases=config.qkv_bias, qk_norm=config.norm_eps if config.qk_norm else 0.0, rotation=turn,
            layer_scale=config.layer_scale, keys=keys, parent=None,
        )  # fmt: skip
        return scan_blocks(self, [block], size.depth, x, prepare=self.prepare, remat=config.remat, each=each)

    def pooled(self, x: jax.Array) -> jax.Array:
        """Features (B, D), fp32, of tokens (B, T, D), by `ViTConfig.pool`; (B, 2 D) for "cls_gap"."""
        config, size, first = self.config, size_of(self.config), first_tokens(self.config)
        norm = layer_norm(self.dtype if config.pool == "map" else jnp.float32, "norm", config.norm_eps)
        if config.pool == "cls":
            return norm(x[:, 0])
        if config.pool == "gap":
            return norm(x[:, first:].mean(1, dtype=jnp.float32))
        x = norm(x)
        if config.pool == "norm_gap":
            return x[:, first:].mean(1)
        if config.pool == "cls_gap":
            return jnp.concatenate([x[:, 0], x[:, first:].mean(1)], -1)
        pool = pooling.AttentionPool(size.heads, size.mlp, self.dtype, config.norm_eps, config.activation, name="pool")
        return pool(x[:, first:]).astype(jnp.float32)

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


def first_tokens(config: ViTConfig) -> int:
    """Tokens before the patches'."""
    return config.has_class_token + config.registers


def grid_of(config: ViTConfig, sides: tuple[int, int]) -> tuple[int, int]:
    """Patches (h, w) of an image of (H, W) pixels.

    Raises:
      ConfigError: they do not divide it.
    """
    if any(side % config.patch_size for side in sides):
        raise ConfigError(
            f"config.model.patch_size = {config.patch_size}: must divide the sides of an image of {sides[0]} x "
            f"{sides[1]} pixels; resize or crop it"
        )
    return sides[0] // config.patch_size, sides[1] // config.patch_size


def forward_flops(config: ViTConfig, num_classes: int) -> float:
    """FLOPs of one image's forward pass: matrix products alone, two per multiply-add."""
    size = size_of(config)
    patches = math.prod(grid_of(config, (config.image_size,) * 2))
    T, D, mlp = patches + first_tokens(config), size.width, 3 if config.activation == "swiglu" else 2
    layer = T * (4 * D * D + mlp * D * size.mlp) + 2 * T * T * D
    features = 2 * D if config.pool == "cls_gap" else D
    total = 2.0 * (patches * 3 * config.patch_size**2 * D + size.depth * layer + features * num_classes)
    return total + (pooling.forward_flops(patches, D, size.mlp) if config.pool == "map" else 0)
