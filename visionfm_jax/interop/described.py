"""What a folder of timm, Hugging Face or OpenCLIP says of its model: the network in our fields, and the preprocessing.

Sizes, tokens, norms and biases are read off the names and shapes of the weights. Heads, pooling, activation, epsilon
and the interpolation of positions are not theirs to show: the importers compare them with a configuration, and say what
it should have been (`leaves.OtherSettings`), so that they are settled when the weights are read.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from visionfm_jax.config import BackboneConfig, PreprocessConfig
from visionfm_jax.config.limits import HeightWidth, ImageSize, shortest
from visionfm_jax.config.saved import model_from_dict
from visionfm_jax.errors import UserError, printable
from visionfm_jax.interop import files, huggingface, huggingface_clip, open_clip, timm
from visionfm_jax.interop.leaves import sides_of, without_prefix
from visionfm_jax.interop.pretrained import State, check_kinds, library_of, timm_facts
from visionfm_jax.interop.swin_v2 import STAGES
from visionfm_jax.interop.vit import Names
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig

LARGEST = 2**14  # side of an image
CLIP_WORDS = 49_408  # of CLIP's vocabulary, which ships with this project
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which transformers writes
_OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}  # OpenCLIP's


class Described(NamedTuple):
    """A model of another library.

    Attributes:
      model: its network or towers, but for what the importers settle.
      names: of its classes, by label, the number where no name is known; (): it has no classifier.
      sigmoid: two towers whose logits have a bias.
      tokenizer: of its texts, as `data.tokenizer.open_tokenizer` takes it; "": it reads none.
      mean, std: (3,), of pixels in [0, 1].
      preprocess: of its images.
    """

    model: BackboneConfig | ClipConfig
    names: tuple[str, ...]
    sigmoid: bool
    tokenizer: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    preprocess: PreprocessConfig


def describe(file: Path, state: State, about: Mapping[str, Any]) -> Described:
    """The model whose weights `file` holds.

    Args:
      file: in the folder of the model.
      state: its tensors by name.
      about: the `config.json` or `open_clip_config.json` beside it.

    Raises:
      UserError: it is of a kind that is not known here, or the folder does not say what is needed.
    """
    check_kinds(about)
    library = library_of(state, about)
    size, preprocess = {"timm": _of_timm, "Hugging Face": _of_processor, "OpenCLIP": _of_open_clip}[library](
        file, about
    )
    said = files.normalization(file, about)
    if not said and library != "OpenCLIP":
        beside = "pretrained_cfg in its config.json" if library == "timm" else "preprocessor_config.json beside it"
        raise UserError(f"{file}: nothing says how its images are normalised; get the folder again, with {beside}")
    try:
        model = _model(library, state, about, shortest(size))
    except KeyError as error:
        raise UserError(
            f"{file}: has no tensor {error} of a {library} model that is known here; get it again"
        ) from None
    names = _class_names(state, about)
    two = isinstance(model, ClipConfig)
    tokenizer = _tokenizer(file.parent, model.text, about) if two else ""
    return Described(model, names, two and "logit_bias" in state, tokenizer, **(said or _OPENAI), preprocess=preprocess)


@functools.cache
def architectures() -> dict[str, dict[str, Any]]:
    """Networks and their preprocessing by the names of timm and OpenCLIP; written by `tools/architectures.py`."""
    return json.loads(resources.files("visionfm_jax.interop").joinpath("architectures.json").read_text())["models"]


def by_name(name: str, num_classes: int = 0) -> Described:
    """The model that a name of `architectures` stands for, of two towers, or a backbone with as many classes.

    Raises:
      UserError: there is no such name, or a model of two towers would have classes.
    """
    if name not in architectures():
        near = difflib.get_close_matches(name, architectures(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() has the names"
        raise UserError(f"there is no model {printable(name)!r}; {hint}")
    said = architectures()[name]
    model = model_from_dict(said["model"])
    two = isinstance(model, ClipConfig)
    if num_classes < 0 or num_classes == 1 or (two and num_classes):
        rule = f"{name} has two towers, which name classes by texts" if two else "a classifier has two classes or more"
        raise UserError(f"num_classes = {num_classes}: {rule}; set it to 0")
    preprocess = PreprocessConfig(**{key: said[key] for key in ("crop", "resize", "interpolation")})
    names = tuple(map(str, range(num_classes)))
    mean, std = tuple(said["mean"]), tuple(said["std"])
    return Described(model, names, False, "clip" if two else "", mean, std, preprocess)


# Networks


def _model(library: str, state: State, about: Mapping[str, Any], size: ImageSize) -> BackboneConfig | ClipConfig:
    if library == "OpenCLIP":
        return _clip_of_open_clip(state, about.get("model_cfg", about), size)
    if library == "timm":
        if any(name.endswith(".attn.logit_scale") for name in state):
            return _swin_of_timm(state, about, size)
        return _vit_of_timm(state, about, size)
    if "vision_config" in about:
        return _clip_of_huggingface(state, about, size)
    if huggingface.setting(about, "model_type") == "swinv2":
        return _swin_of_huggingface(about, size)
    return _vit_of_huggingface(state, about, size)


def _vit(state: State, names: Names) -> dict[str, Any]:
    """Fields of a `ViTConfig` that the tensors in a library's `names` show."""
    patches, block = state[f"{names.patches}.weight"], names.block.format(0)
    width, side = patches.shape[0], patches.shape[-1]
    if names.patch_kind == "linear":  # rows are patches of (P, P, 3)
        side = math.isqrt(side // 3)
    out = {
        "size": "B", "width": width, "depth": _depth(state, names.block), "patch_size": side,
        "mlp": state[f"{block}{names.fc2}.weight"].shape[1],
        "heads": max(1, width // 64),  # until it is settled
        "class_token": names.cls_token in state, "patch_bias": f"{names.patches}.bias" in state,
        "registers": state[names.registers].shape[1] if names.registers in state else 0,
        "qk_norm": bool(names.qk_norm) and f"{block}{names.qk_norm[0]}.weight" in state,
        "pre_norm": bool(names.norm_pre) and f"{names.norm_pre}.weight" in state,
        "layer_scale": 1e-5 if names.layer_scale and f"{block}{names.layer_scale[0]}" in state else 0.0,
        "qkv_bias": _biases(state, names, block),
    }  # fmt: skip
    while width % out["heads"]:
        out["heads"] -= 1
    return out


def _biases(state: State, names: Names, block: str) -> str:
    """`ViTConfig.qkv_bias`."""
    if names.qkv_bias and f"{block}{names.qkv_bias[0]}" in state:
        return "no_key"
    there = [f"{block}{name}.bias" in state or f"{block}{name}_bias" in state for name in names.qkv]
    return "all" if all(there) else "no_key" if any(there) else "none"


def _depth(state: State, block: str) -> int:
    """The number of blocks with names such as `block`."""
    pattern = re.compile(re.escape(block).replace(r"\{\}", r"(\d+)"))
    return len({found[1] for found in map(pattern.match, state) if found})


def _vit_of_timm(state: State, about: Mapping[str, Any], size: ImageSize) -> ViTConfig:
    facts = timm_facts(about, "ViT")
    rotary = facts.get("rope_temperature", 0.0)
    names = timm.form_of(ViTConfig(rope_theta=rotary, activation=facts["act_layer"])).names
    pos_embed = "none"
    if names.table in state:
        pos_embed = "patches" if facts.get("no_embed_class") else "all" if names.registers in state else "class"
    return ViTConfig(**_vit(state, names), rope_theta=rotary, pos_embed=pos_embed, image_size=size)


def _vit_of_huggingface(state: State, about: Mapping[str, Any], size: ImageSize) -> ViTConfig:
    names, has, prefix = huggingface.names_of(about)
    state = without_prefix({k: v for k, v in state.items() if not huggingface.is_left_out(k, about)}, prefix)
    if "class" in has["pos_embed"] and names.table in state and names.cls_token not in state:
        has = {**has, "pos_embed": ("patches",)}
    pos_embed = "none" if names.table not in state else has["pos_embed"][0]
    return ViTConfig(**_vit(state, names), pool=has["pool"][0], pos_embed=pos_embed, image_size=size)


def _swin_of_timm(state: State, about: Mapping[str, Any], size: ImageSize) -> SwinV2Config:
    facts = timm_facts(about, "SwinV2")
    patches = state["patch_embed.proj.weight"]
    blocks = [f"layers.{stage}.blocks.{{}}." for stage in range(STAGES)]
    first = blocks[0].format(0)
    return SwinV2Config(
        size="T", width=patches.shape[0], patch_size=patches.shape[-1], roll_first=True,
        depths=tuple(_depth(state, block) for block in blocks),
        heads=tuple(state[f"{block.format(0)}attn.logit_scale"].shape[0] for block in blocks),
        mlp_ratio=state[f"{first}mlp.fc1.weight"].shape[0] // patches.shape[0],
        **_windows(facts["window_size"], facts["pretrained_window_sizes"], patches.shape[-1], size),
    )  # fmt: skip


def _swin_of_huggingface(about: Mapping[str, Any], size: ImageSize) -> SwinV2Config:
    keys = ("embed_dim", "depths", "num_heads", "mlp_ratio", "patch_size", "window_size", "pretrained_window_sizes")
    said = {key: huggingface.setting(about, key) for key in keys}
    width, depths, heads, ratio, patch, window, before = said.values()
    staged = all(isinstance(each, list) and len(each) == STAGES for each in (depths, heads))
    numbers = [width, patch, *depths, *heads] if staged else []
    if not numbers or not all(type(n) is int and 0 < n < 2**31 for n in numbers) or type(ratio) not in (int, float):
        given = ", ".join(f"{key} = {said[key]!r:.30}" for key in keys[:5])
        raise UserError(f"config.json: {given} are none of a SwinV2; get it again")
    return SwinV2Config(
        size="T", width=width, depths=tuple(depths), heads=tuple(heads), mlp_ratio=int(ratio), patch_size=patch,
        **_windows(window, before, patch, size),
    )  # fmt: skip


def _windows(window: Any, before: Any, patch: int, size: ImageSize) -> dict[str, Any]:
    """Fields of windows and of those that the position bias was trained with, which are by stage."""
    here, sides = sides_of(window), [sides_of(w) for w in before] if isinstance(before, list | tuple) else []
    if not here or len(sides) != STAGES or not all(sides):
        raise UserError(f"config.json: windows {window!r:.60} after {before!r:.60} are none of a SwinV2; get it again")
    out = {"window": shortest(here), "image_size": size}
    if any(map(any, sides)):
        # Maps as small as the last window, or, where no window was cut, just large enough for it.
        last = tuple(side * patch * 2 ** (STAGES - 1) for side in sides[-1])
        out |= {"pretrained_window": shortest(sides[0]), "pretrained_image_size": shortest(last)}
    return out


def _clip_of_huggingface(state: State, about: Mapping[str, Any], size: ImageSize) -> ClipConfig:
    form = huggingface_clip.form_of(about)
    vision, text = about["vision_config"], about["text_config"]
    image = {name: value for name, value in state.items() if name.startswith("vision_model.")}
    fields = {name: value for name, value in form.fields.items() if "." not in name}
    of_text = {name.removeprefix("text."): value for name, value in form.fields.items() if name.startswith("text.")}
    words, table = (state[f"text_model.embeddings.{n}_embedding.weight"] for n in ("token", "position"))
    joint = state.get("text_projection.weight", state.get("text_model.head.weight"))
    if joint is None:
        raise KeyError("text_projection.weight")
    tower = TextConfig(
        size="B", width=words.shape[1], vocab_size=words.shape[0], context=table.shape[0],
        depth=_depth(state, "text_model.encoder.layers.{}."),
        mlp=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        heads=huggingface.setting(text, "num_attention_heads"), end_token=words.shape[0] - 1, **of_text,
    )  # fmt: skip
    network = _vit_of_huggingface(image, vision, size)
    return ClipConfig(image=network, text=tower, embed_dim=joint.shape[0], **fields)


def _clip_of_open_clip(state: State, model: Mapping[str, Any], size: ImageSize) -> ClipConfig:
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    if vision.get("timm_model_name"):
        raise UserError(
            f"open_clip_config.json: the image tower is timm's {vision['timm_model_name']}; load the model's folder of "
            "transformers, or train from it by config.checkpoint.weights"
        )
    names = open_clip.VISUAL
    image = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    fields = _vit(image, names) | {"heads": vision.get("width", 768) // vision.get("head_width", 64), "pool": "cls"}
    rest = without_prefix({k: v for k, v in state.items() if not k.startswith("visual.")}, "text.")
    words, joint = rest["token_embedding.weight"], rest["text_projection"]
    tower = TextConfig(
        size="B", width=words.shape[1], vocab_size=words.shape[0], context=rest["positional_embedding"].shape[0],
        depth=_depth(rest, "transformer.resblocks.{}."), heads=text.get("heads", 8), end_token=words.shape[0] - 1,
        mlp=rest["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
    )  # fmt: skip
    return ClipConfig(image=ViTConfig(**fields, image_size=size), text=tower, embed_dim=joint.shape[1])


# Classes, texts, images


def _class_names(state: State, about: Mapping[str, Any]) -> tuple[str, ...]:
    kernel = next((state[n] for n in ("head.weight", "head.fc.weight", "classifier.weight") if n in state), None)
    if kernel is None:
        return ()
    names = about.get("label_names") or (about.get("pretrained_cfg") or {}).get("label_names")
    if isinstance(by_label := about.get("id2label"), dict):
        names = [by_label.get(str(i), i) for i in range(kernel.shape[0])]
    if not isinstance(names, list) or len(names) != kernel.shape[0]:
        names = range(kernel.shape[0])
    return tuple(map(str, names))


def _tokenizer(folder: Path, text: TextConfig, about: Mapping[str, Any]) -> str:
    """A file of the folder, or CLIP's own; a file that is not there is missed when texts come.

    A `tokenizer.model` alone is as `export` writes it; beside others it is read by rules of theirs.
    """
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer_config.json").is_file():
        return str(folder / "tokenizer.model")
    other = about.get("model_cfg", about).get("text_cfg", {}).get("hf_tokenizer_name")
    if text.vocab_size == CLIP_WORDS and text.pool == "end" and not other:
        return "clip"
    return str(folder / "tokenizer.json")


def _of_timm(file: Path, about: Mapping[str, Any]) -> tuple[HeightWidth, PreprocessConfig]:
    """Size and preprocessing of images by timm's `pretrained_cfg`."""
    said = about.get("pretrained_cfg") or {}
    shape = said.get("input_size")
    size = sides_of(shape[1:] if isinstance(shape, list) else about.get("model_args", {}).get("img_size"))
    mode = said.get("crop_mode") or "center"
    if not size or mode not in ("center", "squash"):
        what = f"crop_mode = {mode!r}, which is not known here" if size else "no input_size"
        raise UserError(f"{file}: pretrained_cfg in its config.json has {what}; set input_size, and center or squash")
    crop, how = said.get("crop_pct", 0.875), said.get("interpolation", "bicubic")
    return size, _preprocess(file, crop, "squash" if mode == "squash" else "crop", how)


def _of_open_clip(file: Path, about: Mapping[str, Any]) -> tuple[HeightWidth, PreprocessConfig]:
    """Size and preprocessing of images by OpenCLIP's `preprocess_cfg`."""
    said = about.get("preprocess_cfg") or {}
    size = sides_of(said.get("size") or about.get("model_cfg", about).get("vision_cfg", {}).get("image_size", 224))
    mode = said.get("resize_mode", "shortest")
    how = {"shortest": "crop", "squash": "squash"}.get(mode if isinstance(mode, str) else "")
    if not size or not how:
        raise UserError(f"{file}: preprocess_cfg in its open_clip_config.json is not known here: {said!r:.100}")
    return size, _preprocess(file, 1.0, how, said.get("interpolation", "bicubic"))


def _of_processor(file: Path, about: Mapping[str, Any]) -> tuple[HeightWidth, PreprocessConfig]:
    """Size and preprocessing of images by transformers' `preprocessor_config.json`."""
    path = file.with_name("preprocessor_config.json")
    if not path.is_file():
        raise UserError(
            f"{file}: no {path.name} beside it says how images become what it is given; get the folder again"
        )
    said = files.read_json(path)
    resized, cropped = (_processor_size(said.get(key)) for key in ("size", "crop_size"))
    crops = bool(said.get("do_center_crop", cropped))
    size = cropped if crops and cropped else resized
    resample, factor = said.get("resample"), said.get("rescale_factor", 1 / 255)
    by = _INTERPOLATIONS.get(resample if isinstance(resample, int) else -1)
    plain = said.get("do_resize", True) and isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-3)
    # Files of older versions have one number, which is that of the shorter edge where there is a crop.
    shorter = "shortest_edge" in said["size"] if isinstance(said.get("size"), dict) else crops
    sizes = size and resized and min(*size, *resized) > 0 and max(*size, *resized) <= LARGEST
    if not sizes or not by or not plain or (shorter and not crops):
        keys = ("size", "crop_size", "do_center_crop", "resample", "do_resize", "rescale_factor")
        given = ", ".join(f"{key} = {said[key]!r:.60}" for key in keys if key in said)
        raise UserError(
            f"{path}: this preprocessing is not known here: {given or 'nothing is said'}; use another model"
        )
    kept = size[0] / resized[0]
    while math.floor(size[0] / kept) < resized[0]:  # which is what is resized to
        kept = math.nextafter(kept, 0)
    return size, _preprocess(file, kept, "crop" if shorter else "squash", by)


def _processor_size(value: Any) -> HeightWidth | None:
    if isinstance(value, dict):
        edge = value.get("shortest_edge")
        value = edge if edge else [value.get("height"), value.get("width")]
    return sides_of(value)


def _preprocess(file: Path, crop: Any, resize: str, interpolation: Any) -> PreprocessConfig:
    if not isinstance(crop, int | float) or not 0.01 <= crop <= 1 or interpolation not in _INTERPOLATIONS.values():
        raise UserError(
            f"{file}: images are cropped to {crop!r:.20} and resized by {interpolation!r:.20}; set a share up to 1 and "
            f"{' or '.join(_INTERPOLATIONS.values())}"
        )
    return PreprocessConfig(crop=float(crop), resize=resize, interpolation=interpolation)
