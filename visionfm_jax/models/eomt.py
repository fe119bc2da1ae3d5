"""EoMT (Kerssies et al. 2025, "Your ViT is Secretly an Image Segmentation Model"): masks by the blocks of a plain ViT.

    images -> the first blocks -> queries join the patches -> the last blocks -> of each query a class and a mask

There is no decoder: the head gives a query's class by a layer, and its mask by the product of an MLP of the query with
the patches, upsampled. While it is trained, the head also predicts before each of the last blocks, and there a query
sees the patches of its mask alone (Cheng et al. 2022, "Mask2Former"). That is given up block by block (`mask_shares`),
so that the trained network needs no masks and predicts once.

Shapes: B batch, H W image, T tokens, D width, h w the patches, or the places of masks, Q queries, C classes, N the
blocks that queries join.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.config.limits import HeightWidth, height_width
from visionfm_jax.models.backbones.vit import ViT, ViTConfig, first_tokens, grid_of, size_of
from visionfm_jax.models.layers import dense, layer_norm, logits
from visionfm_jax.models.segmenter import resize

EPS = 1e-6
POWER = 0.9  # of the polynomial by which masked attention is given up


class Predicted(NamedTuple):
    """What queries say."""

    logits: jax.Array  # (…, Q, C + 1), fp32; the last: there is nothing
    masks: jax.Array  # (…, h, w, Q), fp32 logits


class Masked(NamedTuple):
    """Masked attention in training."""

    shares: jax.Array  # (N,), of the queries of each block that see their mask alone
    keys: jax.Array  # (B,), draw which ones


class Eomt(ViT):
    """A ViT that queries join, whose own parameters stand beside the backbone's as "head"."""

    num_classes: int = 1
    queries: int = 1
    joined: int = 1  # of the blocks, the last so many

    @nn.compact
    def __call__(self, images: jax.Array, keys: jax.Array | None = None, masked: Masked | None = None) -> Predicted:
        """Of images (B, H, W, 3), normalised; `keys` as `Backbone` takes them.

        With `masked` (N + 1, B, …): before each of the blocks, whose attention is masked by that, and after the last.
        Without, of the last alone: (1, B, …).
        """
        config, depth = self.config, size_of(self.config).depth
        chex.assert_shape(images, (None, None, None, 3))
        grid, alone = grid_of(config, images.shape[1:3]), depth - self.joined
        x = self.encode(self.tokens(images, grid, None), grid, keys, slice(alone))
        args = self.num_classes, self.queries, x.shape[-1], upsamplings(config.patch_size), self.dtype
        head = EomtHead(*args, name="head")
        norm = layer_norm(self.dtype, "norm", config.norm_eps)
        read = EomtHead.__call__ if config.remat == "none" else nn.remat(EomtHead.__call__)

        def predict(x: jax.Array) -> Predicted:
            x = norm(x)
            patches = rearrange(x[:, -math.prod(grid) :], "b (h w) d -> b h w d", h=grid[0])
            return read(head, x[:, : self.queries], patches)

        x = jnp.concatenate([jnp.broadcast_to(head.queries.astype(x.dtype), (len(x), *head.queries.shape)), x], 1)
        if masked is None:
            x = self.encode(x, grid, keys, slice(alone, depth))
            return jax.tree.map(lambda a: a[None], predict(x))
        made = []
        for i in range(self.joined):
            made.append(predict(x))
            draws = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(masked.keys)
            mask = attention_mask(made[-1].masks, grid, first_tokens(config), masked.shares[i], draws)
            x = self.encode(x, grid, keys, slice(alone + i, alone + i + 1), mask)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *made, predict(x))


class EomtHead(nn.Module):
    """Queries, and what is said of them."""

    num_classes: int
    num_queries: int
    width: int
    upsamplings: int
    dtype: jnp.dtype

    def setup(self) -> None:
        D, layer = self.width, functools.partial(nn.Dense, dtype=self.dtype)
        self.queries = self.param("queries", nn.initializers.normal(1.0), (self.num_queries, D), jnp.float32)
        self.classes = nn.Dense(self.num_classes + 1, dtype=jnp.float32)
        self.mask = [layer(D) for _ in range(3)]
        self.up = [Upsample(self.dtype) for _ in range(self.upsamplings)]

    def __call__(self, queries: jax.Array, patches: jax.Array) -> Predicted:
        """Of queries (B, Q, D) and patches (B, h, w, D), normed."""
        classes, q = self.classes(queries), queries
        for i, layer in enumerate(self.mask):
            q = layer(nn.gelu(q, approximate=False) if i else q)
        for up in self.up:
            patches = up(patches)
        places = rearrange(patches, "b h w d -> b (h w) d")
        masks = jax.vmap(logits)(places, jnp.swapaxes(q, 1, 2))
        return Predicted(classes, rearrange(masks, "b (h w) q -> b h w q", h=patches.shape[1]))


class Upsample(nn.Module):
    """Twice the resolution; (B, h, w, D) to (B, 2 h, 2 w, D): transposed convolution, GELU, depthwise one, norm."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        x = rearrange(dense(x, 4 * D, self.dtype, "up"), "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)
        x = nn.gelu(x, approximate=False)
        _, h, w, _ = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=())
        kernel = self.param("depthwise", init, (3, 3, D), jnp.float32)
        # A sum of shifted maps, which is fused: of a grouped convolution XLA has slow gradients.
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
        x = sum(padded[:, i : i + h, j : j + w] * kernel[i, j] for i in range(3) for j in range(3))
        return layer_norm(self.dtype, "norm", EPS)(x)


def upsamplings(patch_size: int) -> int:
    """How often a map of patches is doubled: until the stride is 4, or odd (patches of 14: 7), but at least once."""
    count, stride = 1, patch_size // 2
    while stride > 4 and stride % 2 == 0:
        count, stride = count + 1, stride // 2
    return count


def mask_shares(step: jax.Array, total_steps: int, blocks: int) -> jax.Array:
    """Of each block, the share of queries (N,) that see their mask alone, by the step of training.

    1 at first, and 0 at last, which block i reaches from (i + 1) / (N + 2) to (i + 2) / (N + 2) of the training, as in
    the authors' configurations: (1 - t)^0.9 of the time t between.
    """
    time = step / total_steps * (blocks + 2) - jnp.arange(1, blocks + 1)
    return (1 - jnp.clip(time, 0, 1)) ** POWER


def attention_mask(masks: jax.Array, grid: HeightWidth, first: int, share: jax.Array, keys: jax.Array) -> jax.Array:
    """Which tokens see which, bool (B, 1, T, T): of the patches a query sees those where its mask is above 0.

    Queries see each other and the `first` tokens before the patches, and these and the patches see all.

    Args:
      masks: (B, h, w, Q), logits.
      grid: of the patches.
      first: number of tokens between queries and patches.
      share: of the queries, for which that holds; the others see all.
      keys: (B,), draw which ones.
    """
    B, Q = len(masks), masks.shape[-1]
    inside = rearrange(resize(masks, grid) > 0, "b h w q -> b q (h w)")
    chosen = jax.vmap(lambda key: jax.random.bernoulli(key, share, (Q,)))(keys)
    seen = jnp.pad(inside | ~chosen[..., None], ((0, 0), (0, 0), (Q + first, 0)), constant_values=True)
    T = seen.shape[-1]
    return jnp.pad(seen, ((0, 0), (0, T - Q), (0, 0)), constant_values=True).reshape(B, 1, T, T)


def extra_flops(config: ViTConfig, num_classes: int, queries: int, joined: int, predictions: int) -> float:
    """FLOPs of one image's forward pass beside the backbone's at `image_size`: matrix products, two per multiply-add.

    Args:
      config: of the backbone.
      num_classes, queries, joined: of `Eomt`.
      predictions: how often it predicts.
    """
    size, times, Q = size_of(config), upsamplings(config.patch_size), queries
    places, D = math.prod(grid_of(config, height_width(config.image_size))), size.width
    T, mlp = places + first_tokens(config), 3 if config.activation == "swiglu" else 2
    block = Q * (4 * D * D + mlp * D * size.mlp) + 2 * ((T + Q) ** 2 - T * T) * D
    up = sum(places * 4**i * 4 * D * D for i in range(times))
    head = Q * (3 * D * D + D * (num_classes + 1)) + up + places * 4**times * Q * D
    return 2.0 * (joined * block + predictions * head)
