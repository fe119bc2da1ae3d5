"""Write the frozen references of `test_segmentation_parity.py`: heads of Hugging Face transformers.

    python tests/parity/make_segmentation.py

needs what `make_vit.py` needs. `upernet.npz` holds the two heads of `UperNetForSemanticSegmentation` in evaluation, on
maps that are given:

    params        float16, exact: weights and statistics, random in every tensor, one after the other
    map0 … 3      (B, h, w, D) float16, exact
    logits, auxiliary  (B, h, w, C), of both heads
    labels        (B, H, W) uint8, and `loss`, of both heads' logits upsampled to them, with 255 left out
    gradients     d(sum of the mean squares of the logits)/d(param), likewise; of large tensors some elements: `sample`
    about         JSON: shapes by the library's names, in the order of `params` and `gradients`; the versions, and fp32
                  torch's own error against double precision

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
import transformers
from gates import relative, sample
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

HERE = Path(__file__).parent
BATCH, CLASSES, CHANNELS, AUXILIARY = 2, 5, 16, 8
WIDTHS = (8, 12, 16, 24)
SIDES = ((28, 20), (14, 10), (7, 5), (7, 9))  # pooled to 6, bins overlap; sides that are no multiples of one another
IMAGE = (56, 40)
AUXILIARY_WEIGHT = 0.4


def versions() -> dict[str, str]:
    """Of what has computed."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


AROUND_ONE = ("norm.weight", "norm1.weight", "norm2.weight", "norm2d.weight", "_var", "lambda1")


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter and statistic random; matrices keep the scale of what passes. Four values for each tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.state_dict().items():
            if not p.is_floating_point():
                continue
            r = (torch.randint(0, 4, p.shape, generator=generator) - 1.5) / 1.25**0.5
            if p.ndim > 1:
                r *= max(0.02, p[0].numel() ** -0.5)
            else:  # scales and variances around one
                r = 0.1 * r + name.endswith(AROUND_ONE)
            p.copy_(r.half())


class Heads(torch.nn.Module):
    """Both heads of `UperNetForSemanticSegmentation`, which takes maps of a backbone of the library alone."""

    def __init__(self):
        super().__init__()
        config = transformers.UperNetConfig(
            backbone_config=transformers.ResNetConfig(), hidden_size=CHANNELS, auxiliary_channels=AUXILIARY,
            num_labels=CLASSES,
        )  # fmt: skip
        self.decode_head = UperNetHead(config, list(WIDTHS))
        self.auxiliary_head = UperNetFCNHead(config, list(WIDTHS))

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Maps (B, D, h, w) to logits (B, C, h, w) of both."""
        return [self.decode_head(maps), self.auxiliary_head(maps)]


def upsampled(logits: torch.Tensor) -> torch.Tensor:
    """As the library's forward pass has it."""
    return torch.nn.functional.interpolate(logits, size=IMAGE, mode="bilinear", align_corners=False)


def upernet() -> None:
    """Write `upernet.npz`."""
    model = Heads().eval()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(BATCH, D, *sides, generator=generator).half() for D, sides in zip(WIDTHS, SIDES, strict=True)]
    labels = torch.randint(0, CLASSES + 2, (BATCH, *IMAGE), generator=generator)
    labels[labels >= CLASSES] = 255
    state = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    outputs, gradients, losses = {}, {}, {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        out = model([m.to(dtype) for m in maps])
        sum(logits.square().mean() for logits in out).backward()
        outputs[dtype] = [logits.detach().permute(0, 2, 3, 1).numpy() for logits in out]
        gradients[dtype] = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
        parts = [torch.nn.functional.cross_entropy(upsampled(o), labels, ignore_index=255) for o in out]
        losses[dtype] = (parts[0] + AUXILIARY_WEIGHT * parts[1]).item()
    exact, rough = (torch.float64, torch.float32)
    kept = {name: sample(g) for name, g in gradients[exact].items()}
    about = {
        "params": {name: list(v.shape) for name, v in state.items()},
        "gradients": {name: list(v.shape) for name, v in kept.items()},
        "versions": versions(),
        "fp32_error": relative(outputs[rough][0], outputs[exact][0]),
    }
    np.savez_compressed(
        HERE / "upernet.npz",
        params=np.concatenate([v.numpy().ravel() for v in state.values()]).astype(np.float16),
        gradients=np.concatenate([v.ravel() for v in kept.values()]).astype(np.float32),
        **{f"map{i}": m.permute(0, 2, 3, 1).numpy() for i, m in enumerate(maps)},
        logits=outputs[exact][0].astype(np.float32),
        auxiliary=outputs[exact][1].astype(np.float32),
        labels=labels.numpy().astype(np.uint8),
        loss=np.float32(losses[exact]),
        about=json.dumps(about),
    )


if __name__ == "__main__":
    upernet()
