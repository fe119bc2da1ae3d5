"""Heads that give each pixel a class, on any backbone: a linear probe, and UPerNet (Xiao et al. 2018).

    images (B, H, W, 3) -> the backbone's maps, normed -> logits (B, h, w, C), of the finest map

UPerNet's norms are LayerNorms over the channels of a place, where the published code has batch norms. Statistics of a
batch would be those of a device's micro-batch, another loss for every mesh; and a GroupNorm's, over all of an image,
would change with the padding and from window to window of a sliding evaluation.

Shapes: B batch, H W image, h w a map, D its width, F channels of the head, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from visionfm_jax.config import BackboneConfig
from visionfm_jax.config.limits import HeightWidth, height_width
from visionfm_jax.models.heads import logits_layer
from visionfm_jax.models.layers import dense, layer_norm
from visionfm_jax.models.pyramid import Rescale, forward_flops, rescaled

LEVELS = (2, 1, 0, -1)  # of a plain ViT's pyramid: of 4, 2, 1 and 1/2 times the sides of its map
POOLED = (1, 2, 3, 6)  # sides of the grids of UPerNet's pyramid pooling
Norm = Callable[[jnp.dtype, str], nn.Module]


class Segmenter(nn.Module):
    """A backbone and a head on its maps, whose parameters stand beside the backbone's as "head"."""

    backbone: nn.Module  # a `models.backbones.Backbone`
    make_head: Callable[[], nn.Module]
    frozen: bool = False  # no gradient reaches the backbone, and it leaves out no layers

    def setup(self) -> None:
        nn.share_scope(self, self.backbone)
        self.head = self.make_head()

    def __call__(self, images: jax.Array, keys: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """Images (B, H, W, 3), normalised, to logits (B, h, w, C), fp32, and those of an auxiliary head if any."""
        features = self.backbone(images, None if self.frozen else keys)
        # What the last norm does for the last map: a backbone's stages differ in scale by orders of magnitude.
        finer = [nn.standardize(map.astype(jnp.float32), epsilon=1e-6) for map in features.maps[:-1]]
        maps = (*finer, features.normed)
        return self.head(jax.lax.stop_gradient(maps) if self.frozen else maps)


class LinearProbe(nn.Module):
    """A linear layer on the channels of all maps, the coarser ones resized to the finest."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps (B, h, w, D), fine to coarse, to logits (B, h, w, C) of the finest."""
        # A layer on each map and then the resizing, which is linear too and has fewer channels there.
        parts = [logits_layer(m, self.num_classes, self.dtype, f"map{i}", i == 0) for i, m in enumerate(maps)]
        return (sum(resize(part, parts[0].shape[1:3]) for part in parts),)


class UPerNet(nn.Module):
    """Pyramid pooling (Zhao et al. 2017) on the coarsest map, a feature pyramid, and one layer on all its levels.

    A single map, of a plain ViT, becomes four by ViTDet's simple feature pyramid (Li et al. 2022, section 3). BEiT's
    takes the maps of four layers instead, which ViTDet's table 1 found no better; a `Backbone` gives the last alone.
    The auxiliary head (Zhao et al. 2017, section 3.3) is one convolution on the second-coarsest map.
    """

    num_classes: int
    channels: int = 512
    auxiliary_channels: int = 256  # of the auxiliary head; 0: there is none
    dtype: jnp.dtype = jnp.float32
    norm: Norm = lambda dtype, name: layer_norm(dtype, name, 1e-6)

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Maps (B, h, w, D), fine to coarse, to logits (B, h, w, C) of the finest, and those of the auxiliary head."""
        if len(maps) == 1:
            maps = [Rescale(level, self.dtype, name=f"scale{i}")(maps[0]) for i, level in enumerate(LEVELS)]
        last, F = maps[-1].astype(self.dtype), self.channels
        pooled = [self._layer(average_pool(last, side), F, 1, f"pool{side}") for side in POOLED]
        pooled = [last, *(resize(level, last.shape[1:3]) for level in pooled)]
        levels = [self._layer(m, F, 1, f"lateral{i}") for i, m in enumerate(maps[:-1])]
        levels.append(self._layer(jnp.concatenate(pooled, -1), F, 3, "bottleneck"))
        for i in reversed(range(len(levels) - 1)):
            levels[i] += resize(levels[i + 1], levels[i].shape[1:3])
        levels[:-1] = [self._layer(level, F, 3, f"level{i}") for i, level in enumerate(levels[:-1])]
        levels = [resize(level, levels[0].shape[1:3]) for level in levels]
        x = self._layer(jnp.concatenate(levels, -1), F, 3, "fusion")
        out = (logits_layer(x, self.num_classes, self.dtype, "classifier"),)
        if not self.auxiliary_channels:
            return out
        x = self._layer(maps[-2], self.auxiliary_channels, 3, "auxiliary")
        return (*out, logits_layer(x, self.num_classes, self.dtype, "auxiliary_classifier"))

    def _layer(self, x: jax.Array, features: int, kernel: int, name: str) -> jax.Array:
        """Convolution, norm, ReLU."""
        if kernel == 1:
            x = dense(x, features, self.dtype, name, use_bias=False)
        else:
            x = nn.Conv(features, (kernel, kernel), use_bias=False, dtype=self.dtype, name=name)(x)
        return nn.relu(self.norm(self.dtype, f"{name}_norm")(x))


def resize(x: jax.Array, size: HeightWidth) -> jax.Array:
    """(B, h, w, F) to another size, bilinear between the centres of pixels and without antialiasing, as torch does."""
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), "linear", antialias=False)


def average_pool(x: jax.Array, side: int) -> jax.Array:
    """(B, h, w, F) to (B, side, side, F): means over bins that may overlap, as torch's `adaptive_avg_pool2d` has them.

    Bin i of a length n is from floor(i n / side) to ceil((i + 1) n / side).
    """
    rows, columns = (_bins(length, side) for length in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("ah,bw,nhwf->nabf", rows, columns, x, precision=highest, preferred_element_type=jnp.float32)


def _bins(length: int, side: int) -> np.ndarray:
    """The matrix (side, length) of means over the bins of one axis, fp32."""
    i, at = np.arange(side)[:, None], np.arange(length)
    inside = (at >= i * length // side) & (at < -(-(i + 1) * length // side))
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def upernet_flops(model: BackboneConfig, num_classes: int, channels: int, auxiliary: int) -> float:
    """FLOPs of UPerNet on one image: matrix products and convolutions, two per multiply-add."""
    maps, widths, F, total = map_sides(model), model.widths, channels, 0.0
    if len(maps) == 1:
        total += sum(forward_flops(math.prod(maps[0]), level, widths[0]) for level in LEVELS)
        maps, widths = [[rescaled(side, level) for side in maps[0]] for level in LEVELS], widths * len(LEVELS)
    places = [math.prod(sides) for sides in maps]
    macs = sum(side**2 for side in POOLED) * widths[-1] * F
    macs += places[-1] * 9 * (widths[-1] + len(POOLED) * F) * F
    macs += sum(n * (width + 9 * F) * F for n, width in zip(places[:-1], widths[:-1], strict=True))
    macs += places[0] * (9 * len(places) * F * F + F * num_classes)
    macs += places[-2] * auxiliary * (9 * widths[-2] + num_classes)
    return total + 2.0 * macs


def probe_flops(model: BackboneConfig, num_classes: int) -> float:
    """FLOPs of the linear probe on one image: matrix products alone, two per multiply-add."""
    maps = zip(map_sides(model), model.widths, strict=True)
    return 2.0 * num_classes * sum(math.prod(sides) * width for sides, width in maps)


def map_sides(model: BackboneConfig) -> list[tuple[int, ...]]:
    """Sides of each of the backbone's maps, at `image_size`."""
    size = height_width(model.image_size)
    return [tuple(math.ceil(side / stride) for side in size) for stride in model.strides]
