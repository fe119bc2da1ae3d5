"""An image and a text tower with a joint space (Radford et al. 2021).

Shapes: B batch, H W image, T tokens, E width of the joint space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.config import BackboneConfig, ModelConfig
from visionfm_jax.config.limits import ImageSize, Limits, Problem, Range
from visionfm_jax.models import text
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.layers import GatherParams, logits, no_gather

MAX_SCALE = math.log(100.0)  # of logits, in logarithms


@dataclass(kw_only=True)
class ClipConfig(ModelConfig):
    """An image and a text tower with a joint space (Radford et al. 2021)."""

    image: BackboneConfig = field(default_factory=SwinV2Config)
    text: text.TextConfig = field(default_factory=text.TextConfig)
    embed_dim: int = 1024  # dimension of the joint space
    image_projection: bool = True  # project the pooled image features to embed_dim; False: use them directly (SigLIP)
    text_bias: bool = False  # the text projection has a bias (SigLIP)

    limits: ClassVar[Limits] = {"embed_dim": Range(1, 2**16)}

    def problems(self, name: str) -> list[Problem]:
        out = super().problems(name)
        if not self.image_projection and self.image.features != self.embed_dim:
            rule = f"needs embed_dim = {self.embed_dim} to be the image's {self.image.features} channels"
            out.append((f"{name}.image_projection", False, rule, f"set embed_dim to {self.image.features}"))
        return out

    @property
    def image_size(self) -> ImageSize:
        return self.image.image_size

    @property
    def flops(self) -> float:
        """FLOPs of one pair's forward pass, without the loss."""
        widths = self.image.features * self.image_projection + self.text.features
        projections = 2.0 * widths * self.embed_dim
        return self.image.flops + text.forward_flops(self.text) + projections


class Embeddings(NamedTuple):
    """The embeddings that the loss compares, not normalised."""

    image: jax.Array  # (B, E), fp32
    text: jax.Array  # (B, E), fp32
    scale: jax.Array  # (), the logarithm of the inverse temperature
    bias: jax.Array | None  # (), of the logits of the sigmoid loss


class Clip(nn.Module):
    """Two towers, each with a linear map into the joint space.

    `sigmoid`: scale and bias of the logits start as Zhai et al. 2023 have them for their loss.
    """

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather
    sigmoid: bool = False

    def setup(self) -> None:
        self.image = self.config.image.make(self.dtype, self.gather_params)
        self.text = text.TextTransformer(self.config.text, self.dtype, self.gather_params)
        config = self.config
        if config.image_projection:
            self.image_projection = self._projection("image_projection", config.image.features)
        self.text_projection = self._projection("text_projection", config.text.features)
        if config.text_bias:
            self.text_bias = self.param("text_bias", nn.initializers.zeros, (config.embed_dim,), jnp.float32)
        self.scale = self.param(
            "scale", nn.initializers.constant(math.log(10 if self.sigmoid else 1 / 0.07)), (), jnp.float32
        )
        self.bias = self.param("bias", nn.initializers.constant(-10.0), (), jnp.float32) if self.sigmoid else None

    def __call__(self, images: jax.Array, tokens: jax.Array, keys: jax.Array | None = None) -> Embeddings:
        """Images (B, H, W, 3), normalised, and token ids (B, T); `keys` (B,) as for `Backbone`."""
        return Embeddings(self.embed_images(images, keys), self.embed_texts(tokens), self.scale, self.bias)

    def embed_images(self, images: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """(B, E), fp32."""
        pooled = self.image(images, keys).pooled
        return self._project(pooled, self.image_projection) if self.config.image_projection else pooled

    def features(self, images: jax.Array) -> jax.Array:
        """Of the image tower, pooled, fp32; before the joint space."""
        return self.image(images).pooled

    def embed_texts(self, tokens: jax.Array) -> jax.Array:
        """(B, E), fp32."""
        y = self._project(self.text(tokens), self.text_projection)
        return y + self.text_bias if self.config.text_bias else y

    def _projection(self, name: str, width: int) -> jax.Array:
        return self.param(name, nn.initializers.normal(width**-0.5), (width, self.config.embed_dim), jnp.float32)

    def _project(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        return logits(x.astype(self.dtype), kernel.astype(self.dtype))
