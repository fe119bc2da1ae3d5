"""The text transformer of CLIP (Radford et al. 2021), and of SigLIP (Zhai et al. 2023), each difference a field.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.config import NetworkConfig
from visionfm_jax.config.limits import ATTENTION, IDS, MLP_MATMULS, REMAT, Limits, OneOf, Problem, Range
from visionfm_jax.models.layers import Block, GatherParams, layer_norm, no_gather, scan_blocks
from visionfm_jax.models.sizes import TransformerSize, heads_problems, size_by_name

# B L: Radford et al. 2021, the towers beside ViT-B and ViT-L; H: OpenCLIP's beside ViT-H/14. P ("pico") is ours.
SIZES = {
    "P": TransformerSize(96, 4, 3, 384),
    "B": TransformerSize(512, 12, 8, 2048),
    "L": TransformerSize(768, 12, 12, 3072),
    "H": TransformerSize(1024, 24, 16, 4096),
}


@dataclass(kw_only=True)
class TextConfig(NetworkConfig):
    """A text transformer; sizes in `SIZES`."""

    size: str = "H"  # width, depth, heads and mlp by name
    width: int = 0  # channels of a token; 0: the value of size; likewise depth, heads, mlp
    depth: int = 0  # number of blocks
    heads: int = 0  # attention heads
    mlp: int = 0  # hidden channels of the MLPs
    vocab_size: int = 49_408  # of the tokenizer
    context: int = 77  # maximum tokens, with begin and end
    end_token: int = 49_407  # for pool = end: id of the token whose features are pooled, at its first position
    pool: str = "end"  # features of the text: end: at end_token | last: at the last position (SigLIP)
    causal: bool = True  # causal attention; False: full attention, including padding (SigLIP)
    activation: str = "gelu"  # in the MLPs: gelu | gelu_tanh | quick_gelu
    norm_eps: float = 1e-5  # of LayerNorm; must be that of loaded weights
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
        "vocab_size": Range(3, 2**24),
        "context": Range(3, 2**14, "tokens are compared each with each"),
        "end_token": IDS,
        "pool": OneOf(("end", "last")),
        "activation": OneOf(("gelu", "gelu_tanh", "quick_gelu")),
        "norm_eps": Range(1e-12, 1e-3),
        "attention": ATTENTION,
        "remat": REMAT,
        "mlp_matmuls": MLP_MATMULS,
    }

    @property
    def blocks(self) -> int:
        return size_of(self).depth

    @property
    def features(self) -> int:
        """Channels of a text's features."""
        return size_of(self).width

    def problems(self, name: str) -> list[Problem]:
        size = size_of(self)
        out = heads_problems(name, size.width, size.heads)
        if self.end_token >= self.vocab_size:
            rule = f"must be below vocab_size = {self.vocab_size}"
            out.append((f"{name}.end_token", self.end_token, rule, "set the tokenizer's end token"))
        return out


def size_of(config: TextConfig) -> TransformerSize:
    """The row of `SIZES`, with what the configuration gives as a number in its place.

    Raises:
      ConfigError: no such size.
    """
    return size_by_name(SIZES, config)


class TextTransformer(nn.Module):
    """Token ids (B, T) to the normed features (B, D) of one token of each text: of its end, which saw all before it.

    What follows the end token is padding, which no token before it sees if it is causal.
    """

    config: TextConfig
    dtype: jnp.dtype = jnp.float32
    gather_params: GatherParams = no_gather

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        config, size = self.config, size_of(self.config)
        chex.assert_rank(tokens, 2)
        table = self.param("token_embed", nn.initializers.normal(0.02), (config.vocab_size, size.width), jnp.float32)
        position = self.param("pos_embed", nn.initializers.normal(0.01), (config.context, size.width), jnp.float32)
        x = (table[tokens] + position[: tokens.shape[1]]).astype(self.dtype)
        block = Block(
            size.heads, size.mlp, self.dtype, config.attention, config.norm_eps, causal=config.causal,
            activation=config.activation, matmuls=config.mlp_matmuls, parent=None,
        )  # fmt: skip
        x = scan_blocks(
            self, [block], size.depth, x, gather_params=self.gather_params, remat=config.remat,
            unroll=not config.scan_layers,
        )  # fmt: skip
        if config.pool == "end":
            end = jnp.argmax(tokens == config.end_token, 1)
            x = jnp.take_along_axis(x, end[:, None, None], axis=1)
        x = x[:, -1]
        return layer_norm(jnp.float32, "norm", epsilon=config.norm_eps)(x)


def forward_flops(config: TextConfig) -> float:
    """FLOPs of one text's forward pass: matrix products alone, two per multiply-add; attention counted whole."""
    size = size_of(config)
    T, D = config.context, size.width
    return 2.0 * size.depth * (T * (4 * D * D + 2 * D * size.mlp) + 2 * T * T * D)
