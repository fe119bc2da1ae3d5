"""Compare our ViT training step with timm's in PyTorch, in one run. See README.md.

    python benchmarks/torch_vit.py --peer=cpu --torch_python=peers/bin/python
    python benchmarks/torch_vit.py --peer=gpu --batches=32,64,96,128

Both sides do the same work on synthetic data that is already on the device: forward, softmax cross-entropy,
backward, clipping by the global norm, AdamW with decay on matrices. Each side runs in its own process, so the two
libraries may use different environments; the sides alternate, round by round, and never run at once. Further
flags that begin with `--config.` go to our side, e.g. `--config.model.attention=cudnn`.

The last line printed is JSON. This file imports nothing but the standard library until it runs as the torch side.
"""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import halves

SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}  # timm's words, ours

# What --peer stands for; every entry can be set by its own flag.
PEERS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "vit_small_patch16_224", "classes": 1000, "batches": "16", "steps": 6, "threads": 2, "device": "cpu",
        "precision": "fp32", "compile": False,
    },
    "gpu": {
        "model": "vit_huge_patch14_224", "classes": 21841, "batches": "32,64,96,128", "steps": 20, "threads": 0,
        "device": "cuda", "precision": "bf16", "compile": True,
    },
}  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags, checked. `--model` is a timm name, vit_SIZE_patchP_PIXELS."""
    p = halves.parser(__doc__, list(PEERS), ("fp32", "bf16"), "configs/vit_huge.py")
    p.add_argument(
        "--pool", choices=("gap", "cls"), default="gap", help="pooling of both sides: mean of the tokens or class token"
    )
    p.add_argument("--classes", type=int)
    args = halves.parse(p, argv, PEERS)
    if not re.fullmatch(rf"vit_({'|'.join(SIZES)})_patch\d+_\d+", args.model):
        p.error(f"--model={args.model}: must be vit_SIZE_patchP_PIXELS with a size of {', '.join(SIZES)}")
    if args.classes < 2:
        p.error("--classes must be at least 2")
    return args


def torch_model(args: argparse.Namespace) -> Any:
    """timm's model of the chosen form, in training mode on its device."""
    import timm
    import torch

    form = {"class_token": False, "global_pool": "avg"} if args.pool == "gap" else {}
    model = timm.create_model(args.model, num_classes=args.classes, **form).to(args.device).train()
    return model.to(memory_format=torch.channels_last) if args.device == "cuda" else model


def torch_steps(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds of each timed step at one batch size, and what it took."""
    import torch

    model = torch_model(args)
    update = halves.torch_update(args, model, betas=(0.9, 0.95))
    forward = torch.compile(model, dynamic=False) if args.compile else model
    pixels = int(args.model.rsplit("_", 1)[1])
    images = torch.randn(batch, 3, pixels, pixels, device=args.device)
    images = images.to(memory_format=torch.channels_last) if args.device == "cuda" else images
    labels = torch.randint(0, args.classes, (batch,), device=args.device)

    def step() -> torch.Tensor:
        with halves.autocast(args):
            logits = forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        update(loss)
        return loss.detach()

    return halves.time_torch(args, batch, model, step)


def our_command(args: argparse.Namespace, batch: int) -> list[str]:
    """The benchmark command with the peer's model, batch and precision."""
    word, patch, pixels = re.fullmatch(r"vit_(\w+)_patch(\d+)_(\d+)", args.model).groups()
    fields = {
        "model.size": SIZES[word], "model.patch_size": patch, "model.image_size": pixels, "model.pool": args.pool,
        "task.num_classes": args.classes, "task.loss": "softmax", "task.label_smoothing": 0.0,
        "data.augment.jitter": "(0.0,0.0,0.0,0.0)", "optim.clip_norm": args.clip_norm,
        "train.batch_size": batch, "train.accumulate": 1, "train.precision": args.precision,
        "parallel.stage": 0, "parallel.replicas": 1,
    }  # fmt: skip
    if args.peer == "cpu":
        # On CPUs a loop over layers uses memory again that is in the cache, and a copy takes longer than a GELU.
        fields |= {"model.remat": "dots", "model.scan_layers": True, "model.attention": "xla"}
    return halves.our_command(args, fields)


def torch_command(args: argparse.Namespace, batch: int) -> list[str]:
    """This file again, as the torch half."""
    return halves.torch_command(args, batch, __file__, "pool", "classes")


def main(argv: list[str]) -> None:
    """Compare, or be the torch half."""
    args = parse(argv)
    if args.torch_half:
        return halves.torch_half(args, torch_steps)
    makers = {"ours": our_command, "torch": torch_command}
    if args.peer == "cpu" and not args.compile and not args.only:  # on GPUs torch.compile is the faster one, always
        makers["torch.compile"] = lambda args, batch: [*torch_command(args, batch), "--compile"]
    halves.compare("torch_vit", args, argv, makers)


if __name__ == "__main__":
    main(sys.argv[1:])
