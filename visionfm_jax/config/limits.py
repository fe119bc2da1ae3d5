"""What each field may hold by itself: `LIMITS`, a line for each number and each closed set of words.

A number without a line fails `tests/unit/config/test_limits.py`. Bounds are generous: they refuse slips of the hand and
what a counter or an index cannot hold, not unusual runs. Every number is finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from visionfm_jax.config import schema

Problem = tuple[str, object, str, str]  # field, value, rule, remedy

_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # and halves of surrogate pairs, which no file name can hold
_LONGEST = 4096  # characters of a text; Linux' longest path
_ARTICLES = {int: "an int", float: "a number", bool: "True or False", str: "a text"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; the ends belong to it, save those that `above` and `below` leave out."""

    low: float
    high: float
    why: str = ""  # the reason, where it is not plain
    above: bool = False  # greater than `low`
    below: bool = False  # less than `high`
    off: bool = False  # or 0, which turns something off

    def __str__(self) -> str:
        ends = ", ".join(str(end) if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return ("0 or " if self.off else "") + ("(" if self.above else "[") + ends + (")" if self.below else "]")

    def problem(self, value: float) -> tuple[str, str] | None:
        """Rule and remedy if `value` lies outside."""
        if self.off and value == 0:
            return None
        small = value <= self.low if self.above else value < self.low
        large = value >= self.high if self.below else value > self.high
        if not (small or large):
            return None
        closed = not (self.above if small else self.below)
        remedy = f"the nearest is {self.low if small else self.high}" if closed else "set a value in that range"
        return f"must lie in {self}" + (f" ({self.why})" if self.why else ""), remedy


@dataclass(frozen=True)
class OneOf:
    """A closed set."""

    values: tuple[str | int, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))

    def problem(self, value: object) -> tuple[str, str] | None:
        """Rule and remedy if `value` is another."""
        if value in self.values:
            return None
        near = difflib.get_close_matches(str(value), map(str, self.values), n=1, cutoff=0.3)
        return f"must be one of {', '.join(map(str, self.values))}", f"set it to {(near or self.values)[0]}"


@dataclass(frozen=True)
class FileName:
    """The name of a file or folder, and a part of metrics' names."""

    def __str__(self) -> str:
        return "letters, digits and ._-"

    def problem(self, value: str) -> tuple[str, str] | None:
        """Rule and remedy if `value` is no such name."""
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", value):
            return None
        return "must be 1 to 100 letters, digits and ._- and not begin with . or -", 'set e.g. "vit_2"'


@dataclass(frozen=True)
class Filled:
    """A text that is not empty."""

    rule: str
    remedy: str

    def __str__(self) -> str:
        return "not empty"

    def problem(self, value: str) -> tuple[str, str] | None:
        """Rule and remedy if `value` is empty."""
        return None if value else (self.rule, self.remedy)


Limit = Range | OneOf | FileName | Filled

SHARE = Range(0, 1, below=True)
DECAY = Range(0, 0.999999, "1 - decay is rounded in fp32")
STEPS = Range(0, 2**30, "steps are counted in int32")
LOSS_WEIGHT = Range(0, 1e6)
IDS = Range(0, 2**24)
SIDE = Range(1, 4096)  # pixels
ATTENTION = OneOf(("xla", "cudnn"))
REMAT = OneOf(("none", "attention", "dots", "full"))
EVALS = OneOf(
    ("captioning", "classification", "perplexity", "pixel_baseline", "reconstruction", "retrieval", "zero_shot")
)
LOSS = OneOf(("softmax", "sigmoid"))

# A tuple has one limit for all its numbers, or one for each.
LIMITS: dict[type, dict[str, Limit | tuple[Limit, ...]]] = {
    schema.ViTConfig: {
        "size": OneOf(("P", "Ti", "S", "B", "L", "H", "g")),
        "width": Range(0, 2**16),
        "depth": Range(0, 1024),
        "heads": Range(0, 1024),
        "mlp": Range(0, 2**18),
        "patch_size": Range(1, 256),  # pixels
        "image_size": SIDE,
        "pool": OneOf(("gap", "norm_gap", "cls", "cls_gap", "map")),
        "registers": Range(0, 256),
        "pos_embed": OneOf(("none", "patches", "class", "all")),
        "pos_image_size": Range(0, 4096),  # pixels
        "pos_resize": OneOf(("bicubic_antialias", "bicubic", "bicubic_offset", "bilinear_antialias")),
        "rope_theta": Range(1, 1e6, "of periods from 1", off=True),
        "qkv_bias": OneOf(("all", "no_key", "none")),
        "layer_scale": Range(1e-8, 10, off=True),
        "drop_path": SHARE,
        "norm_eps": Range(1e-12, 1e-3),
        "activation": OneOf(("gelu", "gelu_tanh", "quick_gelu", "swiglu")),
        "attention": ATTENTION,
        "remat": REMAT,
    },
    schema.SwinV2Config: {
        "size": OneOf(("P", "T", "S", "B", "L", "H", "G")),
        "patch_size": Range(1, 256),  # pixels
        "image_size": SIDE,
        "window": Range(1, 64, "a window's tokens are compared each with each"),
        "pretrained_window": Range(0, 64),
        "pretrained_image_size": Range(0, 4096),  # pixels
        "attention": ATTENTION,
        "remat": REMAT,
        "drop_path": SHARE,
    },
    schema.TextConfig: {
        "size": OneOf(("P", "B", "L", "H")),
        "vocab_size": Range(3, 2**24),
        "context": Range(3, 2**14, "tokens are compared each with each"),
        "end_token": IDS,
        "attention": ATTENTION,
        "remat": REMAT,
    },
    schema.ClipConfig: {"embed_dim": Range(1, 2**16)},
    schema.DecoderConfig: {
        "size": OneOf(("P", "L")),
        "vocab_size": Range(4, 2**24),
        "context": Range(3, 2**14, "tokens are compared each with each"),
        "begin_token": IDS,
        "end_token": IDS,
        "mask_token": IDS,
        "attention": ATTENTION,
        "remat": REMAT,
    },
    schema.AuroraConfig: {"embed_dim": Range(1, 2**16)},
    schema.ClassificationConfig: {"num_classes": Range(2, 2**24), "loss": LOSS, "label_smoothing": SHARE},
    schema.ContrastiveConfig: {
        "loss": LOSS,
        "mixup": Range(1e-3, 100, "of Beta(alpha, alpha)", off=True),
    },
    schema.MultimodalConfig: {
        "tokenizer": Filled("is needed for captions", "set the path of a SentencePiece model"),
        "split": Range(0, 1000),  # samples
        "masked_image": LOSS_WEIGHT,
        "contrastive": LOSS_WEIGHT,
        "captioning": LOSS_WEIGHT,
        "masked_language": LOSS_WEIGHT,
        "mask_unit": SIDE,
        "mask_ratio": Range(0, 1, above=True, below=True),
        "word_mask_ratio": SHARE,
        "blind": SHARE,
    },
    schema.SourceConfig: {
        "kind": OneOf(("tfds", "folder", "numpy", "bundled", "tars", "coco_captions", "visual_genome")),
        "path": Filled("must name the dataset", "set it to the folder, file or bundled set"),
        "weight": Range(1e-6, 1e6, "relative to the other sources'"),
    },
    schema.AugmentConfig: {
        "crop_scale": Range(0, 1, above=True),
        "rand_augment": (Range(0, 100), Range(0, 10)),  # operations, magnitude
        "jitter": (Range(0, 10), Range(0, 10), Range(0, 10), Range(0, 0.5, "half of the colour circle")),
        "mean": Range(0, 1, "of values in [0, 1]"),
        "std": Range(1e-3, 1, "of values in [0, 1]"),
    },
    schema.DataConfig: {
        "num_examples": Range(0, 2**40),
        "workers": Range(0, 512),  # processes
        "threads": Range(1, 512),
        "prefetch": Range(1, 64, "batches in memory"),
        "max_damaged": SHARE,
        "max_pixels": Range(1, 178_956_970, "the most that Pillow opens"),
    },
    schema.OptimConfig: {
        "lr": Range(1e-12, 100),
        "final_lr": Range(0, 100),
        "warmup_steps": STEPS,
        "b1": DECAY,
        "b2": DECAY,
        "eps": Range(1e-30, 1, "0 / 0 is the update of a weight without gradient"),
        "weight_decay": Range(0, 100),
        "clip_norm": Range(1e-6, 1e6, off=True),
        "layer_decay": Range(0.01, 1),
        "ema": DECAY,
    },
    schema.ParallelConfig: {"stage": OneOf((3, 2, 1, 0)), "replicas": Range(1, 2**20)},
    schema.TrainConfig: {
        "batch_size": Range(1, 2**16, "samples are numbered in two 32-bit words"),
        "accumulate": Range(1, 2**16),
        "epochs": Range(0, 1e6),
        "steps": STEPS,
        "precision": OneOf(("bf16", "fp16", "fp32")),
        "on_nonfinite": OneOf(("stop", "skip")),
    },
    schema.CheckpointConfig: {
        "every_steps": STEPS,
        "every_minutes": Range(0.01, 1e6, off=True),
        "keep_last": Range(1, 10_000),
        "keep_best": Range(0, 10_000),
        "on_damage": OneOf(("stop", "older")),
    },
    schema.PreprocessConfig: {
        "crop": Range(0.01, 1),
        "resize": OneOf(("crop", "squash")),
        "interpolation": OneOf(("bicubic", "bilinear")),
    },
    schema.EvalConfig: {
        "kind": EVALS,
        "name": FileName(),
        "batch_size": Range(0, 2**16),
        "every_steps": STEPS,
        "decoding": OneOf(("greedy", "beam", "nucleus")),
        "beams": Range(1, 64),
        "top_p": Range(0, 1, above=True),
    },
    schema.TelemetryConfig: {
        "log_every": Range(1, 2**30),  # steps
        "stuck_minutes": Range(0.01, 1e6, off=True),
    },
    schema.Config: {"name": FileName(), "seed": Range(0, 2**32 - 1)},
}


def field_problems(holder: Any, prefix: str = "") -> Iterator[Problem]:
    """What is wrong with the fields of `holder`, a dataclass of `schema` named `prefix`, each by itself."""
    known = {f.name: f for f in dataclasses.fields(holder)}
    for name in vars(holder).keys() - known.keys():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        yield f"{prefix}{name}", getattr(holder, name), "no such field", f"did you mean {prefix}{near}?"
    for name, field in known.items():
        limit = LIMITS.get(type(holder), {}).get(name)
        yield from _value_problems(f"{prefix}{name}", getattr(holder, name), field.type, limit)


def _value_problems(name: str, value: Any, kind: Any, limit: Any) -> Iterator[Problem]:
    if typing.get_origin(kind) is tuple:
        yield from _tuple_problems(name, value, typing.get_args(kind), limit)
        return
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) not in ((int, float) if kind is float else kinds):
        what = " or ".join(_ARTICLES.get(k, f"a {k.__name__}") for k in kinds)
        yield name, value, f"must be {what}, not {type(value).__name__}", "set one"
    elif dataclasses.is_dataclass(value):
        yield from field_problems(value, f"{name}.")
    elif isinstance(value, str) and (_CONTROL.search(value) or len(value) > _LONGEST):
        rule = f"must be at most {_LONGEST} characters, none of them a control character"
        yield name, value, rule, "write it anew"
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value, "must be finite", f"set a value in {limit}"
    elif limit and (found := limit.problem(value)):
        yield name, value, *found


def _tuple_problems(name: str, value: Any, kinds: tuple, limit: Any) -> Iterator[Problem]:
    if type(value) is not tuple:
        yield name, value, f"must be a tuple, not {type(value).__name__}", "write (…,)"
        return
    if Ellipsis in kinds:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        yield name, value, f"must be a tuple of {len(kinds)} numbers", "write as many"
        return
    limits = limit if type(limit) is tuple else (limit,) * len(value)
    for i, (item, kind, own) in enumerate(zip(value, kinds, limits, strict=True)):
        yield from _value_problems(f"{name}[{i}]", item, kind, own)
