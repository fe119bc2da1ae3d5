"""ViT-H/14 on ImageNet-21K: 659 M parameters, fully sharded, bf16, global batch 2048, 300 epochs.

    visionfm train --config=vit_huge '--config.data.train[0].path=/data/imagenet21k' \
        '--config.evals[0].source.path=/data/imagenet21k'
    visionfm train --config=vit_huge:tiny

Set config.task.num_classes to the release of the dataset: 21,841 classes (Fall 2011), 19,167 (Winter 2021) or 10,450
(ImageNet-21K-P). The data are a TFDS directory in ArrayRecord format. ImageNet-21K has no official validation split:
the first 51,200 images are held out, as in big_vision (TFDS stores the images of a dataset in random order). For class
folders, set kind=folder and split=NAME_OF_FOLDER in config.data.train[0] and config.evals[0].source, and
config.data.num_examples.

`tiny` runs the same code on the bundled emoji of nine groups, small enough for two CPU cores, and adds CutMix (Yun et
al. 2019), by which patches learn what they show: segmentation and detection continue from its weights.
"""

from visionfm_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PreprocessConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import BundledConfig, TfdsConfig
from visionfm_jax.data.transforms import Flip, RandomResizedCrop
from visionfm_jax.evals.kinds import AccuracyConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig

HELD_OUT = 51_200


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def full() -> Config:
    held_out = TfdsConfig(path="/data/imagenet21k", split=f"train[:{HELD_OUT}]")
    return Config(
        name="vit_huge",
        model=ViTConfig(size="H", patch_size=14, image_size=224, pool="gap", remat="dots", scan_layers=False),
        task=ClassificationConfig(num_classes=21_841, label_smoothing=0.1),
        data=DataConfig(
            train=(TfdsConfig(path="/data/imagenet21k", split=f"train[{HELD_OUT}:]"),),
            num_examples=14_197_122 - HELD_OUT,  # ImageNet Fall 2011
            transforms=(RandomResizedCrop(scale=(0.08, 1.0)), Flip()),
            augment=AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1)),
            workers=12,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=10_000, final_lr=0.0, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=2048, epochs=300, precision="bf16"),
        checkpoint=CheckpointConfig(every_steps=5000, every_minutes=60, keep_last=2),
        evals=(AccuracyConfig(name="val", source=held_out, every_steps=5000),),
    )


def whole() -> PreprocessConfig:
    """No crop: an emoji fills its image."""
    return PreprocessConfig(crop=1.0)


def tiny() -> Config:
    emoji = BundledConfig(path="twemoji", split="test")
    return Config(
        name="vit_huge_tiny",
        model=ViTConfig(size="P", patch_size=8, image_size=48, pool="gap", remat="dots"),
        task=ClassificationConfig(num_classes=9, label_smoothing=0.1, cutmix=1.0),
        data=DataConfig(
            train=(
                BundledConfig(path="twemoji", split="train", weight=1.0),
                BundledConfig(path="noto", split="train", weight=1.0),
            ),
            transforms=(RandomResizedCrop(scale=(0.5, 1.0)), Flip()),
            augment=AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1)),
            threads=2,
        ),
        optim=OptimConfig(lr=2e-3, warmup_steps=100, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=64, steps=1000, precision="bf16"),
        checkpoint=CheckpointConfig(every_steps=250, keep_last=2),
        evals=(AccuracyConfig(name="concepts", source=emoji, preprocess=whole(), every_steps=250),),
        telemetry=TelemetryConfig(log_every=10),
    )
