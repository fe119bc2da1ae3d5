"""Write the frozen references of `test_dialect_parity.py`: tiny ViTs of the dialects in which public weights exist.

    python tests/parity/make_dialects.py

needs what `make_vit.py` needs, and open_clip_torch. Each `dialect_*.npz` holds the model at the resolution of its
position table and at another one, which is not square and larger along one side, smaller along the other:

    params         weights, one behind the other, random in every tensor; float16, exact
    images0, 1     (B, H, W, 3) float16, exact
    outputs0, 1    (B, D) float32, pooled features, or logits where there is a classifier
    cotangent      (B, D) float16, exact
    gradients      (2, …) float32, of both, d(sum of outputs * cotangent)/d(param), computed in double precision, at
                   most 511 elements of each tensor (`gates.sample`)
    about          JSON: the weights' names on disk and shapes, our configuration, what the importer asks for, versions,
                   torch's own fp32 error
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import open_clip
import safetensors
import timm
import torch
import transformers
from gates import sample
from make_vit import HERE, randomise, relative
from open_clip.transformer import VisionTransformer as OpenClipViT
from safetensors.numpy import load_file
from timm.layers import SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

WIDTH, DEPTH, HEADS, MLP, PATCH, SIZE = 16, 2, 2, 24, 4, 16
OTHER, BATCH = (12, 24), 3
SHAPE = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp": MLP, "patch_size": PATCH, "image_size": SIZE}


def timm_vit(classes: int = 0, eps: float = 1e-6, **more: Any) -> torch.nn.Module:
    """A `VisionTransformer`."""
    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=classes,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=eps), dynamic_img_size=True,
        **{"mlp_ratio": MLP / WIDTH, **more},
    )  # fmt: skip


def timm_dinov3(**more: Any) -> torch.nn.Module:
    """An `Eva` as timm's DINOv3 models have it."""
    return Eva(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0,
        mlp_ratio=MLP / WIDTH, init_values=1e-5, rope_type="dinov3", rope_temperature=100, use_rot_pos_emb=True,
        use_abs_pos_emb=False, rope_rotate_half=True, num_reg_tokens=4, use_fc_norm=False, dynamic_img_size=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5), **more,
    )  # fmt: skip


def facts(**more: Any) -> dict[str, Any]:
    """What `vit_from_timm` asks for."""
    return {"num_heads": HEADS, "global_pool": "token", "norm_eps": 1e-6, "act_layer": "gelu", **more}


def huggingface(name: str, **more: Any) -> torch.nn.Module:
    """A model of transformers, by the beginning of its class's name."""
    config, model = getattr(transformers, f"{name.partition('For')[0]}Config"), name
    if "For" not in name:
        model = f"{name}Model"
    shape = {"intermediate_size": MLP, "image_size": SIZE}
    if name.startswith("Dinov2"):
        shape = {"mlp_ratio": 2, "image_size": SIZE}  # 32 channels, or 24 with a gate
    if name.startswith("Siglip2"):
        shape = {"intermediate_size": MLP, "num_patches": (SIZE // PATCH) ** 2}
    return getattr(transformers, model)(
        config(
            hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, patch_size=PATCH, **shape, **more
        )
    )  # fmt: skip


def openclip(**more: Any) -> torch.nn.Module:
    """OpenCLIP's own image tower, with its projection."""
    return OpenClipViT(SIZE, PATCH, WIDTH, DEPTH, HEADS, MLP / WIDTH, output_dim=8, **more)


REGISTERS = {"registers": 4, "layer_scale": 1e-5}
DINOV3 = {**REGISTERS, "pos_embed": "none", "rope_theta": 100.0, "norm_eps": 1e-5}
SIGLIP = {"pool": "map", "activation": "gelu_tanh"}
CLIP = {"pool": "cls", "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5, "activation": "quick_gelu"}

# name: the model, our configuration beside `SHAPE`, what the importer asks for (of transformers: config.json)
CASES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], dict[str, Any] | None]] = {
    "timm_augreg": (lambda: timm_vit(5), {"pool": "cls"}, facts()),
    "timm_deit3": (
        lambda: timm_vit(5, no_embed_class=True, init_values=1e-6),
        {"pool": "cls", "pos_embed": "patches", "layer_scale": 1e-6},
        facts(no_embed_class=True),
    ),
    "timm_dinov2": (
        lambda: timm_vit(init_values=1e-5, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=2 * MLP / WIDTH),
        {"pool": "cls", "layer_scale": 1e-5, "activation": "swiglu"},
        facts(act_layer="swiglu"),
    ),
    "timm_dinov2_registers": (
        lambda: timm_vit(init_values=1e-5, reg_tokens=4, no_embed_class=True),
        {"pool": "cls", "pos_embed": "patches", **REGISTERS},
        facts(no_embed_class=True),
    ),
    "timm_clip": (
        lambda: timm_vit(eps=1e-5, pre_norm=True, act_layer="quick_gelu"),
        CLIP,
        facts(norm_eps=1e-5, act_layer="quick_gelu"),
    ),
    "timm_siglip": (
        lambda: timm_vit(class_token=False, global_pool="map", act_layer="gelu_tanh"),
        SIGLIP,
        facts(global_pool="map", act_layer="gelu_tanh"),
    ),
    "timm_qk_norm": (  # and a table that covers registers, a class token that is not read, no bias of q, k and v
        lambda: timm_vit(qk_norm=True, reg_tokens=2, global_pool="avg", qkv_bias=False),
        {"pool": "gap", "class_token": True, "registers": 2, "pos_embed": "all", "qk_norm": True, "qkv_bias": "none"},
        facts(global_pool="avg"),
    ),
    "timm_dinov3": (
        lambda: timm_dinov3(qkv_bias=False, global_pool="avg"),
        {**DINOV3, "pool": "norm_gap", "class_token": True, "qkv_bias": "none"},
        facts(global_pool="avg", norm_eps=1e-5, rope_temperature=100.0),
    ),
    "timm_dinov3_qkvb": (
        lambda: timm_dinov3(qkv_bias=True, global_pool="token", swiglu_mlp=True, swiglu_align_to=8),
        {**DINOV3, "pool": "cls", "qkv_bias": "no_key", "activation": "swiglu"},
        facts(norm_eps=1e-5, act_layer="swiglu", rope_temperature=100.0),
    ),
    "huggingface_augreg": (
        lambda: huggingface("ViTForImageClassification", num_labels=5, layer_norm_eps=1e-6),
        {"pool": "cls"},
        None,
    ),
    "huggingface_dinov2": (
        lambda: huggingface("Dinov2ForImageClassification", num_labels=5),
        {"pool": "cls_gap", "layer_scale": 1.0, "mlp": 32},
        None,
    ),
    "huggingface_dinov2_swiglu": (
        lambda: huggingface("Dinov2", use_swiglu_ffn=True),
        {"pool": "cls", "layer_scale": 1.0, "activation": "swiglu"},
        None,
    ),
    "huggingface_dinov2_registers": (
        lambda: huggingface("Dinov2WithRegisters", num_register_tokens=4),
        {"pool": "cls", **REGISTERS, "mlp": 32},
        None,
    ),
    "huggingface_dinov3": (
        lambda: huggingface("DINOv3ViT", num_register_tokens=4),
        {**DINOV3, "pool": "cls", "qkv_bias": "no_key"},
        None,
    ),
    "huggingface_dinov3_swiglu": (
        lambda: huggingface("DINOv3ViT", num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
        {**DINOV3, "pool": "cls", "qkv_bias": "no_key", "activation": "swiglu"},
        None,
    ),
    "huggingface_clip": (lambda: huggingface("CLIPVision"), CLIP, None),
    "huggingface_siglip": (lambda: huggingface("SiglipVision"), SIGLIP, None),
    "huggingface_siglip2": (lambda: huggingface("Siglip2Vision"), SIGLIP, None),
    "openclip_quickgelu": (
        lambda: openclip(act_layer=open_clip.transformer.QuickGELU),
        CLIP,
        {
            "quick_gelu": True,
            "embed_dim": 8,
            "vision_cfg": {
                "image_size": SIZE,
                "patch_size": PATCH,
                "layers": DEPTH,
                "width": WIDTH,
                "head_width": WIDTH // HEADS,
                "mlp_ratio": MLP / WIDTH,
            },
        },
    ),
}
# Each library's and model's own way to take its position table to other images.
RESIZE = {"huggingface_siglip2": "bilinear_antialias", "huggingface_dinov2_registers": "bicubic_antialias"}


def outputs(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Pooled features or logits of images (B, 3, H, W)."""
    kind = type(model).__name__
    if isinstance(model, OpenClipViT):  # whose loader resizes the table so (`open_clip.model.resize_pos_embed`)
        table, grid = model.positional_embedding, [side // PATCH for side in images.shape[2:]]
        patches = table[1:].reshape(1, SIZE // PATCH, SIZE // PATCH, -1).permute(0, 3, 1, 2)
        patches = torch.nn.functional.interpolate(patches, grid, mode="bicubic", antialias=True, align_corners=False)
        resized = torch.cat([table[:1], patches.permute(0, 2, 3, 1).reshape(-1, WIDTH)])
        table = table if grid == [SIZE // PATCH] * 2 else resized
        return torch.func.functional_call(model, {"positional_embedding": table}, (images,))
    if not isinstance(model, transformers.PreTrainedModel):
        return model(images)
    if kind.startswith("Siglip2"):
        B, _, H, W = images.shape
        patches = images.reshape(B, 3, H // PATCH, PATCH, W // PATCH, PATCH).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(B, -1, PATCH * PATCH * 3)
        mask = torch.ones(patches.shape[:2], dtype=torch.int64)
        sides = torch.tensor([[H // PATCH, W // PATCH]] * B)
        return model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=sides).pooler_output
    interpolate = {} if kind.startswith("D") else {"interpolate_pos_encoding": True}  # DINO's always do
    out = model(images, **interpolate)
    return out.logits if "For" in kind else out.pooler_output


def on_disk(model: torch.nn.Module) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state in the names that the library writes to files, and config.json."""
    if isinstance(model, OpenClipViT):
        return {f"visual.{name}": value.detach().numpy().copy() for name, value in model.state_dict().items()}, {}
    if not isinstance(model, transformers.PreTrainedModel):
        return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}, {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        return load_file(Path(folder) / "model.safetensors"), config


def run(model: torch.nn.Module, images: torch.Tensor, cotangent: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Outputs, and the gradient of their product with the cotangent."""
    model.zero_grad()
    out = outputs(model, images)
    (out * cotangent).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return out.detach(), grads


def make(name: str, seed: int) -> None:
    """Write one file."""
    build, fields, asked = CASES[name]
    torch.manual_seed(seed)
    model = build().eval()
    randomise(model, seed)
    state, config = on_disk(model)
    out = {"params": np.concatenate([v.ravel() for v in state.values()]).astype(np.float16)}
    rows, error = [], {"outputs": [], "gradients": []}
    for i, size in enumerate(((SIZE, SIZE), OTHER)):
        images = torch.randn(BATCH, 3, *size).half().float()
        width = outputs(model, images).shape[-1]
        cotangent = torch.randn(BATCH, width, generator=torch.Generator().manual_seed(seed)).half().float()
        plain, gradients = run(model, images, cotangent)
        model.double()
        exact, exact_gradients = run(model, images.double(), cotangent.double())
        model.float()
        randomised = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():  # the library itself then gives the gradients their names on disk
            for key, p in model.named_parameters():
                p.copy_(exact_gradients[key])
            named = on_disk(model)[0]
            rows.append(np.concatenate([sample(named[k]) for k in state]))
            for key, p in model.named_parameters():
                p.copy_(randomised[key])
        out[f"images{i}"] = images.permute(0, 2, 3, 1).numpy().astype(np.float16)
        out[f"outputs{i}"], out["cotangent"] = plain.numpy(), cotangent.numpy().astype(np.float16)
        error["outputs"].append(relative({"": plain}, {"": exact}))
        error["gradients"].append(relative(gradients, exact_gradients))
    library = name.partition("_")[0]
    how = RESIZE.get(name, "bicubic" if library == "huggingface" else "bicubic_antialias")
    about = {
        "library": library, "config": {**SHAPE, "pos_resize": how, **fields}, "asked": asked or config,
        "shapes": {k: v.shape for k, v in state.items()}, "peer_error": error,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
            "transformers": transformers.__version__, "open_clip": open_clip.__version__,
            "safetensors": safetensors.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    path = HERE / f"dialect_{name}.npz"
    np.savez_compressed(path, **out, gradients=np.stack(rows), about=np.array(json.dumps(about)))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {error}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for i, case in enumerate(CASES):
        make(case, seed=i)
