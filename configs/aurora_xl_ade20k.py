"""Aurora-Vision-XL on ADE20K segmentation: UPerNet on the encoder of `configs/aurora_xl.py`, at 896 px.

    visionfm train --config=aurora_xl_ade20k
    visionfm train --config=aurora_xl_ade20k:tiny

It starts from the encoder of that run's last checkpoint, with windows twice as wide, as the images. For 64 GPUs of
80 GB with one image each, 40,000 steps; evaluated in windows. Other datasets and heads: see
`configs/vit_huge_ade20k.py`.

`tiny` is the same recipe on scenes of bundled emoji, small enough for two CPU cores, with a linear head in place of
UPerNet, which learns too slowly for minutes. It continues the tiny run of `configs/aurora_xl.py`, which must be
run first.
"""

from visionfm_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import Ade20kConfig, ScenesConfig
from visionfm_jax.data.transforms import Flip, RandomCrop, Resize
from visionfm_jax.evals.kinds import MeanIouConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.tasks.segmentation import SegmentationConfig

ADE20K = "/data/ADEChallengeData2016"


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def full() -> Config:
    return Config(
        name="aurora_xl_ade20k",
        model=SwinV2Config(
            size="G", image_size=896, window=28, pretrained_window=14, pretrained_image_size=448, drop_path=0.3,
            remat="full",
        ),
        task=SegmentationConfig(num_classes=150, head="upernet"),
        data=DataConfig(
            train=(Ade20kConfig(path=ADE20K, split="training"),),
            num_examples=20_210,
            transforms=(Resize(to="shorter", scale=(0.5, 2.0)), Flip(), RandomCrop()),
            augment=AugmentConfig(jitter=(0.125, 0.5, 0.5, 0.1)),  # mmsegmentation's ranges, always
            workers=12,
        ),
        optim=OptimConfig(lr=6e-5, warmup_steps=1500, b2=0.999, weight_decay=0.05, clip_norm=1.0, layer_decay=0.95),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=64, steps=40_000, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=2000, every_minutes=60, keep_last=2, weights="runs/aurora_xl", weights_from="image",
            skip=("head",),
        ),
        evals=(
            MeanIouConfig(
                name="ade20k", source=Ade20kConfig(path=ADE20K, split="validation"), every_steps=5000,
                inference="slide",
            ),
        ),
    )  # fmt: skip


def scenes(style: str, split: str, count: int) -> ScenesConfig:
    return ScenesConfig(path=style, split=split, truth="class_map", size=96, scenes=count)


def tiny() -> Config:
    return Config(
        name="aurora_xl_ade20k_tiny",
        model=SwinV2Config(
            size="P", image_size=128, patch_size=4, window=8, pretrained_window=8, pretrained_image_size=64,
            drop_path=0.05,
        ),  # 128 px: objects are nearly as large as the emoji of its pre-training
        task=SegmentationConfig(num_classes=10, head="linear"),
        data=DataConfig(
            train=(scenes("twemoji", "train", 16), scenes("noto", "train", 16), scenes("noto", "test", 16)),
            transforms=(Resize(to="shorter", scale=(0.75, 1.5)), Flip(), RandomCrop()),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=20, b2=0.99, weight_decay=0.05, clip_norm=1.0, layer_decay=0.8),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=16, steps=150, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=50, keep_last=2, weights="runs/aurora_xl_tiny", weights_from="image", skip=("head",)
        ),
        evals=(MeanIouConfig(name="held_out", source=scenes("twemoji", "test", 256), every_steps=50),),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
