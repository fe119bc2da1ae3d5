"""The text side of CLIP in OpenCLIP's names, to and from our tree: tower, projection, scale and bias of the logits.

Source: open_clip_torch 3.3, `CLIP.state_dict()` and `CustomTextCLIP.state_dict()`. Checked against OpenCLIP itself in
`tests/parity`. OpenCLIP's image towers are other networks than ours. OpenAI's own weights, and OpenCLIP's `-quickgelu`
models, have these names too but another activation: they are refused.

Letters in shapes: D width, M hidden width of the MLP, V vocabulary, T positions, E width of the joint space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import Leaf, Params, affine, export_tree, import_state, layer_norm, require_same
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
    "tokenizer_kwargs", "tokenizer_mode", "tokenizer_type",
}  # fmt: skip


def text_from_open_clip(state: Mapping[str, np.ndarray], config: TextConfig, model_cfg: Mapping[str, Any]) -> Params:
    """The text part of our `Clip` tree: `text`, `text_projection`, and `scale` and `bias` where the state has them.

    Width, depth, vocabulary and positions are read off the state itself. Names may begin with
    "text.", as a `CustomTextCLIP`'s do, or not, as those of a `CLIP` or of a text tower alone; what is the image
    tower's is skipped.

    Args:
      state: name to array, as `model.state_dict()` or a `.safetensors` file holds them.
      config: under which the weights will be used.
      model_cfg: OpenCLIP's of the model, as `open_clip.get_model_config(NAME)` has it, or `open_clip_config.json`
        under that key.

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
        quick_gelu=(bool(model_cfg.get("quick_gelu")), "this project's text tower", False),
        heads=(theirs.get("heads", 8), "TextConfig.size", size_of(config).heads),
        pool_type=(pool, "this project's text tower", pool if pool in ("argmax", "eos") else "argmax"),
        end_token=(end, "TextConfig.end_token", config.end_token),
    )
    state = {name.removeprefix("text."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not _SKIPPED.fullmatch(name)}
    leaves = _TEXT + tuple(leaf for leaf in _OF_LOGITS if leaf.theirs[0] in state)
    return import_state(state, leaves, what)


def text_to_open_clip(params: Params) -> dict[str, np.ndarray]:
    """The state, in the names of OpenCLIP's `CLIP`, of the text part of a `Clip` tree; its image part is left out.

    Raises:
      UserError: `params` has no text tower, or one that is not ours.
    """
    params = {name: value for name, value in params.items() if not name.startswith("image")}
    leaves = _TEXT + tuple(leaf for leaf in _OF_LOGITS if leaf.ours in params)
    return export_tree(params, leaves, "CLIP text")
