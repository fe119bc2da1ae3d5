"""ViT-H on ADE20K segmentation: UPerNet on the backbone of `configs/vit_huge.py`, all of it trained, at 512 px.

    visionfm train --config=vit_huge_ade20k
    visionfm train --config=vit_huge_ade20k:eomt
    visionfm train --config=vit_huge_ade20k:tiny

It starts from the last checkpoint of that run, or from the weights that config.checkpoint.weights names: patches of 14
pixels are resampled to 16, positions to the larger images. For 32 GPUs of 80 GB with two images each, 40,000 steps;
evaluated in windows, as mmsegmentation does. `config.task.head=linear` with `config.task.frozen=True` and
config.optim.layer_decay=1 is a linear probe of frozen features. Any folder of class maps takes ADE20K's place: set
kind=class_maps and its fields in config.data.train[0] and config.evals[0].source, config.data.num_examples and
config.task.num_classes.

`eomt` has EoMT in place of UPerNet (Kerssies et al. 2025): 31 epochs of batch 16, layer decay 0.8;
for 16 GPUs of 80 GB.

`tiny` is the same recipe on scenes of bundled emoji, small enough for two CPU cores, with a linear head in place of
UPerNet, which learns too slowly for minutes. It continues the tiny run of `configs/vit_huge.py`, which must be
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
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.tasks.segmentation import SegmentationConfig

ADE20K = "/data/ADEChallengeData2016"


def get_config(variant: str = "") -> Config:
    return {"": full, "eomt": eomt, "tiny": tiny}[variant_of(("eomt", "tiny"), variant)]()


def full() -> Config:
    return Config(
        name="vit_huge_ade20k",
        model=ViTConfig(
            size="H", patch_size=16, image_size=512, pool="gap", drop_path=0.3, remat="dots"
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
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=64, steps=40_000, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=2000, every_minutes=60, keep_last=2, weights="runs/vit_huge", skip=("head",)
        ),
        evals=(
            MeanIouConfig(
                name="ade20k", source=Ade20kConfig(path=ADE20K, split="validation"), every_steps=5000,
                inference="slide",
            ),
        ),
    )  # fmt: skip


def eomt() -> Config:
    config = full()
    config.name = "vit_huge_ade20k_eomt"
    config.task = EomtConfig(truth="semantic", num_classes=150, queries=100)
    config.model.drop_path = 0.0
    config.optim = OptimConfig(lr=1e-4, warmup_steps=1500, b2=0.999, weight_decay=0.05, clip_norm=0.01, layer_decay=0.8)
    config.train = TrainConfig(batch_size=16, epochs=31, precision="bf16")
    return config


def scenes(style: str, split: str, count: int) -> ScenesConfig:
    return ScenesConfig(path=style, split=split, truth="class_map", size=96, scenes=count)


def tiny() -> Config:
    return Config(
        name="vit_huge_ade20k_tiny",
        model=ViTConfig(size="P", patch_size=8, image_size=96, pool="gap", drop_path=0.05, remat="none"),
        task=SegmentationConfig(num_classes=10, head="linear"),
        data=DataConfig(
            train=(scenes("twemoji", "train", 16), scenes("noto", "train", 16), scenes("noto", "test", 16)),
            transforms=(Resize(to="shorter", scale=(0.75, 1.5)), Flip(), RandomCrop()),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=20, b2=0.99, weight_decay=0.05, clip_norm=1.0, layer_decay=0.65),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=16, steps=150, precision="bf16"),
        checkpoint=CheckpointConfig(
            every_steps=50, keep_last=2, weights="runs/vit_huge_tiny", skip=("head",)
        ),
        evals=(MeanIouConfig(name="held_out", source=scenes("twemoji", "test", 256), every_steps=50),),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
