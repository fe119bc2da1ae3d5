"""ViT weights in the names of Hugging Face transformers, to and from our tree.

Source: `ViTForImageClassification` and `ViTModel` as `save_pretrained` writes them, the same names in transformers 4
and 5. (A live `state_dict()` of transformers 5 has other names; no file has them.) Checked against transformers
itself in `tests/parity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from visionfm_jax.config import ViTConfig
from visionfm_jax.errors import UserError
from visionfm_jax.interop.timm import Leaf, Params, affine, export_tree, import_state, layer_norm, require_same
from visionfm_jax.models.vit import size_of


def _vit_leaves(head: bool) -> tuple[Leaf, ...]:
    """The naming of `ViTForImageClassification`; letters as in `timm`."""
    embed, block = "vit.embeddings.", "vit.encoder.layer.{}."
    patches = embed + "patch_embeddings.projection"
    qkv = " ".join(f"{block}attention.attention.{n}" for n in ("query", "key", "value"))
    leaves = (
        Leaf("embed/kernel", (patches + ".weight",), "patches", ("D", 3, "P", "P")),
        Leaf("embed/bias", (patches + ".bias",), "vector", ("D",)),
        Leaf("pos_embed", (embed + "position_embeddings",), "table", (1, "T", "D")),
        Leaf("cls_token", (embed + "cls_token",), "token", (1, 1, "D")),
        *layer_norm("blocks/ln1", block + "layernorm_before"),
        *affine("blocks/attn/qkv", qkv, "linear", "D", "D"),
        *affine("blocks/attn/out", block + "attention.output.dense", "linear", "D", "D"),
        *layer_norm("blocks/ln2", block + "layernorm_after"),
        *affine("blocks/mlp/fc1", block + "intermediate.dense", "linear", "M", "D"),
        *affine("blocks/mlp/fc2", block + "output.dense", "linear", "D", "M"),
        *layer_norm("norm", "vit.layernorm"),
    )
    return leaves + (affine("head", "classifier", "linear", "C", "D") if head else ())


# `hidden_act` to ours.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}  # fmt: skip


def vit_from_huggingface(state: Mapping[str, np.ndarray], config: ViTConfig, theirs: Mapping[str, Any]) -> Params:
    """Our parameter tree (`pool="cls"`) of a Hugging Face ViT.

    A `ViTModel` (names without "vit.") gives a tree without `head`; its tanh pooler, which classification does not
    use, is left out.

    Args:
      state: name to array, as `model.safetensors` holds them.
      config: under which the weights will be used.
      theirs: what `config.json` beside the weights holds.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape, all of them in one line; a model that `config`
        would compute otherwise.
    """
    what = "Hugging Face ViT"
    heads, eps, activation = (setting(theirs, key) for key in ("num_attention_heads", "layer_norm_eps", "hidden_act"))
    require_same(
        what,
        num_attention_heads=(heads, "ViTConfig.size", size_of(config).heads),
        pooling=("cls", "ViTConfig.pool", config.pool),
        layer_norm_eps=(eps, "ViTConfig.norm_eps", config.norm_eps),
        hidden_act=(ACTIVATIONS.get(activation, activation), "ViTConfig.activation", config.activation),
    )
    if not any(k.startswith("vit.") for k in state):
        state = {f"vit.{k}": v for k, v in state.items() if not k.startswith("pooler.")}
    head = any(k.startswith("classifier.") for k in state)
    return import_state(state, _vit_leaves(head), what)


def setting(theirs: Mapping[str, Any], key: str) -> Any:
    """A value of a Hugging Face `config.json`.

    Raises:
      UserError: it is missing: the default may have been another in the version that wrote the file.
    """
    if key not in theirs:
        raise UserError(
            f"the Hugging Face configuration lacks {key!r}; give all that config.json beside the weights holds"
        )
    return theirs[key]


def vit_to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """The state of `ViTForImageClassification` for our ViT tree: the inverse of `vit_from_huggingface`.

    Raises:
      UserError: `params` is not a ViT tree, or pools by the mean, which Hugging Face's ViT cannot.
    """
    if "cls_token" not in params:
        raise UserError('a Hugging Face ViT has no mean pooling: train with config.model.pool="cls", or export to timm')
    return export_tree(params, _vit_leaves("head" in params), "ViT")
