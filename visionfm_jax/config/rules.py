"""What a configuration must keep to, so that work starts only where it can end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from visionfm_jax.config.schema import (
    AuroraConfig,
    ClassificationConfig,
    ClipConfig,
    Config,
    ContrastiveConfig,
    DecoderConfig,
    MultimodalConfig,
    SwinV2Config,
    TextConfig,
    ViTConfig,
)
from visionfm_jax.errors import ConfigError

Problem = tuple[str, object, str, str]  # field, value, rule, remedy


def check(found: Sequence[Problem]) -> None:
    """Nothing if nothing was found.

    Raises:
      ConfigError: all that was found, one a line: field, value, rule, remedy.
    """
    if found:
        raise ConfigError("\n".join(f"config.{name} = {value!r}: {rule}; {how}" for name, value, rule, how in found))


def problems(c: Config) -> list[Problem]:
    """Rules between a configuration's own fields."""
    out = _model_problems(c)
    out += _choice(c, "train.precision", ("bf16", "fp16", "fp32"))
    out += _choice(c, "train.on_nonfinite", ("stop", "skip"))
    out += _choice(c, "parallel.stage", (3, 2, 1, 0))
    out += _least(
        c,
        {
            "train.batch_size": 1, "train.accumulate": 1, "train.steps": 0, "train.epochs": 0,
            "optim.warmup_steps": 0, "optim.final_lr": 0, "optim.weight_decay": 0, "optim.clip_norm": 0, "optim.eps": 0,
            "parallel.replicas": 1, "data.workers": 0, "data.threads": 1, "data.prefetch": 1,
            "checkpoint.every_steps": 0, "checkpoint.every_minutes": 0, "checkpoint.keep_last": 1,
            "checkpoint.keep_best": 0, "telemetry.log_every": 1, "telemetry.stuck_minutes": 0, "seed": 0,
        },
    )  # fmt: skip
    out += _shares(c, "optim.b1", "optim.b2", "optim.ema", "data.max_damaged")
    if not 0 < c.optim.layer_decay <= 1:
        out.append(("optim.layer_decay", c.optim.layer_decay, "must lie in (0, 1]", "set 1 for no layer decay"))
    if c.optim.layer_decay < 1 and len(c.towers) > 1:
        out.append(("optim.layer_decay", c.optim.layer_decay, "is for models of one tower", "set 1 for no layer decay"))
    if not math.isfinite(c.train.epochs):
        out.append(("train.epochs", c.train.epochs, "must be a number", "set 0 and train.steps, or a number of epochs"))
    if c.train.batch_size > 2**16:
        out.append(("train.batch_size", c.train.batch_size, "must be at most 65536", "lower it"))
    if not c.optim.lr > 0:
        out.append(("optim.lr", c.optim.lr, "must be positive", "set 1e-3"))
    if c.optim.final_lr > c.optim.lr:
        out.append(("optim.final_lr", c.optim.final_lr, f"must not exceed optim.lr = {c.optim.lr:g}", "lower it"))
    out += _augment_problems(c) + _length_problems(c) + _source_problems(c) + _eval_problems(c)
    if c.train.accumulate > 0 and c.train.batch_size % c.train.accumulate:
        near = max(1, round(c.train.batch_size / c.train.accumulate)) * c.train.accumulate
        rule = f"must be a multiple of train.accumulate = {c.train.accumulate}"
        out.append(("train.batch_size", c.train.batch_size, rule, f"the nearest is {near}"))
    if c.checkpoint.resume and c.checkpoint.weights:
        rule = "excludes checkpoint.weights"
        out.append(("checkpoint.resume", c.checkpoint.resume, rule, "empty one: resume continues a whole run"))
    if c.checkpoint.keep_best and not c.checkpoint.best_metric:
        out.append(("checkpoint.best_metric", "", "is needed by checkpoint.keep_best", 'set e.g. "val/top1"'))
    return out


def _get(c: Config, name: str) -> Any:
    value: Any = c
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _choice(c: Config, name: str, allowed: tuple) -> list[Problem]:
    value = _get(c, name)
    if value in allowed:
        return []
    return [(name, value, "must be one of " + ", ".join(map(str, allowed)), f"set it to {allowed[0]}")]


def _least(c: Config, least: dict[str, int]) -> list[Problem]:
    return [
        (name, _get(c, name), f"must be at least {low}", f"set it to {low} or more")
        for name, low in least.items()
        if not _get(c, name) >= low  # also true of NaN
    ]


def _shares(c: Config, *names: str) -> list[Problem]:
    return [
        (name, _get(c, name), "must lie in [0, 1)", "set a value in that range")
        for name in names
        if not 0 <= _get(c, name) < 1
    ]


def _model_problems(c: Config) -> list[Problem]:
    """Of the model, the task, and whether they fit."""
    out: list[Problem] = []
    model, task = MODELS[type(c.task)], type(c.task).__name__
    if not isinstance(c.model, model):
        remedy = f"set model to a {model.__name__}"
        return [("model", type(c.model).__name__, f"is no model for task = {task}", remedy)]
    for name, tower in c.towers.items():
        out += _choice(c, f"{name}.attention", ("xla", "cudnn"))
        out += _choice(c, f"{name}.remat", ("none", "attention", "dots", "full"))
        out += TOWERS[type(tower)](c, name)
    return out + TASKS[type(c.task)](c)


def _vit_problems(c: Config, name: str) -> list[Problem]:
    return _choice(c, f"{name}.pool", ("gap", "cls")) + _image_size_problems(c, name)


def _swin_problems(c: Config, name: str) -> list[Problem]:
    out = _image_size_problems(c, name) + _shares(c, f"{name}.drop_path")
    out += _least(c, {f"{name}.window": 1, f"{name}.pretrained_window": 0, f"{name}.pretrained_image_size": 0})
    tower = _get(c, name)
    if not out and tower.window > (side := tower.image_size // tower.patch_size):
        rule = f"is larger than the map, {side} x {side} tokens"
        out.append((f"{name}.window", tower.window, rule, f"set it to {side} or less"))
    if bool(tower.pretrained_window) != bool(tower.pretrained_image_size):
        rule = "goes with pretrained_image_size"
        out.append((f"{name}.pretrained_window", tower.pretrained_window, rule, "set both, or both to 0"))
    return out


def _text_problems(c: Config, name: str) -> list[Problem]:
    out = _least(c, {f"{name}.context": 3, f"{name}.vocab_size": 3, f"{name}.end_token": 0})
    tower = _get(c, name)
    if tower.end_token >= tower.vocab_size:
        rule = f"must be below vocab_size = {tower.vocab_size}"
        out.append((f"{name}.end_token", tower.end_token, rule, "set the tokenizer's end token"))
    return out


def _decoder_problems(c: Config, name: str) -> list[Problem]:
    out, tower = _least(c, {f"{name}.context": 3}), _get(c, name)
    special = {f"{name}.{leaf}": getattr(tower, leaf) for leaf in ("begin_token", "end_token", "mask_token")}
    if len({0, *special.values()}) < 4 or not all(0 < i < tower.vocab_size for i in special.values()):
        rule = f"must differ from each other and from 0, padding, and be below vocab_size = {tower.vocab_size}"
        out.append((", ".join(special), tuple(special.values()), rule, "set the tokenizer's, e.g. 1, 2 and 4"))
    return out


def _image_size_problems(c: Config, name: str) -> list[Problem]:
    out = _least(c, {f"{name}.patch_size": 1, f"{name}.image_size": 1})
    tower = _get(c, name)
    if tower.patch_size > 0 and tower.image_size % tower.patch_size:
        near = max(1, round(tower.image_size / tower.patch_size)) * tower.patch_size
        rule = f"must be a multiple of {name}.patch_size = {tower.patch_size}"
        out.append((f"{name}.image_size", tower.image_size, rule, f"the nearest is {near}"))
    return out


def _classification_problems(c: Config) -> list[Problem]:
    out = _choice(c, "task.loss", ("softmax", "sigmoid")) + _shares(c, "task.label_smoothing")
    return out + _least(c, {"task.num_classes": 2})


def _contrastive_problems(c: Config) -> list[Problem]:
    return _choice(c, "task.loss", ("softmax", "sigmoid")) + _least(c, {"task.mixup": 0, "model.embed_dim": 1})


def _multimodal_problems(c: Config) -> list[Problem]:
    task, image = c.task, c.model.image
    weights = ("masked_image", "contrastive", "captioning", "masked_language")
    out = _least(c, {f"task.{name}": 0 for name in weights} | {"model.embed_dim": 1, "task.mask_unit": 1})
    out += _shares(c, "task.mask_ratio", "task.word_mask_ratio", "task.blind")
    if not out and not sum(getattr(task, name) for name in weights):
        out.append(("task", dict.fromkeys(weights, 0.0), "the weights sum to nothing", "set one, e.g. captioning"))
    if not task.tokenizer:
        out.append(("task.tokenizer", "", "is needed for captions", "set the path of a SentencePiece model"))
    if min(task.split) < 1:
        rule = "needs samples with captions and without"
        out.append(("task.split", task.split, rule, "set (3, 1)"))
    unit = task.mask_unit
    if unit > 0 < image.patch_size and (unit % image.patch_size or image.image_size % unit):
        rule = f"must be a multiple of model.image.patch_size = {image.patch_size} and divide image_size"
        out.append(("task.mask_unit", unit, f"{rule} = {image.image_size}", f"set it to {image.patch_size}"))
    stride = 8 * image.patch_size
    if stride > 0 and image.image_size % stride:
        rule = f"must be a multiple of {stride}, what a token of the last stage paints"
        near = max(1, round(image.image_size / stride)) * stride
        out.append(("model.image.image_size", image.image_size, rule, f"the nearest is {near}"))
    return out


MODELS = {ClassificationConfig: ViTConfig, ContrastiveConfig: ClipConfig, MultimodalConfig: AuroraConfig}
TASKS: dict[type, Callable[[Config], list[Problem]]] = {
    ClassificationConfig: _classification_problems,
    ContrastiveConfig: _contrastive_problems,
    MultimodalConfig: _multimodal_problems,
}
TOWERS: dict[type, Callable[[Config, str], list[Problem]]] = {
    ViTConfig: _vit_problems,
    SwinV2Config: _swin_problems,
    TextConfig: _text_problems,
    DecoderConfig: _decoder_problems,
}


def _augment_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    augment = c.data.augment
    if not min(augment.std) > 0:
        out.append(("data.augment.std", augment.std, "must be positive", "set (0.229, 0.224, 0.225)"))
    low, high = augment.crop_scale
    if not 0 < low <= high <= 1:
        out.append(("data.augment.crop_scale", augment.crop_scale, "needs 0 < low <= high <= 1", "set (0.08, 1.0)"))
    if min(augment.jitter) < 0 or augment.jitter[3] > 0.5:
        rule = "needs values >= 0 and a hue of at most 0.5"
        out.append(("data.augment.jitter", augment.jitter, rule, "set (0.4, 0.4, 0.4, 0.1)"))
    operations, magnitude = augment.rand_augment
    if operations < 0 or not 0 <= magnitude <= 10:
        rule = "needs operations >= 0 and a magnitude in [0, 10]"
        out.append(("data.augment.rand_augment", augment.rand_augment, rule, "set (2, 9.0), or (0, 9.0) for none"))
    return out


def _length_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if c.train.batch_size < 1 or not math.isfinite(c.train.epochs):  # no length follows from it
        return out
    if bool(c.train.steps) == bool(c.train.epochs):
        out.append(
            ("train.steps", c.train.steps, "exactly one of train.steps and train.epochs is set", "set the other to 0")
        )
    elif c.train.epochs and c.data.num_examples < 1:
        rule = f"is needed by train.epochs = {c.train.epochs:g}"
        out.append(
            ("data.num_examples", c.data.num_examples, rule, "set the number of training images, or train.steps")
        )
    elif c.total_steps < 1:
        out.append(("train.epochs", c.train.epochs, "gives not one step", "raise it, or set train.steps"))
    elif c.optim.warmup_steps >= c.total_steps:
        rule = f"must be below the run's {c.total_steps} steps"
        out.append(("optim.warmup_steps", c.optim.warmup_steps, rule, f"set {max(c.total_steps // 20, 0)}"))
    return out


def _source_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if not c.data.train:
        out.append(("data.train", (), "needs at least one source", "add a SourceConfig"))
    elif not min(s.weight for s in c.data.train) > 0:
        weights = tuple(s.weight for s in c.data.train)
        out.append(("data.train[].weight", weights, "must each be positive", "set 1.0, or remove the source"))
    named = [(f"data.train[{i}]", s) for i, s in enumerate(c.data.train)]
    named += [(f"evals[{i}].source", e.source) for i, e in enumerate(c.evals)]
    named += [(f"evals[{i}].gallery[{j}]", s) for i, e in enumerate(c.evals) for j, s in enumerate(e.gallery)]
    for name, s in named:
        if not s.path:
            out.append((f"{name}.path", s.path, "must name the dataset", "set it to the folder, file or bundled set"))
    return out


def _eval_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    for i, e in enumerate(c.evals):
        out += [
            (f"evals[{i}].{leaf}", getattr(e, leaf), "must be at least 0", "set it to 0 or more")
            for leaf in ("batch_size", "every_steps")
            if getattr(e, leaf) < 0
        ]
        if e.decoding not in ("greedy", "beam", "nucleus"):
            out.append((f"evals[{i}].decoding", e.decoding, "must be one of greedy, beam, nucleus", "set greedy"))
        if e.beams < 1 or not 0 < e.top_p <= 1:
            rule = "needs beams >= 1 and top_p in (0, 1]"
            out.append((f"evals[{i}].beams, top_p", (e.beams, e.top_p), rule, "set 4 and 0.9"))
        if "/" in e.name or not e.name:
            out.append((f"evals[{i}].name", e.name, "must be a word without /", 'set e.g. "val"'))
    names = [e.name for e in c.evals]
    for name in sorted({n for n in names if names.count(n) > 1}):
        out.append(("evals[].name", name, "must be unique", "rename one"))
    metric = c.checkpoint.best_metric
    if metric and metric.partition("/")[0] not in names:
        out.append(("checkpoint.best_metric", metric, f"names none of the evals {names}", "write EVAL/METRIC"))
    return out


def device_problems(c: Config, devices: int, hosts: int) -> list[Problem]:
    """Rules that tie the batch and the mesh to `devices`, all hosts', and `hosts`."""
    out: list[Problem] = []
    if devices % c.parallel.replicas:
        fits = [r for r in range(1, devices + 1) if devices % r == 0]
        near = min(fits, key=lambda r: abs(r - c.parallel.replicas))
        out.append(
            ("parallel.replicas", c.parallel.replicas, f"must divide the {devices} devices", f"the nearest is {near}")
        )
    if c.parallel.stage and c.parallel.replicas == devices > 1:
        rule = f"leaves one device a replica, over which parallel.stage = {c.parallel.stage} cannot shard"
        out.append(("parallel.replicas", c.parallel.replicas, rule, "set parallel.stage to 0, or fewer replicas"))
    batches = [
        (
            "train.batch_size",
            c.train.batch_size,
            devices * c.train.accumulate,
            f"{devices} devices x {c.train.accumulate} micro-batches",
        )
    ]
    batches += [
        (f"evals[{i}].batch_size", e.batch_size or c.train.batch_size, devices, f"{devices} devices")
        for i, e in enumerate(c.evals)
    ]
    rows, why = 1, ""  # that must be in one micro-batch of a device
    if isinstance(c.task, ContrastiveConfig) and c.task.mixup:
        rows, why = 2, " x 2 images to mix"
    if isinstance(c.task, MultimodalConfig):
        rows, why = sum(c.task.split), f" x {sum(c.task.split)} samples of task.split = {c.task.split}"
    name, size, unit, what = batches[0]
    batches[0] = (name, size, unit * rows, what + why)
    for name, size, unit, what in batches:
        if size % unit:
            near = max(1, round(size / unit)) * unit
            out.append((name, size, f"must be a multiple of {unit} ({what})", f"the nearest is {near}"))
    if devices % hosts:
        out.append(
            (
                "parallel",
                c.parallel,
                f"{devices} devices must spread evenly over {hosts} hosts",
                "start as many per host",
            )
        )
    return out
