"""Compare our contrastive step of SwinV2 and a text tower with PyTorch and timm, in one run. See README.md.

    python benchmarks/torch_swin.py --peer=cpu --torch_python=peers/bin/python
    python benchmarks/torch_swin.py --peer=gpu --batches=32,64,128 --torch_python=peers/bin/python

Both sides do the same work on synthetic pairs that are already on the device: forward of both towers, the contrastive
loss of the batch, backward, clipping by the global norm, AdamW with decay on matrices; in fp16 with a dynamic loss
scale. Each side runs in its own process, so the two libraries may use different environments; the sides alternate,
round by round, and never run at once. Flags that begin with `--config.` go to our side, e.g.
`--config.model.image.remat=dots`.

The last line printed is JSON. This file imports nothing but the standard library until it runs as the torch side.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import halves

# timm's words: our size, width, depths, heads. timm has no norms of the main branch and calls another size giant.
IMAGE = {
    "tiny": ("T", 96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": ("S", 96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": ("B", 128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": ("L", 192, (2, 2, 18, 2), (6, 12, 24, 48)),
    "giant": ("G", 512, (2, 2, 42, 4), (16, 32, 64, 128)),
}
TEXT = {"P": (96, 4, 3), "B": (512, 12, 8), "L": (768, 12, 12), "H": (1024, 24, 16)}  # width, depth, heads
VOCABULARY, CONTEXT, JOINT = 49_408, 77, 1024

# What --peer stands for; every entry can be set by its own flag.
PEERS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "swinv2_tiny_window8_256", "text": "P", "batches": "8", "steps": 4, "threads": 2, "device": "cpu",
        "precision": "fp32", "compile": False, "checkpointing": False,
    },
    "gpu": {
        "model": "swinv2_giant_window14_224", "text": "H", "batches": "16,32,64,128", "steps": 20, "threads": 0,
        "device": "cuda", "precision": "fp16", "compile": True, "checkpointing": False,
    },
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. `--model` is in timm's manner, swinv2_SIZE_windowW_PIXELS."""
    p = halves.parser(__doc__, list(PEERS), ("fp32", "bf16", "fp16"), "configs/swinv2_g_clip.py")
    p.add_argument("--text", choices=TEXT, help="size of the text tower of both sides")
    p.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="recompute the blocks on the torch side"
    )
    args = halves.parse(p, argv, PEERS)
    if not re.fullmatch(rf"swinv2_({'|'.join(IMAGE)})_window\d+_\d+", args.model):
        p.error(f"--model={args.model}: must be swinv2_SIZE_windowW_PIXELS with a size of {', '.join(IMAGE)}")
    return args


def form(args: argparse.Namespace) -> tuple[str, int, int]:
    """timm's word, window and pixels of `--model`."""
    word, window, pixels = re.fullmatch(r"swinv2_(\w+)_window(\d+)_(\d+)", args.model).groups()
    return word, int(window), int(pixels)


def torch_model(args: argparse.Namespace) -> Any:
    """Two towers and the loss of their batch, in training mode; (images, tokens) to the loss."""
    import torch
    from timm.models.swin_transformer_v2 import SwinTransformerV2
    from torch import nn
    from torch.nn import functional

    word, window, pixels = form(args)
    _, width, depths, heads = IMAGE[word]
    text_width, layers, text_heads = TEXT[args.text]

    class TwoTowers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = SwinTransformerV2(
                img_size=pixels, window_size=window, embed_dim=width, depths=depths, num_heads=heads, num_classes=0,
                drop_path_rate=0.0,
            )  # fmt: skip
            self.image.set_grad_checkpointing(args.checkpointing)
            self.tokens = nn.Embedding(VOCABULARY, text_width)
            self.positions = nn.Parameter(torch.zeros(CONTEXT, text_width))
            block = nn.TransformerEncoderLayer(
                text_width, text_heads, 4 * text_width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            self.text = nn.TransformerEncoder(block, layers, nn.LayerNorm(text_width), enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
            self.image_projection = nn.Linear(8 * width, JOINT, bias=False)
            self.text_projection = nn.Linear(text_width, JOINT, bias=False)
            self.scale = nn.Parameter(torch.tensor(2.66))

        def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            texts = self.text(self.tokens(tokens) + self.positions, self.mask, is_causal=True)
            texts = self.text_projection(texts[torch.arange(len(texts), device=texts.device), tokens.argmax(1)])
            images = functional.normalize(self.image_projection(self.image(images)).float(), dim=1)
            texts = functional.normalize(texts.float(), dim=1)
            with torch.autocast(images.device.type, enabled=False):
                logits = self.scale.exp() * images @ texts.T
            right = torch.arange(len(logits), device=logits.device)
            return (functional.cross_entropy(logits, right) + functional.cross_entropy(logits.T, right)) / 2

    return TwoTowers().to(args.device).train()


def torch_steps(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds of each timed step at one batch size, and what it took."""
    import torch

    model = torch_model(args)
    update = halves.torch_update(args, model, betas=(0.9, 0.98))
    forward = torch.compile(model, dynamic=False) if args.compile else model
    pixels = form(args)[2]
    images = torch.randn(batch, 3, pixels, pixels, device=args.device)
    tokens = torch.randint(0, VOCABULARY, (batch, CONTEXT), device=args.device)

    def step() -> torch.Tensor:
        with halves.autocast(args):
            loss = forward(images, tokens)
        update(loss)
        return loss.detach()

    return halves.time_torch(args, batch, model, step)


def our_command(args: argparse.Namespace, batch: int) -> list[str]:
    """The benchmark command with the peer's towers, batch and precision."""
    word, window, pixels = form(args)
    fields = {
        "model.image.size": IMAGE[word][0], "model.image.window": window, "model.image.image_size": pixels,
        "model.image.drop_path": 0.0, "model.text.size": args.text, "model.text.context": CONTEXT,
        "model.embed_dim": JOINT, "task.mixup": 0.0, "optim.clip_norm": args.clip_norm,
        "train.batch_size": batch, "train.precision": args.precision, "parallel.stage": 0, "parallel.replicas": 1,
        "model.image.remat": "branches",  # that of the recipe has as many blocks as SwinV2-G
    }  # fmt: skip
    if args.peer == "cpu":
        form_here = {"remat": "none", "scan_layers": True, "attention": "xla"}
        fields |= {f"model.{tower}.{k}": v for tower in ("image", "text") for k, v in form_here.items()}
    return halves.our_command(args, fields)


def torch_command(args: argparse.Namespace, batch: int) -> list[str]:
    """This file again, as the torch half."""
    checkpointing = "--checkpointing" if args.checkpointing else "--no-checkpointing"
    return [*halves.torch_command(args, batch, __file__, "text"), checkpointing]


def main(argv: list[str]) -> None:
    """Compare, or be the torch half."""
    args = parse(argv)
    if args.torch_half:
        return halves.torch_half(args, torch_steps)
    halves.compare("torch_swin", args, argv, {"ours": our_command, "torch": torch_command})


if __name__ == "__main__":
    main(sys.argv[1:])
