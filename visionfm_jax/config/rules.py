"""What the fields of a configuration must keep to between them; each by itself: `limits`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from visionfm_jax.config.limits import STEPS, Problem, field_problems
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


def check(found: Sequence[Problem]) -> None:
    """Nothing if nothing was found.

    Raises:
      ConfigError: all that was found, one a line: field, value, rule, remedy.
    """
    if found:
        raise ConfigError(
            "\n".join(f"config.{name} = {shown(value)}: {rule}; {how}" for name, value, rule, how in found)
        )


def shown(value: object) -> str:
    """`value` as Python writes it, its beginning if that is long."""
    try:
        text = repr(value)
    except Exception as error:  # an int of thousands of digits, or a class of the user's
        return f"({type(value).__name__}, which cannot be written: {type(error).__name__})"
    return text if len(text) <= 120 else f"{text[:60]} … ({len(text):,} characters)"


def problems(c: Config) -> list[Problem]:
    """All broken rules of a configuration. Rules between fields of which one is broken by itself are left out."""
    out = list(field_problems(c))
    broken = [name for name, *_ in out]
    for rule, *reads in BETWEEN:
        if not any(a.startswith(b) or b.startswith(a) for a in broken for b in reads):
            out += rule(c)
    return out


def _get(c: Config, name: str) -> Any:
    value: Any = c
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _optim_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if c.optim.final_lr > c.optim.lr:
        out.append(("optim.final_lr", c.optim.final_lr, f"must not exceed optim.lr = {c.optim.lr:g}", "lower it"))
    if c.optim.layer_decay < 1 and len(c.towers) > 1:
        out.append(("optim.layer_decay", c.optim.layer_decay, "is for models of one tower", "set 1 for no layer decay"))
    return out


def _accumulate_problems(c: Config) -> list[Problem]:
    if not c.train.batch_size % c.train.accumulate:
        return []
    near = max(1, round(c.train.batch_size / c.train.accumulate)) * c.train.accumulate
    rule = f"must be a multiple of train.accumulate = {c.train.accumulate}"
    return [("train.batch_size", c.train.batch_size, rule, f"the nearest is {near}")]


def _checkpoint_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if c.checkpoint.resume and c.checkpoint.weights:
        rule = "excludes checkpoint.weights"
        out.append(("checkpoint.resume", c.checkpoint.resume, rule, "empty one: resume continues a whole run"))
    if c.checkpoint.keep_best and not c.checkpoint.best_metric:
        out.append(("checkpoint.best_metric", "", "is needed by checkpoint.keep_best", 'set e.g. "val/top1"'))
    return out


def _model_problems(c: Config) -> list[Problem]:
    """Of the model, the task, and whether they fit."""
    out: list[Problem] = []
    model, task = MODELS[type(c.task)], type(c.task).__name__
    if not isinstance(c.model, model):
        remedy = f"set model to a {model.__name__}"
        return [("model", type(c.model).__name__, f"is no model for task = {task}", remedy)]
    for name, tower in c.towers.items():
        out += TOWERS[type(tower)](c, name)
        if tower.attention == "cudnn" and c.train.precision == "fp32":
            rule = "needs train.precision = bf16 or fp16, as cuDNN has no attention in fp32"
            out.append((f"{name}.attention", "cudnn", rule, "set it to xla, or train.precision to bf16"))
    return out + (_multimodal_problems(c) if isinstance(c.task, MultimodalConfig) else [])


def _vit_problems(c: Config, name: str) -> list[Problem]:
    tower = _get(c, name)
    out = _image_size_problems(c, name)
    if (tokens := (tower.image_size // tower.patch_size) ** 2) > 2**16:
        rule = f"gives {tokens} tokens, more than 65536, each compared with each"
        out.append((f"{name}.patch_size", tower.patch_size, rule, f"set {-(-tower.image_size // 256)} or more"))
    if tower.pos_image_size and tower.pos_embed == "none":
        rule = f"is of a position table, and {name}.pos_embed = none has no table"
        out.append((f"{name}.pos_image_size", tower.pos_image_size, rule, "set it to 0"))
    elif tower.pos_image_size:
        out += _image_size_problems(c, name, "pos_image_size")
    if tower.pos_embed == "none" and not tower.rope_theta:
        rule = f"leaves the patches without places, as {name}.rope_theta = 0"
        out.append((f"{name}.pos_embed", "none", rule, "set rope_theta to 100, or pos_embed to class"))
    if tower.pool == "map" and tower.activation == "swiglu":
        rule = f"has an MLP of two layers, and {name}.activation = swiglu needs three"
        out.append((f"{name}.pool", "map", rule, "set another pool, or activation to gelu"))
    if tower.pos_embed == "all" and not tower.registers:
        rule = f"has rows for registers, and {name}.registers = 0"
        out.append((f"{name}.pos_embed", "all", rule, "set it to class"))
    return out


def _swin_problems(c: Config, name: str) -> list[Problem]:
    tower, out = _get(c, name), _image_size_problems(c, name)
    side = tower.image_size // tower.patch_size
    if not out and tower.window > side:
        rule = f"is larger than the map, {side} x {side} tokens"
        out.append((f"{name}.window", tower.window, rule, f"set it to {side} or less"))
    if (pairs := side**2 * tower.window**2) > 2**28:
        rule = f"compares {pairs} pairs of tokens on a map of {side} x {side}, more than {2**28}"
        out.append((f"{name}.window", tower.window, rule, "set a smaller window, or larger patches"))
    if bool(tower.pretrained_window) != bool(tower.pretrained_image_size):
        rule = "goes with pretrained_image_size"
        out.append((f"{name}.pretrained_window", tower.pretrained_window, rule, "set both, or both to 0"))
    return out


def _text_problems(c: Config, name: str) -> list[Problem]:
    tower = _get(c, name)
    if tower.end_token < tower.vocab_size:
        return []
    rule = f"must be below vocab_size = {tower.vocab_size}"
    return [(f"{name}.end_token", tower.end_token, rule, "set the tokenizer's end token")]


def _decoder_problems(c: Config, name: str) -> list[Problem]:
    tower = _get(c, name)
    special = {f"{name}.{leaf}": getattr(tower, leaf) for leaf in ("begin_token", "end_token", "mask_token")}
    if len({0, *special.values()}) == 4 and all(0 < i < tower.vocab_size for i in special.values()):
        return []
    rule = f"must differ from each other and from 0, padding, and be below vocab_size = {tower.vocab_size}"
    return [(", ".join(special), tuple(special.values()), rule, "set the tokenizer's, e.g. 1, 2 and 4")]


def _image_size_problems(c: Config, name: str, leaf: str = "image_size") -> list[Problem]:
    tower = _get(c, name)
    size = getattr(tower, leaf)
    if not size % tower.patch_size:
        return []
    near = max(1, round(size / tower.patch_size)) * tower.patch_size
    rule = f"must be a multiple of {name}.patch_size = {tower.patch_size}"
    return [(f"{name}.{leaf}", size, rule, f"the nearest is {near}")]


def _multimodal_problems(c: Config) -> list[Problem]:
    task, image, out = c.task, c.model.image, []
    weights = ("masked_image", "contrastive", "captioning", "masked_language")
    if not sum(getattr(task, name) for name in weights):
        out.append(("task", dict.fromkeys(weights, 0.0), "the weights sum to nothing", "set one, e.g. captioning"))
    if min(task.split) < 1:
        rule = "needs samples with captions and without"
        out.append(("task.split", task.split, rule, "set (3, 1)"))
    unit = task.mask_unit
    if unit % image.patch_size or image.image_size % unit:
        rule = f"must be a multiple of model.image.patch_size = {image.patch_size} and divide image_size"
        out.append(("task.mask_unit", unit, f"{rule} = {image.image_size}", f"set it to {image.patch_size}"))
    stride = 8 * image.patch_size
    if image.image_size % stride:
        rule = f"must be a multiple of {stride}, what a token of the last stage paints"
        near = max(1, round(image.image_size / stride)) * stride
        out.append(("model.image.image_size", image.image_size, rule, f"the nearest is {near}"))
    return out


MODELS = {ClassificationConfig: ViTConfig, ContrastiveConfig: ClipConfig, MultimodalConfig: AuroraConfig}
TOWERS: dict[type, Callable[[Config, str], list[Problem]]] = {
    ViTConfig: _vit_problems,
    SwinV2Config: _swin_problems,
    TextConfig: _text_problems,
    DecoderConfig: _decoder_problems,
}


def _crop_problems(c: Config) -> list[Problem]:
    low, high = scale = c.data.augment.crop_scale
    return [] if low <= high else [("data.augment.crop_scale", scale, "needs low <= high", f"set {high, low}")]


def _length_problems(c: Config) -> list[Problem]:
    if bool(c.train.steps) == bool(c.train.epochs):
        rule = "exactly one of train.steps and train.epochs is set"
        return [("train.steps", c.train.steps, rule, "set the other to 0")]
    if c.train.epochs and c.data.num_examples < 1:
        rule = f"is needed by train.epochs = {c.train.epochs:g}"
        remedy = "set the number of training images, or train.steps"
        return [("data.num_examples", c.data.num_examples, rule, remedy)]
    if c.total_steps < 1:
        rule = f"gives not one step of train.batch_size = {c.train.batch_size}, as data.num_examples = "
        return [("train.epochs", c.train.epochs, f"{rule}{c.data.num_examples}", "raise it, or set train.steps")]
    if c.total_steps > STEPS.high:
        rule = f"gives {c.total_steps} steps, more than {STEPS.high} ({STEPS.why})"
        return [("train.epochs", c.train.epochs, rule, "lower it, or raise train.batch_size")]
    if c.optim.warmup_steps >= c.total_steps:
        length = "train.steps" if c.train.steps else "train.epochs x data.num_examples / train.batch_size"
        rule = f"must be below the run's {c.total_steps} steps ({length})"
        return [("optim.warmup_steps", c.optim.warmup_steps, rule, f"set {c.total_steps // 20}")]
    return []


def _source_problems(c: Config) -> list[Problem]:
    return [] if c.data.train else [("data.train", (), "needs at least one source", "add a SourceConfig")]


def _eval_problems(c: Config) -> list[Problem]:
    names = [e.name for e in c.evals]
    twice = sorted({n for n in names if names.count(n) > 1})
    return [("evals[].name", name, "must be unique", "rename one") for name in twice]


# A rule between fields, and the beginnings of the names of those that it reads.
BETWEEN: tuple[tuple[Any, ...], ...] = (
    (_model_problems, "model", "task", "train.precision"),
    (_accumulate_problems, "train.batch_size", "train.accumulate"),
    (_length_problems, "train.steps", "train.epochs", "train.batch_size", "data.num_examples", "optim.warmup_steps"),
    (_optim_problems, "model", "optim.lr", "optim.final_lr", "optim.layer_decay"),
    (_crop_problems, "data.augment.crop_scale"),
    (_source_problems, "data.train"),
    (_checkpoint_problems, "checkpoint"),
    (_eval_problems, "evals"),
)


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
