"""Networks that make features of images: one file each, with its configuration (`config.BackboneConfig`).

    images (B, H, W, 3), normalised -> maps of several strides, the normed last map, pooled features

Classifiers, the towers of CLIP, Aurora's encoder and dense heads are built on any of them.

Shapes: B batch, H W image, h w a map, D its width, R tokens of no place, C pooled channels.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax


class Features(NamedTuple):
    """The features that a backbone makes of images; what a head does not use is not computed."""

    maps: tuple[jax.Array, ...]  # (B, h, w, D) by stride, fine to coarse, before the last norm
    normed: jax.Array  # (B, h, w, D), the last map after the last norm
    prefix: jax.Array  # (B, R, D), likewise the class token, if there is one, and registers
    pooled: jax.Array  # (B, C), fp32
    layers: tuple[jax.Array, ...] = ()  # (B, h, w, D), after the blocks of a ViT or stages of a SwinV2 asked for


class Hidden(NamedTuple):
    """Patches that are kept from the network, to be predicted (Xie et al. 2022, "SimMIM"; Zhou et al. 2022, "iBOT")."""

    token: jax.Array  # (embed_width,), stands for a hidden patch
    where: jax.Array  # (B, H / P, W / P) bool


class Backbone(Protocol):
    """The module that `BackboneConfig.make` gives."""

    def __call__(
        self,
        images: jax.Array,
        keys: jax.Array | None = None,
        hidden: Hidden | None = None,
        layers: tuple[int, ...] = (),
    ) -> Features:
        """Features of images; `keys` (B,) draw which layers a sample leaves out, None: none (evaluation).

        `layers` are numbers from 0, in rising order, of those whose maps are returned as `Features.layers`.
        """
        ...
