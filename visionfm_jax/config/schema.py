"""What a run is made of: nested, typed dataclasses with units, rules and derived quantities.

The classes are not frozen, because flags write into them, and their annotations are no strings, because flags read
their types; `Config.validate` is called once after that,
and nothing changes a configuration afterwards. Derived quantities are properties, never stored.
"""

import dataclasses
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class ViTConfig:
    """A Vision Transformer (Dosovitskiy et al. 2021); sizes in `models.vit.SIZES`.

    The defaults are AugReg's (Steiner et al. 2022) but for the pooling; other public weights' are in BUILD.md.
    """

    size: str = "H"
    width: int = 0  # channels of a token; 0: of the named size, as for the next three
    depth: int = 0  # blocks
    heads: int = 0
    mlp: int = 0  # hidden channels of the MLPs
    patch_size: int = 14  # pixels
    image_size: int = 224  # pixels, square
    pool: str = (
        "gap"  # gap: norm of the patches' mean | norm_gap: mean of the normed | cls | cls_gap: both | map: probe
    )
    class_token: bool = False  # one that is not read: beside gap, norm_gap and map; cls and cls_gap have it anyway
    registers: int = 0  # further tokens of no place (Darcet et al. 2024)
    pos_embed: str = "class"  # what has rows in the table: none | patches | class: and its token | all: and registers
    pos_image_size: int = 0  # pixels, of the images that the table is for; 0: image_size
    pos_resize: str = "bicubic_antialias"  # to other images: that | bicubic | bicubic_offset | bilinear_antialias
    rope_theta: float = 0.0  # longest period of rotary positions, in half sides of the image (DINOv3: 100); 0: none
    patch_bias: bool = True  # of the patch embedding
    qkv_bias: str = "all"  # of queries, keys and values: all | no_key | none
    qk_norm: bool = False  # LayerNorms of each head's queries and keys (Dehghani et al. 2023)
    pre_norm: bool = False  # a norm before the blocks (Radford et al. 2021)
    layer_scale: float = 0.0  # where each branch's factors start (Touvron et al. 2021); 0: none
    drop_path: float = 0.0  # chance that the last block is left out; falls linearly to 0 at the first
    norm_eps: float = 1e-6  # of LayerNorms; other weights may have been trained with another
    activation: str = "gelu"  # of the MLPs: gelu | gelu_tanh | quick_gelu | swiglu
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full

    @property
    def has_class_token(self) -> bool:
        return self.class_token or self.pool in ("cls", "cls_gap")


@dataclass(kw_only=True)
class SwinV2Config:
    """A Swin Transformer V2 (Liu et al. 2022); sizes in `models.swin_v2.SIZES`."""

    size: str = "G"
    patch_size: int = 4  # pixels
    image_size: int = 224  # pixels, square
    window: int = 14  # tokens; a smaller map is one window
    pretrained_window: int = 0  # of the run whose weights this continues; 0: none
    pretrained_image_size: int = 0  # pixels, of that run
    roll_first: bool = False  # shifted maps that need padding are rolled, then padded, as timm does; False: the reverse
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full
    drop_path: float = 0.2  # chance that the last block is left out; falls linearly to 0 at the first


@dataclass(kw_only=True)
class TextConfig:
    """A text transformer; sizes in `models.text.SIZES`."""

    size: str = "H"
    vocab_size: int = 49_408
    context: int = 77  # tokens, with those of begin and end
    end_token: int = 49_407  # where a text is read off: the first token with this id
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full


@dataclass(kw_only=True)
class ClipConfig:
    """An image and a text tower with a joint space (Radford et al. 2021)."""

    image: SwinV2Config = field(default_factory=SwinV2Config)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 1024  # of the joint space


@dataclass(kw_only=True)
class DecoderConfig:
    """A text transformer whose upper half looks at an image; sizes in `models.decoder.SIZES`.

    Token ids are those of the tokenizer; 0 is padding.
    """

    size: str = "L"
    vocab_size: int = 32_000
    context: int = 64  # tokens, with those of begin and end
    begin_token: int = 1
    end_token: int = 2  # where the lower half's embedding of a text is read off: the first token with this id
    mask_token: int = 4  # stands for a word to guess
    attention: str = "xla"  # xla | cudnn
    remat: str = "none"  # what the backward pass recomputes: none | attention | dots | full


@dataclass(kw_only=True)
class AuroraConfig:
    """An image encoder, a text decoder that looks at its tokens, a joint space, and a head that paints pixels."""

    image: SwinV2Config = field(default_factory=SwinV2Config)
    text: DecoderConfig = field(default_factory=DecoderConfig)
    embed_dim: int = 1024  # of the joint space


@dataclass(kw_only=True)
class ClassificationConfig:
    """One label per image."""

    num_classes: int = 1000
    loss: str = "softmax"  # softmax | sigmoid (one-vs-all; Beyer et al. 2020)
    label_smoothing: float = 0.1


@dataclass(kw_only=True)
class ContrastiveConfig:
    """Pictures and captions that belong together, told apart from all others of the global batch."""

    loss: str = "softmax"  # softmax (Radford et al. 2021) | sigmoid (Zhai et al. 2023)
    tokenizer: str = "clip"  # clip, or a path: of a tokenizer.json, or of a SentencePiece model
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), from which the shares of two mixed images come; 0: none
    cached: bool = True  # micro-batches are contrasted with all of the batch (Gao et al. 2021); False: each alone


@dataclass(kw_only=True)
class MultimodalConfig:
    """Masked images, and pairs that are contrasted, captioned, and whose captions' masked words are guessed.

    Every image passes the encoder once: of `split[0] + split[1]` samples the first have captions, the others none.
    """

    tokenizer: str = ""  # path of a SentencePiece model with a mask token, or the name of a shipped one
    split: tuple[int, int] = (3, 1)  # samples in turn: with caption, without
    masked_image: float = 1.0  # weight of the loss; so are the next three
    contrastive: float = 1.0
    captioning: float = 2.0
    masked_language: float = 1.0
    mask_unit: int = 32  # pixels, side of what is hidden of an image at a time
    mask_ratio: float = 0.6  # of an image's units
    word_mask_ratio: float = 0.4  # of a text's tokens (Wettig et al. 2023), at least one
    blind: float = 0.1  # share of texts whose words are guessed without the image
    cached: bool = True  # as for `ContrastiveConfig`


@dataclass(kw_only=True)
class SourceConfig:
    """A dataset that gives record i on demand."""

    kind: str = "tfds"  # a name in `data.sources.SOURCES`
    path: str = ""  # a directory or file; for `bundled`, the name of the set
    split: str = "train"
    weight: float = 1.0  # share of this source in a mixture, relative to the others'
    image_key: str = "image"
    label_key: str = "label"
    caption_key: str = "caption"  # of `tars`: the .txt beside each picture, or another suffix; empty: no captions
    selection: str = ""  # of `tars`: file written by `python -m visionfm_jax.data.select`; empty: all pairs


@dataclass(kw_only=True)
class AugmentConfig:
    """How a training image is varied; crop and RandAugment on the host, the rest on the device."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the crop relative to the image; (1, 1): no random crop
    rand_augment: tuple[int, float] = (0, 9.0)  # operations on an image (0: none), and their magnitude of 10
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
    max_damaged: float = 0.001  # share of samples with unreadable records past which the run stops
    max_pixels: int = 2**26  # of an image; one with more is damaged. A process holds at most 24 bytes times this


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float = 1e-3  # peak
    final_lr: float = 0.0
    warmup_steps: int = 10_000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on position tables, position biases, pooling probes
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
    epochs: float = 0.0  # a file sets epochs or steps; a flag for one overrides the other
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
    on_damage: str = "stop"  # the newest checkpoint is damaged: stop | older: continue from the newest whole one


@dataclass(kw_only=True)
class PreprocessConfig:
    """What an evaluation sees of an image, resized once, antialiased, to the model's size."""

    crop: float = 0.875  # side of the centre square relative to the shorter side: 224 of 256; 1: all of it
    resize: str = "crop"  # crop: the centre square | squash: `crop` of either side, whatever the ratio becomes
    interpolation: str = "bicubic"  # bicubic | bilinear


@dataclass(kw_only=True)
class EvalConfig:
    """A measurement on held-out data, named in the logs by `name`."""

    kind: str = "classification"  # a name in `evals.EVALS`
    name: str = "val"
    source: SourceConfig = field(default_factory=SourceConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    batch_size: int = 0  # 0: the training batch size
    every_steps: int = 0  # 0: only at the end
    classes: str = ""  # of `zero_shot`: a shipped list or a file of names, one a line; empty: those of the source
    prompts: str = ""  # of `zero_shot`: likewise, or one prompt, {} for the name; empty: imagenet_prompts_short
    gallery: tuple[SourceConfig, ...] = ()  # of `retrieval`: more pairs to choose from
    decoding: str = "greedy"  # of `captioning`: greedy | beam | nucleus
    beams: int = 4  # of `beam`
    top_p: float = 0.9  # of `nucleus`


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
    model: ViTConfig | ClipConfig | AuroraConfig = field(default_factory=ViTConfig)
    task: ClassificationConfig | ContrastiveConfig | MultimodalConfig = field(default_factory=ClassificationConfig)
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
    def towers(self) -> dict[str, ViTConfig | SwinV2Config | TextConfig | DecoderConfig]:
        """The networks of the model, by the names of their fields."""
        if isinstance(self.model, ViTConfig):
            return {"model": self.model}
        return {"model.image": self.model.image, "model.text": self.model.text}

    @property
    def split(self) -> tuple[int, int]:
        """Samples in turn with caption and without; (0, 0): the task does not tell them apart."""
        return self.task.split if isinstance(self.task, MultimodalConfig) else (0, 0)

    @property
    def image_size(self) -> int:
        """Side of the images that the model is given, pixels."""
        return next(iter(self.towers.values())).image_size

    @property
    def contrasts_whole_batch(self) -> bool:
        """Whether micro-batches are contrasted with all of the batch."""
        return not isinstance(self.task, ClassificationConfig) and self.task.cached

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
        from visionfm_jax.config import rules  # which need the classes of this file

        rules.check(rules.problems(self))

    def validate_devices(self, devices: int, hosts: int = 1) -> None:
        """Check the rules that tie the batch and the mesh to `devices` (all hosts') and `hosts`.

        Raises:
          ConfigError: as `validate`.
        """
        from visionfm_jax.config import rules

        rules.check(rules.device_problems(self, devices, hosts))


def to_dict(config: Config) -> dict:
    """Nested plain values, for JSON."""
    return dataclasses.asdict(config)
