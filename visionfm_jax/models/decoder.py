"""A text decoder in two halves, unimodal, then multimodal with cross-attention to an image (Yu et al. 2022, "CoCa").

Both run causally, to caption, and with every word in sight, to guess hidden ones, on the same weights. Every layer is
self-attention, then in the multimodal half cross-attention, then an MLP, each behind a norm of its own.

Shapes: B batch, T tokens, S image tokens, D width, M width of the image tokens, V vocabulary, L layers of a half.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.config import NetworkConfig
from visionfm_jax.config.limits import ATTENTION, IDS, MLP_MATMULS, REMAT, Limits, OneOf, Problem, Range
from visionfm_jax.models.attention import attention
from visionfm_jax.models.fused import add_rows
from visionfm_jax.models.layers import (
    Attention,
    GatherParams,
    KVCache,
    Mlp,
    dense,
    layer_norm,
    logits,
    no_gather,
    scan_blocks,
)
from visionfm_jax.models.sizes import heads_problems, size_by_name


class DecoderSize(NamedTuple):
    """Width D, layers of the unimodal and of the multimodal half, heads N, width of the MLP."""

    width: int
    depths: tuple[int, int]
    heads: int
    mlp: int


# Halves as Yu et al. 2022, table 1, has them for CoCa-L, here of width 1024. P ("pico") is ours.
SIZES = {
    "P": DecoderSize(128, (2, 2), 4, 512),
    "L": DecoderSize(1024, (12, 12), 16, 4096),
}
EPS = 1e-5


@dataclass(kw_only=True)
class DecoderConfig(NetworkConfig):
    """A text decoder whose second half has cross-attention to an image; sizes in `SIZES`.

    Token ids are those of the tokenizer; 0 is padding.
    """

    size: str = "L"  # width, depths, heads and mlp by name
    width: int = 0  # channels of a token; 0: the value of size; likewise depths, heads, mlp
    depths: tuple[int, int] = (0, 0)  # blocks of the unimodal and the multimodal half
    heads: int = 0  # attention heads
    mlp: int = 0  # hidden channels of the MLPs
    vocab_size: int = 32_000  # of the tokenizer
    context: int = 64  # maximum tokens, with begin and end
    begin_token: int = 1  # id of the first token of every text
    end_token: int = 2  # id of the token whose features embed the text, at its first position
    mask_token: int = 4  # id of the token that replaces a masked word
    attention: str = "auto"  # auto: cudnn if this GPU runs it, else xla | xla | cudnn
    remat: str = (
        "none"  # recomputed in the backward pass: none | attention | dots | branches | full; full:N: in N blocks
    )
    scan_layers: bool = True  # run blocks as a loop, compiled once; False: a faster step on GPUs, a longer compile
    mlp_matmuls: str = "compute"  # of the MLPs, in training: compute (train.precision) | fp8 (Ada, Hopper and later)

    limits: ClassVar[Limits] = {
        "size": OneOf(tuple(SIZES)),
        "width": Range(0, 2**16),
        "depths": Range(0, 1024),
        "heads": Range(0, 1024),
        "mlp": Range(0, 2**18),
        "vocab_size": Range(4, 2**24),
        "context": Range(3, 2**14, "tokens are compared each with each"),
        "begin_token": IDS,
        "end_token": IDS,
        "mask_token": IDS,
        "attention": ATTENTION,
        "remat": REMAT,
        "mlp_matmuls": MLP_MATMULS,
    }

    @property
    def blocks(self) -> int:
        return sum(size_of(self).depths)

    def problems(self, name: str) -> list[Problem]:
        size = size_of(self)
        out = heads_problems(name, size.width, size.heads)
        special = {f"{name}.{leaf}": getattr(self, leaf) for leaf in ("begin_token", "end_token", "mask_token")}
        if len({0, *special.values()}) == 4 and all(0 < i < self.vocab_size for i in special.values()):
            return out
        rule = f"must differ from each other and from 0, padding, and be below vocab_size = {self.vocab_size}"
        return [*out, (", ".join(special), tuple(special.values()), rule, "set the tokenizer's, e.g. 1, 2 and 4")]


def size_of(config: DecoderConfig) -> DecoderSize:
    """The row of `SIZES`, with what the configuration gives as a number in its place.

    Raises:
      ConfigError: no such size.
    """
    return size_by_name(SIZES, config)


class View(NamedTuple):
    """A way to read a text.

    Several ways in one pass, on texts (B, V T) that stand V times one behind another, need the weights and the image's
    keys and values once.
    """

    causal: bool | tuple[bool, ...]  # a token sees itself and those before it; else all of the text. Several: V
    lengths: jax.Array  # (B,), tokens of each text, with that of the end


def view_of(tokens: jax.Array, config: DecoderConfig, *, causal: bool) -> View:
    """How token ids (B, T) are read: up to their end token."""
    return View(causal, jnp.argmax(tokens == config.end_token, 1) + 1)


class EncoderKV(NamedTuple):
    """An image's keys and values in one layer."""

    keys: jax.Array  # (B, S, N, K)
    values: jax.Array  # (B, S, N, K)


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, D) to others (B, S, M), or to what was made of them; (B, T, D), and that."""

    heads: int
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, others: jax.Array | EncoderKV) -> tuple[jax.Array, EncoderKV]:
        D = x.shape[-1]

        def heads(a: jax.Array) -> jax.Array:
            return rearrange(checkpoint_name(a, "qkv"), "b t (n k) -> b t n k", n=self.heads)

        q = heads(dense(x, D, self.dtype, "query"))
        if not isinstance(others, EncoderKV):
            others = EncoderKV(*(heads(dense(others, D, self.dtype, name)) for name in ("key", "value")))
        y = rearrange(attention(q, *others, self.implementation), "b t n k -> b t (n k)")
        return checkpoint_name(dense(y, D, self.dtype, "out"), "projection"), others


class Layer(nn.Module):
    """Pre-norm layer of either half; (B, T, D) to (B, T, D).

    Attributes:
      view: of x; None where x is one token, at `position` after its cache.
      image: tokens (B, S, M) for the multimodal half.
      cross_attention_mask: (B,), or of several readings (B, V), 0 where the image is not seen; None: 1.
    """

    heads: int
    mlp: int
    dtype: jnp.dtype
    implementation: str
    view: View | None
    image: jax.Array | None = None
    cross_attention_mask: jax.Array | None = None
    position: jax.Array | None = None
    matmuls: str = "compute"  # of `Mlp`

    @nn.compact
    def __call__(self, x: jax.Array, before: dict | None = None) -> Any:
        """With `before`, a `cache` and, in the multimodal half, `encoder_kv`, a pair: x, and the same after it."""
        norm, after = partial(layer_norm, self.dtype, epsilon=EPS), {}
        causal, lengths = (True, None) if before else self.view
        y = Attention(self.heads, self.dtype, self.implementation, causal, name="attn")
        y = y(norm(name="ln1")(x), lengths, before and before["cache"], self.position)
        if before:
            y, after["cache"] = y
        x = add_rows(x, y)
        others = before["encoder_kv"] if before and "encoder_kv" in before else self.image
        if others is not None:
            if not isinstance(others, EncoderKV):
                others = norm(name="ln_image")(others)
            y, after["encoder_kv"] = CrossAttention(self.heads, self.dtype, self.implementation, name="cross")(
                norm(name="ln_cross")(x), others
            )
            if self.cross_attention_mask is not None:
                mask = self.cross_attention_mask.reshape(len(y), -1)
                y = y * jnp.repeat(mask, y.shape[1] // mask.shape[1], 1)[..., None].astype(y.dtype)
            x = add_rows(x, y)
        x = add_rows(x, Mlp(self.mlp, self.dtype, matmuls=self.matmuls, name="mlp")(norm(name="ln2")(x)))
        return (x, after) if before else x


class UnimodalDecoder(nn.Module):
    """Token ids (B, T) to features (B, T, D) of the text alone."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(
        self, tokens: jax.Array, view: View | None, before: dict | None = None, position: jax.Array | None = None
    ) -> Any:
        """With `before`, tokens (B, 1) at `position`, and a pair as `Layer` gives it; leaves of both are (L, B, …)."""
        config, size = self.config, size_of(self.config)
        table = self.param("token_embed", nn.initializers.normal(0.02), (config.vocab_size, size.width), jnp.float32)
        places = self.param("pos_embed", nn.initializers.normal(0.01), (config.context, size.width), jnp.float32)
        start = 0 if position is None else position
        readings = len(view.causal) if view is not None and isinstance(view.causal, tuple) else 1
        places = jax.lax.dynamic_slice_in_dim(places, start, tokens.shape[1] // readings)
        x = (table[tokens] + jnp.tile(places, (readings, 1))).astype(self.dtype)
        layer = Layer(
            size.heads, size.mlp, self.dtype, config.attention, view, position=position, matmuls=config.mlp_matmuls,
            parent=None,
        )  # fmt: skip
        return scan_blocks(
            self, [layer], size.depths[0], x,
            gather_params=self.gather_params, remat=config.remat,
            unroll=not config.scan_layers, each=before, outputs=before is not None,
        )  # fmt: skip


class MultimodalDecoder(nn.Module):
    """Features (B, T, D) of a text, and an image's tokens (B, S, M), to logits (B, T, V) of tokens, fp32."""

    config: DecoderConfig
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        view: View | None,
        image: jax.Array | None,
        cross_attention_mask: jax.Array | None = None,
        before: dict | None = None,
        position: jax.Array | None = None,
    ) -> Any:
        """With `before`, as for `UnimodalDecoder`; without an image, `before` holds what was made of it."""
        config, size = self.config, size_of(self.config)
        layer = Layer(
            size.heads, size.mlp, self.dtype, config.attention, view, image, cross_attention_mask, position,
            config.mlp_matmuls, parent=None,
        )  # fmt: skip
        x = scan_blocks(
            self, [layer], size.depths[1], x,
            gather_params=self.gather_params, remat=config.remat,
            unroll=not config.scan_layers, each=before, outputs=before is not None,
            first=size.depths[0],
        )  # fmt: skip
        x, after = x if before is not None else (x, None)
        x = layer_norm(self.dtype, "norm", epsilon=EPS)(x)
        kernel = self.param(
            "vocabulary", nn.initializers.normal(size.width**-0.5), (size.width, config.vocab_size), jnp.float32
        )
        words = logits(rearrange(x, "b t d -> (b t) d"), kernel.astype(self.dtype))
        words = rearrange(words, "(b t) v -> b t v", b=len(x))
        return words if before is None else (words, after)


def empty_cache(config: DecoderConfig, half: int, rows: int, dtype: jnp.dtype) -> KVCache:
    """That of a half, 0 unimodal or 1 multimodal, before the first token; leaves are (L, B, …)."""
    size = size_of(config)
    zeros = jnp.zeros((size.depths[half], rows, config.context, size.heads, size.width // size.heads), dtype)
    return KVCache(zeros, zeros)


def forward_flops(config: DecoderConfig, image_tokens: int, image_width: int, readings: int = 1) -> tuple[float, float]:
    """FLOPs of a text's forward pass through the unimodal and the multimodal half, its logits included.

    `readings`: V, in one pass. Matrix products alone, two per multiply-add; attention counted whole.
    """
    size = size_of(config)
    T, D, S = config.context, size.width, image_tokens
    layer = T * (4 * D * D + 2 * D * size.mlp) + 2 * T * T * D
    cross = T * 2 * D * D + 2 * T * S * D
    image = 2 * S * image_width * D
    unimodal, multimodal = size.depths
    once = multimodal * (layer + cross) + T * D * config.vocab_size
    return 2.0 * readings * unimodal * layer, 2.0 * (readings * once + multimodal * image)
