"""CLIP in OpenCLIP's names, to and from our trees: both towers, their projections, scale and bias of the logits.

Source: open_clip_torch 3.3, `CLIP.state_dict()` and `CustomTextCLIP.state_dict()`, whose image tower is its own ViT (a
tower of timm's, `visual.trunk`, has timm's names). Checked against OpenCLIP itself in `tests/parity`. OpenAI's own
weights, and OpenCLIP's `-quickgelu` models, have these names too, and another activation.

Letters in shapes: D width, M hidden width of the MLP, V vocabulary, T positions, E width of the joint space.
"""

from __future__ import annotations

import re
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
    layer_norm,
    require_same,
    without_prefix,
)  # fmt: skip
from visionfm_jax.interop.timm import resized
from visionfm_jax.interop.vit import Form, Names, no_windows, ratio_of, require_network
from visionfm_jax.models.backbones import vit
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig, size_of

# The image tower, and a mask that follows from the positions, which older files hold.
_SKIPPED = re.compile(r"visual\..*|attn_mask")
_BLOCK = "transformer.resblocks.{}."
_TEXT = (
    Leaf("text/token_embed", ("token_embedding.weight",), "vector", ("V", "D")),
    Leaf("text/pos_embed", ("positional_embedding",), "vector", ("T", "D")),
    *layer_norm("text/blocks/ln1", _BLOCK + "ln_1"),
    Leaf("text/blocks/attn/qkv/kernel", (_BLOCK + "attn.in_proj_weight",), "linear", ("3D", "D")),
    Leaf("text/blocks/attn/qkv/bias", (_BLOCK + "attn.in_proj_bias",), "vector", ("3D",)),
    *affine("text/blocks/attn/out", _BLOCK + "attn.out_proj", "linear", "D", "D"),
    *layer_norm("text/blocks/ln2", _BLOCK + "ln_2"),
    *affine("text/blocks/mlp/fc1", _BLOCK + "mlp.c_fc", "linear", "M", "D"),
    *affine("text/blocks/mlp/fc2", _BLOCK + "mlp.c_proj", "linear", "D", "M"),
    *layer_norm("text/norm", "ln_final"),
    Leaf("text_projection", ("text_projection",), "vector", ("D", "E")),  # (in, out), as ours
)
_OF_LOGITS = (Leaf("scale", ("logit_scale",), "vector", ()), Leaf("bias", ("logit_bias",), "vector", ()))


# What `text_cfg` may hold beside what is compared: shapes, which the state has too, and what the tokenizer needs.
_KNOWN = {
    "context_length", "vocab_size", "width", "layers", "mlp_ratio", "heads", "pool_type", "eos_id", "pad_id", "bos_id",
    "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "tokenizer_type",
}  # fmt: skip


def text_from_open_clip(
    state: Mapping[str, np.ndarray], config: TextConfig, model_cfg: Mapping[str, Any], skip: Sequence[str] = ()
) -> Params:
    """The text part of our `Clip` tree: `text`, `text_projection`, and `scale` and `bias` where the state has them.

    Width, depth, vocabulary and positions are read off the state itself. Names may begin with
    "text.", as a `CustomTextCLIP`'s do, or not, as those of a `CLIP` or of a text tower alone; what is the image
    tower's is skipped.

    Args:
      state: name to array, as `model.state_dict()` or a `.safetensors` file holds them.
      config: under which the weights will be used.
      model_cfg: OpenCLIP's of the model, as `open_clip.get_model_config(NAME)` has it, or `open_clip_config.json`
        under that key.
      skip: names, theirs or ours, or their beginnings, that are left out of the tree.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape, all of them in one line; a model that ours cannot
        compute, or that `config` would compute otherwise.
    """
    what, theirs = "OpenCLIP text tower", model_cfg["text_cfg"]
    if other := sorted(key for key, value in theirs.items() if key not in _KNOWN and value):
        raise UserError(
            f"the {what} has {', '.join(other)} in its text_cfg, which ours cannot compute; use another model"
        )
    pool = theirs.get("pool_type", "argmax")  # of "argmax", the end token is the largest id
    end = theirs.get("eos_id") if pool == "eos" else config.vocab_size - 1
    require_same(
        what,
        quick_gelu=(
            "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
            "TextConfig.activation",
            config.activation,
        ),
        heads=(theirs.get("heads", 8), "TextConfig.heads", size_of(config).heads),
        norm_eps=(1e-5, "TextConfig.norm_eps", config.norm_eps),
        causal=(True, "TextConfig.causal", config.causal),
        pooling=("end", "TextConfig.pool", config.pool),
        pool_type=(pool, "this project's text tower", pool if pool in ("argmax", "eos") else "argmax"),
        end_token=(end, "TextConfig.end_token", config.end_token),
    )
    state = without_prefix(state, "text.")
    state = {name: value for name, value in state.items() if not _SKIPPED.fullmatch(name)}
    leaves = _TEXT + tuple(leaf for leaf in _OF_LOGITS if leaf.theirs[0] in state)
    return import_state(state, leaves, what, skip)


def text_to_open_clip(params: Params) -> dict[str, np.ndarray]:
    """The state, in the names of OpenCLIP's `CLIP`, of the text part of a `Clip` tree; its image part is left out.

    Raises:
      UserError: `params` has no text tower, or one that is not ours.
    """
    params = {name: value for name, value in params.items() if not name.startswith("image")}
    leaves = _TEXT + tuple(leaf for leaf in _OF_LOGITS if leaf.ours in params)
    return export_tree(params, leaves, "CLIP text")


VISUAL = Names(
    patches="conv1", cls_token="class_embedding", token_kind="vector", table="positional_embedding",
    table_kind="vector", norm_pre="ln_pre", block="transformer.resblocks.{}.", ln1="ln_1", qkv=("attn.in_proj",),
    out="attn.out_proj", ln2="ln_2", fc1="mlp.c_fc", fc2="mlp.c_proj", layer_scale=("ls_1.gamma", "ls_2.gamma"),
    norm="ln_post",
)  # fmt: skip
_OF_VISUAL: dict[str, Any] = {  # fields of `ViTConfig` that the tower can have (`Form.has`)
    "pool": ("cls",), "pos_embed": ("class",), "registers": False, "rope_theta": False, "patch_bias": False,
    "qkv_bias": ("all",), "qk_norm": False, "activation": ("gelu", "quick_gelu"),
}  # fmt: skip
# What `vision_cfg` may hold beside what is compared: shapes, which the state has too, and what is of training alone.
_KNOWN_VISUAL = {
    "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio", "patch_dropout", "ls_init_value",
    "no_ln_pre", "pool_type", "pos_embed_type",
}  # fmt: skip


def _visual_form() -> Form:
    return Form("OpenCLIP image tower", VISUAL, _OF_VISUAL)


def _visual_leaves(config: ViTConfig, projected: bool) -> tuple[Leaf, ...]:
    leaves = _visual_form().leaves(config, False)
    packed = {"attn.in_proj.weight": "attn.in_proj_weight", "attn.in_proj.bias": "attn.in_proj_bias"}

    def named(name: str) -> str:
        for ours, theirs in packed.items():
            name = name.replace(ours, theirs)
        return f"visual.{name}"

    leaves = tuple(leaf._replace(theirs=tuple(map(named, leaf.theirs))) for leaf in leaves)
    return leaves + ((Leaf("projection", ("visual.proj",), "vector", ("D", "E")),) if projected else ())


def visual_from_open_clip(
    state: Mapping[str, np.ndarray], config: ViTConfig, model_cfg: Mapping[str, Any], skip: Sequence[str] = ()
) -> Params:
    """Our tree of an OpenCLIP ViT, and in it `projection` (D, E), where the state has it, which is `Clip`'s.

    Args:
      state: name to array; names that begin with "visual." are taken.
      config: under which the weights will be used.
      model_cfg: as for `text_from_open_clip`.
      skip: likewise.

    Raises:
      UserError: as `text_from_open_clip`.
    """
    what, theirs = "OpenCLIP image tower", model_cfg["vision_cfg"]
    if other := sorted(key for key, value in theirs.items() if key not in _KNOWN_VISUAL and value):
        raise UserError(f"the {what} has {', '.join(other)} in its vision_cfg, which ours cannot compute; use another")
    state = {name: value for name, value in state.items() if name.startswith("visual.")}
    width, head = theirs.get("width", 768), theirs.get("head_width", 64)
    require_same(
        what,
        head_width=(head, "ViTConfig.width / ViTConfig.heads", width / vit.size_of(config).heads),
        pool_type=({"tok": "cls"}.get(theirs.get("pool_type", "tok")), "ViTConfig.pool", config.pool),
        quick_gelu=(
            "quick_gelu" if model_cfg.get("quick_gelu") else "gelu", "ViTConfig.activation", config.activation
        ),
        norm_eps=(1e-5, "ViTConfig.norm_eps", config.norm_eps),
        **resized("bicubic_antialias", config, state.get("visual.positional_embedding")),
    )  # fmt: skip
    return import_state(state, _visual_leaves(config, "visual.proj" in state), what, skip)


def visual_to_open_clip(params: Params, config: ViTConfig) -> dict[str, np.ndarray]:
    """The state of an OpenCLIP image tower: the inverse of `visual_from_open_clip`.

    Raises:
      UserError: `params` is not the tree of `config`, or OpenCLIP's ViT cannot be that.
    """
    return export_tree(params, _visual_leaves(config, "projection" in params), "ViT")


def clip_open_clip_config(config: ClipConfig, sigmoid: bool) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` of the network of `config`, of an image tower that is a ViT.

    Args:
      config: of the model.
      sigmoid: the logits have a bias, as those of the sigmoid loss do.

    Raises:
      UserError: OpenCLIP has no such network.
    """
    image, text = config.image, config.text
    if not isinstance(image, ViTConfig):
        require_network("OpenCLIP", [f"ClipConfig.image is a {type(image).__name__}, there a ViT"])
    wrong = _visual_form().differences(image) + no_windows(image)
    for name, wanted in {"image_projection": True, "text_bias": False}.items():
        if getattr(config, name) != wanted:
            wrong.append(f"ClipConfig.{name} = {not wanted}, there {wanted}")
    for name, wanted in {"pool": "end", "causal": True, "activation": image.activation}.items():
        if getattr(text, name) != wanted:
            wrong.append(f"TextConfig.{name} = {getattr(text, name)!r}, there {wanted!r}")
    for tower in (image, text):
        if tower.norm_eps != 1e-5:
            wrong.append(f"{type(tower).__name__}.norm_eps = {tower.norm_eps:g}, there 1e-05")
    require_network("OpenCLIP", wrong)
    size, of_text = vit.size_of(image), size_of(text)
    vision_cfg = {
        "image_size": shortest(height_width(image.image_size)), "layers": size.depth, "width": size.width,
        "head_width": size.width // size.heads, "mlp_ratio": ratio_of(size.width, size.mlp),
        "patch_size": image.patch_size, "no_ln_pre": not image.pre_norm,
        "ls_init_value": image.layer_scale or None,
    }  # fmt: skip
    text_cfg = {
        "context_length": text.context, "vocab_size": text.vocab_size, "width": of_text.width, "heads": of_text.heads,
        "layers": of_text.depth, "mlp_ratio": ratio_of(of_text.width, of_text.mlp),
    }  # fmt: skip
    if text.end_token != text.vocab_size - 1:  # else that of the largest id
        text_cfg |= {"pool_type": "eos", "eos_id": text.end_token}
    out = {"embed_dim": config.embed_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    out |= {"quick_gelu": True} if image.activation == "quick_gelu" else {}
    return out | ({"init_logit_bias": -10.0} if sigmoid else {})
