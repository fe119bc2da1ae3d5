"""A trained network as the folder of another library: its weights, and the JSON files that say what they are.

`timm_folder`, `transformers_folder` and `open_clip_folder` are pure functions of arrays and settings; what they give is
what `interop.pretrained` reads, to the bit. A network that a library does not have is refused.

Shapes: H W image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config.limits import HeightWidth, shortest
from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import vit_huggingface_config, vit_to_huggingface
from visionfm_jax.interop.huggingface_clip import clip_huggingface_config, clip_to_huggingface
from visionfm_jax.interop.leaves import Params
from visionfm_jax.interop.open_clip import clip_open_clip_config, text_to_open_clip, visual_to_open_clip
from visionfm_jax.interop.swin_v2 import (
    swin_v2_huggingface_config,
    swin_v2_timm_config,
    swin_v2_to_huggingface,
    swin_v2_to_timm,
)
from visionfm_jax.interop.timm import vit_timm_config, vit_to_timm
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig

FILTERS = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers


class Pixels(NamedTuple):
    """How an image becomes what the network is given.

    Attributes:
      size: (H, W).
      mean, std: (3,), of values in [0, 1].
      crop: share of each side that is kept.
      squash: the whole image takes the network's aspect ratio, before the crop; else the centre is seen.
      interpolation: bicubic or bilinear.
    """

    size: HeightWidth
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: float = 1.0
    squash: bool = False
    interpolation: str = "bicubic"

    @property
    def resized(self) -> HeightWidth:
        """To which an image is resized before the crop."""
        return tuple(math.floor(side / self.crop) for side in self.size)


class Trained(NamedTuple):
    """A trained network.

    Attributes:
      params: its tree, NumPy arrays, with `head` if it has a classifier.
      config: of the backbone or the model of two towers; its `image_size` is that of `pixels`.
      pixels: what it is given.
      names: of the classes, by label; (): no classifier.
      sigmoid: two towers whose logits have a bias.
    """

    params: Params
    config: ViTConfig | SwinV2Config | ClipConfig
    pixels: Pixels
    names: tuple[str, ...] = ()
    sigmoid: bool = False


class Folder(NamedTuple):
    """What a library opens.

    Attributes:
      library: its name on hubs.
      tensors: by name.
      weights: the file that holds them.
      texts: JSON files by name.
      indexed: the library reads weights in several files, by an index.
    """

    library: str
    tensors: dict[str, np.ndarray]
    weights: str
    texts: dict[str, dict[str, Any]]
    indexed: bool = False


def timm_settings(trained: Trained) -> dict[str, Any]:
    """What timm's `config.json` says of the network.

    Raises:
      UserError: timm has no such network.
    """
    if isinstance(trained.config, ViTConfig):
        return vit_timm_config(trained.config)
    if isinstance(trained.config, SwinV2Config):
        return swin_v2_timm_config(trained.config)
    raise UserError("timm has no such network: it has no models of two towers")


def transformers_settings(trained: Trained) -> dict[str, Any]:
    """What transformers' `config.json` says of the network.

    Raises:
      UserError: transformers has no such network.
    """
    if isinstance(trained.config, ClipConfig):
        return clip_huggingface_config(trained.config, trained.sigmoid)
    if isinstance(trained.config, ViTConfig):
        return vit_huggingface_config(trained.config, bool(trained.names))
    return swin_v2_huggingface_config(trained.config, bool(trained.names))


def open_clip_settings(trained: Trained) -> dict[str, Any]:
    """What OpenCLIP's `open_clip_config.json` says of the network.

    Raises:
      UserError: OpenCLIP has no such network.
    """
    if isinstance(trained.config, ClipConfig):
        return clip_open_clip_config(trained.config, trained.sigmoid)
    raise UserError("OpenCLIP has no such network: it has models of an image and a text tower")


SETTINGS = {"timm": timm_settings, "transformers": transformers_settings, "open_clip": open_clip_settings}


def timm_folder(trained: Trained) -> Folder:
    """As timm's own folders on hubs: `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    Raises:
      UserError: timm has no such network.
    """
    settings, (params, config, pixels, names, _) = timm_settings(trained), trained
    if isinstance(config, ViTConfig):
        classifier, tensors = "head", vit_to_timm(params, config)
    else:
        classifier = "head.fc"
        tensors = _with_head(swin_v2_to_timm, params, classifier)
    height, width = pixels.size
    pretrained_cfg = {
        "custom_load": False, "input_size": [3, height, width], "fixed_input_size": True, "pool_size": None,
        "interpolation": pixels.interpolation, "crop_pct": pixels.crop,
        "crop_mode": "squash" if pixels.squash else "center", "mean": list(pixels.mean), "std": list(pixels.std),
        "num_classes": len(names), "first_conv": "patch_embed.proj", "classifier": classifier,
    }  # fmt: skip
    about = {**settings, "num_classes": len(names), "pretrained_cfg": pretrained_cfg}
    about |= {"label_names": list(names)} if names else {}
    return Folder("timm", tensors, "model.safetensors", {"config.json": about})


def transformers_folder(trained: Trained) -> Folder:
    """As `save_pretrained` of transformers writes them, with the preprocessing of images.

    Raises:
      UserError: transformers has no such network.
    """
    settings, (params, config, pixels, names, _) = transformers_settings(trained), trained
    if isinstance(config, ClipConfig):
        tensors = clip_to_huggingface(params, config, settings["model_type"])
    elif isinstance(config, ViTConfig):
        tensors = vit_to_huggingface(params, config, settings["model_type"])
    else:
        tensors = _with_head(swin_v2_to_huggingface, params, "classifier")
    settings = {**settings, "dtype": "float32"}
    if names:
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    texts = {"config.json": settings, "preprocessor_config.json": _image_processor(pixels)}
    return Folder("transformers", tensors, "model.safetensors", texts, indexed=True)


def open_clip_folder(trained: Trained) -> Folder:
    """As OpenCLIP's own folders on hubs: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

    Raises:
      UserError: OpenCLIP has no such network.
    """
    model_cfg, (params, config, pixels, _, _) = open_clip_settings(trained), trained
    visual = params["image"] | {"projection": params["image_projection"]}
    tensors = visual_to_open_clip(visual, config.image) | text_to_open_clip(params)
    preprocess_cfg = {
        "size": shortest(pixels.size), "mode": "RGB", "mean": list(pixels.mean), "std": list(pixels.std),
        "interpolation": pixels.interpolation, "resize_mode": "squash" if pixels.squash else "shortest",
    }  # fmt: skip
    about = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    return Folder("open_clip", tensors, "open_clip_model.safetensors", {"open_clip_config.json": about})


FOLDERS = {"timm": timm_folder, "transformers": transformers_folder, "open_clip": open_clip_folder}


def other_pixels(library: str, pixels: Pixels) -> str:
    """How a library's images differ from what `pixels` says, for people; "": they do not."""
    height, width = pixels.size
    if library == "open_clip" and pixels.crop < 1:
        return f"OpenCLIP shows the model all of an image, where its evaluation kept {pixels.crop:.4g} of each side"
    if library == "transformers" and height != width and not pixels.squash:
        return "transformers takes the whole image to the model's aspect ratio, where its evaluation cut out the centre"
    return ""


def _image_processor(pixels: Pixels) -> dict[str, Any]:
    """transformers' `preprocessor_config.json`; not square, and not squashed, it squashes nonetheless."""
    (height, width), resized = pixels.size, pixels.resized
    whole = pixels.squash or height != width
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"height": resized[0], "width": resized[1]} if whole else {"shortest_edge": resized[0]},
        "resample": FILTERS[pixels.interpolation], "do_center_crop": True,
        "crop_size": {"height": height, "width": width}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(pixels.mean), "image_std": list(pixels.std),
    }  # fmt: skip


def _with_head(to: Any, params: Params, name: str) -> dict[str, np.ndarray]:
    """A state of features, and under `name` of the classifier, if there is one."""
    tensors = to({key: value for key, value in params.items() if key != "head"})
    if "head" in params:
        tensors |= {f"{name}.weight": np.ascontiguousarray(np.asarray(params["head"]["kernel"]).T)}
        tensors |= {f"{name}.bias": np.asarray(params["head"]["bias"])}
    return tensors


def parts_of(tensors: Mapping[str, np.ndarray], weights: str, most: int) -> dict[str, Sequence[str]]:
    """The names of tensors by file, in order: one file, or several of at most `most` bytes, or of one tensor."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    if len(parts) == 1:
        return {weights: parts[0]}
    stem, count = weights.removesuffix(".safetensors"), len(parts)
    return {f"{stem}-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(parts, 1)}
