"""Aurora: one hierarchical encoder for masked images, image-text contrast and captions.

    image (B, H, W, 3) -> backbone -> map (B, h, w, D) -> hidden pixels (Xie et al. 2022, "SimMIM")
                                                     -> pool, projection: the image in the joint space
                                                     -> projection: tokens for the decoder's cross-attention
    text (B, T) -> unimodal decoder -> at its end token, projection: the text in the joint space
                                    -> multimodal decoder: the next word, or a hidden one

Shapes: B batch, H W image, h w map, S = h w image tokens, T text tokens, D width of the map, E width of the joint
space, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from visionfm_jax.config import BackboneConfig, ModelConfig
from visionfm_jax.config.limits import ImageSize, Limits, Problem, Range, height_width, multiple_of
from visionfm_jax.models import decoder, pooling
from visionfm_jax.models.backbones import Hidden
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig, View, view_of
from visionfm_jax.models.layers import GatherParams, dense, layer_norm, no_gather

EPS = 1e-5
POOL_HEAD = 128  # width of a head of the pool; narrower maps have one
PIXELS = 3


@dataclass(kw_only=True)
class AuroraConfig(ModelConfig):
    """An image encoder, a text decoder with cross-attention to it, a joint space, and a head that predicts pixels."""

    image: BackboneConfig = field(default_factory=SwinV2Config)
    text: DecoderConfig = field(default_factory=DecoderConfig)
    embed_dim: int = 1024  # dimension of the joint space

    limits: ClassVar[Limits] = {"embed_dim": Range(1, 2**16)}

    @property
    def image_size(self) -> ImageSize:
        return self.image.image_size

    def flops(self, readings: int = 1) -> dict[str, float]:
        """FLOPs of one sample's forward pass by part: matrix products alone, two per multiply-add.

        `readings`: how often a text is read in one pass (`decoder.View`).

        Returns:
          encoder and reconstruction, of an image; pool, of an image, with its projection; token_projection, of its
          tokens; unimodal and multimodal, of a text; text_projection.
        """
        text, stride = decoder.size_of(self.text).width, self.image.strides[-1]
        D, S = self.image.widths[-1], math.prod(side // stride for side in height_width(self.image_size))
        unimodal, multimodal = decoder.forward_flops(self.text, S, text, readings)
        return {
            "encoder": self.image.flops,
            "reconstruction": 2.0 * S * D * stride**2 * PIXELS,
            "pool": pooling.forward_flops(S, D, 4 * D) + 2.0 * (D * D + D * self.embed_dim),
            "token_projection": 2.0 * S * 2 * D * (D + text),
            "unimodal": unimodal,
            "multimodal": multimodal,
            "text_projection": 2.0 * 4 * text * (text + self.embed_dim),
        }

    def problems(self, name: str) -> list[Problem]:
        return super().problems(name) + self._stride_problems(f"{name}.image.image_size", self.image_size)

    def size_problems(self, field: str, size: ImageSize, name: str = "model") -> list[Problem]:
        return super().size_problems(field, size, name) + self._stride_problems(field, size)

    def _stride_problems(self, field: str, size: ImageSize) -> list[Problem]:
        stride = self.image.strides[-1]
        return multiple_of(field, size, stride, f"{stride}, what a token of the last map reconstructs")


class Projection(nn.Module):
    """A two-layer head, (…, M) to (…, features) through `hidden`."""

    hidden: int
    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(dense(x, self.hidden, self.dtype, "fc1"), approximate=False)
        return dense(x, self.features, self.dtype, "fc2", use_bias=False)


class Aurora(nn.Module):
    """Encoder, decoder and heads; used by its methods, of which each is a way through the picture above."""

    config: AuroraConfig
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    def setup(self) -> None:
        config = self.config
        width, text = config.image.widths[-1], decoder.size_of(config.text).width
        self.image = config.image.make(self.dtype, self.gather_params)
        self.mask_token = self.param(
            "mask_token", nn.initializers.truncated_normal(0.02), (config.image.embed_width,), jnp.float32
        )
        self.reconstruction = nn.Dense(self.stride**2 * PIXELS, dtype=self.dtype)
        self.pool = pooling.AttentionPool(max(width // POOL_HEAD, 1), 4 * width, self.dtype, EPS)
        self.image_projection = Projection(width, config.embed_dim, self.dtype)
        self.token_projection = Projection(2 * width, text, self.dtype)
        self.unimodal = decoder.UnimodalDecoder(config.text, self.dtype, self.gather_params)
        self.unimodal_norm = layer_norm(self.dtype, None, epsilon=EPS)
        self.text_projection = Projection(4 * text, config.embed_dim, self.dtype)
        self.multimodal = decoder.MultimodalDecoder(config.text, self.dtype, self.gather_params)
        self.scale = self.param("scale", nn.initializers.constant(math.log(1 / 0.07)), (), jnp.float32)

    @property
    def stride(self) -> int:
        """Pixels between two tokens of the last map."""
        return self.config.image.strides[-1]

    def __call__(self, images: jax.Array, tokens: jax.Array) -> tuple:
        """Everything once, to make parameters: images (B, H, W, 3), normalised, and token ids (B, T)."""
        x = self.encode(images)
        text = self.encode_text(tokens, view := view_of(tokens, self.config.text, causal=True))
        return (
            self.reconstruct(x),
            self.embed_image(x),
            self.embed_text(text, tokens),
            self.decode_text(text, view, self.project_tokens(x)),
        )

    def encode(self, images: jax.Array, keys: jax.Array | None = None, hidden: jax.Array | None = None) -> jax.Array:
        """The normed last map (B, h, w, D); `keys` as for `Backbone`, `hidden` (B, …) bool of patches not shown."""
        kept = None if hidden is None else Hidden(self.mask_token, hidden)
        return self.image(images, keys, kept).normed.astype(self.dtype)

    def features(self, images: jax.Array) -> jax.Array:
        """Of the encoder, pooled, fp32."""
        return self.image(images).pooled

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """The map to pixels (B, H, W, 3), fp32, normalised like the images."""
        y = self.reconstruction(x).astype(jnp.float32)
        return rearrange(y, "b h w (c p q) -> b (h p) (w q) c", p=self.stride, q=self.stride)

    def project_tokens(self, x: jax.Array) -> jax.Array:
        """The map to the decoder's image tokens (B, S, width of the text)."""
        return self.token_projection(rearrange(x, "b h w d -> b (h w) d"))

    def embed_image(self, x: jax.Array) -> jax.Array:
        """The map to the joint space, (B, E), fp32, not normalised."""
        return self.image_projection(self.pool(rearrange(x, "b h w d -> b (h w) d"))).astype(jnp.float32)

    def encode_text(self, tokens: jax.Array, view: View) -> jax.Array:
        """The unimodal decoder; (B, T, D)."""
        return self.unimodal(tokens, view)

    def embed_text(self, text: jax.Array, tokens: jax.Array) -> jax.Array:
        """Features of the unimodal decoder, read causally, to the joint space, (B, E), fp32, not normalised."""
        end = jnp.argmax(tokens == self.config.text.end_token, 1)
        return self.text_projection(self.unimodal_norm(text[jnp.arange(len(text)), end])).astype(jnp.float32)

    def decode_text(
        self, text: jax.Array, view: View, image: jax.Array, cross_attention_mask: jax.Array | None = None
    ) -> jax.Array:
        """The multimodal decoder: logits (B, T, V), fp32."""
        return self.multimodal(text, view, image, cross_attention_mask)

    def init_cache(self, image: jax.Array) -> dict[str, Any]:
        """The cache before the first token of a caption of image tokens (B, S, …); leaves are (L, B, …)."""
        text, rows = self.config.text, len(image)
        cache = [decoder.empty_cache(text, half, rows, self.dtype) for half in (0, 1)]
        tokens = jnp.full((rows, 1), text.begin_token, jnp.int32)
        first = jnp.zeros((), jnp.int32)  # only what the layers make of the image is kept of this
        x, _ = self.unimodal(tokens, None, {"cache": cache[0]}, first)
        _, after = self.multimodal(x, None, image, before={"cache": cache[1]}, position=first)
        return {"unimodal": {"cache": cache[0]}, "multimodal": {"cache": cache[1], "encoder_kv": after["encoder_kv"]}}

    def decode_token(
        self, cache: dict[str, Any], tokens: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Logits (B, V) of what follows the tokens (B,) at `position`, and the cache with them."""
        x, unimodal = self.unimodal(tokens[:, None], None, cache["unimodal"], position)
        words, multimodal = self.multimodal(x, None, None, before=cache["multimodal"], position=position)
        return words[:, 0], {"unimodal": unimodal, "multimodal": multimodal}
