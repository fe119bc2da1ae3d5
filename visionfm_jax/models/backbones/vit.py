"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") in the dialects of public weights.

    image (B, H, W, 3) -> patches (B, T, D) -> behind the class token and registers, with positions -> blocks
                       -> normed patches, class token and registers -> pooled (B, D)

What differs between AugReg, DeiT-3, DINOv2, DINOv3, CLIP and SigLIP is a field of `ViTConfig` each, with a table of
their values in BUILD.md. For large images, most blocks can attend inside windows (Li et al. 2022, "ViTDet").

Shapes: B batch, H W image, P patch, h w patches of an image, T tokens, D width, N heads, K head dim, L layers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.config import BackboneConfig
from visionfm_jax.config.limits import (
    ATTENTION,
    MLP_MATMULS,
    REMAT,
    SHARE,
    SIDE,
    HeightWidth,
    ImageSize,
    Limits,
    OneOf,
    Problem,
    Range,
    height_width,
    multiple_of,
)
from visionfm_jax.errors import ConfigError
from visionfm_jax.models import pooling
from visionfm_jax.models.attention import window_pairs
from visionfm_jax.models.backbones import Features, Hidden
from visionfm_jax.models.layers import Block, GatherParams, dense, layer_norm, no_gather, scan_blocks
from visionfm_jax.models.positions import resize_table, rotation
from visionfm_jax.models.sizes import TransformerSize, heads_problems, size_by_name

# Ti S: Touvron et al. 2021 (DeiT); B L H: Dosovitskiy et al. 2021, table 1; g: Zhai et al. 2022, table 2.
# P ("pico") is ours, for machines without an accelerator.
SIZES = {
    "P": TransformerSize(96, 6, 3, 384),
    "Ti": TransformerSize(192, 12, 3, 768),
    "S": TransformerSize(384, 12, 6, 1536),
    "B": TransformerSize(768, 12, 12, 3072),
    "L": TransformerSize(1024, 24, 16, 4096),
    "H": TransformerSize(1280, 32, 16, 5120),
    "g": TransformerSize(1408, 40, 16, 6144),
}


@dataclass(kw_only=True)
class ViTConfig(BackboneConfig):
    """A Vision Transformer (Dosovitskiy et al. 2021); sizes in `SIZES`.

    The defaults are AugReg's (Steiner et al. 2022) but for the pooling; other public weights' are in BUILD.md.
    """

    size: str = "H"  # width, depth, heads and MLP by name
    width: int = 0  # channels of a token; 0: the value of size; likewise depth, heads, mlp
    depth: int = 0  # number of blocks
    heads: int = 0  # attention heads; must divide the width
    mlp: int = 0  # hidden channels of the MLPs
    patch_size: int = 14  # pixels, side of a square
    image_size: ImageSize = 224  # pixels, side of a square or (height, width)
    pool: str = "gap"  # gap: mean, then norm | norm_gap: norm, then mean | cls | cls_gap: both | map: attention pool
    class_token: bool = False  # add a class token that is not pooled; cls and cls_gap always have one
    registers: int = 0  # number of register tokens (Darcet et al. 2024)
    pos_embed: str = "class"  # tokens with a position: none | patches | class: and class token | all: and registers
    pos_image_size: ImageSize = 0  # pixels; image size of the position table; 0: image_size
    pos_resize: str = (
        "bicubic_antialias"  # interpolation: bicubic_antialias | bicubic | bicubic_offset | bilinear_antialias
    )
    rope_theta: float = 0.0  # longest period of rotary positions, in half image sides (DINOv3: 100); 0: no RoPE
    patch_bias: bool = True  # the patch embedding has a bias
    qkv_bias: str = "all"  # biases of queries, keys and values: all | no_key | none
    qk_norm: bool = False  # LayerNorm on the queries and keys of each head (Dehghani et al. 2023)
    pre_norm: bool = False  # LayerNorm before the first block (Radford et al. 2021)
    layer_scale: float = 0.0  # initial value of LayerScale (Touvron et al. 2021); 0: no LayerScale
    drop_path: float = 0.0  # probability of dropping the last block; decreases linearly to 0 at the first
    norm_eps: float = 1e-6  # of LayerNorm; must be that of loaded weights
    activation: str = "gelu"  # in the MLPs: gelu | gelu_tanh | quick_gelu | swiglu
    window: int = 0  # patches, side of the windows that most blocks attend in (Li et al. 2022); 0: all blocks globally
    global_blocks: int = 4  # blocks that attend globally beside windows, evenly spread up to the last; divides depth
    attention: str = "auto"  # auto: cudnn if this GPU runs it, else xla | xla | cudnn
    remat: str = (
        "none"  # recomputed in the backward pass: none | attention | dots | branches | full; full:N: in N blocks
    )
    scan_layers: bool = True  # run blocks as a loop, compiled once; False: a faster step on GPUs, a longer compile
    mlp_matmuls: str = "compute"  # of the MLPs, in training: compute (train.precision) | fp8 (Ada, Hopper and later)

    limits: ClassVar[Limits] = {
        "size": OneOf(tuple(SIZES)),
        "width": Range(0, 2**16),
        "depth": Range(0, 1024),
        "heads": Range(0, 1024),
        "mlp": Range(0, 2**18),
        "patch_size": Range(1, 256),  # pixels
        "image_size": SIDE,
        "pool": OneOf(("gap", "norm_gap", "cls", "cls_gap", "map")),
        "registers": Range(0, 256),
        "pos_embed": OneOf(("none", "patches", "class", "all")),
        "pos_image_size": Range(1, 4096, off=True),  # pixels
        "pos_resize": OneOf(("bicubic_antialias", "bicubic", "bicubic_offset", "bilinear_antialias")),
        "rope_theta": Range(1, 1e6, "of periods from 1", off=True),
        "qkv_bias": OneOf(("all", "no_key", "none")),
        "layer_scale": Range(1e-8, 10, off=True),
        "drop_path": SHARE,
        "norm_eps": Range(1e-12, 1e-3),
        "activation": OneOf(("gelu", "gelu_tanh", "quick_gelu", "swiglu")),
        "window": Range(1, 4096, off=True),  # patches
        "global_blocks": Range(1, 1024),
        "attention": ATTENTION,
        "remat": REMAT,
        "mlp_matmuls": MLP_MATMULS,
    }

    @property
    def has_class_token(self) -> bool:
        return self.class_token or self.pool in ("cls", "cls_gap")

    @property
    def blocks(self) -> int:
        return size_of(self).depth

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,)

    @property
    def widths(self) -> tuple[int, ...]:
        return (size_of(self).width,)

    @property
    def features(self) -> int:
        return size_of(self).width * (2 if self.pool == "cls_gap" else 1)

    @property
    def embed_width(self) -> int:
        return size_of(self).width

    @property
    def flops(self) -> float:
        size, grid = size_of(self), grid_of(self, height_width(self.image_size))
        patches = math.prod(grid)
        T, D, mlp = patches + first_tokens(self), size.width, 3 if self.activation == "swiglu" else 2
        blocks = windows_of(self, grid)
        inside = sum(window_pairs(grid, window) - patches**2 for window in blocks if window) / len(blocks)
        layer = T * (4 * D * D + mlp * D * size.mlp) + 2 * (T * T + inside) * D
        total = 2.0 * (patches * 3 * self.patch_size**2 * D + size.depth * layer)
        return total + (pooling.forward_flops(patches, D, size.mlp) if self.pool == "map" else 0)

    def make(self, dtype: jnp.dtype, gather_params: GatherParams) -> ViT:
        return ViT(self, dtype, gather_params)

    def problems(self, name: str) -> list[Problem]:
        out, size = self.size_problems(f"{name}.image_size", self.image_size, name), size_of(self)
        unit, why = (4, " whose channels rotary positions take in fours") if self.rope_theta else (1, "")
        out += heads_problems(name, size.width, size.heads, unit, why)
        if self.pos_image_size and self.pos_embed == "none":
            rule = f"has no effect, as {name}.pos_embed = none has no position table"
            out.append((f"{name}.pos_image_size", self.pos_image_size, rule, "set it to 0"))
        elif self.pos_image_size:
            what = f"{name}.patch_size = {self.patch_size}"
            out += multiple_of(f"{name}.pos_image_size", self.pos_image_size, self.patch_size, what)
        if self.pos_embed == "none" and not self.rope_theta:
            rule = f"leaves the patches without positions, as {name}.rope_theta = 0"
            out.append((f"{name}.pos_embed", "none", rule, "set rope_theta to 100, or pos_embed to class"))
        if self.window and size.depth % self.global_blocks:
            fits = max(n for n in range(1, self.global_blocks) if size.depth % n == 0)
            rule = f"must divide the {size.depth} blocks, as {name}.window = {self.window}"
            out.append((f"{name}.global_blocks", self.global_blocks, rule, f"set it to {fits}"))
        if self.pool == "map" and self.activation == "swiglu":
            rule = f"has an MLP of two layers, and {name}.activation = swiglu needs three"
            out.append((f"{name}.pool", "map", rule, "set another pool, or activation to gelu"))
        if self.pos_embed == "all" and not self.registers:
            rule = f"has rows for registers, and {name}.registers = 0"
            out.append((f"{name}.pos_embed", "all", rule, "set it to class"))
        return out

    def size_problems(self, field: str, size: ImageSize, name: str = "model") -> list[Problem]:
        out = multiple_of(field, size, self.patch_size, f"{name}.patch_size = {self.patch_size}")
        if (tokens := math.prod(side // self.patch_size for side in height_width(size))) > 2**16:
            rule = f"gives {tokens} tokens of {name}.patch_size = {self.patch_size}, each compared with each; the most"
            out.append((field, size, f"{rule} is 65536", "set a smaller size, or larger patches"))
        return out


def size_of(config: ViTConfig) -> TransformerSize:
    """The row of `SIZES`, with what the configuration gives as a number in its place.

    Raises:
      ConfigError: no such size.
    """
    return size_by_name(SIZES, config)


class ViT(nn.Module):
    """The `Backbone` of a `ViTConfig`."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.float32  # of activations and matrix products; norms and softmax are fp32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        keys: jax.Array | None = None,
        hidden: Hidden | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """As `Backbone`; with windows, `layers` are not kept.

        Raises:
          ConfigError: a side of the images is no multiple of the patch.
        """
        config, kept = self.config, []
        chex.assert_shape(images, (None, None, None, 3))
        grid = grid_of(config, images.shape[1:3])
        x = self.tokens(images, grid, hidden)
        ends = [layer + 1 for layer in layers]
        for begin, end in itertools.pairwise([0, *ends]):
            x = self.encode(x, grid, keys, slice(begin, end))
            kept.append(rearrange(x[:, first_tokens(config) :], "b (h w) d -> b h w d", h=grid[0]))
        if not ends or ends[-1] < size_of(config).depth:
            x = self.encode(x, grid, keys, slice(ends[-1] if ends else None, None))
        return self.features(x, grid)._replace(layers=tuple(kept))

    def tokens(self, images: jax.Array, grid: HeightWidth, hidden: Hidden | None) -> jax.Array:
        """(B, H, W, 3) to (B, T, D): the class token, registers and patches with their positions."""
        config, width, P = self.config, size_of(self.config).width, self.config.patch_size
        patches = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=P, q=P)
        x = dense(patches, width, self.dtype, "embed", use_bias=config.patch_bias)
        if hidden is not None:
            x = jnp.where(rearrange(hidden.where, "b h w -> b (h w) 1"), hidden.token.astype(x.dtype), x)
        first = (
            [self.param("cls_token", nn.initializers.zeros, (width,), jnp.float32)[None]]
            if config.has_class_token
            else []
        )
        if config.registers:
            first.append(self.param("registers", nn.initializers.normal(0.02), (config.registers, width), jnp.float32))
        if first:
            own = jnp.concatenate(first).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(own, (x.shape[0], *own.shape)), x], 1)
        if config.pos_embed != "none":
            x = x + self.positions(grid).astype(x.dtype)
        return layer_norm(self.dtype, "norm_pre", config.norm_eps)(x) if config.pre_norm else x

    def positions(self, grid: HeightWidth) -> jax.Array:
        """(T, D) for an image of (h, w) patches; zeros for tokens that have no row in the table."""
        config, width = self.config, size_of(self.config).width
        own, first = table_grid(config), table_first(config)
        # Of the size of a sine-cosine table and of the patch embedding: beside 0.02 a small model does not see position
        # for its first hundreds of steps.
        table = self.param("pos_embed", nn.initializers.normal(0.5), (first + math.prod(own), width), jnp.float32)
        if grid != own:
            resized = resize_table(rearrange(table[first:], "(h w) d -> h w d", h=own[0]), grid, config.pos_resize)
            table = jnp.concatenate([table[:first], rearrange(resized, "h w d -> (h w) d")])
        missing = first_tokens(config) - first
        rows = table[:first], jnp.zeros((missing, width), table.dtype), table[first:]
        return jnp.concatenate(rows) if missing else table

    def encode(
        self,
        x: jax.Array,
        grid: HeightWidth,
        keys: jax.Array | None,
        part: slice = slice(None),
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """The blocks, or a part of them; (B, T, D) to (B, T, D).

        Tokens beside those of `tokens` stand before them, without a position. `mask` as `Block` has it. With windows,
        there is neither a mask nor a part.
        """
        config, size = self.config, size_of(self.config)
        turn, each = None, None
        if config.rope_theta:
            first = x.shape[1] - math.prod(grid)
            turn = rotation(grid, first, size.width // size.heads, config.rope_theta)
        if keys is not None and config.drop_path:
            layer = jnp.arange(size.depth)
            each = {"layer": layer, "rate": config.drop_path * layer / max(size.depth - 1, 1)}
        group = [
            Block(
                size.heads, size.mlp, self.dtype, config.attention, config.norm_eps, activation=config.activation,
                biases=config.qkv_bias, qk_norm=config.norm_eps if config.qk_norm else 0.0, rotation=turn,
                layer_scale=config.layer_scale, keys=keys, mask=mask, window=window, grid=grid,
                matmuls=config.mlp_matmuls, parent=None,
            )
            for window in windows_of(config, grid)
        ]  # fmt: skip
        return scan_blocks(
            self, group, size.depth // len(group), x, gather_params=self.gather_params, remat=config.remat,
            unroll=not config.scan_layers, each=each,
            part=part, alike=len(group) > 1,
        )  # fmt: skip

    def features(self, x: jax.Array, grid: HeightWidth) -> Features:
        """Of tokens (B, T, D); pooled by `ViTConfig.pool`: (B, 2 D) for "cls_gap", else (B, D)."""
        config, size, first = self.config, size_of(self.config), first_tokens(self.config)
        norm = layer_norm(self.dtype if config.pool == "map" else jnp.float32, "norm", config.norm_eps)
        normed = norm(x)
        own, patches = normed[:, :first], normed[:, first:]
        if config.pool == "cls":
            pooled = norm(x[:, 0])
        elif config.pool == "gap":
            pooled = norm(x[:, first:].mean(1, dtype=jnp.float32))
        elif config.pool == "norm_gap":
            pooled = patches.mean(1)
        elif config.pool == "cls_gap":
            pooled = jnp.concatenate([own[:, 0], patches.mean(1)], -1)
        else:
            args = size.heads, size.mlp, self.dtype, config.norm_eps, config.activation
            pooled = pooling.AttentionPool(*args, name="pool")(patches).astype(jnp.float32)
        last, patches = (rearrange(a, "b (h w) d -> b h w d", h=grid[0]) for a in (x[:, first:], patches))
        return Features((last,), patches, own, pooled)


def windows_of(config: ViTConfig, grid: HeightWidth) -> list[int]:
    """The windows of the blocks, until they repeat, on a map of (h, w) patches; 0: none, the block attends globally."""
    if not config.window or config.window >= max(grid):
        return [0]
    return [config.window] * (size_of(config).depth // config.global_blocks - 1) + [0]


def first_tokens(config: ViTConfig) -> int:
    """Tokens before the patches'."""
    return config.has_class_token + config.registers


def table_first(config: ViTConfig) -> int:
    """Rows of the position table before the patches'."""
    return {"patches": 0, "class": int(config.has_class_token), "all": first_tokens(config)}[config.pos_embed]


def table_grid(config: ViTConfig) -> HeightWidth:
    """Patches (h, w) of the images that the position table is for."""
    height, width = height_width(config.pos_image_size or config.image_size)
    return height // config.patch_size, width // config.patch_size


def grid_of(config: ViTConfig, sides: HeightWidth) -> HeightWidth:
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
