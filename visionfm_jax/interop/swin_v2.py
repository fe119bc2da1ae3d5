"""SwinV2 weights in the names of timm and of Hugging Face transformers, to and from our tree.

Sources: timm 1.0 `SwinTransformerV2.state_dict()`; `Swinv2Model` and `Swinv2ForImageClassification` of transformers
as `save_pretrained` writes them, the same names in transformers 4 and 5. The authors' own files are timm's names with
the merging at the end of a stage and are read too. Checked against both libraries in `tests/parity`.

A state is read stage by stage: all widths in a stage are multiples of its own. Letters in shapes: D width of the
stage, M hidden width of the MLP, N heads, P patch side in pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from visionfm_jax.config.limits import HeightWidth, ImageSize, height_width, shortest
from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import ACTIVATIONS, setting
from visionfm_jax.interop.leaves import (
    Leaf,
    Params,
    affine,
    export_tree,
    import_state,
    layer_norm,
    require_same,
    sides_of,
)
from visionfm_jax.interop.vit import only_square, require_network
from visionfm_jax.models.backbones.swin_v2 import (
    BIAS_HIDDEN,
    EPS,
    SwinV2Config,
    SwinV2Size,
    bias_windows,
    group_of,
    maps_of,
    pretrained_windows,
    size_of,
    windows_of,
)

# Tables and masks that follow from the window's size, timm's bias of keys that is always zero, and classifiers: our
# encoder has none.
_SKIPPED = re.compile(r"(.*\.)?(relative_coords_table|relative_position_index|attn_mask|k_bias)|(head|classifier)\..*")
STAGES = 4


def _timm_leaves(stage: int, merging_first: bool = True) -> tuple[Leaf, ...]:
    """The naming of one stage of timm's, with its embedding or merging, and the last norm."""
    block = f"layers.{stage}.blocks.{{}}."
    leaves = (
        *layer_norm("blocks/ln1", block + "norm1"),
        Leaf("blocks/attn/qkv/kernel", (block + "attn.qkv.weight",), "linear", ("3D", "D")),
        Leaf("blocks/attn/qkv/bias", (block + "attn.q_bias", block + "attn.v_bias"), "vector", ("D",)),
        *_cosine_attention(block + "attn.logit_scale", block + "attn.cpb_mlp"),
        *affine("blocks/attn/out", block + "attn.proj", "linear", "D", "D"),
        *layer_norm("blocks/ln2", block + "norm2"),
        *affine("blocks/mlp/fc1", block + "mlp.fc1", "linear", "M", "D"),
        *affine("blocks/mlp/fc2", block + "mlp.fc2", "linear", "D", "M"),
    )
    if stage == 0:
        leaves += _embedding("patch_embed.proj", "patch_embed.norm")
    if merging_first and stage > 0:
        leaves += _merging(stage - 1, f"layers.{stage}.downsample", "D", "2D")
    if not merging_first and stage < STAGES - 1:
        leaves += _merging(stage, f"layers.{stage}.downsample", "2D", "4D")
    return leaves + (layer_norm("norm", "norm") if stage == STAGES - 1 else ())


def _huggingface_leaves(stage: int) -> tuple[Leaf, ...]:
    """The naming of one stage of Hugging Face's, likewise."""
    embed, layer = "swinv2.embeddings.", f"swinv2.encoder.layers.{stage}."
    block = layer + "blocks.{}."
    attn = block + "attention.self."
    qkv = tuple(f"{attn}{n}.weight" for n in ("query", "key", "value"))
    leaves = (
        *layer_norm("blocks/ln1", block + "layernorm_before"),
        Leaf("blocks/attn/qkv/kernel", qkv, "linear", ("D", "D")),
        Leaf("blocks/attn/qkv/bias", (attn + "query.bias", attn + "value.bias"), "vector", ("D",)),
        *_cosine_attention(attn + "logit_scale", attn + "continuous_position_bias_mlp"),
        *affine("blocks/attn/out", block + "attention.output.dense", "linear", "D", "D"),
        *layer_norm("blocks/ln2", block + "layernorm_after"),
        *affine("blocks/mlp/fc1", block + "intermediate.dense", "linear", "M", "D"),
        *affine("blocks/mlp/fc2", block + "output.dense", "linear", "D", "M"),
    )
    if stage == 0:
        leaves += _embedding(embed + "patch_embeddings.projection", embed + "norm")
    if stage < STAGES - 1:
        return leaves + _merging(stage, layer + "downsample", "2D", "4D")
    return leaves + layer_norm("norm", "swinv2.layernorm")


def _embedding(patches: str, norm: str) -> tuple[Leaf, ...]:
    return (
        Leaf("embed/kernel", (patches + ".weight",), "patches", ("D", 3, "P", "P")),
        Leaf("embed/bias", (patches + ".bias",), "vector", ("D",)),
        *layer_norm("embed_norm", norm),
    )


def _cosine_attention(scale: str, network: str) -> tuple[Leaf, ...]:
    return (
        Leaf("blocks/attn/scale", (scale,), "heads", ("N", 1, 1)),
        *affine("blocks/attn/bias/fc1", network + ".0", "linear", BIAS_HIDDEN, 2),
        Leaf("blocks/attn/bias/fc2/kernel", (network + ".2.weight",), "linear", ("N", BIAS_HIDDEN)),
    )


def _merging(number: int, theirs: str, out: str, inner: str) -> tuple[Leaf, ...]:
    return (
        Leaf(f"merging{number}/reduction/kernel", (theirs + ".reduction.weight",), "linear", (out, inner)),
        Leaf(f"merging{number}/norm/scale", (theirs + ".norm.weight",), "vector", (out,)),
        Leaf(f"merging{number}/norm/bias", (theirs + ".norm.bias",), "vector", (out,)),
    )


def swin_v2_from_timm(
    state: Mapping[str, np.ndarray],
    config: SwinV2Config,
    *,
    window_size: ImageSize,
    pretrained_window_sizes: Sequence[ImageSize],
    norm_eps: float,
    act_layer: str,
    img_size: ImageSize = 0,
    skip: Sequence[str] = (),
) -> Params:
    """Our parameter tree of a timm `SwinTransformerV2`, or of a file of SwinV2's authors.

    Widths, depths, heads and patch size are read off the state itself; windows are no part of it, and what a file
    holds of them is skipped, as is a classifier's head. The tree is of a size without norms of the main branch.

    Args:
      state: name to array, as `model.state_dict()` or a `.safetensors` file holds them.
      config: under which the weights will be used. Where shifted maps of its image size need padding, it must have
        `roll_first`, as timm rolls before it pads; the authors' own code refuses such maps.
      window_size: of timm's model, as given to its constructor (`always_partition` must be its default, False).
      pretrained_window_sizes: likewise, by stage; zeros: none.
      norm_eps: likewise, `model.norm.eps`: 1e-5 by default.
      act_layer: likewise: "gelu" by default.
      img_size: likewise; the windows of `config` may then be others than the model's, as long as the position bias is
        evaluated as it was trained (`pretrained_window`). 0: they are the same.
      skip: names, timm's or ours, or their beginnings, that are left out of the tree.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape, all of a stage's in one line; a model that ours
        cannot compute, or that `config` would compute otherwise.
    """
    what = "timm SwinV2"
    trained = img_size, np.shape(state.get("patch_embed.proj.weight", ()))
    _require_same(what, config, True, trained, window_size=window_size, norm_eps=norm_eps, act_layer=act_layer,
                  pretrained_window_sizes=pretrained_window_sizes)  # fmt: skip
    first = "layers.0.downsample.reduction.weight" not in state
    return _import(state, what, "layers.", lambda stage: _timm_leaves(stage, first), skip)


def swin_v2_to_timm(params: Params) -> dict[str, np.ndarray]:
    """The timm state of our SwinV2 tree: the inverse of `swin_v2_from_timm`.

    Raises:
      UserError: `params` is not a SwinV2 tree, or norms its main branch, which timm's SwinV2 cannot.
    """
    return _export(params, _timm_leaves, merging_first=True)


def swin_v2_from_huggingface(
    state: Mapping[str, np.ndarray], config: SwinV2Config, theirs: Mapping[str, Any], skip: Sequence[str] = ()
) -> Params:
    """Our parameter tree of a Hugging Face SwinV2; see `swin_v2_from_timm`.

    Names may begin with "swinv2.", as a classifier's do, or not, as those of a `Swinv2Model`.

    Args:
      state: name to array, as `model.safetensors` holds them.
      config: under which the weights will be used; not `roll_first`, if shifted maps of its image size need padding.
      theirs: what `config.json` beside the weights holds; with its `image_size`, windows may be others, as there.
      skip: names, theirs without prefix or ours, or their beginnings, that are left out of the tree.
    """
    what = "Hugging Face SwinV2"
    keys = ("window_size", "layer_norm_eps", "hidden_act", "pretrained_window_sizes")
    if not any(name.startswith("swinv2.") for name in state):
        state = {f"swinv2.{name}": value for name, value in state.items()}
    patches = np.shape(state.get("swinv2.embeddings.patch_embeddings.projection.weight", ()))
    trained = theirs.get("image_size", 0), patches
    _require_same(what, config, False, trained, **{key: setting(theirs, key) for key in keys})
    skip = (*skip, *(f"swinv2.{name}" for name in skip))
    return _import(state, what, "swinv2.encoder.layers.", _huggingface_leaves, skip)


def is_left_out(name: str) -> bool:
    """Whether a tensor of a file is none of the encoder's."""
    return bool(_SKIPPED.fullmatch(name))


def swin_v2_to_huggingface(params: Params) -> dict[str, np.ndarray]:
    """The state of `Swinv2ForImageClassification`, less its head, for our SwinV2 tree; see `swin_v2_to_timm`."""
    return _export(params, _huggingface_leaves, merging_first=False)


def _require_same(
    what: str, config: SwinV2Config, rolls_first: bool, trained: tuple[ImageSize, tuple[int, ...]], **theirs: Any
) -> None:
    """`require_same` of what a state does not tell: windows, epsilon, activation; and the order.

    `trained`: size of the images that the model was made for, 0: unknown, and shape of its patch embedding's weight.
    """
    window, eps, activation, pretrained = theirs
    if (sides := sides_of(theirs[window])) is None or min(sides) < 1:
        raise UserError(f"the {what} has {window} = {theirs[window]!r:.60}, which is no window; get config.json again")
    theirs[window] = shortest(sides)
    facts = {
        eps: (theirs[eps], "this project's SwinV2", EPS),
        activation: (ACTIVATIONS.get(theirs[activation], theirs[activation]), "this project's SwinV2", "gelu"),
    }
    before, ours = [sides_of(w) for w in theirs[pretrained]], pretrained_windows(config)
    fields = "SwinV2Config.pretrained_window and pretrained_image_size"
    size, patches = sides_of(trained[0]), trained[1]
    if size and all(size) and len(patches) == 4 and patches[-1] and len(before) == STAGES and all(before):
        # What counts is where the position bias was trained, or, if nowhere before, is.
        own = [windows_of(map, theirs[window], (0, 0), False).window for map in maps_of(size, patches[-1])]
        before = [w if any(w) else here for w, here in zip(before, own, strict=True)]
        ours = bias_windows(config)
        fields = f"SwinV2Config.window, or for other windows than its {theirs[window]} at {shortest(size)} px {fields},"
    else:
        facts[window] = (theirs[window], "SwinV2Config.window", shortest(height_width(config.window)))
    require_same(what, **{pretrained: (_written(before), fields, _written(ours))}, **facts)
    if _rolls_what_it_pads(config):
        require_same(what, rolls_before_padding=(rolls_first, "SwinV2Config.roll_first", config.roll_first))


def _rolls_what_it_pads(config: SwinV2Config) -> bool:
    """Whether the order of the two makes a difference."""
    maps = maps_of(config.image_size, config.patch_size)
    return any(any(w.shift) and w.padded != w.map for w in (windows_of(m, config.window, (0, 0), True) for m in maps))


def swin_v2_timm_config(config: SwinV2Config) -> dict[str, Any]:
    """What timm's `config.json` says of the network of `config`: an architecture, and what differs from it.

    Raises:
      UserError: timm has no such network.
    """
    size = _size("timm", config, True)
    model_args = {
        "img_size": shortest(height_width(config.image_size)), "patch_size": config.patch_size,
        "embed_dim": size.width, "depths": list(size.depths), "num_heads": list(size.heads),
        "window_size": shortest(height_width(config.window)), "mlp_ratio": config.mlp_ratio,
        "pretrained_window_sizes": _written(pretrained_windows(config)),
    }  # fmt: skip
    return {"architecture": "swinv2_base_window8_256", "num_features": config.features, "global_pool": "avg",
            "model_args": model_args}  # fmt: skip


def swin_v2_huggingface_config(config: SwinV2Config, head: bool) -> dict[str, Any]:
    """The `config.json` of transformers' SwinV2 for `config`, with or without a classifier.

    Raises:
      UserError: it has no such network.
    """
    size = _size("transformers", config, False)
    return {
        "architectures": ["Swinv2ForImageClassification" if head else "Swinv2Model"], "model_type": "swinv2",
        "image_size": shortest(height_width(config.image_size)), "patch_size": config.patch_size, "num_channels": 3,
        "embed_dim": size.width, "depths": list(size.depths), "num_heads": list(size.heads),
        "window_size": height_width(config.window)[0], "mlp_ratio": float(config.mlp_ratio), "qkv_bias": True,
        "pretrained_window_sizes": _written(pretrained_windows(config)), "hidden_act": "gelu", "layer_norm_eps": EPS,
        "use_absolute_embeddings": False,
    }  # fmt: skip


def _size(library: str, config: SwinV2Config, rolls_first: bool) -> SwinV2Size:
    """Widths, depths and heads, if the library has the network."""
    size, wrong = size_of(config), []
    if size.extra_norm_every:
        norms = f"with norms of the main branch every {size.extra_norm_every} blocks"
        wrong.append(f"SwinV2Config.size = {config.size!r}, {norms}, there none")
    if _rolls_what_it_pads(config) and config.roll_first != rolls_first:
        wrong.append(f"SwinV2Config.roll_first = {config.roll_first}, there {rolls_first}")
    if not rolls_first:
        wrong += only_square(config.window, "SwinV2Config.window")
        wrong += only_square(config.pretrained_window, "SwinV2Config.pretrained_window")
    require_network(library, wrong)
    return size


def _written(windows: Sequence[HeightWidth | None]) -> list[ImageSize | None]:
    return [window and shortest(window) for window in windows]


def _import(
    state: Mapping[str, np.ndarray],
    what: str,
    prefix: str,
    naming: Callable[[int], tuple[Leaf, ...]],
    skip: Sequence[str] = (),
) -> Params:
    last_norm = {leaf.theirs[0] for leaf in naming(STAGES - 1) if leaf.ours.startswith("norm/")}
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(STAGES)]
    for name, value in state.items():
        if not is_left_out(name):
            stage = re.match(re.escape(prefix) + rf"([0-{STAGES - 1}])\.", name)
            parts[int(stage.group(1)) if stage else STAGES - 1 if name in last_norm else 0][name] = value
    params: Params = {}
    for stage, part in enumerate(parts):
        tree = import_state(part, naming(stage), f"{what} stage {stage}", skip)
        params[f"stage{stage}"] = {"blocks": _grouped(tree.pop("blocks"))}
        params |= tree
    widths = [_width(params, stage) for stage in range(STAGES)]
    if widths != [widths[0] * 2**stage for stage in range(STAGES)]:
        raise UserError(f"the state is no {what}: stages of widths {widths}, each must be twice the one before. "
                        "Check which model wrote it")  # fmt: skip
    return params


def _export(params: Params, naming: Callable[[int], tuple[Leaf, ...]], merging_first: bool) -> dict[str, np.ndarray]:
    if missing := [f"stage{i}/blocks" for i in range(STAGES) if "blocks" not in params.get(f"stage{i}", {})]:
        raise UserError(f"the parameters are no SwinV2 tree: missing {', '.join(missing)}. "
                        "Check which model they belong to")  # fmt: skip
    parts: list[Params] = [{"blocks": _in_a_row(params[f"stage{i}"]["blocks"])} for i in range(STAGES)]
    for name, value in params.items():
        if merging := re.fullmatch(r"merging([0-2])", name):
            parts[int(merging.group(1)) + merging_first][name] = value
        elif name not in [f"stage{i}" for i in range(STAGES)]:
            parts[STAGES - 1 if name == "norm" else 0][name] = value
    state: dict[str, np.ndarray] = {}
    for stage, part in enumerate(parts):
        state |= export_tree(part, naming(stage), f"SwinV2 stage {stage}")
    return state


def _width(params: Params, stage: int) -> int:
    blocks = params[f"stage{stage}"]["blocks"]
    return blocks.get("0", blocks)["ln1"]["scale"].shape[-1]


def _grouped(blocks: Params) -> Params:
    """Layers stacked in a row, as our loop has them: one stack for each number in a group that repeats."""
    depth = blocks["ln1"]["scale"].shape[0]
    group = group_of(depth, 0)
    if group == 1:
        return blocks
    return {str(i): jax.tree.map(lambda a, i=i: a[i::group], blocks) for i in range(group)}


def _in_a_row(blocks: Params) -> Params:
    """The reverse of `_grouped`.

    Raises:
      UserError: blocks differ in what they hold: some end in a norm of the main branch.
    """
    if "0" not in blocks:
        return blocks
    numbers = [blocks[str(i)] for i in range(len(blocks))]
    if any("norm" in block for block in numbers):
        raise UserError(
            "these parameters norm the main branch every few blocks (sizes H and G), which SwinV2 of timm and of "
            "Hugging Face cannot: keep them in this project's format"
        )
    return jax.tree.map(lambda *a: np.stack(a, 1).reshape(-1, *a[0].shape[1:]), *numbers)
