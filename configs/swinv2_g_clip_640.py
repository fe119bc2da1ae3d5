"""The model of `configs/swinv2_g_clip.py`, continued from its last checkpoint at 640 px with windows of 20.

    visionfm train --config=swinv2_g_clip_640

Only the weights are taken from that run; the schedule is new. The position bias is evaluated for the new windows, with
coordinates relative to the old ones. For 128 GPUs of 80 GB with 32 pairs each: the global batch is 4,096, as an image
at 640 px needs eight times the memory and FLOPs of one at 224 px. It trains for a twentieth of an epoch, 60 M pairs,
which is 5 % of the FLOPs of the run at 224 px, with a fifth of its peak learning rate.

    visionfm train --config=swinv2_g_clip_640:tiny

continues the tiny run of that file, which must be run first, at twice its resolution and window.
"""

from visionfm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PreprocessConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import BundledConfig, TarsConfig, TfdsConfig
from visionfm_jax.data.transforms import Flip, RandAugment, RandomResizedCrop
from visionfm_jax.evals.kinds import RetrievalConfig, ZeroShotConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def full() -> Config:
    imagenet = TfdsConfig(path="/data/imagenet2012", split="validation")
    return Config(
        name="swinv2_g_clip_640",
        model=ClipConfig(
            image=SwinV2Config(
                size="G", image_size=640, window=20, pretrained_window=14, pretrained_image_size=224, drop_path=0.2,
                remat="branches", scan_layers=False,
            ),
            text=TextConfig(size="H", remat="dots", scan_layers=False),
            embed_dim=1024,
        ),
        task=ContrastiveConfig(tokenizer="clip", mixup=0.2),
        data=DataConfig(
            train=(TarsConfig(path="/data/laion5b", selection="/data/laion5b.selection"),),
            num_examples=1_200_000_000,
            transforms=(RandomResizedCrop(scale=(0.5, 1.0)), Flip(), RandAugment(operations=2, magnitude=9.0)),
            workers=12,
        ),
        optim=OptimConfig(lr=1e-4, warmup_steps=1_000, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=4_096, epochs=0.05, precision="fp16"),
        checkpoint=CheckpointConfig(every_steps=1000, every_minutes=60, keep_last=2, weights="runs/swinv2_g_clip"),
        evals=(
            ZeroShotConfig(
                name="imagenet", source=imagenet, every_steps=2_500, batch_size=2048,
                classes="imagenet_classes", prompts="imagenet_prompts",
            ),
        ),
    )  # fmt: skip


def emoji(split: str) -> SourceConfig:
    return BundledConfig(path="twemoji", split=split)


def whole() -> PreprocessConfig:
    """No crop: an emoji fills its image."""
    return PreprocessConfig(crop=1.0)


def tiny() -> Config:
    unseen, known = emoji("combinations"), (emoji("train"), emoji("test"))
    return Config(
        name="swinv2_g_clip_640_tiny",
        model=ClipConfig(
            image=SwinV2Config(
                size="P", image_size=128, patch_size=8, window=16, pretrained_window=8, pretrained_image_size=64,
                drop_path=0.05,
            ),
            text=TextConfig(size="P", context=24),
            embed_dim=128,
        ),
        task=ContrastiveConfig(tokenizer="clip", mixup=0.1),
        data=DataConfig(
            train=(emoji("train"),),
            transforms=(RandomResizedCrop(scale=(0.8, 1.0)), RandAugment(operations=1, magnitude=2.0)),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=15, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=128, steps=240, precision="fp16"),
        checkpoint=CheckpointConfig(every_steps=80, keep_last=2, weights="runs/swinv2_g_clip_tiny"),
        evals=(
            RetrievalConfig(
                name="unseen", source=unseen, gallery=known, preprocess=whole(), batch_size=128
            ),
        ),
        telemetry=TelemetryConfig(log_every=5),
    )  # fmt: skip
