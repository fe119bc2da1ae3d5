"""CLIP and SigLIP in the names of Hugging Face transformers, to and from our `Clip` trees: towers and what joins them.

Source: `CLIPModel` and `SiglipModel` (also of SigLIP 2 but for NaFlex) as `save_pretrained` writes them. Checked
against transformers itself in `tests/parity`.

Letters in shapes: D width, M hidden width of the MLP, V vocabulary, T positions, E width of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import (
    ACTIVATIONS,
    HIDDEN_ACT,
    setting,
    vit_differences,
    vit_from_huggingface,
    vit_settings,
    vit_to_huggingface,
)
from visionfm_jax.interop.leaves import Leaf, Params, affine, export_tree, import_state, layer_norm, require_same
from visionfm_jax.interop.vit import require_network
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import size_of

_BLOCK = "text_model.encoder.layers.{}."
_TEXT = (
    Leaf("text/token_embed", ("text_model.embeddings.token_embedding.weight",), "vector", ("V", "D")),
    Leaf("text/pos_embed", ("text_model.embeddings.position_embedding.weight",), "vector", ("T", "D")),
    *layer_norm("text/blocks/ln1", f"{_BLOCK}layer_norm1"),
    *affine("text/blocks/attn/qkv", " ".join(f"{_BLOCK}self_attn.{p}_proj" for p in "qkv"), "linear", "D", "D"),
    *affine("text/blocks/attn/out", f"{_BLOCK}self_attn.out_proj", "linear", "D", "D"),
    *layer_norm("text/blocks/ln2", f"{_BLOCK}layer_norm2"),
    *affine("text/blocks/mlp/fc1", f"{_BLOCK}mlp.fc1", "linear", "M", "D"),
    *affine("text/blocks/mlp/fc2", f"{_BLOCK}mlp.fc2", "linear", "D", "M"),
    *layer_norm("text/norm", "text_model.final_layer_norm"),
)


class _Form(NamedTuple):
    """One of transformers' models of two towers."""

    vision: str  # `model_type` of its image tower
    joint: tuple[Leaf, ...]
    fields: dict[str, Any]  # of our configuration


_CLIP = _Form(
    "clip_vision_model",
    (
        Leaf("text_projection", ("text_projection.weight",), "linear", ("E", "D")),
        Leaf("image_projection", ("visual_projection.weight",), "linear", ("E", "I")),
        Leaf("scale", ("logit_scale",), "vector", ()),
    ),
    {"image_projection": True, "text_bias": False, "text.pool": "end", "text.causal": True},
)
_SIGLIP = _Form(
    "siglip_vision_model",
    (
        Leaf("text_projection", ("text_model.head.weight",), "linear", ("E", "D")),
        Leaf("text_bias", ("text_model.head.bias",), "vector", ("E",)),
        Leaf("scale", ("logit_scale",), "vector", (1,)),
        Leaf("bias", ("logit_bias",), "vector", (1,)),
    ),
    {"image_projection": False, "text_bias": True, "text.pool": "last", "text.causal": False},
)
_FORMS = {"clip": _CLIP, "siglip": _SIGLIP}


def clip_from_huggingface(
    state: Mapping[str, np.ndarray], config: ClipConfig, theirs: Mapping[str, Any], skip: Sequence[str] = ()
) -> Params:
    """Our `Clip` tree of a Hugging Face model of two towers.

    Args:
      state: name to array, as `model.safetensors` holds them.
      config: under which the weights will be used; its image tower is a `ViTConfig`.
      theirs: what `config.json` holds, or transformers' `AutoConfig.from_pretrained(…).to_dict()`.
      skip: names, theirs or ours, or their beginnings, that are left out of the tree.

    Raises:
      UserError: as `vit_from_huggingface`.
    """
    form, what = form_of(theirs), f"Hugging Face {theirs['model_type']}"
    text = setting(theirs, "text_config")
    activation = setting(text, "hidden_act")
    end = setting(text, "eos_token_id")
    if form is not _CLIP:  # SigLIP reads the last position
        end = config.text.end_token
    elif end == 2:  # older files say so and mean the largest id
        end = setting(text, "vocab_size") - 1
    fields = form.fields | {
        "text.heads": setting(text, "num_attention_heads"),
        "text.norm_eps": setting(text, "layer_norm_eps"),
        "text.activation": ACTIVATIONS.get(activation, activation),
        "text.end_token": end,
    }
    own = {name: _get(config, name) for name in fields} | {"text.heads": size_of(config.text).heads}
    require_same(what, **{name: (value, f"ClipConfig.{name}", own[name]) for name, value in fields.items()})
    image = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    others = {k: v for k, v in state.items() if k not in image and not k.endswith("embeddings.position_ids")}
    params = import_state(others, _TEXT + form.joint, what, skip)
    for name in ("scale", "bias"):
        if name in params:
            params[name] = params[name].reshape(())
    return {**params, "image": vit_from_huggingface(image, config.image, theirs["vision_config"], skip)}


def clip_to_huggingface(params: Params, config: ClipConfig, model_type: str) -> dict[str, np.ndarray]:
    """The state of a model of `model_type` for our `Clip` tree: the inverse of `clip_from_huggingface`.

    Raises:
      UserError: `params` is not the tree of `config`, or that model is another network.
    """
    form = form_of({"model_type": model_type})
    rest = {k: v for k, v in params.items() if k != "image"}
    shapes = {leaf.ours: leaf.shape for leaf in form.joint}
    rest = {k: np.reshape(v, (1,)) if shapes.get(k) == (1,) else v for k, v in rest.items()}
    state = export_tree(rest, _TEXT + form.joint, f"Hugging Face {model_type}")
    return state | vit_to_huggingface(params["image"], config.image, form.vision)


def clip_huggingface_config(config: ClipConfig, sigmoid: bool) -> dict[str, Any]:
    """The `config.json` of transformers' model of two towers that computes `config`.

    Args:
      config: of the model.
      sigmoid: it was trained by the sigmoid loss, whose logits have a bias.

    Raises:
      UserError: there is none; the line is about the one that is nearest.
    """
    if not isinstance(config.image, ViTConfig):
        require_network("transformers", [f"ClipConfig.image is a {type(config.image).__name__}, there a ViT"])
    wrong = {model_type: _differences(model_type, config, sigmoid) for model_type in _FORMS}
    model_type = min(wrong, key=lambda name: len(wrong[name]))
    require_network(f"transformers ({model_type} is nearest)", wrong[model_type])
    text, size = config.text, size_of(config.text)
    text_config = {
        "model_type": f"{model_type}_text_model", "vocab_size": text.vocab_size, "hidden_size": size.width,
        "intermediate_size": size.mlp, "num_hidden_layers": size.depth, "num_attention_heads": size.heads,
        "max_position_embeddings": text.context, "hidden_act": HIDDEN_ACT[text.activation],
        "layer_norm_eps": text.norm_eps, "eos_token_id": text.end_token,
    }  # fmt: skip
    vision_config = vit_settings(f"{model_type}_vision_model", config.image)
    out = {"model_type": model_type, "text_config": text_config, "vision_config": vision_config}
    if model_type == "siglip":
        text_config["projection_size"] = config.embed_dim
        return {"architectures": ["SiglipModel"], **out}
    for part in (text_config, vision_config, out):
        part["projection_dim"] = config.embed_dim
    return {"architectures": ["CLIPModel"], **out}


def _differences(model_type: str, config: ClipConfig, sigmoid: bool) -> list[str]:
    """What stands in the way of a `model_type`."""
    form = _FORMS[model_type]
    wrong = vit_differences(form.vision, config.image, False)
    for name, wanted in form.fields.items():
        if (value := _get(config, name)) != wanted:
            kind = "TextConfig" if name.startswith("text.") else "ClipConfig"
            wrong.append(f"{kind}.{name.removeprefix('text.')} = {value!r}, there {wanted!r}")
    if sigmoid != (model_type == "siglip"):
        loss, there = ("sigmoid", "softmax") if sigmoid else ("softmax", "sigmoid")
        wrong.append(f"ContrastiveConfig.loss = {loss!r}, there {there!r}")
    text = config.text
    if model_type == "clip" and text.end_token == 2 != text.vocab_size - 1:
        wrong.append("TextConfig.end_token = 2, which stands for the largest id there")
    return wrong


def form_of(theirs: Mapping[str, Any]) -> _Form:
    """That of a `config.json`.

    Raises:
      UserError: it is of no model of two towers that is known here.
    """
    model_type = setting(theirs, "model_type")
    if model_type not in _FORMS:
        raise UserError(
            f"model_type = {model_type!r} is none of the models of two towers known here: {', '.join(_FORMS)}; use one"
        )
    return _FORMS[model_type]


def _get(config: ClipConfig, name: str) -> Any:
    holder, _, leaf = name.rpartition(".")
    return getattr(getattr(config, holder) if holder else config, leaf)
