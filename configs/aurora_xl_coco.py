"""Aurora-Vision-XL on COCO detection: Plain-DETR on the encoder of `configs/aurora_xl.py`, at 896 px.

    visionfm train --config=aurora_xl_coco
    visionfm train --config=aurora_xl_coco:tiny

It starts from the encoder of that run's last checkpoint, with windows twice as wide, as the images. For 64 GPUs of
80 GB with one image each, 36 epochs, large-scale jitter (Ghiasi et al. 2021). Other datasets: see
`configs/vit_huge_coco.py`.

`tiny` is the same recipe on scenes of bundled emoji, small enough for two CPU cores. It continues the tiny run of
`configs/aurora_xl.py`, which must be run first.
"""

from visionfm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import CocoConfig, ScenesConfig
from visionfm_jax.data.transforms import Flip, RandomCrop, Resize
from visionfm_jax.evals.kinds import BoxesConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.tasks.detection import DetectionConfig


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def full() -> Config:
    return Config(
        name="aurora_xl_coco",
        model=SwinV2Config(
            size="G", image_size=896, window=28, pretrained_window=14, pretrained_image_size=448, drop_path=0.3,
            remat="full",
        ),
        task=DetectionConfig(num_classes=80),
        data=DataConfig(
            train=(CocoConfig(path="/data/coco", split="train2017"),),
            num_examples=118_287,
            transforms=(Resize(to="longer", scale=(0.1, 2.0)), Flip(), RandomCrop()),
            workers=12,
        ),
        optim=OptimConfig(lr=2e-4, warmup_steps=1000, b2=0.999, weight_decay=0.05, clip_norm=0.1, layer_decay=0.94),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=64, epochs=36, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=2000, every_minutes=60, keep_last=2, weights="runs/aurora_xl", weights_from="image",
            skip=("head",),
        ),
        evals=(
            BoxesConfig(name="coco", source=CocoConfig(path="/data/coco", split="val2017"), every_steps=10_000),
        ),
    )  # fmt: skip


def scenes(style: str, split: str, count: int) -> ScenesConfig:
    return ScenesConfig(path=style, split=split, size=64, scenes=count, most=4)


def tiny() -> Config:
    return Config(
        name="aurora_xl_coco_tiny",
        model=SwinV2Config(
            size="P", image_size=64, patch_size=4, window=8, pretrained_window=8, pretrained_image_size=64,
            drop_path=0.05, remat="dots",
        ),
        task=DetectionConfig(
            num_classes=9, most_objects=4, width=96, heads=4, mlp=192, encoder_depth=1, decoder_depth=2, stride=8,
            queries=20, many_queries=24, copies=4, detections=20,
        ),
        data=DataConfig(
            train=(scenes("twemoji", "train", 2048), scenes("noto", "train", 2048), scenes("noto", "test", 2048)),
            transforms=(Resize(to="longer", scale=(0.75, 1.5)), Flip(), RandomCrop(min_visible=0.3)),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, b2=0.99, weight_decay=0.05, clip_norm=0.1, layer_decay=0.8),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=16, steps=600, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=300, keep_last=2, weights="runs/aurora_xl_tiny", weights_from="image", skip=("head",)
        ),
        evals=(BoxesConfig(name="held_out", source=scenes("twemoji", "test", 256), every_steps=300),),
        telemetry=TelemetryConfig(log_every=20),
    )  # fmt: skip
