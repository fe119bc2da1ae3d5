"""Optax's AdamW (Loshchilov & Hutter 2019), with the masks a recipe asks for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from visionfm_jax.config import OptimConfig
from visionfm_jax.parallel.zero import is_scanned, matrix_rank


def schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update i: linear from 0 to `lr` over the warm-up, then cosine to `final_lr` at the end."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.lr,
        peak_value=config.lr,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.final_lr,
    )


# Not decayed whatever their shape: tables, tokens and vectors that are added or looked up by a query, not multiplied,
# and all below "bias", which in SwinV2 is also a network: as in the authors' lists (`no_weight_decay` of timm's ViT and
# of Swin-Transformer, where it is `cpb_mlp`; the kernels alone in big_vision, whose attention pooling has the probe).
_NOT_DECAYED = {"bias", "pos_embed", "probe", "registers"}
_ABOVE_BLOCKS = {"norm", "pool", "head"}  # of a ViT


def decay_mask(params: Any) -> Any:
    """True for parameters under weight decay: matrices, but for position tables and biases, probes and registers."""

    def decays(path: tuple, leaf: Any) -> bool:
        return matrix_rank(path, leaf) >= 2 and _NOT_DECAYED.isdisjoint(key.key for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, decay: float) -> Any:
    """Learning-rate factors by depth (BEiT, Bao et al. 2022): decay^(layers between a parameter and the head).

    The embedding is below all L layers and gets decay^(L+1), layer i (from 0) decay^(L-i), norm, pool and head 1.
    A scanned parameter's factor has shape (L, 1, …).
    """

    def scale(path: tuple, leaf: Any) -> jax.Array:
        if is_scanned(path):
            L = leaf.shape[0]
            return (decay ** jnp.arange(L, 0, -1.0)).reshape(L, *(1,) * (leaf.ndim - 1))
        return jnp.asarray(1.0 if path[0].key in _ABOVE_BLOCKS else decay ** (depth + 1))

    flat = jax.tree_util.tree_leaves_with_path(params)
    depth = max((leaf.shape[0] for path, leaf in flat if is_scanned(path)), default=0)
    return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(config: OptimConfig, total_steps: int) -> optax.GradientTransformation:
    """`optax.adamw` with fp32 moments, after clipping by the global norm; then factors by depth."""
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(
        optax.adamw(
            schedule(config, total_steps), config.b1, config.b2, config.eps,
            mu_dtype=jnp.float32, weight_decay=config.weight_decay, mask=decay_mask,
        )
    )  # fmt: skip
    if config.layer_decay < 1:
        parts.append(
            optax.stateless(
                lambda updates, params: jax.tree.map(jnp.multiply, updates, layer_scales(params, config.layer_decay))
            )
        )
    return optax.chain(*parts)


def update_count(opt_state: Any) -> jax.Array:
    """How many updates have been applied: the schedule's own count."""
    return optax.tree.get(opt_state, "ScaleByScheduleState").count
