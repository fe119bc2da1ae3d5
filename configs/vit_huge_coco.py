"""ViT-H on COCO detection: Plain-DETR on the backbone of `configs/vit_huge.py`, all of it trained, at 1024 px.

    visionfm train --config=vit_huge_coco
    visionfm train --config=vit_huge_coco:panoptic
    visionfm train --config=vit_huge_coco:tiny

It starts from the last checkpoint of that run, or from the weights that config.checkpoint.weights names: patches of 14
pixels are resampled to 16, positions to the larger images. For 32 GPUs of 80 GB with two images each, 36 epochs,
large-scale jitter (Ghiasi et al. 2021). Any dataset in the formats of COCO, Pascal VOC, YOLO or TFDS takes COCO's
place: set kind, path and split in config.data.train[0] and config.evals[0].source, config.data.num_examples and
config.task.num_classes.

`panoptic` learns COCO's 133 classes of things and stuff by EoMT in place of Plain-DETR (Kerssies et al. 2025), at
640 px: 12 epochs of batch 16, layer decay 0.8; for 16 GPUs of 80 GB.

`tiny` is the same recipe on scenes of bundled emoji, small enough for two CPU cores. It continues the tiny run of
`configs/vit_huge.py`, which must be run first.
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
from visionfm_jax.data.sources.kinds import CocoConfig, CocoPanopticConfig, ScenesConfig
from visionfm_jax.data.transforms import Flip, RandomCrop, Resize
from visionfm_jax.evals.kinds import BoxesConfig, PanopticConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.detection import DetectionConfig
from visionfm_jax.tasks.eomt import EomtConfig


def get_config(variant: str = "") -> Config:
    return {"": full, "panoptic": panoptic, "tiny": tiny}[variant_of(("panoptic", "tiny"), variant)]()


def full() -> Config:
    return Config(
        name="vit_huge_coco",
        model=ViTConfig(
            size="H", patch_size=16, image_size=1024, pool="gap", drop_path=0.4, remat="dots"
        ),
        task=DetectionConfig(num_classes=80),
        data=DataConfig(
            train=(CocoConfig(path="/data/coco", split="train2017"),),
            num_examples=118_287,
            transforms=(Resize(to="longer", scale=(0.1, 2.0)), Flip(), RandomCrop()),
            workers=12,
        ),
        optim=OptimConfig(lr=2e-4, warmup_steps=1000, b2=0.999, weight_decay=0.05, clip_norm=0.1, layer_decay=0.9),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=64, epochs=36, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=2000, every_minutes=60, keep_last=2, weights="runs/vit_huge", skip=("head",)
        ),
        evals=(
            BoxesConfig(name="coco", source=CocoConfig(path="/data/coco", split="val2017"), every_steps=10_000),
        ),
    )  # fmt: skip


def panoptic() -> Config:
    config = full()
    config.name = "vit_huge_coco_panoptic"
    config.model.image_size, config.model.drop_path = 640, 0.0
    config.task = EomtConfig(truth="panoptic", num_classes=133, queries=200)
    config.data.train = (CocoPanopticConfig(path="/data/coco", split="train2017", truth="masks"),)
    config.optim = OptimConfig(lr=1e-4, warmup_steps=2000, b2=0.999, weight_decay=0.05, clip_norm=0.01, layer_decay=0.8)
    config.train = TrainConfig(batch_size=16, epochs=12, precision="bf16")
    held_out = CocoPanopticConfig(path="/data/coco", split="val2017", truth="masks")
    config.evals = (PanopticConfig(name="coco", source=held_out, every_steps=10_000),)
    return config


def scenes(style: str, split: str, count: int) -> ScenesConfig:
    return ScenesConfig(path=style, split=split, size=64, scenes=count, most=4)


def tiny() -> Config:
    return Config(
        name="vit_huge_coco_tiny",
        model=ViTConfig(size="P", patch_size=8, image_size=64, pool="gap", drop_path=0.05, remat="dots"),
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
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=16, steps=600, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=300, keep_last=2, weights="runs/vit_huge_tiny", skip=("head",)
        ),
        evals=(BoxesConfig(name="held_out", source=scenes("twemoji", "test", 256), every_steps=300),),
        telemetry=TelemetryConfig(log_every=20),
    )  # fmt: skip
