"""A small ViT on 4,000 bundled scans of handwritten digits, in under three minutes on two CPU cores.

    ./launch/quickstart.sh

It is evaluated on 1,000 other scans, next to a logistic regression on the pixels.
"""

from visionfm_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    PreprocessConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.data.transforms import RandomResizedCrop
from visionfm_jax.evals.kinds import AccuracyConfig, PixelBaselineConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig


def whole() -> PreprocessConfig:
    """No crop: a digit fills its image."""
    return PreprocessConfig(crop=1.0)


def get_config(variant: str = "") -> Config:
    variant_of((), variant)
    held_out = BundledConfig(path="digits", split="test")
    return Config(
        name="quickstart",
        model=ViTConfig(size="P", patch_size=7, image_size=28, pool="cls", remat="full"),
        task=ClassificationConfig(num_classes=10, label_smoothing=0.1),
        data=DataConfig(
            train=(BundledConfig(path="digits", split="train"),),
            num_examples=4000,
            transforms=(RandomResizedCrop(scale=(0.7, 1.0)),),
            augment=AugmentConfig(mean=(0.13,) * 3, std=(0.31,) * 3),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=60, weight_decay=0.05),
        train=TrainConfig(batch_size=32, epochs=16, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=500, keep_last=1, keep_best=1, best_metric="digits/top1"),
        evals=(
            AccuracyConfig(name="digits", source=held_out, preprocess=whole(), batch_size=200, every_steps=500),
            PixelBaselineConfig(name="pixels", source=held_out, preprocess=whole(), batch_size=200),
        ),
        telemetry=TelemetryConfig(log_every=20),
    )
