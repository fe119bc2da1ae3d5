"""Optax's AdamW (Loshchilov & Hutter 2019), with the masks a recipe asks for."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from visionfm_jax.config import OptimConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.parallel.zero import SCANNED, is_scanned, matrix_rank


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
HEAD = "head"  # whose layers, if it has some, all get factor 1
_ABOVE_BLOCKS = {"norm", "pool", HEAD, "vocabulary", "image_head", "patch_head"}  # of a network
_STAGE, _MERGING = re.compile(r"stage(\d+)"), re.compile(r"merging(\d+)")


def decay_mask(params: Any) -> Any:
    """True for parameters under weight decay: matrices, but for position tables and biases, probes and registers."""

    def decays(path: tuple, leaf: Any) -> bool:
        return matrix_rank(path, leaf) >= 2 and _NOT_DECAYED.isdisjoint(key.key for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


def layer_scales(params: Any, decay: float) -> Any:
    """Learning-rate factors by depth (BEiT, Bao et al. 2022): decay^(layers between a parameter and the head).

    Of each network by itself: the embedding is below all L layers and gets decay^(L+1), layer i (from 0) decay^(L-i),
    norm, pool and head 1. The layers of stages (`stage0`, …) are numbered through, and the map that leads to a stage
    counts with its first layer. What belongs to no network, as projections and the scale of logits, gets 1.
    A scanned parameter's factor has shape (L, 1, …).

    Raises:
      ConfigError: there is no network of such names.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    networks: dict[tuple[str, ...], dict[int, dict[int, int]]] = {}  # path: stage: number in its group: layers
    for path, leaf in flat:
        if place := _place(path):
            network, stage, number = place
            networks.setdefault(network, {}).setdefault(stage, {})[number] = leaf.shape[0]
    if not networks:
        raise ConfigError(
            f"config.optim.layer_decay = {decay}: needs layers that are scanned, below the name {SCANNED}, and "
            "this model has none; set it to 1"
        )
    starts = {}  # (network, stage): its first layer; the stage after the last: all layers
    for network, stages in networks.items():
        total = 0
        for stage in sorted(stages):
            starts[network, stage] = total
            total += sum(stages[stage].values())
        starts[network, -1] = total

    def scale(path: tuple, leaf: Any) -> jax.Array:
        if place := _place(path):
            network, stage, number = place
            first, group = starts[network, stage] + number, len(networks[network][stage])
            layers = first + group * jnp.arange(leaf.shape[0], dtype=jnp.float32)
            return (decay ** (starts[network, -1] - layers)).reshape(-1, *(1,) * (leaf.ndim - 1))
        keys = tuple(key.key for key in path)
        network = max((n for n in networks if keys[: len(n)] == n), key=len, default=None)
        if network is None or keys[len(network)] in _ABOVE_BLOCKS:
            return jnp.asarray(1.0)
        if merging := _MERGING.fullmatch(keys[len(network)]):
            return jnp.asarray(decay ** (starts[network, -1] - starts[network, int(merging[1]) + 1]))
        return jnp.asarray(decay ** (starts[network, -1] + 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def _place(path: tuple) -> tuple[tuple[str, ...], int, int] | None:
    """Of a scanned parameter: its network, the stage, and its number in the group that is scanned; else None."""
    keys = tuple(key.key for key in path)
    if not is_scanned(path) or HEAD in keys[: keys.index(SCANNED)]:
        return None
    at = keys.index(SCANNED)
    number = int(keys[at + 1]) if keys[at + 1].isdigit() else 0
    stage = _STAGE.fullmatch(keys[at - 1]) if at else None
    return (keys[: at - 1], int(stage[1]), number) if stage else (keys[:at], 0, number)


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
