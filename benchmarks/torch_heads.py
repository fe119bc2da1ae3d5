"""Compare our heads for detection and segmentation with the same in PyTorch, in one run. See README.md.

    python benchmarks/torch_heads.py --model=plain_detr --torch_python=peers/bin/python
    python benchmarks/torch_heads.py --model=upernet --torch_python=peers/bin/python

Both sides do the same work on the same random maps and objects: forward, loss with its matching, backward, without a
backbone and without an optimiser, in fp32. The torch side is written here, from the papers, of `torch.nn` alone; it
has as many parameters, or there is no result. Each side runs in its own process, so the two libraries may use
different environments; the sides alternate, round by round, and never run at once.

The last line printed is JSON. This file imports nothing but the standard library until it runs as one of the sides.

Shapes: B images, H W the canvas, h w a map, S its places, D width, N heads, Q queries, P proposals, M objects.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import halves

WIDTHS = {"plain_detr": (768,), "upernet": (96, 192, 384, 768)}  # of the maps that a head is given: ViT-B's, Swin-T's
STRIDES = {"plain_detr": (16,), "upernet": (4, 8, 16, 32)}
SIDE = {"plain_detr": 512, "upernet": 256}  # pixels of the canvas
OBJECTS = 7  # of an image, as COCO has on average

# Of Plain-DETR; half of the layers and queries of our default.
D, N, MLP, ENCODER, DECODER, QUERIES, MANY, COPIES, MOST, CLASSES = 256, 8, 2048, 3, 3, 300, 600, 6, 100, 80
CLASS, BOX, GIOU = 2.0, 1.0, 2.0  # weights of its loss
# Of UPerNet.
CHANNELS, AUXILIARY, AUXILIARY_WEIGHT, KINDS = 128, 64, 0.4, 150


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags, checked."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--model", choices=list(WIDTHS), required=True, help="head of both sides")
    p.add_argument("--batch", type=int, default=2, help="images of a step (%(default)s)")
    p.add_argument("--steps", type=int, default=4, help="steps to time per round, after the warm-up (%(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="rounds, which alternate between the sides (%(default)s)")
    p.add_argument("--threads", type=int, default=2, help="cores for each side; 0: all (%(default)s)")
    p.add_argument("--only", choices=("ours", "torch"), help="time one side alone, without a ratio")
    p.add_argument("--torch_python", default=sys.executable, help="interpreter with torch, scipy and timm")
    p.add_argument("--jax_python", default=sys.executable, help="interpreter with jax and flax")
    p.add_argument("--timeout", type=halves.time_limit, default=1800.0, help="seconds per process (%(default)s)")
    p.add_argument("--half", choices=("ours", "torch"), help=argparse.SUPPRESS)  # this process is that half
    p.set_defaults(peer="cpu", device="cpu", precision="fp32")
    args = p.parse_args(argv)
    if min(args.batch, args.steps, args.rounds) < 1 or args.threads < 0:
        p.error("--batch, --steps and --rounds must be at least 1, --threads at least 0")
    args.batches = [args.batch]
    return args


def inputs(args: argparse.Namespace) -> dict[str, Any]:
    """Maps and what is known of the images, the same on both sides: NumPy arrays.

    For Plain-DETR `map` (B, h, w, C), `size` (B, 2), `boxes` (B, M, 4) by corners, `box_labels` (B, M), `objects` (B,);
    every second image covers three quarters of the canvas. For UPerNet `maps` and `class_map` (B, H, W).
    """
    import numpy as np

    rng, B, side = np.random.default_rng(0), args.batch, SIDE[args.model]
    maps = [
        rng.normal(size=(B, side // stride, side // stride, width)).astype(np.float32)
        for stride, width in zip(STRIDES[args.model], WIDTHS[args.model], strict=True)
    ]
    if args.model == "upernet":
        class_map = rng.integers(0, KINDS, (B, side // 16, side // 16)).repeat(16, 1).repeat(16, 2)
        return {"maps": maps, "class_map": class_map.astype(np.int32)}
    size = np.array([(side, side if i % 2 == 0 else side * 3 // 4) for i in range(B)], np.int32)
    boxes = np.zeros((B, MOST, 4), np.float32)
    corner = rng.uniform(0, 0.6, (B, OBJECTS, 2))
    boxes[:, :OBJECTS] = np.concatenate([corner, corner + rng.uniform(0.1, 0.4, corner.shape)], -1)
    boxes *= np.concatenate([size[:, ::-1]] * 2, -1)[:, None]
    return {
        "map": maps[0], "size": size, "boxes": boxes, "objects": np.full(B, OBJECTS, np.int32),
        "box_labels": rng.integers(0, CLASSES, (B, MOST)).astype(np.int32),
    }  # fmt: skip


# Our half.


def our_loss(args: argparse.Namespace) -> tuple[Callable[..., Any], Any]:
    """The loss of (parameters, inputs), and fresh parameters."""
    import jax
    import jax.numpy as jnp

    from visionfm_jax.config import Config, DataConfig, OptimConfig, TrainConfig
    from visionfm_jax.data.sources.kinds import TfdsConfig
    from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
    from visionfm_jax.models.backbones.vit import ViTConfig
    from visionfm_jax.models.detector import PlainDetr
    from visionfm_jax.models.layers import no_gather
    from visionfm_jax.models.segmenter import UPerNet
    from visionfm_jax.parallel.context import Context
    from visionfm_jax.tasks.detection import DetectionConfig
    from visionfm_jax.tasks.segmentation import SegmentationConfig

    if args.model == "plain_detr":
        model = ViTConfig(size="B", patch_size=16, image_size=SIDE[args.model], remat="none", attention="xla")
        task = DetectionConfig(
            num_classes=CLASSES, most_objects=MOST, width=D, heads=N, mlp=MLP, encoder_depth=ENCODER,
            decoder_depth=DECODER, queries=QUERIES, many_queries=MANY, copies=COPIES, class_weight=CLASS,
            box_weight=BOX, giou_weight=GIOU,
        )  # fmt: skip
    else:
        model = SwinV2Config(size="T", image_size=SIDE[args.model], window=8)
        task = SegmentationConfig(
            num_classes=KINDS, channels=CHANNELS, auxiliary=AUXILIARY_WEIGHT, auxiliary_channels=AUXILIARY
        )
    config = Config(
        name="heads", model=model, task=task, data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(warmup_steps=1), train=TrainConfig(batch_size=args.batch, steps=2, precision="fp32"),
    )  # fmt: skip
    config.validate()
    assert model.widths == WIDTHS[args.model]
    made = task.make(config, jnp.float32, no_gather)
    if args.model == "plain_detr":
        head = PlainDetr(made.settings)

        def given(batch: dict[str, jax.Array]) -> tuple:
            return batch["map"], batch["size"], True

    else:
        head = UPerNet(KINDS, CHANNELS, AUXILIARY)

        def given(batch: dict[str, jax.Array]) -> tuple:
            return (batch["maps"],)

    def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        context = Context(jnp.zeros((), jnp.int32), counts=made.counts(batch, None))
        return made.per_sample(head.apply({"params": params}, *given(batch)), batch, context)["loss"].mean()

    first = jax.tree.map(lambda a: a[:1], inputs(args))
    return loss, jax.jit(lambda key: head.init(key, *given(first))["params"])(jax.random.key(0))


def our_half(args: argparse.Namespace) -> None:
    """Time our side and print its JSON line."""
    sys.path.insert(0, str(halves.ROOT))
    try:
        import jax
    except ImportError as e:
        sys.exit(f"{sys.executable} has no {e.name}: name an interpreter that has jax and flax by --jax_python")
    loss, params = our_loss(args)
    batch = jax.tree.map(jax.numpy.asarray, inputs(args))
    step = jax.jit(jax.value_and_grad(loss))
    start = time.perf_counter()
    first = float(jax.block_until_ready(step(params, batch))[0]), time.perf_counter() - start
    jax.block_until_ready(step(params, batch))
    marks = [time.perf_counter()]
    for _ in range(args.steps):
        last, _ = jax.block_until_ready(step(params, batch))
        marks.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    print(json.dumps({
        "batch": args.batch, "images_per_s": args.batch * args.steps / sum(seconds),
        "step_ms": [round(1e3 * s, 3) for s in seconds], "first_step_s": first[1], "loss": [first[0], float(last)],
        "parameters": sum(p.size for p in jax.tree.leaves(params)), "device": jax.devices()[0].device_kind,
    }))  # fmt: skip


# The torch half: Plain-DETR.


def torch_plain_detr() -> Any:
    """The head, (B, h, w, C) and sizes (B, 2) to proposals and layers, each of logits, deltas, reference and boxes."""
    import torch
    from torch import nn
    from torch.nn import functional

    def sine(x: torch.Tensor, width: int) -> torch.Tensor:
        angles = x[..., None] / 10_000.0 ** (torch.arange(width // 2, device=x.device) / (width // 2))
        return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)

    def centres(h: int, w: int) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        return torch.stack([columns, rows], -1)

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(D, D) for _ in range(4))

        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None,
            groups: tuple[int, ...] = (),
        ) -> torch.Tensor:  # fmt: skip
            given = ((self.query, query), (self.key, key), (self.value, value))
            made = [layer(x).unflatten(-1, (N, D // N)).transpose(1, 2) for layer, x in given]
            parts = zip(*(x.split(groups, 2) for x in made), strict=True) if groups else [made]
            each = [functional.scaled_dot_product_attention(*part, attn_mask=mask) for part in parts]
            return self.out(torch.cat(each, 2).transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(D, MLP), nn.Linear(MLP, D)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(functional.gelu(self.fc1(x)))

    class EncoderLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1, self.attn, self.ln2, self.mlp = nn.LayerNorm(D), Attend(), nn.LayerNorm(D), Mlp()

        def forward(self, x: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y = self.ln1(x)
            x = x + self.attn(y + places, y + places, y, mask)
            return x + self.mlp(self.ln2(x))

    class Predictors(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.classes, self.box1, self.box2, self.box3 = (nn.Linear(D, n) for n in (classes, D, D, 4))
            nn.init.constant_(self.classes.bias, -math.log(99))
            nn.init.zeros_(self.box3.weight)
            nn.init.zeros_(self.box3.bias)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.classes(x), self.box3(self.box2(self.box1(x).relu()).relu())

    class Rescale(nn.Module):
        """A map at 2, 1, 1/2 or 1/4 of its resolution, by convolutions whose windows do not overlap."""

        def __init__(self, level: int) -> None:
            super().__init__()
            self.level = level
            self.norm1 = nn.LayerNorm(D, 1e-6) if level == -2 else None
            for i in range(abs(level)):
                if level > 0:
                    self.up0 = nn.Linear(D, 4 * D)
                else:
                    setattr(self, f"down{i}", nn.Linear(4 * D, D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.level > 0:
                return self.up0(x).unflatten(-1, (2, 2, D)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
            for i in range(-self.level):
                x = functional.gelu(self.norm1(x)) if i else x
                x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(3)
                x = getattr(self, f"down{i}")(x)
            return x

    class BoxBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.column1, self.row1 = nn.Linear(2, 512), nn.Linear(2, 512)
            self.column2, self.row2 = nn.Linear(512, N, bias=False), nn.Linear(512, N, bias=False)

        def forward(self, boxes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
            x, y, w, h = boxes.unbind(-1)
            parts = []
            for first, last, seen, one, two in (
                (x - w / 2, x + w / 2, columns, self.column1, self.column2),
                (y - h / 2, y + h / 2, rows, self.row1, self.row2),
            ):
                at = 16.0 * (torch.arange(seen.shape[1]) + 0.5)
                part = two(one(torch.stack([first, last], -1)[:, :, None] - at[:, None]).relu())
                parts.append(part.permute(0, 3, 1, 2).masked_fill(~seen[:, None, None], -1e9))
            return (parts[1][..., :, None] + parts[0][..., None, :]).flatten(3)

    class DecoderLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1, self.ln2, self.ln3, self.norm = (nn.LayerNorm(D) for _ in range(4))
            self.attn, self.cross, self.bias, self.mlp = Attend(), Attend(), BoxBias(), Mlp()
            self.predictors = Predictors(CLASSES)

        def forward(
            self, x: torch.Tensor, boxes: torch.Tensor, at: torch.Tensor, memory: torch.Tensor, places: torch.Tensor,
            rows: torch.Tensor, columns: torch.Tensor,
        ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
            y = self.ln1(x)
            x = x + self.attn(y + at, y + at, y, groups=(QUERIES, MANY))
            x = x + self.cross(self.ln2(x) + at, memory + places, memory, self.bias(boxes, rows, columns))
            x = x + self.mlp(self.ln3(x))
            return x, self.predictors(self.norm(x))

    class PlainDetr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.input_norm = nn.Linear(WIDTHS["plain_detr"][0], D), nn.LayerNorm(D)
            self.encoder, self.encoder_norm = nn.ModuleList(EncoderLayer() for _ in range(ENCODER)), nn.LayerNorm(D)
            self.levels = nn.ModuleList(Rescale(level) for level in (1, 0, -1, -2))
            self.project, self.norm, self.predictors = nn.Linear(D, D), nn.LayerNorm(D), Predictors(1)
            self.queries = nn.Parameter(torch.randn(QUERIES + MANY, D))
            self.query_places, self.query_norm = nn.Linear(2 * D, D), nn.LayerNorm(D)
            self.decoder = nn.ModuleList(DecoderLayer() for _ in range(DECODER))

        def forward(self, x: torch.Tensor, size: torch.Tensor) -> tuple[Any, torch.Tensor, list[Any]]:
            x, stride = self.input_norm(self.input(x)), STRIDES["plain_detr"][0]
            h, w = x.shape[1:3]
            rows, columns = (stride * torch.arange(side) < size[:, i, None] for i, side in enumerate((h, w)))
            seen = (rows[:, :, None] & columns[:, None]).flatten(1)
            places, x = sine(centres(h, w), D // 2).flatten(0, 1), x.flatten(1, 2)
            for layer in self.encoder:
                x = layer(x, places, seen[:, None, None])
            memory = self.encoder_norm(x).masked_fill(~seen[..., None], 0)

            maps = [level(memory.unflatten(1, (h, w))) for level in self.levels]
            logits, deltas = self.predictors(self.norm(self.project(torch.cat([m.flatten(1, 2) for m in maps], 1))))
            squares = []
            for i, m in enumerate(maps):
                at = centres(*m.shape[1:3]).flatten(0, 1) * (stride * 2 ** (i - 1))
                squares.append(torch.cat([at, torch.full_like(at, 6.25 * stride * 2 ** (i - 1))], -1))
            squares = torch.cat(squares).expand(len(x), -1, -1)
            valid = (squares[..., :2] < size[:, None].flip(-1)).all(-1)
            proposals = logits, deltas, squares, decode(deltas, squares, size[:, None])

            best = logits[..., 0].masked_fill(~valid, -math.inf).topk(QUERIES + MANY, 1).indices
            boxes = proposals[3].detach().gather(1, best[..., None].expand(-1, -1, 4))
            at = self.query_norm(self.query_places(sine(boxes / stride, D // 2)))
            x, own, layers = self.queries.expand(len(x), -1, -1), boxes, []
            for layer in self.decoder:
                x, (logits, deltas) = layer(x, boxes, at, memory, places, rows, columns)
                # Of what the layer before says, with its gradient ("look forward twice"); it is looked at without.
                moved = decode(deltas, own, size[:, None])
                layers.append((logits, deltas, own, moved))
                own, boxes = decode(deltas, boxes, size[:, None]), moved.detach()
            return proposals, valid, layers

    return PlainDetr()


def decode(deltas: Any, reference: Any, size: Any) -> Any:
    """Boxes (…, 4), by centres, of deltas from other boxes, on images of `size`."""
    import torch

    own = reference[..., 2:].clamp(min=1)
    middle = reference[..., :2] + own * deltas[..., :2]
    half = own * deltas[..., 2:].clamp(-math.log(62.5), math.log(62.5)).exp() / 2
    limit = size.flip(-1).to(middle.dtype)
    first, last = (torch.minimum((middle + sign * half).clamp(min=0), limit) for sign in (-1, 1))
    return torch.cat([(first + last) / 2, last - first], -1)


def encode(boxes: Any, reference: Any) -> Any:
    """What makes boxes of others, both by centres."""
    import torch

    size, own = boxes[..., 2:].clamp(min=1), reference[..., 2:].clamp(min=1)
    return torch.cat([(boxes[..., :2] - reference[..., :2]) / own, (size / own).log()], -1)


def corners(boxes: Any) -> Any:
    """By corners, of boxes by centres."""
    import torch

    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def giou(a: Any, b: Any) -> Any:
    """Of boxes by corners, (…)."""
    import torch

    def area(first: Any, last: Any) -> Any:
        return (last - first).clamp(min=0).prod(-1)

    both = area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    around = area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    return both / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def focal(logits: Any, targets: Any) -> Any:
    """Focal loss of each logit."""
    from torch.nn import functional

    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    chance = logits.sigmoid()
    wrong = chance * (1 - targets) + (1 - chance) * targets
    return (0.25 * targets + 0.75 * (1 - targets)) * wrong**2 * losses


def set_loss(predicted: Any, boxes: list[Any], labels: list[Any], valid: Any = None) -> Any:
    """Of what was said of a batch, with its matching by scipy: summed.

    Args:
      predicted: logits (B, Q, C), deltas, reference and boxes (B, Q, 4), by centres.
      boxes, labels: of each image, (M, 4), by centres, and (M,).
      valid: (B, Q) bool.
    """
    import torch
    from scipy.optimize import linear_sum_assignment

    logits, deltas, reference, found = predicted
    counts, wanted, kind = [len(b) for b in boxes], torch.cat(boxes), torch.cat(labels)
    with torch.no_grad():
        own = logits[..., kind].sigmoid()  # of all images with the objects of all, as torch's DETRs have it
        present, absent = 0.25 * (1 - own) ** 2 * -(own + 1e-8).log(), 0.75 * own**2 * -(1 - own + 1e-8).log()
        costs = CLASS * (present - absent)
        costs += BOX * (deltas[:, :, None] - encode(wanted, reference[:, :, None])).abs().sum(-1)
        costs -= GIOU * giou(corners(found)[:, :, None], corners(wanted))
        if valid is not None:
            costs.masked_fill_(~valid[..., None], 1e6)
        pairs = [linear_sum_assignment(c[i]) for i, c in enumerate(costs.cpu().split(counts, -1))]
    image = torch.cat([torch.full((len(q),), i) for i, (q, _) in enumerate(pairs)])
    query = torch.cat([torch.as_tensor(q) for q, _ in pairs])
    starts = itertools.accumulate([0, *counts])
    which = torch.cat([torch.as_tensor(m) + start for start, (_, m) in zip(starts, pairs, strict=False)])
    wanted, kind = wanted[which], kind[which]
    targets = torch.zeros_like(logits)
    targets[image, query, kind] = 1
    classes = focal(logits, targets)
    classes = classes if valid is None else classes.masked_fill(~valid[..., None], 0)
    away = (deltas[image, query] - encode(wanted, reference[image, query])).abs()
    apart = 1 - giou(corners(found[image, query]), corners(wanted))
    return CLASS * classes.sum() + BOX * away.sum() + GIOU * apart.sum()


def plain_detr_loss(out: Any, batch: dict[str, Any]) -> Any:
    """Of all layers and of the proposals, over the number of objects."""
    import torch

    proposals, valid, layers = out
    boxes, labels = [], []
    for own, kind, count in zip(batch["boxes"], batch["box_labels"], batch["objects"].tolist(), strict=True):
        first, last = own[:count, :2], own[:count, 2:]
        boxes.append(torch.cat([(first + last) / 2, last - first], -1))
        labels.append(kind[:count].long())
    loss = set_loss(proposals, boxes, [torch.zeros_like(kind) for kind in labels], valid)
    copied = [b.repeat(COPIES, 1) for b in boxes], [kind.repeat(COPIES) for kind in labels]
    for layer in layers:
        loss = loss + set_loss([a[:, :QUERIES] for a in layer], boxes, labels)
        loss = loss + set_loss([a[:, QUERIES:] for a in layer], *copied) / COPIES
    return loss / sum(map(len, boxes))


# The torch half: UPerNet.


def torch_upernet() -> Any:
    """The head, maps (B, h, w, C), fine to coarse, to logits (B, C, h, w) and those of its auxiliary head.

    Maps are in channels_last, the form in which both LayerNorm over channels and oneDNN's convolutions need no copy.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    class Layer(nn.Module):
        """Convolution, norm, ReLU."""

        def __init__(self, channels: int, features: int, kernel: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, features, kernel, padding=kernel // 2, bias=False)
            self.norm = nn.LayerNorm(features, 1e-6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x).permute(0, 2, 3, 1)).relu().permute(0, 3, 1, 2)

    def resize(x: torch.Tensor, size: Any) -> torch.Tensor:
        return functional.interpolate(x, size, mode="bilinear", align_corners=False)

    class UPerNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            *finer, last = WIDTHS["upernet"]
            self.pools = nn.ModuleList(Layer(last, CHANNELS, 1) for _ in range(4))
            self.bottleneck = Layer(last + 4 * CHANNELS, CHANNELS, 3)
            self.laterals = nn.ModuleList(Layer(width, CHANNELS, 1) for width in finer)
            self.levels = nn.ModuleList(Layer(CHANNELS, CHANNELS, 3) for _ in finer)
            self.fusion, self.classifier = Layer(4 * CHANNELS, CHANNELS, 3), nn.Conv2d(CHANNELS, KINDS, 1)
            self.auxiliary, self.auxiliary_classifier = Layer(finer[-1], AUXILIARY, 3), nn.Conv2d(AUXILIARY, KINDS, 1)

        def forward(self, maps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
            last = maps[-1]
            pooled = [functional.adaptive_avg_pool2d(last, n) for n in (1, 2, 3, 6)]
            pooled = [resize(layer(p), last.shape[2:]) for layer, p in zip(self.pools, pooled, strict=True)]
            pooled = torch.cat([last, *pooled], 1)
            levels = [lateral(m) for lateral, m in zip(self.laterals, maps[:-1], strict=True)]
            levels.append(self.bottleneck(pooled))
            for i in reversed(range(len(levels) - 1)):
                levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
            levels[:-1] = [layer(level) for layer, level in zip(self.levels, levels[:-1], strict=True)]
            x = self.fusion(torch.cat([resize(level, levels[0].shape[2:]) for level in levels], 1))
            return self.classifier(x), self.auxiliary_classifier(self.auxiliary(maps[-2]))

    return UPerNet().to(memory_format=torch.channels_last)


def upernet_loss(out: Any, batch: dict[str, Any]) -> Any:
    """Cross-entropy at the size of the image, of the head and of its auxiliary head."""
    from torch.nn import functional

    wanted = batch["class_map"].long()
    losses = [
        functional.cross_entropy(
            functional.interpolate(logits, wanted.shape[1:], mode="bilinear", align_corners=False), wanted,
            ignore_index=255,
        )
        for logits in out
    ]  # fmt: skip
    return losses[0] + AUXILIARY_WEIGHT * losses[1]


def torch_steps(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds of each timed step, and what it took."""
    import torch

    given = inputs(args)
    if args.model == "plain_detr":
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        model, loss_of, maps = torch_plain_detr(), plain_detr_loss, (given["map"], given["size"])
    else:
        maps = ([torch.from_numpy(m) for m in given.pop("maps")],)
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        model, loss_of = torch_upernet(), upernet_loss

    def step() -> torch.Tensor:
        loss = loss_of(model(*maps), given)
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    return halves.time_torch(args, batch, model, step)


def command(half: str) -> halves.Maker:
    """This file again, as one of the halves."""

    def make(args: argparse.Namespace, batch: int) -> list[str]:
        python = {"ours": args.jax_python, "torch": args.torch_python}[half]
        flags = [f"--{name}={getattr(args, name)}" for name in ("model", "batch", "steps", "threads")]
        return [python, __file__, *flags, f"--half={half}"]

    return make


def main(argv: list[str]) -> None:
    """Compare, or be a half."""
    args = parse(argv)
    if args.half == "ours":
        our_half(args)
    elif args.half == "torch":
        halves.torch_half(args, torch_steps)
    else:
        halves.compare("torch_heads", args, argv, {half: command(half) for half in ("ours", "torch")})


if __name__ == "__main__":
    main(sys.argv[1:])
