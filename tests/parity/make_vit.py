"""Write the frozen references of `test_vit_parity.py`: small ViTs as timm and Hugging Face transformers compute them.

    python tests/parity/make_vit.py

needs torch, timm, transformers and safetensors (`pip install -e .[parity]`); the tests need none of them. The same
versions give the same bytes. Each `vit_*.npz` holds

    param/NAME    weights in the library's names on disk, random in every tensor (zero or one would hide mistakes);
                  float16, because they are drawn to be exact in it
    images        (B, H, W, 3) float16, exact; labels (B,) int32
    features      (B, D) float32, what the head gets; logits (B, C) float32
    logits_fp64   (B, C) float64, the same in double precision: tells whose error a difference is
    grad/NAME     float32, d(mean cross-entropy)/d(param), computed in double precision
    about         JSON: the model's shape, the versions, and fp32 torch's own error against double precision
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import safetensors
import timm
import torch
import transformers
from safetensors.numpy import load_file
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).parent
CLASSES, BATCH = 10, 3

# name: (library, pool, image px, patch px, width, depth, heads, width of the MLP, eps of norms, activation)
CASES = {
    "timm_cls": ("timm", "cls", 32, 8, 32, 3, 4, 128, 1e-6, "gelu"),
    "timm_gap": ("timm", "gap", 32, 8, 32, 2, 4, 128, 1e-6, "gelu"),
    "timm_gap_head80": ("timm", "gap", 16, 4, 160, 1, 2, 32, 1e-6, "gelu"),  # the head width of ViT-H
    "huggingface_cls": ("huggingface", "cls", 32, 8, 32, 2, 2, 128, 1e-6, "gelu"),
    "huggingface_default_eps": ("huggingface", "cls", 32, 8, 32, 2, 2, 64, 1e-12, "quick_gelu"),
    "timm_tanh": ("timm", "gap", 32, 8, 32, 2, 4, 64, 1e-5, "gelu_tanh"),
}


class HuggingFaceLogits(torch.nn.Module):
    """A Hugging Face classifier that answers with a tensor, as timm's do."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) to (B, C)."""
        return self.model(x).logits


def build(
    library: str, pool: str, image: int, patch: int, width: int, depth: int, heads: int, mlp: int, eps: float, act: str
):
    """The model, and its head's module (whose input are the features)."""
    if library == "timm":
        model = VisionTransformer(
            img_size=image, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width,
            num_classes=CLASSES, class_token=pool == "cls", global_pool="token" if pool == "cls" else "avg",
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=eps), act_layer=act,
        )  # fmt: skip
        return model, model.head
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=mlp,
        image_size=image, patch_size=patch, num_labels=CLASSES, layer_norm_eps=eps, hidden_act=act,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    return HuggingFaceLogits(model), model.classifier


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, to a value that float16 holds exactly: matrices keep the scale of what passes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.empty_like(p).normal_(generator=generator)
            if p.ndim > 1:
                r *= max(0.02, p[0].numel() ** -0.5)
            else:
                r = 0.1 * r + name.endswith("weight")  # norms: around one
            p.copy_(r.half())


def on_disk(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state in the names that the library writes to files (transformers 5 has others in memory)."""
    if isinstance(model, HuggingFaceLogits):
        with tempfile.TemporaryDirectory() as folder:
            model.model.save_pretrained(folder)
            return load_file(Path(folder) / "model.safetensors")
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def run(model: torch.nn.Module, head: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor):
    """Logits and features; gradients are left in the parameters."""
    seen = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    logits = model(images)
    hook.remove()
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    return logits.detach(), seen[0], {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(a: dict, b: dict) -> float:
    """||a - b|| / ||b|| over all tensors."""
    square = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    return (square / sum(float(b[k].double().square().sum()) for k in b)) ** 0.5


def make(name: str, seed: int) -> None:
    """Write one file."""
    library, pool, image, patch, width, depth, heads, mlp, eps, act = CASES[name]
    torch.manual_seed(seed)
    model, head = build(*CASES[name])
    randomise(model.eval(), seed)
    # Faint images keep the tokens' variance small, which makes a wrong epsilon of a norm visible.
    images = (0.1 * torch.randn(BATCH, 3, image, image)).half().float()
    labels = torch.randint(0, CLASSES, (BATCH,))
    out = {f"param/{k}": v.astype(np.float16) for k, v in on_disk(model).items()}
    logits, features, gradients = run(model, head, images, labels)
    model.double()
    exact_logits, _, exact_gradients = run(model, head, images.double(), labels)
    model.float()
    with torch.no_grad():  # the library itself then gives the gradients their names on disk
        for key, p in model.named_parameters():
            p.copy_(exact_gradients[key])
    out |= {f"grad/{k}": v for k, v in on_disk(model).items()}
    about = {
        "library": library, "pool": pool, "image_size": image, "patch_size": patch, "classes": CLASSES,
        "width": width, "depth": depth, "heads": heads, "mlp": mlp, "eps": eps, "activation": act,
        "peer_error": {
            "logits": relative({"": logits}, {"": exact_logits}), "gradients": relative(gradients, exact_gradients),
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    out |= {
        "images": images.permute(0, 2, 3, 1).numpy().astype(np.float16), "labels": labels.numpy().astype(np.int32),
        "features": features.numpy(), "logits": logits.numpy(), "logits_fp64": exact_logits.numpy(),
        "about": np.array(json.dumps(about)),
    }  # fmt: skip
    path = HERE / f"vit_{name}.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {about['peer_error']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for i, case in enumerate(CASES):
        make(case, seed=i)
