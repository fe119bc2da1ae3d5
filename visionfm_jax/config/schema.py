"""What a run is made of: nested, typed dataclasses with units, rules and derived quantities.

The classes are not frozen, because flags write into them, and their annotations are no strings, because flags read
their types; `Config.validate` is called once after that,
and nothing changes a configuration afterwards. Derived quantities are properties, never stored.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from visionfm_jax.errors import ConfigError


@dataclass(kw_only=True)
class ViTConfig:
    """A Vision Transformer (Dosovitskiy et al. 2021); sizes in `models.vit.SIZES`."""

    size: str = "H"
    patch_size: int = 14  # pixels
    image_size: int = 224  # pixels, square
    pool: str = "gap"  # gap: mean of the patch tokens | cls: a class token
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full


@dataclass(kw_only=True)
class SwinV2Config:
    """A Swin Transformer V2 (Liu et al. 2022); sizes in `models.swin_v2.SIZES`."""

    size: str = "G"
    patch_size: int = 4  # pixels
    image_size: int = 224  # pixels, square
    window: int = 14  # tokens; a smaller map is one window
    pretrained_window: int = 0  # of the run whose weights this continues; 0: none
    pretrained_image_size: int = 0  # pixels, of that run
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full
    drop_path: float = 0.2  # chance that the last block is left out; falls linearly to 0 at the first


@dataclass(kw_only=True)
class TextConfig:
    """A text transformer; sizes in `models.text.SIZES`."""

    size: str = "H"
    vocab_size: int = 49_408
    context: int = 77  # tokens, with those of begin and end
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full


@dataclass(kw_only=True)
class ClipConfig:
    """An image and a text tower with a joint space (Radford et al. 2021)."""

    image: SwinV2Config = field(default_factory=SwinV2Config)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 1024  # of the joint space


@dataclass(kw_only=True)
class ClassificationConfig:
    """One label per image."""

    num_classes: int = 1000
    loss: str = "softmax"  # softmax | sigmoid (one-vs-all; Beyer et al. 2020)
    label_smoothing: float = 0.1


@dataclass(kw_only=True)
class SourceConfig:
    """A dataset that gives record i on demand."""

    kind: str = "tfds"  # a name in `data.sources.SOURCES`
    path: str = ""  # a directory or file; for `bundled`, the name of the set
    split: str = "train"
    weight: float = 1.0  # share of this source in a mixture, relative to the others'
    image_key: str = "image"
    label_key: str = "label"


@dataclass(kw_only=True)
class AugmentConfig:
    """How a training image is varied; the crop on the host, the rest on the device."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the crop relative to the image; (1, 1): no random crop
    flip: bool = True  # horizontal; off for flags, digits, clock faces
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's, of values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class DataConfig:
    """The training data and its loader."""

    train: tuple[SourceConfig, ...] = ()
    num_examples: int = 0  # images in an epoch; needed when the run's length is given in epochs
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    shuffle: bool = True
    workers: int = 0  # processes per host; 0: threads of the training process
    threads: int = 8  # reader threads per process
    prefetch: int = 2  # batches held ready per worker
    max_damaged: float = 0.001  # share of unreadable records past which the run stops


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3  # peak
    final_lr: float = 0.0
    warmup_steps: int = 10_000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    layer_decay: float = 1.0  # factor of the learning rate per layer below the head; 1: none
    ema: float = 0.0  # decay per step of the averaged weights; 0: none


@dataclass(kw_only=True)
class ParallelConfig:
    """A mesh (replica, fsdp) and the ZeRO stage on it; see `parallel.zero`."""

    stage: int = 3  # 0: plain data parallel … 3: fully sharded
    replicas: int = 1  # hybrid sharding: this many copies, each sharded over devices / replicas


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch and precision."""

    batch_size: int = 2048  # images per optimiser step, over all devices
    accumulate: int = 1  # micro-batches per step
    epochs: float = 0.0  # exactly one of epochs and steps is set
    steps: int = 0
    precision: str = "bf16"  # compute: bf16 | fp16 | fp32; what stays fp32: docs/precision.md
    on_nonfinite: str = "stop"  # a non-finite loss or gradient: stop | skip the step, as fp16 always does


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to start."""

    every_steps: int = 0  # 0: never by steps
    every_minutes: float = 0.0  # 0: never by time
    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = ""  # e.g. "val/top1"; needed by keep_best; higher is better
    resume: str = ""  # another run's folder: continue its whole state
    weights: str = ""  # another run's folder: start from its weights only


@dataclass(kw_only=True)
class EvalConfig:
    """A measurement on held-out data, named in the logs by `name`."""

    kind: str = "classification"  # a name in `evals.EVALS`
    name: str = "val"
    source: SourceConfig = field(default_factory=SourceConfig)
    batch_size: int = 0  # 0: the training batch size
    every_steps: int = 0  # 0: only at the end


@dataclass(kw_only=True)
class TelemetryConfig:
    """What a person sees while it runs."""

    log_every: int = 50  # steps
    progress: bool = True
    tensorboard: bool = True
    stuck_minutes: float = 30.0  # no finished step for this long: dump stacks, name the process, exit; 0: wait for ever


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    name: str
    seed: int = 0
    workdir: str = ""  # the run folder; empty: runs/NAME
    model: ViTConfig = field(default_factory=ViTConfig)
    task: ClassificationConfig = field(default_factory=ClassificationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: tuple[EvalConfig, ...] = ()
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def folder(self) -> str:
        return self.workdir or f"runs/{self.name}"

    @property
    def total_steps(self) -> int:
        return self.train.steps or round(self.train.epochs * self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps per pass over the data; 0 where the size of the data is not given."""
        return self.data.num_examples / self.train.batch_size

    @property
    def micro_batch(self) -> int:
        """Images per forward pass, over all devices."""
        return self.train.batch_size // self.train.accumulate

    @property
    def warmup_share(self) -> float:
        return self.optim.warmup_steps / self.total_steps

    def derived(self) -> dict[str, int | float]:
        """The computed quantities, for people: printed at start and kept in the run folder."""
        return {
            "total_steps": self.total_steps,
            "steps_per_epoch": self.steps_per_epoch,
            "micro_batch": self.micro_batch,
            "warmup_share": self.warmup_share,
            "examples_seen": self.total_steps * self.train.batch_size,
        }

    def validate(self) -> None:
        """Check every rule that needs no device and no data.

        Raises:
          ConfigError: all broken rules at once, one a line: field, value, rule, remedy.
        """
        problems = [_line(*p) for p in _problems(self)]
        if problems:
            raise ConfigError("\n".join(problems))

    def validate_devices(self, devices: int, hosts: int = 1) -> None:
        """Check the rules that tie the batch and the mesh to `devices` (all hosts') and `hosts`.

        Raises:
          ConfigError: as `validate`.
        """
        problems = [_line(*p) for p in _device_problems(self, devices, hosts)]
        if problems:
            raise ConfigError("\n".join(problems))


Problem = tuple[str, object, str, str]  # field, value, rule, remedy


def _line(name: str, value: object, rule: str, remedy: str) -> str:
    return f"config.{name} = {value!r}: {rule}; {remedy}"


def _choice(c: object, name: str, allowed: tuple) -> list[Problem]:
    value = c
    for part in name.split("."):
        value = getattr(value, part)
    if value in allowed:
        return []
    return [(name, value, "must be one of " + ", ".join(map(str, allowed)), f"set it to {allowed[0]}")]


def _problems(c: Config) -> list[Problem]:
    """Rules between a configuration's own fields."""
    out: list[Problem] = []
    out += _choice(c, "model.pool", ("gap", "cls"))
    out += _choice(c, "model.attention", ("xla", "cudnn"))
    out += _choice(c, "model.remat", ("none", "attention", "dots", "full"))
    out += _choice(c, "task.loss", ("softmax", "sigmoid"))
    out += _choice(c, "train.precision", ("bf16", "fp16", "fp32"))
    out += _choice(c, "train.on_nonfinite", ("stop", "skip"))
    out += _choice(c, "parallel.stage", (3, 2, 1, 0))
    for name, least in (
        ("model.patch_size", 1), ("model.image_size", 1), ("task.num_classes", 2), ("train.batch_size", 1),
        ("train.accumulate", 1), ("train.steps", 0), ("train.epochs", 0), ("optim.warmup_steps", 0),
        ("optim.final_lr", 0), ("optim.weight_decay", 0), ("optim.clip_norm", 0), ("parallel.replicas", 1),
        ("data.workers", 0), ("data.threads", 1), ("data.prefetch", 1),
        ("optim.eps", 0), ("checkpoint.every_steps", 0),
        ("checkpoint.every_minutes", 0), ("checkpoint.keep_last", 1), ("checkpoint.keep_best", 0),
        ("telemetry.log_every", 1), ("telemetry.stuck_minutes", 0), ("seed", 0),
    ):  # fmt: skip
        part, _, leaf = name.rpartition(".")
        value = getattr(getattr(c, part) if part else c, leaf)
        if not value >= least:  # also true of NaN
            out.append((name, value, f"must be at least {least}", f"set it to {least} or more"))
    for name, value, low, high in (
        ("optim.b1", c.optim.b1, 0, 1), ("optim.b2", c.optim.b2, 0, 1), ("optim.ema", c.optim.ema, 0, 1),
        ("task.label_smoothing", c.task.label_smoothing, 0, 1), ("data.max_damaged", c.data.max_damaged, 0, 1),
    ):  # fmt: skip
        if not low <= value < high:
            out.append((name, value, f"must lie in [{low}, {high})", "set a value in that range"))
    if not 0 < c.optim.layer_decay <= 1:
        out.append(("optim.layer_decay", c.optim.layer_decay, "must lie in (0, 1]", "set 1 for no layer decay"))
    if not math.isfinite(c.train.epochs):
        out.append(("train.epochs", c.train.epochs, "must be a number", "set 0 and train.steps, or a number of epochs"))
    if c.train.batch_size > 2**16:
        out.append(("train.batch_size", c.train.batch_size, "must be at most 65536", "lower it"))
    if not min(c.data.augment.std) > 0:
        out.append(("data.augment.std", c.data.augment.std, "must be positive", "set (0.229, 0.224, 0.225)"))
    for i, e in enumerate(c.evals):
        for leaf in ("batch_size", "every_steps"):
            if getattr(e, leaf) < 0:
                out.append((f"evals[{i}].{leaf}", getattr(e, leaf), "must be at least 0", "set it to 0 or more"))
        if "/" in e.name or not e.name:
            out.append((f"evals[{i}].name", e.name, "must be a word without /", 'set e.g. "val"'))
    if not c.optim.lr > 0:
        out.append(("optim.lr", c.optim.lr, "must be positive", "set 1e-3"))
    if c.optim.final_lr > c.optim.lr:
        out.append(("optim.final_lr", c.optim.final_lr, f"must not exceed optim.lr = {c.optim.lr:g}", "lower it"))
    if c.model.patch_size > 0 and c.model.image_size % c.model.patch_size:
        near = max(1, round(c.model.image_size / c.model.patch_size)) * c.model.patch_size
        rule = f"must be a multiple of model.patch_size = {c.model.patch_size}"
        out.append(("model.image_size", c.model.image_size, rule, f"the nearest is {near}"))
    low, high = c.data.augment.crop_scale
    if not 0 < low <= high <= 1:
        rule = "needs 0 < low <= high <= 1"
        out.append(("data.augment.crop_scale", c.data.augment.crop_scale, rule, "set (0.08, 1.0)"))
    if min(c.data.augment.jitter) < 0 or c.data.augment.jitter[3] > 0.5:
        rule = "needs values >= 0 and a hue of at most 0.5"
        out.append(("data.augment.jitter", c.data.augment.jitter, rule, "set (0.4, 0.4, 0.4, 0.1)"))
    out += _length_problems(c)
    out += _source_problems(c)
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
    for name, s in named:
        if not s.path:
            out.append((f"{name}.path", s.path, "must name the dataset", "set it to the folder, file or bundled set"))
    names = [e.name for e in c.evals]
    for name in sorted({n for n in names if names.count(n) > 1}):
        out.append(("evals[].name", name, "must be unique", "rename one"))
    metric = c.checkpoint.best_metric
    if metric and metric.partition("/")[0] not in names:
        out.append(("checkpoint.best_metric", metric, f"names none of the evals {names}", "write EVAL/METRIC"))
    return out


def _device_problems(c: Config, devices: int, hosts: int) -> list[Problem]:
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


def to_dict(config: Config) -> dict:
    """Nested plain values, for JSON."""
    return dataclasses.asdict(config)
