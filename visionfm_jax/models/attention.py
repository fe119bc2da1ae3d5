"""Scaled dot-product attention by JAX's own kernels, of all tokens or of those of a window.

Shapes: B batch, T tokens that ask, S tokens that are looked at, N heads, K head dim, h w patches of a map.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from visionfm_jax.config.limits import HeightWidth


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    causal: bool = False,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q kᵀ + bias) v with fp32 logits and softmax (Vaswani et al. 2017).

    Args:
      q: (B, T, N, K).
      k, v: (B, S, N, K).
      implementation: "xla", anywhere; or "cudnn", fused on NVIDIA GPUs, for 16-bit inputs. cuDNN's training
        kernel takes even lengths only: an odd T or S is lengthened by one token that no query sees. "auto" is xla
        here: who runs a network on a GPU has replaced it before (`train.fused_attention`).
      bias: (1, N, T, S), fp32; cuDNN takes it in the dtype of q.
      scale: None: 1 / √K.
      causal: a token sees itself and those before it.
      lengths: (B,), at least 1: only the first of the S tokens are seen; None: all.
      mask: (B, 1, T, S) bool, which tokens see which, for xla alone; None: all see all.

    Returns:
      (B, T, N, K) in the dtype of q.
    """
    T, S = q.shape[1], k.shape[1]
    implementation = "xla" if implementation == "auto" else implementation
    lengths = None if lengths is None else lengths.astype(jnp.int32)  # 64 bits, where a program has switched those on
    if implementation == "xla":
        attend = functools.partial(
            _plain, mask=mask, scale=q.shape[-1] ** -0.5 if scale is None else scale, causal=causal, lengths=lengths
        )
        if q.dtype == jnp.float16 and 1 in (T, S):
            # XLA's GPU compiler turns a product with a vector into sums, and refuses those of fp16 in fp32.
            y = _widened(attend, q, k, v, bias)
        elif q.dtype == jnp.float16:
            # XLA's CPU compiler has no products of fp16 that add up in fp32.
            y = jax.lax.platform_dependent(q, k, v, bias, cpu=functools.partial(_widened, attend), default=attend)
        else:
            y = attend(q, k, v, bias)
        return checkpoint_name(y, "attention")  # `models.layers` says what is done with it
    attend = functools.partial(
        jax.nn.dot_product_attention, mask=mask, scale=scale, is_causal=causal, implementation=implementation
    )
    bias = None if bias is None else bias.astype(q.dtype)
    if T % 2 == 0 and S % 2 == 0 and lengths is None:
        return attend(q, k, v, bias)
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q, k, v))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, T % 2), (0, S % 2)))
    zeros = 0 * q[:, 0, 0, 0].astype(jnp.int32)  # of q, as jax 0.10's rule for vmap wants lengths batched like it
    lengths = zeros + (S if lengths is None else lengths)
    return attend(q, k, v, bias, query_seq_lengths=zeros + T, key_value_seq_lengths=lengths)[:, :T]


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    *,
    mask: jax.Array | None,
    scale: float,
    causal: bool,
    lengths: jax.Array | None,
) -> jax.Array:
    """`attention` as two products of matrices, one for each sample and head.

    `jax.nn.dot_product_attention` leaves the heads in the middle and has one more dim, of heads that share keys, for
    which XLA's CPU compiler copies logits and weights: a step of attention takes it half as long again.
    """
    T, S, dtype = q.shape[1], k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    # Of 16 bits by name, or else the backward pass multiplies fp32 gradients of logits with fp32 copies of q and k.
    algorithms = jax.lax.DotAlgorithmPreset
    precision = {"bfloat16": algorithms.BF16_BF16_F32, "float16": algorithms.F16_F16_F32}.get(q.dtype.name)
    logits = scale * jnp.einsum("bntk,bnsk->bnts", q, k, precision=precision, preferred_element_type=dtype)
    logits = logits if bias is None else logits + bias
    seen = [] if mask is None else [mask]
    seen += [jnp.tril(jnp.ones((T, S), bool))] if causal else []
    seen += [] if lengths is None else [jnp.arange(S) < lengths[:, None, None, None]]
    if seen:
        logits = jnp.where(functools.reduce(jnp.logical_and, seen), logits, 0.7 * jnp.finfo(dtype).min)
    weights = jax.nn.softmax(logits).astype(v.dtype)
    return jnp.einsum("bnts,bnsk->bntk", weights, v).swapaxes(1, 2)


def windowed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str, *, grid: HeightWidth, window: int
) -> jax.Array:
    """As `attention`, of patches to those of their own window (Li et al. 2022, "ViTDet").

    Windows are cut from the upper left. ViTDet pads the map to whole ones; here those at the lower and right edges are
    smaller, which is the same as if the padding were masked, and costs nothing. Tokens before the patches, as the class
    token, are part of every window, and attend to all tokens.

    Args:
      q, k, v: (B, T, N, K), of which the last h w tokens are patches.
      implementation: as `attention`.
      grid: (h, w).
      window: patches of a side.

    Returns:
      (B, T, N, K).
    """
    first = q.shape[1] - grid[0] * grid[1]
    maps = [rearrange(a[:, first:], "b (h w) n k -> b h w n k", h=grid[0]) for a in (q, k, v)]
    rows = []
    for top, bottom, height in _bands(grid[0], window):
        row = []
        for left, right, width in _bands(grid[1], window):
            cut = {"r": (bottom - top) // height, "c": (right - left) // width, "h": height, "w": width}
            queries, *others = (
                rearrange(a[:, top:bottom, left:right], "b (r h) (c w) n k -> (b r c) (h w) n k", **cut) for a in maps
            )
            if first:
                own = (jnp.repeat(a[:, :first], cut["r"] * cut["c"], axis=0) for a in (k, v))
                others = [jnp.concatenate(pair, axis=1) for pair in zip(own, others, strict=True)]
            y = attention(queries, *others, implementation)
            row.append(rearrange(y, "(b r c) (h w) n k -> b (r h) (c w) n k", **cut))
        rows.append(jnp.concatenate(row, axis=2))
    y = rearrange(jnp.concatenate(rows, axis=1), "b h w n k -> b (h w) n k")
    return jnp.concatenate([attention(q[:, :first], k, v, implementation), y], axis=1) if first else y


def window_pairs(grid: HeightWidth, window: int) -> int:
    """Pairs of patches that attend to each other in the windows of a map (h, w)."""
    rows, columns = (sum((end - start) * side for start, end, side in _bands(length, window)) for length in grid)
    return rows * columns


def _bands(length: int, window: int) -> list[tuple[int, int, int]]:
    """A side cut into windows: where those of one length start and end, and that length; whole ones, then the rest."""
    whole, rest = length - length % window, length % window
    return [band for band in ((0, whole, window), (whole, length, rest)) if band[0] < band[1]]


def _widened(attend: Callable[..., jax.Array], *inputs: jax.Array | None) -> jax.Array:
    """`attend` in fp32, its result in the dtype of the first input."""
    return attend(*(a if a is None else a.astype(jnp.float32) for a in inputs)).astype(inputs[0].dtype)
