"""ViT weights in timm's names and layout, to and from our tree.

Source: timm 1.0, `VisionTransformer.state_dict()` (AugReg, DeiT-3, DINOv2, CLIP, SigLIP), and `Eva.state_dict()` as its
DINOv3 models have it. Checked against timm itself in `tests/parity`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visionfm_jax.config.limits import height_width, shortest
from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import (
    Leaf,
    Params,
    affine,
    export_tree,
    import_state,
    is_named,
    layer_norm,
    require_same,
)
from visionfm_jax.interop.resample import square_grid
from visionfm_jax.interop.vit import Form, Names, no_windows, ratio_of, require_network
from visionfm_jax.models.backbones.vit import ViTConfig, first_tokens, size_of, table_first, table_grid

_POOL = (
    Leaf("pool/probe", ("attn_pool.latent",), "table", (1, 1, "D")),
    *affine("pool/attn/query", "attn_pool.q", "linear", "D", "D"),
    *(
        leaf._replace(part=(i, 2))
        for i, ours in enumerate(("pool/attn/key", "pool/attn/value"))
        for leaf in affine(ours, "attn_pool.kv", "linear", "2D", "D")
    ),
    *affine("pool/attn/out", "attn_pool.proj", "linear", "D", "D"),
    *layer_norm("pool/norm", "attn_pool.norm"),
    *affine("pool/mlp/fc1", "attn_pool.mlp.fc1", "linear", "M", "D"),
    *affine("pool/mlp/fc2", "attn_pool.mlp.fc2", "linear", "D", "M"),
)
_NAMES = Names(
    patches="patch_embed.proj", cls_token="cls_token", registers="reg_token", table="pos_embed", norm_pre="norm_pre",
    block="blocks.{}.", ln1="norm1", qkv=("attn.qkv",), out="attn.proj", ln2="norm2",
    fc1="mlp.fc1", gate="mlp.fc1", fc2="mlp.fc2", qk_norm=("attn.q_norm", "attn.k_norm"),
    layer_scale=("ls1.gamma", "ls2.gamma"), norm="norm", head="head",
)  # fmt: skip


def form_of(config: ViTConfig) -> Form:
    """timm's network that computes `config`: with rotary positions an `Eva`, else a `VisionTransformer`."""
    if config.rope_theta:
        names = _NAMES._replace(
            layer_scale=("gamma_1", "gamma_2"), gate="mlp.fc1_g", qkv_bias=("attn.q_bias", "attn.v_bias"),
            fc1="mlp.fc1_x" if config.activation == "swiglu" else "mlp.fc1",
        )  # fmt: skip
        has = {"pool": ("cls", "norm_gap"), "pos_embed": ("none",), "qkv_bias": ("no_key", "none"),
               "activation": ("gelu", "swiglu"), "pre_norm": False}  # fmt: skip
        return Form("timm Eva", names, has)
    names = _NAMES
    if config.pool == "gap":
        names = names._replace(norm="fc_norm")  # after the mean
    if config.pool == "map":
        names = names._replace(pool=_POOL)
    has = {"pool": ("cls", "gap", "norm_gap", "map"), "pos_embed": ("patches", "class", "all"),
           "qkv_bias": ("all", "none"), "patch_bias": not config.pre_norm}  # fmt: skip
    return Form("timm ViT", names, has)


def vit_from_timm(
    state: Mapping[str, np.ndarray],
    config: ViTConfig,
    *,
    num_heads: int,
    global_pool: str,
    norm_eps: float,
    act_layer: str,
    no_embed_class: bool = False,
    rope_temperature: float = 0.0,
    skip: Sequence[str] = (),
) -> Params:
    """Our parameter tree of a timm `VisionTransformer`, or of an `Eva` as DINOv3's.

    Width, depth, patch size and classes are read off the state itself. `pool` is "gap" for timm's
    `global_pool="avg"` with an `fc_norm`, "norm_gap" without; "cls" for "token"; "map" for "map". Prefix tokens are not
    pooled (timm's `pool_include_prefix=False`). A state without a head (`num_classes=0`) gives a tree without `head`.

    Args:
      state: name to array, as `model.state_dict()` or a `.safetensors` file holds them.
      config: under which the weights will be used.
      num_heads: of timm's model, `model.blocks[0].attn.num_heads`.
      global_pool: likewise, `model.global_pool`, which `config.json` of a hub folder holds too.
      norm_eps: likewise, `model.blocks[0].norm1.eps`; timm's default is 1e-6.
      act_layer: likewise, "gelu" by default; "swiglu" for `SwiGLUPacked` and `swiglu_mlp`.
      no_embed_class: likewise, `model.no_embed_class`; needed where there are a position table and tokens before the
        patches'.
      rope_temperature: of an `Eva`, `model.rope.temperature`, 100 for DINOv3, with `rope_type="dinov3"` and
        `rope_rotate_half=True`.
      skip: names, timm's or ours, or their beginnings, that are left out of the tree; with "pool", the pooling here may
        be another.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape, all of them in one line; a model that ours cannot
        compute, or that `config` would compute otherwise.
    """
    pool = {"token": "cls", "avg": "gap" if "fc_norm.weight" in state else "norm_gap", "map": "map"}.get(global_pool)
    if pool is None or (global_pool == "token" and "cls_token" not in state):
        token = "with" if "cls_token" in state else "without"
        raise UserError(
            f'a timm ViT of global_pool="{global_pool}" {token} a class token is not supported; supported are '
            'global_pool="token", "avg" and "map"'
        )
    if "pool" in skip:
        config = dataclasses.replace(config, pool=pool)
    table = "none"
    if "pos_embed" in state:
        table = "patches" if no_embed_class else "all" if "reg_token" in state else "class"
    ours = config.pos_embed
    if (table == "patches" and ours == "class" and not config.has_class_token) or (
        "none" not in (table, ours) and not first_tokens(config)
    ):
        ours = table  # the same, for want of the tokens in which they differ
    if is_named("pos_embed", skip):
        table = ours
    require_same(
        "timm ViT",
        num_heads=(num_heads, "ViTConfig.heads", size_of(config).heads),
        global_pool=(pool, "ViTConfig.pool", config.pool, global_pool),
        norm_eps=(norm_eps, "ViTConfig.norm_eps", config.norm_eps),
        act_layer=(act_layer, "ViTConfig.activation", config.activation),
        pos_embed=(table, "ViTConfig.pos_embed", ours),
        rope_temperature=(rope_temperature, "ViTConfig.rope_theta", config.rope_theta),
        **resized("bicubic_antialias", config, state.get("pos_embed")),
    )
    form = form_of(config)
    return import_state(state, form.leaves(config, any(k.startswith("head.") for k in state)), form.what, skip)


def vit_to_timm(params: Params, config: ViTConfig) -> dict[str, np.ndarray]:
    """The timm state of our ViT tree: the inverse of `vit_from_timm`.

    Raises:
      UserError: `params` is not the tree of `config`: its missing and unknown leaves; or no network of timm's is that
        of `config`.
    """
    state = export_tree(params, form_of(config).leaves(config, "head" in params), "ViT")
    if "pos_embed" in state and 0 < (rows := table_first(config)) < (tokens := first_tokens(config)):
        table = state["pos_embed"]  # whose registers have rows there, which add nothing
        state["pos_embed"] = np.insert(table, [rows] * (tokens - rows), 0, axis=1)
    return state


# By width, timm's architecture of that name; all of it that may be another is written beside it.
_BY_WIDTH = {192: "tiny_patch16_224", 384: "small_patch16_224", 768: "base_patch16_224", 1024: "large_patch16_224",
             1280: "huge_patch14_224"}  # fmt: skip
_POOLS = {"cls": "token", "gap": "avg", "norm_gap": "avg", "map": "map"}


def vit_timm_config(config: ViTConfig) -> dict[str, Any]:
    """What timm's `config.json` says of the network of `config`: the architecture, and what differs from it.

    Raises:
      UserError: timm has no such network.
    """
    size, gated, rotary = size_of(config), config.activation == "swiglu", bool(config.rope_theta)
    wrong = form_of(config).differences(config) + no_windows(config)
    eps = (1e-5,) if rotary else (1e-6,) if gated else (1e-6, 1e-5)
    if config.norm_eps not in eps:
        wrong.append(f"ViTConfig.norm_eps = {config.norm_eps:g}, there {' or '.join(f'{e:g}' for e in eps)}")
    if rotary and not config.patch_bias:
        wrong.append("ViTConfig.patch_bias = False, there set")
    require_network("timm", wrong)
    model_args: dict[str, Any] = {
        "img_size": shortest(height_width(config.image_size)), "patch_size": config.patch_size,
        "embed_dim": size.width, "depth": size.depth, "num_heads": size.heads,
        "mlp_ratio": ratio_of(size.width, size.mlp), "class_token": config.has_class_token,
        "global_pool": _POOLS[config.pool], "qkv_bias": config.qkv_bias != "none", "qk_norm": config.qk_norm,
    }  # fmt: skip
    if rotary:
        architecture = "vit_huge_plus_patch16_dinov3" if gated else "vit_base_patch16_dinov3"
        model_args |= {"num_reg_tokens": config.registers, "rope_temperature": config.rope_theta}
        model_args |= {"init_values": config.layer_scale or None}
        model_args |= {"swiglu_align_to": 1} if gated else {}
    else:
        architecture = f"vit_{_BY_WIDTH.get(size.width, 'base_patch16_224')}"
        if config.norm_eps == 1e-5:
            architecture = "vit_base_patch16_clip_224"
        if gated:  # both halves in one
            architecture = "vit_giant_patch14_dinov2"
            model_args["mlp_ratio"] = ratio_of(size.width, 2 * size.mlp)
        else:
            model_args["act_layer"] = config.activation
        positions, tokens = table_first(config), first_tokens(config)
        model_args |= {
            "reg_tokens": config.registers, "no_embed_class": positions == 0 < tokens, "pre_norm": config.pre_norm,
            "fc_norm": config.pool == "gap", "init_values": config.layer_scale,
        }  # fmt: skip
    return {"architecture": architecture, "num_features": size.width, "global_pool": _POOLS[config.pool],
            "model_args": model_args}  # fmt: skip


def resized(how: str, config: ViTConfig, table: np.ndarray | None) -> dict[str, tuple[str, str, str]]:
    """For `require_same`: how a library takes its position table to other images, where the configuration does.

    `table`: of the state, (…, T, D).
    """
    if config.pos_embed == "none" or table is None:
        return {}
    patches, here = np.shape(table)[-2] - table_first(config), table_grid(config)
    there = square_grid(patches) or (here if patches == math.prod(here) else None)
    if there == here and height_width(config.pos_image_size or config.image_size) == height_width(config.image_size):
        return {}
    return {"resizing": (how, "ViTConfig.pos_resize", config.pos_resize)}
