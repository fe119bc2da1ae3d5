"""Self-distillation of a ViT-H/14 with registers, DINOv2's recipe (Oquab et al. 2023): no labels, global batch 2048.

    python -m visionfm_jax.main --config=configs/vit_huge_dino.py '--config.data.train[0].path=/data/imagenet21k'
    python -m visionfm_jax.main --config=configs/vit_huge_dino.py:tiny

Each image gives two views of 224 and eight of 98 pixels. For 128 GPUs with 16 images each. The teacher is evaluated by
k-nearest neighbours on ImageNet, next to k-nearest neighbours on raw pixels.

`tiny` is the same recipe on bundled scans of digits, small enough for two CPU cores.
"""

from visionfm_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    PhotometricConfig,
    PreprocessConfig,
    TelemetryConfig,
    TrainConfig,
)
from visionfm_jax.config.load import variant_of
from visionfm_jax.data.sources.kinds import BundledConfig, TfdsConfig
from visionfm_jax.data.transforms import MultiCrop, Views
from visionfm_jax.evals.kinds import KnnConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.self_distillation import SelfDistillationConfig


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
            attention="cudnn", remat="dots",
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


def whole() -> PreprocessConfig:
    """No crop: a digit fills its image."""
    return PreprocessConfig(crop=1.0)


def tiny() -> Config:
    """Digits have no colours and must not be flipped: their views differ by position, size and blur."""
    train, held_out = (BundledConfig(path="digits", split=split) for split in ("train", "test"))
    crops = MultiCrop(
        views=tuple(
            Views(
                name=name, size=size, scale=scale, flip=0.0,
                photometric=PhotometricConfig(blur_chance=0.5, blur_sigma=(0.1, 0.5)),
            )
            for name, size, scale in (("global", 28, (0.5, 1.0)), ("local", 14, (0.25, 0.5)))
        )
    )  # fmt: skip
    return Config(
        name="vit_huge_dino_tiny",
        model=ViTConfig(size="P", depth=4, patch_size=7, image_size=28, pool="cls", registers=2, layer_scale=0.1),
        task=SelfDistillationConfig(
            prototypes=1024, head_hidden=256, head_bottleneck=64, temperature_warmup_steps=100,
            teacher_momentum=(0.98, 1.0),
        ),
        data=DataConfig(
            train=(train,),
            augment=AugmentConfig(mean=(0.13,) * 3, std=(0.31,) * 3),
            transforms=(crops,),
            threads=2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=50, b1=0.9, b2=0.999, weight_decay=0.05, clip_norm=3.0),
        parallel=ParallelConfig(stage=3),
        train=TrainConfig(batch_size=64, steps=300, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=100, keep_last=2),
        evals=(
            KnnConfig(
                name="digits", source=held_out, gallery=(train,), preprocess=whole(), every_steps=100,
                at_start=True,
            ),
        ),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
