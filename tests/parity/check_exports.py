"""Open exported folders in the libraries that they are for, and compare what is computed there with ours.

    python tests/parity/check_exports.py write FOLDER [RUN ...]     # where this project is installed
    peers/bin/python tests/parity/check_exports.py compare FOLDER   # where timm, transformers and OpenCLIP are

`write` makes tiny models with every number random, or loads trained runs, exports each in every form that it has, and
keeps beside each folder what our network computes on random pixels, and what our preprocessing makes of an image. The
weights of runs are in several files with an index, where the library reads that, and must be read back to the bit.
`compare` prints the relative error (largest difference / largest value) of each, and how many grey levels the library's
own preprocessing is off; it ends with 1 if one is past its gate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
GATE, GREY = 3e-6, 3.0  # relative error; mean difference of pixels, of 255
CLASSES = 5


# What is exported: ours


def vit(**more: Any) -> Any:
    """A tiny ViT."""
    from visionfm_jax.models.backbones.vit import ViTConfig

    size = {"width": 48, "depth": 3, "heads": 3, "mlp": 96, "patch_size": 8, "image_size": 32}
    return ViTConfig(**{"size": "P", **size, **more})


def swin(**more: Any) -> Any:
    """A tiny SwinV2."""
    from visionfm_jax.models.backbones.swin_v2 import SwinV2Config

    size = {"width": 16, "depths": (1, 2, 2, 1), "heads": (1, 2, 4, 8), "image_size": 64, "window": 4}
    return SwinV2Config(**{"size": "P", **size, **more})


DINOV2 = {"layer_scale": 0.1, "mlp": 192}
DINOV3 = {"pos_embed": "none", "rope_theta": 100.0, "norm_eps": 1e-5, "layer_scale": 0.1, "registers": 4, "pool": "cls",
          "qkv_bias": "no_key"}  # fmt: skip
CLIP_VIT = {"pool": "cls", "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5}


def cases() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Name, task (classes, backbone or pairs), network, and settings beside it."""
    yield "vit_cls", "classes", vit(pool="cls"), {}
    yield "vit_gap", "classes", vit(pool="gap", activation="gelu_tanh", mlp=100), {}
    yield "vit_norm_gap", "classes", vit(pool="norm_gap", class_token=True, registers=2, pos_embed="all"), {}
    yield "vit_map", "classes", vit(pool="map", pos_embed="patches", qk_norm=True), {}
    yield "vit_patches", "classes", vit(pool="cls", pos_embed="patches", layer_scale=0.1, qkv_bias="none"), {}
    yield "vit_registers", "classes", vit(pool="cls", registers=4, layer_scale=0.1), {}
    yield "vit_clip", "classes", vit(**CLIP_VIT, activation="quick_gelu"), {}
    yield "vit_swiglu", "classes", vit(pool="cls", activation="swiglu", mlp=72), {}
    yield "vit_not_square", "classes", vit(pool="cls", image_size=(32, 48)), {"resize": "squash"}
    yield "vit_resized", "classes", vit(pool="cls", pos_image_size=64, pos_resize="bicubic"), {"crop": 0.875}
    yield "vit_evaluated_larger", "classes", vit(pool="cls"), {"eval_size": 48}
    yield "vit_rope", "classes", vit(**DINOV3), {}
    yield "vit_rope_gap", "classes", vit(**DINOV3 | {"pool": "norm_gap", "qkv_bias": "none", "qk_norm": True}), {}
    yield "swin", "classes", swin(), {"crop": 0.875, "interpolation": "bilinear"}
    yield "swin_pretrained", "classes", swin(pretrained_window=2, pretrained_image_size=32, window=8), {}
    yield "swin_roll_first", "classes", swin(image_size=52, roll_first=True), {}
    yield "swin_evaluated_larger", "classes", swin(), {"eval_size": 128}
    yield "dinov2", "classes", vit(**DINOV2, pool="cls_gap"), {}
    yield "dinov2_swiglu", "classes", vit(layer_scale=0.1, pool="cls_gap", activation="swiglu", mlp=128), {}
    yield "dinov2_registers", "classes", vit(**DINOV2, pool="cls_gap", registers=4), {}
    yield "backbone_vit", "backbone", vit(pool="cls"), {}
    yield "backbone_dinov2", "backbone", vit(**DINOV2, pool="cls"), {}
    yield "backbone_rope", "backbone", vit(**DINOV3), {}
    yield "backbone_rope_swiglu", "backbone", vit(**DINOV3 | {"activation": "swiglu", "mlp": 80}), {}
    yield "backbone_siglip", "backbone", vit(pool="map", pos_embed="patches", activation="gelu_tanh"), {}
    yield "backbone_clip", "backbone", vit(**CLIP_VIT), {}
    yield "backbone_swin", "backbone", swin(), {}
    yield "clip", "pairs", vit(**CLIP_VIT), {"tokenizer": "clip"}
    yield "clip_quick", "pairs", vit(**CLIP_VIT, activation="quick_gelu"), {"text": {"activation": "quick_gelu"}}
    yield "clip_no_pre", "pairs", vit(**CLIP_VIT | {"pre_norm": False, "layer_scale": 0.1}), {"loss": "sigmoid"}
    siglip = vit(pool="map", pos_embed="patches")
    text = {"pool": "last", "causal": False, "norm_eps": 1e-6, "activation": "gelu_tanh"}
    joint = {"image_projection": False, "text_bias": True, "embed_dim": 48}
    yield "siglip", "pairs", siglip, {"text": text, "joint": joint, "loss": "sigmoid"}


def made(task: str, network: Any, more: dict[str, Any]) -> Any:
    """The configuration of a run."""
    from visionfm_jax.config import PreprocessConfig
    from visionfm_jax.config.load import load_file
    from visionfm_jax.models.clip import ClipConfig
    from visionfm_jax.models.text import TextConfig

    file = {"classes": "quickstart.py", "backbone": "vit_huge_dino.py:tiny", "pairs": "swinv2_g_clip.py:tiny"}[task]
    config = load_file(f"{ROOT}/configs/{file}")
    config.model, config.train.precision = network, "fp32"
    config.data.augment.mean, config.data.augment.std = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)
    config.evals = config.evals[:1]
    how = {"crop": 1.0, **{name: more[name] for name in ("crop", "resize", "interpolation") if name in more}}
    config.evals[0].preprocess = PreprocessConfig(**how)
    config.evals[0].image_size = more.get("eval_size", 0)
    if task == "classes":
        config.task.num_classes = CLASSES
    if task == "pairs":
        ours = more.get("tokenizer", "") == "clip"
        shape = {"width": 32, "depth": 2, "heads": 2, "mlp": 64, "context": 12}
        vocabulary = {"vocab_size": 49408, "end_token": 49407} if ours else {"vocab_size": 60, "end_token": 40}
        text = TextConfig(**{**shape, **vocabulary, **more.get("text", {})})
        config.model = ClipConfig(**{"image": network, "text": text, "embed_dim": 24, **more.get("joint", {})})
        config.task.tokenizer = "clip" if ours else "emoji"
        config.task.loss = more.get("loss", "softmax")
    return config


def random_like(shapes: Any) -> Any:
    """Parameters of which no number is zero or one: matrices keep the scale of what passes."""
    import jax

    random = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        value = random.standard_normal(leaf.shape, np.float32)
        name = jax.tree_util.keystr(path)
        if "kernel" in name or "projection" in name:
            return value * np.float32(leaf.shape[-2] ** -0.5)
        one = 2.0 if name.endswith("['scale']") and len(leaf.shape) < 2 and "attn" in name else 1.0
        return np.float32(0.1) * value + np.float32(one * name.endswith("['scale']"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def ours(model: Any, images: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, pooled features or embeddings of normalised images (B, H, W, 3)."""
    import jax.numpy as jnp

    from visionfm_jax.models.clip import Clip, ClipConfig
    from visionfm_jax.models.heads import Classifier
    from visionfm_jax.models.layers import no_gather

    config, variables = model.config, {"params": model.params}
    if isinstance(config.model, ClipConfig):
        net = Clip(config.model, sigmoid=config.task.loss == "sigmoid")
        out = net.apply(variables, images, tokens)
        return {"image": out.image, "text": out.text, "pooled": net.apply(variables, images, method=Clip.features)}
    backbone = config.model.make(jnp.float32, no_gather)
    if hasattr(config.task, "num_classes"):
        return {"logits": Classifier(backbone, config.task.num_classes).apply(variables, images)}
    return {"pooled": backbone.apply(variables, images).pooled}


def photo() -> Image.Image:
    """Smooth, so that filters of two libraries agree, in colours, wider than high."""
    y, x = np.mgrid[:90, :120] / 90
    channels = [np.sin(5 * x + 2 * y), np.cos(4 * y - x), np.sin(3 * x * y + 1)]
    return Image.fromarray((127.5 * (1 + np.stack(channels, -1))).astype(np.uint8))


def write(folder: Path, only: str, runs: list[Path]) -> None:
    """Each case, or run, in each form that it has."""
    import jax

    from visionfm_jax.api import Model, load
    from visionfm_jax.errors import UserError
    from visionfm_jax.export import LARGEST, export
    from visionfm_jax.interop.hub import FOLDERS
    from visionfm_jax.models.clip import ClipConfig
    from visionfm_jax.parallel.mesh import make_mesh
    from visionfm_jax.train.step import Trainer

    def models() -> Iterator[tuple[str, Model]]:
        yield from ((run.name, load(run)) for run in runs)
        for name, task, network, more in () if runs else cases():
            if only in name:
                trainer = Trainer(made(task, network, more), make_mesh(1, jax.devices()[:1]))
                names = tuple(f"class {i}" for i in range(CLASSES)) if task == "classes" else ()
                yield name, Model(trainer, random_like(trainer.shapes.params), names)

    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes nearly all of the time
    random = np.random.default_rng(1)
    for name, model in models():
        size = model.transform.size
        height, width = (size, size) if isinstance(size, int) else size
        images = random.standard_normal((2, height, width, 3), np.float32)
        tokens = random.integers(3, 39, (2, 12))
        if isinstance(model.config.model, ClipConfig):
            tokens = random.integers(3, 39, (2, model.config.model.text.context))
            tokens[0, 5:], tokens[1, 9:] = 0, 0
            tokens[[0, 1], [4, 8]] = model.config.model.text.end_token
        pixels = model.transform(np.asarray(photo()))
        found = {**ours(model, images, tokens), "images": images, "tokens": tokens, "pixels": pixels}
        augment = model.config.data.augment
        found |= {
            "mean": np.float32(augment.mean),
            "std": np.float32(augment.std),
            "names": np.array(model.class_names),
        }
        refused = {}
        for to in FOLDERS:
            where = folder / name / to
            try:
                export(model, to, where, largest=200_000 if runs else LARGEST)
                if runs:
                    require_same(model, load(where))
                np.savez(where.with_suffix(".npz"), **found)
            except UserError as error:
                refused[to] = str(error)
        print(name, *(f"\n    {line}" for line in refused.values()), flush=True)


def require_same(model: Any, again: Any) -> None:
    """What was exported and is read back has the very numbers, those of the image tower at least."""
    import jax

    ours, theirs = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(m.params)}
        for m in (model, again)
    )
    ours = {name.removeprefix("['image']") if name not in theirs else name: value for name, value in ours.items()}
    assert theirs.keys() <= ours.keys(), theirs.keys() - ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(value, ours[name], name)


# What is compared: the libraries


def timm_outputs(folder: Path, images: Any, tokens: Any) -> Iterator[tuple[str, Any, np.ndarray]]:
    """What is computed, as ours names it; and what the library's transform makes of the photo."""
    import timm
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    name = "logits" if model.num_classes else "pooled"
    yield name, model(images), transform(photo())[None].numpy()
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(photo(), return_tensors="pt")["pixel_values"].numpy()
    wrapped = (AutoModelForImageClassification if model.num_classes else AutoModel).from_pretrained(folder).eval()
    out = wrapped(images)
    yield name, out.logits if model.num_classes else out.pooler_output, pixels


def transformers_outputs(folder: Path, images: Any, tokens: Any) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Likewise."""
    import transformers

    about = json.loads((folder / "config.json").read_text())
    name = about["architectures"][0]
    more = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **more)
    missing = [key for key in info["missing_keys"] if not key.endswith("mask_token")]
    assert not missing, missing
    assert not info["unexpected_keys"], info["unexpected_keys"]
    model.eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(photo(), return_tensors="pt")["pixel_values"].numpy()
    if name in ("CLIPModel", "SiglipModel"):
        image, text = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
        yield "image", getattr(image, "pooler_output", image), pixels
        yield "text", getattr(text, "pooler_output", text), pixels
        return
    out = model(pixel_values=images)
    if "ForImageClassification" in name:
        yield "logits", out.logits, pixels
    else:
        yield "pooled", out.last_hidden_state[:, 0] if name == "ViTModel" else out.pooler_output, pixels


def open_clip_outputs(folder: Path, images: Any, tokens: Any) -> Iterator[tuple[str, Any, np.ndarray]]:
    """Likewise."""
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    yield "image", model.encode_image(images), transform(photo())[None].numpy()
    yield "text", model.encode_text(tokens), transform(photo())[None].numpy()


OUTPUTS: dict[str, Callable[..., Iterator[tuple[str, Any, np.ndarray]]]] = {
    "timm": timm_outputs, "transformers": transformers_outputs, "open_clip": open_clip_outputs,
}  # fmt: skip


def compare(folder: Path, only: str) -> int:
    """Each folder that was written."""
    import torch

    torch.set_num_threads(1)
    worst = 0
    for file in sorted(folder.glob("*/*.npz")):
        if only not in str(file):
            continue
        with np.load(file) as kept:
            found = dict(kept)
        about = file.with_suffix("") / "config.json"
        if file.stem == "transformers" and "id2label" in (about := json.loads(about.read_text())):
            assert list(about["id2label"].values()) == found["names"].tolist()
        images = torch.from_numpy(found["images"].transpose(0, 3, 1, 2).copy())
        tokens = torch.from_numpy(found["tokens"])
        with torch.no_grad():
            for name, theirs, pixels in OUTPUTS[file.stem](file.with_suffix(""), images, tokens):
                expected = found[name]
                error = np.abs(theirs.numpy() - expected).max() / np.abs(expected).max()
                grey = np.abs((pixels[0].transpose(1, 2, 0) * found["std"] + found["mean"]) * 255 - found["pixels"])
                past = bool(error > GATE or grey.mean() > GREY)
                worst += past
                line = f"{file.parent.name:22} {file.stem:13} {name:7} {error:.1e}"
                line += f"   grey levels: mean {grey.mean():.2f}, most {grey.max():.0f}"
                print(line + "   PAST THE GATE" * past, flush=True)
    print(f"{worst} past the gates of {GATE:g} and {GREY:g}")
    return int(worst > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "compare"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="*", type=Path, help="of write: folders of runs, in place of random weights")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    arguments = parser.parse_args()
    if arguments.what == "compare":
        sys.exit(compare(arguments.folder, arguments.only))
    write(arguments.folder, arguments.only, arguments.runs)
