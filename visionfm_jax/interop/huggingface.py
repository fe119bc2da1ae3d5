"""ViT weights in the names of Hugging Face transformers, to and from our tree.

Source: `ViTModel`, `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`, `CLIPVisionModel`, `SiglipVisionModel`,
`Siglip2VisionModel` and their classifiers as `save_pretrained` writes them, the same names in transformers 4 and 5. (A
live `state_dict()` of transformers 5 has other names; no file has them.) Checked against transformers itself in
`tests/parity`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
from visionfm_jax.interop.vit import Form, Names, no_windows, only_square, require_network
from visionfm_jax.models.backbones.vit import ViTConfig, size_of

_VIT = Names(
    patches="embeddings.patch_embeddings.projection", cls_token="embeddings.cls_token",
    table="embeddings.position_embeddings", block="encoder.layer.{}.", ln1="layernorm_before",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    out="attention.output.dense", ln2="layernorm_after", fc1="intermediate.dense", fc2="output.dense",
    norm="layernorm", head="classifier",
)  # fmt: skip
_LAYER_SCALE = ("layer_scale1.lambda1", "layer_scale2.lambda1")
_DINOV2 = _VIT._replace(
    ln1="norm1", ln2="norm2", fc1="mlp.fc1", fc2="mlp.fc2", layer_scale=_LAYER_SCALE,
    registers="embeddings.register_tokens",
)  # fmt: skip
_SWIGLU = {"fc1": "mlp.weights_in", "gate": "mlp.weights_in", "fc2": "mlp.weights_out"}  # of DINOv2
_DINOV3 = Names(
    patches="embeddings.patch_embeddings", cls_token="embeddings.cls_token", registers="embeddings.register_tokens",
    block="layer.{}.", ln1="norm1", qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    out="attention.o_proj", ln2="norm2", gate="mlp.gate_proj", fc1="mlp.up_proj", fc2="mlp.down_proj",
    layer_scale=_LAYER_SCALE, norm="norm",
)  # fmt: skip
_CLIP = Names(
    patches="embeddings.patch_embedding", cls_token="embeddings.class_embedding", token_kind="vector",
    table="embeddings.position_embedding.weight", table_kind="vector", norm_pre="pre_layrnorm",
    block="encoder.layers.{}.", ln1="layer_norm1", qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj", ln2="layer_norm2", fc1="mlp.fc1", fc2="mlp.fc2", norm="post_layernorm",
)  # fmt: skip
_PROJECTIONS = ("query", "key", "value")
_SIGLIP = _CLIP._replace(
    pool=(
        Leaf("pool/probe", ("head.probe",), "table", (1, 1, "D")),
        *(
            Leaf(f"pool/attn/{name}/kernel", ("head.attention.in_proj_weight",), "linear", ("3D", "D"), (i, 3))
            for i, name in enumerate(_PROJECTIONS)
        ),
        *(
            Leaf(f"pool/attn/{name}/bias", ("head.attention.in_proj_bias",), "vector", ("3D",), (i, 3))
            for i, name in enumerate(_PROJECTIONS)
        ),
        *affine("pool/attn/out", "head.attention.out_proj", "linear", "D", "D"),
        *layer_norm("pool/norm", "head.layernorm"),
        *affine("pool/mlp/fc1", "head.mlp.fc1", "linear", "M", "D"),
        *affine("pool/mlp/fc2", "head.mlp.fc2", "linear", "D", "M"),
    )
)
# Fields of `ViTConfig` that a network can have (`Form.has`).
_PLAIN: dict[str, Any] = {
    "pool": ("cls",), "pos_embed": ("class",), "registers": False, "rope_theta": False, "patch_bias": True,
    "pre_norm": False, "qkv_bias": ("all", "none"), "qk_norm": False, "layer_scale": False,
    "activation": ("gelu", "gelu_tanh", "quick_gelu"),
}  # fmt: skip
_OF_DINO = {"layer_scale": True, "activation": ("gelu", "gelu_tanh", "quick_gelu", "swiglu")}
_OF_DINOV2 = _PLAIN | _OF_DINO | {"pool": ("cls", "cls_gap")}
_OF_SIGLIP = _PLAIN | {"pool": ("map",), "pos_embed": ("patches", "class"), "class_token": False, "qkv_bias": ("all",)}


class _Model(NamedTuple):
    """One of transformers' ViTs."""

    names: Names
    prefix: str  # of its names in a larger model
    resizes: str  # its position table: `ViTConfig.pos_resize`
    has: dict[str, Any]


_MODELS = {
    "vit": _Model(_VIT, "vit.", "bicubic", _PLAIN),
    "dinov2": _Model(_DINOV2, "dinov2.", "bicubic", _OF_DINOV2),
    "dinov2_with_registers": _Model(
        _DINOV2, "dinov2_with_registers.", "bicubic_antialias", _OF_DINOV2 | {"registers": True}
    ),
    "dinov3_vit": _Model(
        _DINOV3, "", "", {k: v for k, v in (_PLAIN | _OF_DINO).items() if k != "registers"}
        | {"pos_embed": ("none",), "rope_theta": True, "qkv_bias": ("all", "no_key", "none")},
    ),
    "clip_vision_model": _Model(
        _CLIP, "vision_model.", "bicubic", _PLAIN | {"patch_bias": False, "pre_norm": True, "qkv_bias": ("all",)}
    ),
    "siglip_vision_model": _Model(_SIGLIP, "vision_model.", "bicubic", _OF_SIGLIP),
    "siglip2_vision_model": _Model(
        _SIGLIP._replace(patch_kind="linear"), "vision_model.", "bilinear_antialias", _OF_SIGLIP
    ),
}  # fmt: skip

# `hidden_act` to ours.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip
# Not of the network that makes features: a pooler that classification does not use, what hides patches in training,
# the text side and the joint space of two towers.
_SKIPPED = ("pooler.", "embeddings.mask_token", "embeddings.position_ids", "text_model.", "text_projection.",
            "visual_projection.", "logit_scale", "logit_bias")  # fmt: skip


def _model(model_type: str) -> _Model:
    """The network of a `model_type`.

    Raises:
      UserError: there is none.
    """
    if model_type not in _MODELS:
        raise UserError(f"model_type = {model_type!r} is none of the ViTs known here: {', '.join(_MODELS)}; use one")
    return _MODELS[model_type]


def names_of(theirs: Mapping[str, Any]) -> tuple[Names, Mapping[str, Any], str]:
    """The names of the ViT of a `config.json`, what of our fields it can have, and what its names may begin with."""
    model = _model(setting(theirs, "model_type"))
    gated = theirs.get("use_swiglu_ffn", False) and model.names is _DINOV2
    return model.names._replace(**_SWIGLU) if gated else model.names, model.has, model.prefix


def _form(model_type: str, config: ViTConfig) -> Form:
    model = _model(model_type)
    gated = config.activation == "swiglu" and model.names is _DINOV2
    names = model.names._replace(**_SWIGLU) if gated else model.names
    return Form(f"Hugging Face {model_type}", names, model.has)


def vit_from_huggingface(
    state: Mapping[str, np.ndarray], config: ViTConfig, theirs: Mapping[str, Any], skip: Sequence[str] = ()
) -> Params:
    """Our parameter tree of a Hugging Face ViT, of which `model_type` says which.

    A model without classifier gives a tree without `head`. Of a model of two towers, whose `config.json` has a
    `vision_config`, the image tower is taken. What plays no part in its features is left out: the tanh pooler of
    `ViTModel`, mask tokens.

    Args:
      state: name to array, as `model.safetensors` holds them.
      config: under which the weights will be used.
      theirs: what `config.json` beside the weights holds, or, where that leaves out defaults, transformers'
        `AutoConfig.from_pretrained(…).to_dict()`.
      skip: names, theirs without prefix or ours, or their beginnings, that are left out of the tree; with "pool", the
        pooling here may be another.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape, all of them in one line; a model that ours cannot
        compute, or that `config` would compute otherwise.
    """
    theirs = theirs.get("vision_config", theirs)
    model = _model(setting(theirs, "model_type"))
    state = without_prefix({k: v for k, v in state.items() if not is_left_out(k, theirs)}, model.prefix)
    head = any(k.startswith("classifier.") for k in state)
    heads, eps = (setting(theirs, key) for key in ("num_attention_heads", "layer_norm_eps"))
    activation = setting(theirs, "hidden_act")
    gated = theirs.get("use_swiglu_ffn", False) or (theirs.get("use_gated_mlp", False) and activation == "silu")
    pool = "cls_gap" if head and "cls_gap" in model.has["pool"] else model.has["pool"][0]
    if "pool" in skip:
        config = dataclasses.replace(config, pool=pool)
    form = _form(theirs["model_type"], config)
    theta = setting(theirs, "rope_theta") if model.has["rope_theta"] else 0.0
    require_same(
        form.what,
        num_attention_heads=(heads, "ViTConfig.heads", size_of(config).heads),
        pooling=(pool, "ViTConfig.pool", config.pool),
        layer_norm_eps=(eps, "ViTConfig.norm_eps", config.norm_eps),
        hidden_act=(
            "swiglu" if gated else ACTIVATIONS.get(activation, activation), "ViTConfig.activation", config.activation,
        ),
        rope_theta=(theta, "ViTConfig.rope_theta", config.rope_theta),
        **resized(model.resizes, config, state.get(model.names.table)),
    )  # fmt: skip
    return import_state(state, form.leaves(config, head), form.what, skip)


def is_left_out(name: str, theirs: Mapping[str, Any]) -> bool:
    """Whether a tensor of the file is none of the network that makes features; `theirs` is its `config.json`."""
    model_type = theirs.get("vision_config", theirs).get("model_type")
    return name.removeprefix(_model(model_type).prefix).startswith(_SKIPPED)


def setting(theirs: Mapping[str, Any], key: str) -> Any:
    """A value of a Hugging Face `config.json`.

    Raises:
      UserError: it is missing: the default may have been another in the version that wrote the file.
    """
    if key not in theirs:
        raise UserError(
            f"the Hugging Face configuration lacks {key!r}; give all that config.json beside the weights holds, or "
            "AutoConfig.from_pretrained(…).to_dict(), which has the defaults too"
        )
    return theirs[key]


def vit_to_huggingface(params: Params, config: ViTConfig, model_type: str = "vit") -> dict[str, np.ndarray]:
    """The state of a model of `model_type` for our ViT tree: the inverse of `vit_from_huggingface`.

    Raises:
      UserError: `params` is not the tree of `config`, or that model is another network.
    """
    state = export_tree(params, _form(model_type, config).leaves(config, "head" in params), "ViT")
    prefix = _model(model_type).prefix
    return {k if k.startswith("classifier.") else f"{prefix}{k}": v for k, v in state.items()}


# Those that a run is written as, the first that computes its network, and their classes without and with a classifier.
_CLASSES = {
    "vit": ("ViTModel", "ViTForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", ""),
    "clip_vision_model": ("CLIPVisionModel", ""),
    "siglip_vision_model": ("SiglipVisionModel", ""),
}
HIDDEN_ACT = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "swiglu": "silu"}


def vit_huggingface_config(config: ViTConfig, head: bool) -> dict[str, Any]:
    """The `config.json` of transformers' first ViT that computes `config`, with or without a classifier.

    Raises:
      UserError: there is none; the line is about the one that is nearest.
    """
    wrong = {model_type: vit_differences(model_type, config, head) for model_type in _CLASSES}
    model_type = min(wrong, key=lambda name: len(wrong[name]))
    require_network(f"transformers ({model_type} is nearest)", wrong[model_type])
    return {"architectures": [_CLASSES[model_type][head]], **vit_settings(model_type, config)}


def vit_differences(model_type: str, config: ViTConfig, head: bool) -> list[str]:
    """What stands in the way of a `model_type`."""
    wrong = _form(model_type, config).differences(config) + no_windows(config)
    if head and not _CLASSES[model_type][1]:
        wrong.append("ClassificationConfig.num_classes is set, there no classifier")
    if model_type.startswith("dinov2"):
        if config.pool in ("cls", "cls_gap") and head != (config.pool == "cls_gap"):
            which = "cls_gap under a classifier" if head else "cls without a classifier"
            wrong.append(f"ViTConfig.pool = {config.pool!r}, there {which}")
        if _dinov2_ratio(config) is None:
            wrong.append(f"ViTConfig.mlp = {size_of(config).mlp}, there of a whole mlp_ratio")
    if model_type != "vit" and not config.rope_theta:
        wrong += only_square(config.image_size)
    return wrong


def _dinov2_ratio(config: ViTConfig) -> int | None:
    """The `mlp_ratio`, a whole number; None: there is none. Of SwiGLU two thirds are kept, in eights."""
    size = size_of(config)
    if config.activation != "swiglu":
        return size.mlp // size.width if size.mlp % size.width == 0 else None
    about = round(size.mlp * 1.5 / size.width)
    fits = (n for n in (about - 1, about, about + 1) if (int(size.width * n * 2 / 3) + 7) // 8 * 8 == size.mlp)
    return next(fits, None)


def vit_settings(model_type: str, config: ViTConfig) -> dict[str, Any]:
    """What a `config.json` says of a network that is a `model_type`."""
    size, gated = size_of(config), config.activation == "swiglu"
    own: dict[str, Any] = {
        "model_type": model_type, "hidden_size": size.width, "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads, "hidden_act": HIDDEN_ACT[config.activation],
        "layer_norm_eps": config.norm_eps, "patch_size": config.patch_size, "num_channels": 3,
        "image_size": shortest(height_width(config.image_size)),
    }  # fmt: skip
    if model_type.startswith("dinov2"):
        own |= {"hidden_act": "gelu"} if gated else {}
        own |= {"mlp_ratio": _dinov2_ratio(config), "use_swiglu_ffn": gated, "qkv_bias": config.qkv_bias != "none"}
        own |= {"layerscale_value": config.layer_scale}
        own |= {"num_register_tokens": config.registers} if config.registers else {"use_mask_token": False}
    elif model_type == "dinov3_vit":
        biased = config.qkv_bias != "none"
        own |= {
            "intermediate_size": size.mlp, "use_gated_mlp": gated, "rope_theta": config.rope_theta,
            "query_bias": biased, "key_bias": config.qkv_bias == "all", "value_bias": biased, "proj_bias": True,
            "mlp_bias": True, "layerscale_value": config.layer_scale, "num_register_tokens": config.registers,
        }  # fmt: skip
    else:
        own |= {"intermediate_size": size.mlp}
        own |= {"qkv_bias": config.qkv_bias != "none"} if model_type == "vit" else {}
    return own
