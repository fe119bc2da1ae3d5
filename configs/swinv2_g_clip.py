"""SwinV2-G and a text tower, 3.36 B parameters: CLIP at 224 px on the 1.2 B pairs of LAION-5B with the highest score.

    visionfm data select --path=/data/laion5b --where='similarity >= 0.28' --out=/data/laion5b.selection
    visionfm train --config=swinv2_g_clip
    visionfm train --config=swinv2_g_clip:tiny

For 128 GPUs of 80 GB: fully sharded, fp16 with a dynamic loss scale (config.train.precision=bf16 works too), global
batch 32,768. `configs/swinv2_g_clip_640.py` continues at 640 px.

`tiny` is the same recipe on the bundled emoji and their names, small enough for two CPU cores. The test set has
combinations of a concept and a skin tone that do not occur together in the training data.
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
        name="swinv2_g_clip",
        model=ClipConfig(
            image=SwinV2Config(
                size="G", image_size=224, window=14, drop_path=0.2, remat="branches:46", scan_layers=False,
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
        optim=OptimConfig(lr=5e-4, warmup_steps=10_000, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=32_768, epochs=8, precision="fp16"),
        checkpoint=CheckpointConfig(every_steps=2000, every_minutes=60, keep_last=2),
        evals=(
            ZeroShotConfig(
                name="imagenet", source=imagenet, every_steps=10_000, batch_size=8192,
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
        name="swinv2_g_clip_tiny",
        model=ClipConfig(
            image=SwinV2Config(size="P", image_size=64, patch_size=8, window=8, drop_path=0.05),
            text=TextConfig(size="P", context=24),
            embed_dim=128,
        ),
        task=ContrastiveConfig(tokenizer="clip", mixup=0.1),
        data=DataConfig(
            train=(emoji("train"),),
            transforms=(RandomResizedCrop(scale=(0.8, 1.0)), RandAugment(operations=1, magnitude=2.0)),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=128, steps=400, precision="fp16"),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=2),
        evals=(
            RetrievalConfig(
                name="unseen", source=unseen, gallery=known, preprocess=whole(), batch_size=128,
                every_steps=100,
            ),
            ZeroShotConfig(
                name="groups", source=emoji("test"), prompts="{}", preprocess=whole(), batch_size=128
            ),
        ),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
