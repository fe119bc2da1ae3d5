"""Write the frozen references of `test_swin_parity.py`: small SwinV2s of timm and Hugging Face.

    python tests/parity/make_swin.py

needs what `make_vit.py` needs. Each `swin_*.npz` holds

    params        float16, exact: weights in the library's layout, random in every tensor, one after the other
    images        (B, H, W, 3) float16, exact
    stage0 … 3    (B, H, W, D), the map of each stage before it is merged
    pooled        (B, D), the mean of the normed last map
    gradients     d(sum of the mean squares of the five)/d(param), likewise; of large tensors some elements: `sample`
    about         JSON: shapes by the library's names on disk, in the order of `params` and `gradients`; the model's
                  shape, the versions, and fp32 torch's own error against double precision

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import safetensors
import timm
import torch
import transformers
from gates import sample
from make_vit import relative
from safetensors.numpy import load_file
from timm.models.swin_transformer_v2 import SwinTransformerV2

HERE = Path(__file__).parent
BATCH = 2


class Case(NamedTuple):
    """A model and its images. Windows that a library derives from its own image size are those of ours: see below."""

    library: str
    window: int
    image: tuple[int, int]  # (height, width), pixels
    patch: int = 4
    width: int = 16  # with 4 a norm divides by next to nothing now and then, which amplifies rounding a hundredfold
    depths: tuple[int, ...] = (2, 2, 2, 1)
    heads: tuple[int, ...] = (2, 2, 4, 4)
    pretrained_window: int = 0
    pretrained_image: int = 0  # pixels
    library_image: int = 0  # pixels, Hugging Face's `image_size`, of which it makes windows; 0: the images' own


CASES = {
    # Maps of 8, 4, 2 and 1: shifted; as large as the window; smaller. Four layers: the loop's second turn.
    "timm_window4": Case("timm", 4, (32, 32), depths=(2, 4, 1, 1)),
    # Maps of 14, 7, 4 and 2: odd windows, an odd side to merge, stages of odd depth.
    "timm_window7": Case("timm", 7, (56, 56), depths=(3, 1, 2, 1)),
    "timm_pretrained": Case("timm", 8, (64, 64), pretrained_window=4, pretrained_image=32),
    "huggingface_window4": Case("huggingface", 4, (32, 32), patch=2, depths=(4, 2, 1, 1)),
    "huggingface_pretrained": Case(
        "huggingface", 8, (32, 32), patch=2, pretrained_window=4, pretrained_image=32
    ),
    # 13 x 15 patches of lengthened images, then 7 x 8: no window fits, and an odd side is merged. Hugging Face makes
    # windows of `image_size`, ours of the map: for 64 pixels both are 4, 4, 4 and 2.
    "huggingface_padded": Case("huggingface", 4, (50, 60), library_image=64),
    "huggingface_padded7": Case("huggingface", 7, (32, 32), patch=2),
    # 13 x 15 patches, then 7 x 8: padded after they are rolled.
    "timm_padded": Case("timm", 4, (52, 60)),
    "timm_padded7": Case("timm", 7, (64, 64)),
}  # fmt: skip


def windows(case: Case) -> list[int]:
    """The windows that the weights were trained on, by stage."""
    maps = [-(-case.pretrained_image // (case.patch * 2**i)) for i in range(4)]
    return [min(case.pretrained_window, m) for m in maps]


def build(case: Case) -> torch.nn.Module:
    """The library's model, without a head."""
    if case.library == "timm":
        return SwinTransformerV2(
            img_size=case.image, patch_size=case.patch, embed_dim=case.width, depths=case.depths,
            num_heads=case.heads, window_size=case.window, pretrained_window_sizes=windows(case), num_classes=0,
        )  # fmt: skip
    config = transformers.Swinv2Config(
        image_size=case.library_image or case.image[0], patch_size=case.patch, embed_dim=case.width,
        depths=case.depths, num_heads=case.heads, window_size=case.window, pretrained_window_sizes=windows(case),
    )  # fmt: skip
    return transformers.Swinv2Model(config)


def run(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """stage0 … stage3 and pooled; images (B, 3, H, W)."""
    maps: list[torch.Tensor] = []
    if isinstance(model, SwinTransformerV2):  # a stage merges first: its output is its map
        hooks = [stage.register_forward_hook(lambda _, __, out: maps.append(out)) for stage in model.layers]
        pooled = model.forward_features(images).mean((1, 2))
    else:

        def keep(_, inputs: tuple, out: tuple) -> None:
            before_merging, (height, width, *_) = out[1], out[2]
            maps.append(before_merging.unflatten(1, (height, width)))

        hooks = [stage.register_forward_hook(keep) for stage in model.encoder.layers]
        pooled = model(images).pooler_output
    for hook in hooks:
        hook.remove()
    return {f"stage{i}": m for i, m in enumerate(maps)} | {"pooled": pooled}


def differentiate(model: torch.nn.Module, images: torch.Tensor) -> tuple[dict, dict]:
    """Outputs and gradients; gradients stay in the parameters too."""
    outputs = run(model, images)
    model.zero_grad()
    sum(out.square().mean() for out in outputs.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {name: out.detach() for name, out in outputs.items()}, gradients


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random; matrices keep the scale of what passes.

    Four values for each tensor, which float16 holds exactly and which take two bits each once compressed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = (torch.randint(0, 4, p.shape, generator=generator) - 1.5) / 1.25**0.5
            if name.endswith("logit_scale"):
                r = math.log(10) + 0.5 * r
            elif p.ndim > 1:
                r *= max(0.02, p[0].numel() ** -0.5)
            else:
                r = 0.1 * r + name.endswith("weight")  # norms: around one
            p.copy_(r.half())


def on_disk(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state in the names that the library writes to files."""
    if isinstance(model, SwinTransformerV2):
        return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def make(name: str, seed: int) -> None:
    """Write one file."""
    case = CASES[name]
    torch.manual_seed(seed)
    model = build(case).eval()
    randomise(model, seed)
    images = (0.05 * torch.randint(-4, 5, (BATCH, 3, *case.image))).half().float()  # faint: a norm's epsilon shows
    params = on_disk(model)
    outputs, gradients = differentiate(model, images)
    model.double()
    exact, exact_gradients = differentiate(model, images.double())
    model.float()
    with torch.no_grad():  # the library itself then gives the gradients their names on disk
        for key, p in model.named_parameters():
            p.copy_(exact_gradients[key])
    exact_on_disk = on_disk(model)
    about = case._asdict() | {
        "shapes": {k: v.shape for k, v in params.items()},
        "peer_error": {
            "worst output": max(relative({"": outputs[k]}, {"": exact[k]}) for k in exact),
            "gradients": relative(gradients, exact_gradients),
            "worst gradient": max(
                # In a window of one token nothing but the values counts: other gradients are zero.
                relative({"": gradients[k]}, {"": g}) for k, g in exact_gradients.items() if g.any()
            ),
        },
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__,
            "transformers": transformers.__version__, "safetensors": safetensors.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    out = {k: v.numpy().astype(np.float32) for k, v in exact.items()} | {
        "params": np.concatenate([v.ravel() for v in params.values()]).astype(np.float16),
        "gradients": np.concatenate([sample(exact_on_disk[k]) for k in params]).astype(np.float32),
        "images": images.permute(0, 2, 3, 1).numpy().astype(np.float16), "about": np.array(json.dumps(about)),
    }  # fmt: skip
    path = HERE / f"swin_{name}.npz"
    np.savez_compressed(path, **out)
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {about['peer_error']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for i, case in enumerate(CASES):
        make(case, seed=i)
