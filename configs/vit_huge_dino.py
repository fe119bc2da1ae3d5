"""Self-distillation of a ViT-H/14 with registers, DINOv2's recipe (Oquab et al. 2023): no labels, global batch 2048.

    visionfm train --config=vit_huge_dino '--config.data.train[0].path=/data/imagenet21k'
    visionfm train --config=vit_huge_dino:tiny

Each image gives two views of 224 and eight of 98 pixels. For 128 GPUs with 16 images each. The teacher is evaluated by
k-nearest neighbours on ImageNet, next to k-nearest neighbours on raw pixels.

`tiny` is the same recipe on bundled scans of digits, small enough for two CPU cores. Each scan is printed in its own
colours and at its own position, which vary in photographs too: for centred white digits on black, nearest neighbours
of raw pixels are right in 94.8 % of the cases, which leaves little to learn.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from visionfm_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PhotometricConfig,
    TelemetryConfig,
    TrainConfig,
    Transform,
)
from visionfm_jax.config.limits import Limits, Range
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import BundledConfig, TfdsConfig
from visionfm_jax.data.transforms import MultiCrop, Views
from visionfm_jax.evals.kinds import KnnConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.self_distillation import SelfDistillationConfig

if TYPE_CHECKING:
    from visionfm_jax.data.sample import Sample


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def views(size: int, local_size: int, local_count: int, scale: float = 0.32) -> MultiCrop:
    """DINOv2's views; local crops are smaller than the share `scale` of the image, global ones larger."""
    shared = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_chance": 0.8, "grey_chance": 0.2}

    def view(name: str, size: int, count: int, scale: tuple[float, float], **more: float) -> Views:
        return Views(name=name, size=size, count=count, scale=scale, photometric=PhotometricConfig(**shared, **more))

    return MultiCrop(
        views=(
            view("global", size, 1, (scale, 1.0), blur_chance=1.0),
            view("global", size, 1, (scale, 1.0), blur_chance=0.1, solarize_chance=0.2),
            view("local", local_size, local_count, (0.05, scale), blur_chance=0.5),
        )
    )


def full() -> Config:
    held_out = TfdsConfig(path="/data/imagenet2012", split="validation")
    gallery = (TfdsConfig(path="/data/imagenet2012", split="train"),)
    return Config(
        name="vit_huge_dino",
        # Registers after Darcet et al. 2024; layer_scale and drop_path as in DINOv2's code, where each layer is
        # left out as often: here the last most often.
        model=ViTConfig(
            size="H", patch_size=14, image_size=224, pool="cls", registers=4, layer_scale=1e-5, drop_path=0.3,
            remat="dots",
        ),
        task=SelfDistillationConfig(
            prototypes=65_536, head_hidden=2048, head_bottleneck=256,
            temperature_warmup_steps=37_500, teacher_momentum=(0.994, 1.0), freeze_steps=1250,
        ),
        data=DataConfig(
            train=(TfdsConfig(path="/data/imagenet21k", split="train"),),
            num_examples=14_197_122,
            transforms=(views(224, 98, 8),),
            workers=24,
        ),
        # lr: 2e-4 for 1024 images, by the root of the batch (Oquab et al. 2023, table 16). Weight decay is constant
        # here, between the 0.04 of their start and the 0.2 of their end.
        optim=OptimConfig(
            lr=2.8e-4, final_lr=1e-6, warmup_steps=100_000, b1=0.9, b2=0.999, weight_decay=0.1, clip_norm=3.0
        ),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=2048, steps=625_000, precision="bf16"),
        checkpoint=CheckpointConfig(every_steps=5000, every_minutes=60, keep_last=2),
        evals=(KnnConfig(name="imagenet", source=held_out, gallery=gallery, every_steps=25_000),),
    )  # fmt: skip


@dataclass(kw_only=True)
class Print(Transform):
    """A white scan on black, printed in a colour on lighter paper, at some position of a sheet of the model's size.

    The random generator is seeded with the scan's pixels: an image looks the same in training and in evaluation.
    """

    margin: int = 4  # pixels by which the scan is lower and narrower than the sheet

    limits: ClassVar[Limits] = {"margin": Range(0, 16)}

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample.target
        sample = sample.resize((height - self.margin, width - self.margin))
        scan = sample.image
        own = np.random.default_rng(zlib.crc32(scan.tobytes()))
        ink, paper = np.sort(own.random((2, 3)), 0)  # paper is lighter in each channel
        top, left = own.integers(0, self.margin + 1, 2).tolist()
        share = np.pad(scan / 255, ((top, self.margin - top), (left, self.margin - left), (0, 0)))
        sheet = (255 * (paper + (ink - paper) * share)).astype(np.uint8)
        return sample.crop(-top, -left, height, width).with_image(sheet)


def tiny() -> Config:
    """Strong colour jitter, as colours say nothing about a digit; no flip, as a mirrored digit is another sign."""
    train, held_out = (BundledConfig(path="digits", split=split) for split in ("train", "test"))
    colours = {"jitter": (0.8, 0.8, 0.8, 0.5), "jitter_chance": 0.9, "grey_chance": 0.3}

    def view(name: str, size: int, count: int, scale: tuple[float, float]) -> Views:
        photometric = PhotometricConfig(**colours, blur_chance=0.5, blur_sigma=(0.1, 0.5))
        return Views(name=name, size=size, count=count, scale=scale, flip=0.0, photometric=photometric)

    crops = MultiCrop(views=(view("global", 32, 2, (0.5, 1.0)), view("local", 16, 2, (0.25, 0.5))))
    return Config(
        name="vit_huge_dino_tiny",
        model=ViTConfig(size="P", depth=4, patch_size=8, image_size=32, pool="cls", registers=2),
        task=SelfDistillationConfig(
            # Views in other colours are little alike at first. What they share grows if the student's temperature over
            # the teacher's exceeds 1 / their correlation, else the targets become uniform: here the ratio is 20, at
            # full size 2.5, then 1.4.
            prototypes=256, head_hidden=256, head_bottleneck=64, koleo=0.5,
            student_temperature=0.2, teacher_temperature=(0.01, 0.01), teacher_momentum=(0.9, 1.0),
        ),
        data=DataConfig(
            train=(train,),
            augment=AugmentConfig(mean=(0.5,) * 3, std=(0.25,) * 3),
            transforms=(Print(), crops),
            threads=2,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=100, b1=0.9, b2=0.999, weight_decay=0.05, clip_norm=3.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=64, steps=1000, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=2),
        evals=(
            KnnConfig(
                name="digits", source=held_out, gallery=(train,), preprocess=Print(), every_steps=500, at_start=True
            ),
        ),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
