"""The configuration of a run: nested, typed dataclasses with units, bounds and derived quantities.

A model and a task bring their own classes, which stand beside their implementation: subclasses of `BackboneConfig`,
`ModelConfig` and `TaskConfig`. The classes are not frozen, because flags write into them; `Config.validate` is called
once after that, and nothing changes a configuration afterwards. Derived quantities are properties, never stored.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from visionfm_jax.config import rules
from visionfm_jax.config.limits import (
    CHANCE,
    DECAY,
    SHARE,
    STEPS,
    FileName,
    Filled,
    ImageSize,
    Limits,
    OneOf,
    Problem,
    Range,
    height_width,
)

if TYPE_CHECKING:  # the packages above this one
    import jax.numpy as jnp
    from flax import linen as nn


class Choice(ABC):
    """A group of fields that is one of several classes; `kind` is its name in messages and in a run's settings.

    Attributes:
      kinds: the classes by their `kind` among which a flag can choose; {}: only the file chooses.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Choice]]] = {}

    def __init_subclass__(cls, **more: Any):
        super().__init_subclass__(**more)
        if "kind" not in vars(cls):
            cls.kind = cls.__name__


class ModelConfig(Choice):
    """The model that a run trains: one network, or several in its fields. Subclasses are dataclasses.

    Attributes:
      limits: what each field may hold.
      image_size: of the images that it is given, pixels: the side of a square, or (height, width), which
        `limits.height_width` makes of both.
    """

    limits: ClassVar[Limits] = {}
    image_size: ImageSize

    def networks(self, name: str = "model") -> dict[str, NetworkConfig]:
        """Its networks by the names of their fields, where it stands as field `name` itself."""
        fields = {f"{name}.{f.name}": getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if isinstance(v, NetworkConfig)}

    def problems(self, name: str) -> list[Problem]:
        """Broken rules between its fields, where it stands as field `name`."""
        return [p for part, network in self.networks(name).items() for p in network.problems(part)]

    def size_problems(self, field: str, size: ImageSize, name: str = "model") -> list[Problem]:
        """Why it cannot be given images of `size`, the value of `field`; it stands as field `name`."""
        return [p for part, network in self.networks(name).items() for p in network.size_problems(field, size, part)]


class NetworkConfig(ModelConfig):
    """One network of a model; it can say how it computes attention and the MLPs, and what it recomputes."""

    attention: str
    remat: str
    scan_layers: bool = True
    mlp_matmuls = "compute"  # of networks without such a field

    @property
    def blocks(self) -> int:
        """How many `remat` counts; 0: it takes no number."""
        return 0

    def networks(self, name: str = "model") -> dict[str, NetworkConfig]:
        return {name: self}

    def problems(self, name: str) -> list[Problem]:
        return []

    def size_problems(self, field: str, size: ImageSize, name: str = "model") -> list[Problem]:
        return []


class BackboneConfig(NetworkConfig):
    """A network that makes features of images: what classifiers, towers and decoders are built on.

    Attributes:
      strides: pixels between two places of each of its maps, fine to coarse.
      widths: channels of each map.
      features: channels of the pooled features.
      embed_width: channels of an embedded patch, which a mask token may replace.
      patch_size: pixels, side of a patch, which is square.
      flops: FLOPs of one image's forward pass at `image_size`: matrix products alone, two per multiply-add.
    """

    image_size: ImageSize
    patch_size: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    features: int
    embed_width: int
    flops: float

    @abstractmethod
    def make(self, dtype: jnp.dtype, gather_params: Callable[[Any], Any]) -> nn.Module:
        """The module of this configuration: see `models.backbones.Backbone`."""


class TaskConfig(Choice):
    """An objective: what it needs of the model and the data, and how it is made. Subclasses are dataclasses.

    Attributes:
      limits: what each field may hold.
      model_class: the class of models that it trains.
      predictions: what `Task.predict` can be asked for, and so which evals suit it.
      loss_scope: what the loss of a row depends on beside the row: nothing ("sample"), the others of its micro-batch
        ("micro_batch"), or the others of the batch whatever the micro-batches ("batch").
      rows: how many rows a device must be given at a time, and why, for people.
      pair_ratio: samples in turn with caption and without; (0, 0): it does not tell them apart.
      reads_captions: whether it has a `tokenizer`.
      trained: names at the top of the parameters that have gradients, moments and averages and that the optimiser
        changes; (): of all.
    """

    limits: ClassVar[Limits] = {}
    model_class: ClassVar[type[ModelConfig]]
    predictions: ClassVar[frozenset[str]]
    loss_scope: str = "sample"
    rows: tuple[int, str] = (1, "")
    pair_ratio: tuple[int, int] = (0, 0)
    reads_captions: ClassVar[bool] = False
    trained: tuple[str, ...] = ()

    def problems(self, run: Config) -> list[Problem]:
        """Broken rules between its fields, the model and the rest of the run."""
        return []

    def size_problems(self, run: Config, field: str, size: ImageSize) -> list[Problem]:
        """Why it cannot be evaluated on images of `size`, the value of `field`."""
        return []

    @abstractmethod
    def fields(self, run: Config) -> Any:
        """What a row holds beside its image: `data.fields.Fields`.

        Raises:
          ConfigError, DataError: the task cannot read its data.
        """

    @abstractmethod
    def make(self, run: Config, dtype: jnp.dtype, gather_params: Callable[[Any], Any]) -> Any:
        """The `tasks.task.Task` of this configuration, which computes in `dtype`."""


@dataclass(kw_only=True)
class SourceConfig(Choice):
    """A dataset that gives record i on demand; a subclass for each format: `data.sources.kinds`.

    Attributes:
      split: part of the dataset, where the format has parts.
      loose_files: whether its records are files, which have no checksums of their own.
      kinds: the classes by their `kind`, for the command line; add a line for one of your own.
    """

    kinds: ClassVar[dict[str, type[Choice]]] = {}
    loose_files: ClassVar[bool] = False

    path: str = ""  # a directory, a file or the name of a bundled set
    weight: float = 1.0  # sampling weight in a mixture, relative to the other sources
    split: ClassVar[str] = ""

    limits: ClassVar[Limits] = {
        "path": Filled("must name the dataset", "set it to the folder, file or bundled set"),
        "weight": Range(1e-6, 1e6, "relative to the other sources'"),
    }

    @abstractmethod
    def make(self) -> Any:
        """Open it: a `data.sources.Source`.

        Raises:
          DataError: one line: it is not what the fields say, and the remedy.
          OSError: the storage fails.
        """


class Transform(Choice):
    """A step of the chain that a sample passes. Subclasses, dataclasses, are in `data.transforms`, or your own.

    Attributes:
      limits: what each field may hold.
      views: groups of views of an image that it makes in place of it (`data.transforms.Views`); most make none.
    """

    limits: ClassVar[Limits] = {}
    views: ClassVar[tuple[Any, ...]] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """(V, H, W, 3) of the views by name; several groups may share one."""
        counts = {v.name: sum(w.count for w in self.views if w.name == v.name) for v in self.views}
        return {v.name: (counts[v.name], *height_width(v.size), 3) for v in self.views}

    @abstractmethod
    def __call__(self, sample: Any, rng: Any) -> Any:
        """A `data.sample.Sample`, transformed.

        What is drawn, is drawn by `rng`, a NumPy generator of the sample's own, and as much whatever the sample.
        """

    def problems(self, name: str) -> list[Problem]:
        """Broken rules between its fields, where it stands as field `name`."""
        return []


@dataclass(kw_only=True)
class PhotometricConfig:
    """Random changes of a training image's colours, on the device, in this order."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # of brightness, contrast, saturation, hue
    jitter_chance: float = 1.0  # probability of jitter
    grey_chance: float = 0.0  # probability of converting to grey
    blur_chance: float = 0.0  # probability of Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; range of the blur's sigma
    solarize_chance: float = 0.0  # probability of inverting the values above one half

    limits: ClassVar[Limits] = {
        "jitter": (Range(0, 10), Range(0, 10), Range(0, 10), Range(0, 0.5, "half of the colour circle")),
        "jitter_chance": CHANCE,
        "grey_chance": CHANCE,
        "blur_chance": CHANCE,
        "blur_sigma": Range(0.01, 16),  # pixels
        "solarize_chance": CHANCE,
    }


@dataclass(kw_only=True)
class AugmentConfig(PhotometricConfig):
    """Augmentation on the device; `mean` and `std` also normalise the images of evaluations."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # subtracted from values in [0, 1]; default: ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # values are divided by it afterwards; default: ImageNet's

    limits: ClassVar[Limits] = {
        **PhotometricConfig.limits,
        "mean": Range(0, 1, "of values in [0, 1]"),
        "std": Range(1e-3, 1, "of values in [0, 1]"),
    }


@dataclass(kw_only=True)
class DataConfig:
    """The training data and its loader."""

    train: tuple[SourceConfig, ...] = ()
    num_examples: int = 0  # images per epoch; needed if the length of the run is given in epochs
    transforms: tuple[Transform, ...] = ()  # on the host, in order (`data.transforms`); (): resize the whole image
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # on the device, after the transforms
    shuffle: bool = True  # a new order in every epoch; False: the order of the sources
    workers: int = -1  # loader processes per host; 0: threads in the training process; -1: measured at the start
    threads: int = 8  # reader threads per process
    prefetch: int = 2  # batches prepared in advance per worker
    max_damaged: float = 0.001  # share of unreadable samples past which the run stops; 0: at the first
    max_pixels: int = 2**26  # larger images count as damaged; decoding uses at most 24 bytes times this per process

    limits: ClassVar[Limits] = {
        "num_examples": Range(0, 2**40),
        "workers": Range(-1, 512),  # processes
        "threads": Range(1, 512),
        "prefetch": Range(1, 64, "batches in memory"),
        "max_damaged": SHARE,
        "max_pixels": Range(1, 178_956_970, "the most that Pillow opens"),
    }


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3  # peak learning rate
    final_lr: float = 0.0  # learning rate at the last step
    warmup_steps: int = 10_000  # steps of linear warm-up to the peak
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the square root of the second moment
    weight_decay: float = 0.1  # on matrices, except position tables, position biases and pooling probes
    clip_norm: float = 1.0  # maximum global gradient norm; 0: no clipping
    layer_decay: float = 1.0  # factor on the learning rate per layer below the head; 1: none
    ema: float = 0.0  # decay per step of the EMA weights; 0: no EMA

    limits: ClassVar[Limits] = {
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
    }


@dataclass(kw_only=True)
class ParallelConfig:
    """A mesh (replica, fsdp) and the ZeRO stage on it; see `parallel.zero`."""

    stage: int = 3  # ZeRO stage, from 0: plain data parallel to 3: fully sharded
    replicas: int = 1  # hybrid sharding: number of replicas, each sharded over devices / replicas

    limits: ClassVar[Limits] = {"stage": OneOf((3, 2, 1, 0)), "replicas": Range(1, 2**20)}


@dataclass(kw_only=True)
class TrainConfig:
    """Length, batch and precision."""

    batch_size: int = 2048  # images per optimiser step, over all devices
    accumulate: int = 1  # micro-batches per step
    epochs: float = 0.0  # length of the run; set epochs or steps, a flag for one overrides the other
    steps: int = 0  # length of the run in optimiser steps
    precision: str = "bf16"  # of activations and matrix products: bf16 | fp16 | fp32; see docs/precision.md
    on_nonfinite: str = "stop"  # if the loss or a gradient is not finite: stop | skip the step; fp16 always skips

    limits: ClassVar[Limits] = {
        "batch_size": Range(1, 2**16, "samples are numbered in two 32-bit words"),
        "accumulate": Range(1, 2**16),
        "epochs": Range(0, 1e6),
        "steps": STEPS,
        "precision": OneOf(("bf16", "fp16", "fp32")),
        "on_nonfinite": OneOf(("stop", "skip")),
    }


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints: when to save, what to keep, where to start."""

    every_steps: int = 0  # save interval in steps; 0: off
    every_minutes: float = 0.0  # save interval in minutes; 0: off
    keep_last: int = 2  # number of newest checkpoints to keep
    keep_best: int = 0  # number of checkpoints with the highest best_metric to keep as well
    best_metric: str = ""  # EVAL/METRIC, e.g. "val/top1"; higher is better; needed by keep_best
    resume: str = ""  # folder of another run, whose whole state is continued
    weights: str = ""  # initial weights: a run folder, or files of timm, Hugging Face or OpenCLIP
    weights_config: str = ""  # config.json of the weights if elsewhere, a timm architecture, or "model"
    weights_from: str = ""  # load only the names with this prefix, e.g. "backbone"
    weights_into: str = ""  # part of the model to load into, e.g. "image"; empty: all of it
    skip: tuple[str, ...] = ()  # names or prefixes, of file or model, not to be loaded; *: any one part of a name
    on_damage: str = "stop"  # if the newest checkpoint is damaged: stop | older: use the newest intact one

    limits: ClassVar[Limits] = {
        "every_steps": STEPS,
        "every_minutes": Range(0.01, 1e6, off=True),
        "keep_last": Range(1, 10_000),
        "keep_best": Range(0, 10_000),
        "on_damage": OneOf(("stop", "older")),
    }


@dataclass(kw_only=True)
class PreprocessConfig(Transform):
    """The preprocessing of an evaluation's images: resized once, antialiased, to the size that the model is given."""

    crop: float = 0.875  # share of each side that is kept, e.g. 224 / 256; 1: all that fits the model's aspect ratio
    resize: str = "crop"  # crop: centre in the model's aspect ratio | squash: to that aspect ratio | pad: grey borders
    interpolation: str = "bicubic"  # bicubic | bilinear

    limits: ClassVar[Limits] = {
        "crop": Range(0.01, 1),
        "resize": OneOf(("crop", "squash", "pad")),
        "interpolation": OneOf(("bicubic", "bilinear")),
    }

    def problems(self, name: str) -> list[Problem]:
        if self.resize == "pad" and self.crop != 1:
            return [(f"{name}.crop", self.crop, f"leaves out what {name}.resize = pad shows", "set it to 1")]
        return []

    def __call__(self, sample: Any, rng: Any) -> Any:
        """As timm's evaluation: torchvision's Resize(floor(S / crop)) and CenterCrop(S), whole pixels and all.

        Where the model's images are not square, the smallest image that covers both sides over `crop` is cropped.
        """
        (height, width), (rows, columns) = (math.floor(side / self.crop) for side in sample.target), sample.size
        wide = rows * width <= columns * height
        if self.resize != "squash" and wide == (self.resize == "crop"):
            width = max(1, height * columns // rows)
        elif self.resize != "squash":
            height = max(1, width * rows // columns)
        sample = sample.resize((height, width), self.interpolation)
        if self.resize == "pad":
            return sample.crop(0, 0, *sample.target)
        top, left = (round((side - wanted) / 2) for side, wanted in zip(sample.size, sample.target, strict=True))
        return sample.crop(top, left, *sample.target)


@dataclass(kw_only=True)
class EvalConfig(Choice):
    """A measurement on held-out data, named in the logs by `name`; a subclass for each: `evals.kinds`.

    Attributes:
      measures: the prediction that the task must have, one of `TaskConfig.predictions`.
      metrics: those of its scores of which higher is better: what `checkpoint.best_metric` may name.
    """

    measures: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    name: str = "val"  # used in logs and file names
    source: SourceConfig
    image_size: ImageSize = 0  # pixels, side or (height, width), of what the model is given; 0: model.image_size
    preprocess: Transform = field(default_factory=PreprocessConfig)
    batch_size: int = 0  # images; 0: the training batch size
    every_steps: int = 0  # evaluation interval in steps; 0: only at the end
    at_start: bool = False  # also evaluate before the first step of a new run

    limits: ClassVar[Limits] = {
        "name": FileName(),
        "image_size": Range(1, 4096, off=True),  # pixels
        "batch_size": Range(0, 2**16),
        "every_steps": STEPS,
    }

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All that it reads beside `data.train`."""
        return (self.source,)

    @abstractmethod
    def make(self, run: Config, host: int, hosts: int) -> Any:
        """The `evals.eval.Eval` of `run` for process `host` of `hosts`, its data opened and found to serve.

        Raises:
          DataError: a dataset that cannot serve.
        """


@dataclass(kw_only=True)
class TelemetryConfig:
    """Logs, progress bar and alarm of a run."""

    log_every: int = 50  # logging interval, steps
    progress: bool = True  # show a progress bar in the terminal
    tensorboard: bool = True  # also write TensorBoard event files
    trackers: tuple[str, ...] = ()  # services that also get the metrics: wandb | mlflow
    stuck_minutes: float = 30.0  # if no step finishes for this long: dump stacks, name the process, exit; 0: off
    profile_steps: tuple[int, int] = (0, 0)  # first and last step, from 0, of a trace for XProf; (0, 0): none

    limits: ClassVar[Limits] = {
        "log_every": Range(1, 2**30),  # steps
        "trackers": OneOf(("wandb", "mlflow")),
        "stuck_minutes": Range(0.01, 1e6, off=True),
        "profile_steps": STEPS,
    }


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    name: str  # name of the run and its folder
    seed: int = 0  # of initialisation, data order, augmentation and stochastic depth
    workdir: str = ""  # run folder; empty: runs/NAME
    model: ModelConfig
    task: TaskConfig
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evals: tuple[EvalConfig, ...] = ()
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    limits: ClassVar[Limits] = {"name": FileName(), "seed": Range(0, 2**32 - 1)}

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
        rules.check(rules.problems(self))

    def validate_model(self) -> None:
        """Check the rules of the model alone, of a configuration by which nothing is trained.

        Raises:
          ConfigError: as `validate`.
        """
        rules.check([problem for problem in rules.problems(self) if problem[0].startswith("model")])

    def validate_devices(self, devices: int, hosts: int = 1) -> None:
        """Check the rules that tie the batch and the mesh to `devices` (all hosts') and `hosts`.

        Raises:
          ConfigError: as `validate`.
        """
        rules.check(rules.device_problems(self, devices, hosts))


def to_dict(value: Any) -> Any:
    """The plain values of a configuration or a part of it, nested, for JSON; of a `Choice` its kind, too."""
    if isinstance(value, tuple):
        return tuple(map(to_dict, value))
    if not dataclasses.is_dataclass(value):
        return value
    kind = {"kind": value.kind} if isinstance(value, Choice) else {}
    return kind | {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
