"""ViT weights in the names of Hugging Face transformers, to and from our tree.

Source: `ViTForImageClassification` and `ViTModel` as `save_pretrained` writes them, the same names in transformers 4
and 5. (A live `state_dict()` of transformers 5 has other names; no file has them.) Checked against transformers
itself in `tests/parity`. Their LayerNorm must have `layer_norm_eps=1e-6`, as ours has: the library's default is 1e-12.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from visionfm_jax.errors import UserError
from visionfm_jax.interop.timm import Leaf, Params, affine, export_tree, import_state, layer_norm


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


def vit_from_huggingface(state: Mapping[str, np.ndarray]) -> Params:
    """Our parameter tree (`pool="cls"`) of a Hugging Face ViT.

    A `ViTModel` (names without "vit.") gives a tree without `head`; its tanh pooler, which classification does not
    use, is left out.

    Args:
      state: name to array, as `model.safetensors` holds them.
    Raises:
      UserError: names that are missing or unknown, or a wrong shape; all of them in one line.
    """
    if not any(k.startswith("vit.") for k in state):
        state = {f"vit.{k}": v for k, v in state.items() if not k.startswith("pooler.")}
    head = any(k.startswith("classifier.") for k in state)
    return import_state(state, _vit_leaves(head), "Hugging Face ViT")


def vit_to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """The state of `ViTForImageClassification` for our ViT tree: the inverse of `vit_from_huggingface`.

    Raises:
      UserError: `params` is not a ViT tree, or pools by the mean, which Hugging Face's ViT cannot.
    """
    if "cls_token" not in params:
        raise UserError('a Hugging Face ViT has no mean pooling: train with config.model.pool="cls", or export to timm')
    return export_tree(params, _vit_leaves("head" in params), "ViT")
