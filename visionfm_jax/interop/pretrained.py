"""Weights in the names of timm, Hugging Face or OpenCLIP, for a part of our model: whose they are, and what to ask.

What the names do not tell (heads, pooling, the epsilon of norms, activations, windows) is in the `config.json` beside
the weights: Hugging Face's and OpenCLIP's say it, timm's names the architecture, of which `timm_architectures.json`
knows it (written by `tools/timm_architectures.py` from timm itself).
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.errors import UserError
from visionfm_jax.interop import huggingface, huggingface_clip, open_clip, swin_v2
from visionfm_jax.interop.leaves import Params, flatten, is_named, sides_of
from visionfm_jax.interop.timm import vit_from_timm
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig, size_of
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig

State = dict[str, np.ndarray]
AS_MODEL = "model"  # instead of a config.json: what names do not tell is as in the configuration
_READABLE = {  # of timm's `model_args`: what the weights show, and what is of training alone
    "img_size", "patch_size", "embed_dim", "depth", "depths", "mlp_ratio", "num_classes", "in_chans", "init_values",
    "class_token", "reg_tokens", "num_reg_tokens", "qkv_bias", "dynamic_img_size", "drop_rate", "drop_path_rate",
    "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "strict_img_size",
    "fc_norm", "pre_norm", "qk_norm", "swiglu_align_to",
}  # fmt: skip
# What a config.json of a stranger may hold under the names that are read here.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("architecture", "model_type", "hidden_act", "global_pool", "act_layer", "pool_type"), str),
    **dict.fromkeys(("timm_model_name", "timm_pool", "hf_tokenizer_name"), (str, type(None))),
    **dict.fromkeys(("vision_config", "text_config", "model_cfg", "vision_cfg", "text_cfg", "model_args"), dict),
    **dict.fromkeys(("pretrained_cfg", "preprocess_cfg"), (dict, type(None))),
    **dict.fromkeys(("width", "heads", "head_width", "num_attention_heads", "vocab_size"), int),
    **dict.fromkeys(("window_size", "num_heads"), (int, list)),  # of SwinV2's stages, and its windows' sides
    **dict.fromkeys(("layer_norm_eps", "norm_eps", "rope_theta", "rope_temperature"), (int, float)),
    "pretrained_window_sizes": list,
}
_POSITIVE = ("width", "heads", "head_width", "num_attention_heads", "vocab_size")


class Imported(NamedTuple):
    """Arrays by their paths in our model, below the part that they are for; and what of the file is not among them."""

    what: str  # for people
    arrays: dict[str, np.ndarray]
    left: dict[str, list[str]]  # why -> names of tensors
    grids: dict[str, HeightWidth]  # patches (h, w) of the images that position tables are for, where it is known


def import_weights(
    state: State, about: Mapping[str, Any] | str, towers: Mapping[str, Any], into: str, skip: Sequence[str]
) -> Imported:
    """The tensors of a file for the part `into` of the model.

    Args:
      state: name to array.
      about: the model's `config.json` (timm's, Hugging Face's or OpenCLIP's), a timm architecture, or `AS_MODEL`.
      towers: the configurations of the model and its networks, by their paths in the parameters; "" is the model.
      into: a path that `towers` has.
      skip: names, theirs or ours, or their beginnings, that are not taken.

    Raises:
      UserError: names that are missing or unknown, or a wrong shape; a model that ours cannot compute, or that its
        configuration would compute otherwise; a library that is not known here.
    """
    if not isinstance(about, str):
        check_kinds(about)
    library = library_of(state, about)
    listed = [name for name in state if is_named(name, skip)]
    state = {name: tensor for name, tensor in state.items() if not is_named(name, skip)}
    left = {"listed in checkpoint.skip": listed}
    if library == "OpenCLIP":
        found = _from_open_clip(state, about, towers, into, skip, left)
    else:
        tower = towers.get(into)
        importers = _importers(tower)
        if library not in importers:
            parts = [path for path, part in towers.items() if library in _importers(part)]
            parts = f"; set it to {' or '.join(map(repr, parts))}" if parts else ""
            what = "no part" if tower is None else f"a {type(tower).__name__}"
            raise UserError(
                f"config.checkpoint.weights_into = {into!r}: {library} weights are read for networks of "
                f"{_kinds_of(library)}, and this is {what}{parts}"
            )
        found = _as_paths(importers[library](state, tower, about, skip, left), into)
    left = {why: names for why, names in left.items() if names}
    return Imported(_what(library, about), found, left, _grids(found, about))


def _grids(found: Mapping[str, np.ndarray], about: Mapping[str, Any] | str) -> dict[str, HeightWidth]:
    """By the path of each position table of images, what a config.json says of their size."""
    if isinstance(about, str):
        return {}
    model, timm = about.get("model_cfg", about), about.get("pretrained_cfg")
    channels_first = timm.get("input_size") if isinstance(timm, dict) else None
    size = sides_of(about.get("model_args", {}).get("img_size"))
    size = size or sides_of(about.get("vision_config", about).get("image_size"))
    size = size or sides_of(model.get("vision_cfg", {}).get("image_size"))
    size = size or sides_of(channels_first[1:] if isinstance(channels_first, list) else None)
    kernels = {path.removesuffix("embed/kernel"): k for path, k in found.items() if path.endswith("embed/kernel")}
    patches = {path: math.isqrt(kernel.shape[0] // 3) for path, kernel in kernels.items()}
    return {
        f"{path}pos_embed": (size[0] // P, size[1] // P) for path, P in patches.items() if P and size and min(size) > 0
    }


def check_kinds(about: Mapping[str, Any], depth: int = 0) -> None:
    """Refuse a config.json that holds something else than is read under a name, at any depth that is read.

    Raises:
      UserError: it does.
    """
    for name, value in about.items():
        kind = _KINDS.get(name, object)
        number = isinstance(value, int | float) and kind is not object
        wrong = number and (isinstance(value, bool) or not abs(value) < 2**31 or (name in _POSITIVE and value < 1))
        if wrong or not isinstance(value, kind) or value != value:  # NaN, which equals nothing
            raise UserError(f"config.json: {name} = {value!r:.60} is not a valid value; get the file again")
        if isinstance(value, dict) and kind is not object and depth < 2:
            check_kinds(value, depth + 1)


def library_of(state: State, about: Mapping[str, Any] | str) -> str:
    """By what is said of the model, or, where that is nothing, by its names."""
    if isinstance(about, str) and about != AS_MODEL:
        return "timm"
    keys = {"architecture": "timm", "model_type": "Hugging Face", "vision_config": "Hugging Face",
            "model_cfg": "OpenCLIP", "vision_cfg": "OpenCLIP"}  # fmt: skip
    found = {library for key, library in keys.items() if about != AS_MODEL and key in about}
    found -= {"Hugging Face"} if "timm" in found else set()  # timm writes model_type for some
    if about == AS_MODEL:
        starts = {r"blocks\.0\.|layers\.0\.blocks\.0\.attn\.qkv": "timm",
                  r"visual\.|(text\.)?transformer\.resblocks\.0\.": "OpenCLIP"}  # fmt: skip
        found = {library for start, library in starts.items() if any(re.match(start, name) for name in state)}
    if len(found) != 1:
        few = ", ".join(list(state)[:3])
        why = "says nothing of the model" if about != AS_MODEL else f"cannot be told from names such as {few}"
        raise UserError(
            f"whose names they are (timm's, Hugging Face's, OpenCLIP's) {why}; set config.checkpoint.weights_config to "
            "the config.json of the model, or config.checkpoint.weights_from to what the names begin with"
        )
    return found.pop()


def _what(library: str, about: Mapping[str, Any] | str) -> str:
    name = about if isinstance(about, str) else about.get("architecture") or about.get("model_type") or ""
    return f"{library} names" if name in ("", AS_MODEL) else f"{library} {name}"


def _as_paths(tree: Params, into: str) -> dict[str, np.ndarray]:
    return {f"{into}/{path}" if into else path: value for path, value in flatten(tree).items()}


def _leave(state: State, left: dict[str, list[str]], why: str, leave: Callable[[str], bool]) -> State:
    """The rest of `state`; names for which `leave` holds go to `left`."""
    left.setdefault(why, []).extend(name for name in state if leave(name))
    return {name: tensor for name, tensor in state.items() if not leave(name)}


# timm


@functools.cache
def timm_architectures() -> dict[str, dict[str, Any]]:
    """What the importers ask for, by timm's names of architectures."""
    table = json.loads(files("visionfm_jax.interop").joinpath("timm_architectures.json").read_text())
    return {name: row["facts"] for row in table["architectures"] for name in row["of"]}


def timm_facts(about: Mapping[str, Any] | str, kind: str) -> dict[str, Any]:
    """What timm's importers ask for, of an architecture, with what its config.json changes of it."""
    name = about if isinstance(about, str) else about["architecture"]
    known = timm_architectures()
    if not isinstance(name, str) or name not in known:
        raise UserError(
            f"timm's architecture {name!r} is none of the {len(known)} known here; if config.model is that network, "
            f"set config.checkpoint.weights_config={AS_MODEL}"
        )
    facts = dict(known[name])
    if ("window_size" in facts) != (kind == "SwinV2"):
        raise UserError(
            f"timm's {name} is no {kind}, which the configuration has there; set another network, or in "
            "config.checkpoint.weights_config the architecture of the weights"
        )
    if isinstance(about, str):
        return facts
    arguments = {**about.get("model_args", {})}
    if kind == "SwinV2" and arguments.get("global_pool") == "avg":
        del arguments["global_pool"]
    if kind == "SwinV2":
        arguments.pop("num_heads", None)  # the weights show them
    elif "rope_temperature" not in facts:
        facts.setdefault("no_embed_class", False)
    if other := sorted(arguments.keys() - facts.keys() - _READABLE):
        raise UserError(
            f"the model_args {', '.join(other)} of config.json are not understood; if config.model is that network, "
            f"set config.checkpoint.weights_config={AS_MODEL}"
        )
    facts |= {key: value for key, value in arguments.items() if key in facts}
    if kind == "ViT" and about.get("global_pool"):
        facts["global_pool"] = about["global_pool"]
    return facts


def _vit_of_timm(
    state: State, tower: ViTConfig, about: Mapping[str, Any] | str, skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    if about == AS_MODEL:
        pools = {"cls": "token", "gap": "avg", "norm_gap": "avg", "map": "map"}
        if tower.pool not in pools:
            raise UserError(f"ViTConfig.pool = {tower.pool!r}: no ViT of timm's has it; set another")
        facts = {
            "num_heads": size_of(tower).heads, "global_pool": pools[tower.pool], "norm_eps": tower.norm_eps,
            "act_layer": tower.activation, "no_embed_class": tower.pos_embed == "patches",
            "rope_temperature": tower.rope_theta,
        }  # fmt: skip
    else:
        facts = timm_facts(about, "ViT")
    return vit_from_timm(state, tower, skip=skip, **facts)


def _swin_of_timm(
    state: State, tower: SwinV2Config, about: Mapping[str, Any] | str, skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    state = _leave(state, left, "no part of the network", lambda n: swin_v2.is_left_out(n) and "head.fc." not in n)
    if about == AS_MODEL:
        facts = {
            "window_size": tower.window, "pretrained_window_sizes": swin_v2.pretrained_windows(tower),
            "norm_eps": swin_v2.EPS, "act_layer": "gelu",
        }  # fmt: skip
    else:
        facts = timm_facts(about, "SwinV2")
    return swin_v2.swin_v2_from_timm(state, tower, skip=skip, **facts) | _head(state, "head.fc", skip)


def _head(state: State, name: str, skip: Sequence[str]) -> Params:
    """A linear classifier on pooled features; {}: the state has none."""
    kernel, bias = (state.get(f"{name}.{leaf}") for leaf in ("weight", "bias"))
    if kernel is None or bias is None or is_named("head", skip):
        return {}
    if kernel.ndim != 2 or bias.shape != kernel.shape[:1]:
        raise UserError(f"{name}.weight {kernel.shape} and {name}.bias {bias.shape} are no linear layer; get it again")
    return {"head": {"kernel": kernel.T, "bias": bias}}


# Hugging Face


def _vit_of_huggingface(
    state: State, tower: ViTConfig, about: Mapping[str, Any], skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    state = _leave(state, left, "no part of the features", lambda name: huggingface.is_left_out(name, about))
    return huggingface.vit_from_huggingface(state, tower, about, skip)


def _clip_of_huggingface(
    state: State, model: ClipConfig, about: Mapping[str, Any], skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    if _importers(model.image).get("Hugging Face") is not _vit_of_huggingface:
        raise UserError(
            "config.model.image is no ViT, which the image towers of CLIP and SigLIP are; set it to a ViTConfig"
        )
    if not {"text_config", "vision_config"} <= about.keys():
        raise UserError("config.json has no text_config and vision_config; get the file again")
    state = _leave(state, left, "no part of the network", lambda name: name.endswith("embeddings.position_ids"))
    return huggingface_clip.clip_from_huggingface(state, model, about, skip)


def _swin_of_huggingface(
    state: State, tower: SwinV2Config, about: Mapping[str, Any], skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    state = _leave(state, left, "no part of the network", lambda n: swin_v2.is_left_out(n) and "classifier." not in n)
    return swin_v2.swin_v2_from_huggingface(state, tower, about, skip) | _head(state, "classifier", skip)


# OpenCLIP


def _from_open_clip(
    state: State,
    about: Mapping[str, Any] | str,
    towers: Mapping[str, Any],
    into: str,
    skip: Sequence[str],
    left: dict[str, list[str]],
) -> dict[str, np.ndarray]:
    """Both towers and what joins them, or the one that `into` names."""
    if about == AS_MODEL:
        raise UserError(
            "of OpenCLIP weights, config.checkpoint.weights_config must name their open_clip_config.json (or what "
            "open_clip.get_model_config(NAME) gives, as JSON)"
        )
    theirs = about.get("model_cfg", about)
    if not {"vision_cfg", "text_cfg"} <= theirs.keys():
        raise UserError("open_clip_config.json has no vision_cfg and text_cfg in its model_cfg; get the file again")
    found: dict[str, np.ndarray] = {}
    here = [path for path in towers if (path or len(towers) == 1) and (not into or path == into)]
    joined = len(towers) > 1 and not into
    visual = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    rest = {name: tensor for name, tensor in state.items() if name not in visual}
    halves = {_image_of_open_clip: visual, _text_of_open_clip: rest}
    importers = {path: _importers(towers[path]).get("OpenCLIP") for path in here}
    for path, importer in importers.items():
        if importer is None:
            kind = type(towers[path]).__name__
            raise UserError(
                f"OpenCLIP's image towers are ViTs, and config.model.{path} is a {kind}; set it to a ViTConfig"
            )
        found |= importer(halves[importer], path, towers[path], theirs, skip, left, joined)
    for importer, half in halves.items():
        if importer not in importers.values():
            left.setdefault("of the other tower", []).extend(half)
    return found


def _image_of_open_clip(
    state: State,
    path: str,
    tower: ViTConfig,
    theirs: Mapping[str, Any],
    skip: Sequence[str],
    left: dict[str, list[str]],
    joined: bool,
) -> dict[str, np.ndarray]:
    """The image tower at `path`, and where both towers are `joined`, its projection."""
    tree = _visual_of_open_clip(state, tower, theirs, skip, left)
    projection = tree.pop("projection", None)
    found = _as_paths(tree, path)
    if joined and projection is not None:
        found[f"{path}_projection"] = projection
    elif projection is not None:
        left.setdefault("of the joint space", []).append("visual.proj")
    return found


def _text_of_open_clip(
    state: State,
    path: str,
    tower: TextConfig,
    theirs: Mapping[str, Any],
    skip: Sequence[str],
    left: dict[str, list[str]],
    joined: bool,
) -> dict[str, np.ndarray]:
    """The text tower at `path`, and where both towers are `joined`, what joins them."""
    tree = flatten(open_clip.text_from_open_clip(state, tower, theirs, skip))
    own = {name: tensor for name, tensor in tree.items() if joined or name.startswith("text/")}
    if not joined:
        names = ("text_projection", "text.text_projection", "logit_scale", "logit_bias")
        left.setdefault("of the joint space", []).extend(n for n in names if n in state)
    return {name.replace("text", path, 1): tensor for name, tensor in own.items()}


def _visual_of_open_clip(
    state: State, tower: ViTConfig, theirs: Mapping[str, Any], skip: Sequence[str], left: dict[str, list[str]]
) -> Params:
    """OpenCLIP's own ViT, or one of timm's."""
    name = theirs["vision_cfg"].get("timm_model_name")
    if not name:
        return open_clip.visual_from_open_clip(state, tower, theirs, skip)
    state = _leave(state, left, "of the joint space", lambda name: not name.startswith("visual.trunk."))
    state = {name.removeprefix("visual.trunk."): tensor for name, tensor in state.items()}
    pool = theirs["vision_cfg"].get("timm_pool", "avg")
    return _vit_of_timm(state, tower, {"architecture": name, "global_pool": pool}, skip, left)


_IMPORTERS: dict[type, dict[str, Callable[..., Params]]] = {
    ViTConfig: {"timm": _vit_of_timm, "Hugging Face": _vit_of_huggingface, "OpenCLIP": _image_of_open_clip},
    SwinV2Config: {"timm": _swin_of_timm, "Hugging Face": _swin_of_huggingface},
    TextConfig: {"OpenCLIP": _text_of_open_clip},
    ClipConfig: {"Hugging Face": _clip_of_huggingface},
}


def _importers(part: Any) -> dict[str, Callable[..., Params]]:
    """By library, those of a configuration's class, or of the nearest that it is derived from."""
    return next((_IMPORTERS[cls] for cls in type(part).__mro__ if cls in _IMPORTERS), {})


def _kinds_of(library: str) -> str:
    return ", ".join(kind.__name__ for kind, importers in _IMPORTERS.items() if library in importers)
