"""Aurora-Vision-XL, 3.70 B parameters: masked images, image-text contrast and captions at 448 px.

    visionfm tokenizer train --config=aurora_xl --vocab_size=32000
    visionfm train --config=aurora_xl
    visionfm train --config=aurora_xl:tiny

For 64 GPUs of 80 GB: ZeRO-2, bf16, global batch 2048 in 8 micro-batches; each pair is contrasted with all others of the
batch. Three of four samples are pairs, from LAION-5B, COCO and Visual Genome; the fourth is an image without caption.
An epoch has 2 B samples.

`tiny` is the same recipe on the bundled emoji, small enough for two CPU cores. The pairs come from one drawing style,
the images without caption from both. The test set has combinations of a concept and a skin tone that do not occur
together in the training data.
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
from visionfm_jax.data.sources.kinds import BundledConfig, CocoCaptionsConfig, TarsConfig, VisualGenomeConfig
from visionfm_jax.data.transforms import Flip, RandomResizedCrop
from visionfm_jax.evals.kinds import CaptioningConfig, PerplexityConfig, ReconstructionConfig, RetrievalConfig
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig


def get_config(variant: str = "") -> Config:
    return {"": full, "tiny": tiny}[variant_of(("tiny",), variant)]()


def full() -> Config:
    return Config(
        name="aurora_xl",
        model=AuroraConfig(
            image=SwinV2Config(size="G", image_size=448, window=14, drop_path=0.2, remat="dots"),
            text=DecoderConfig(size="L", vocab_size=32_000, context=64, remat="none"),
            embed_dim=1024,
        ),
        task=MultimodalConfig(tokenizer="/data/aurora.model", pair_ratio=(3, 1)),
        data=DataConfig(
            train=(
                TarsConfig(path="/data/laion5b", weight=0.97),
                CocoCaptionsConfig(path="/data/coco", split="train2017", weight=0.02),
                VisualGenomeConfig(path="/data/visual_genome", weight=0.01),
                TarsConfig(path="/data/images", caption_key=""),
            ),
            num_examples=2_000_000_000,
            transforms=(RandomResizedCrop(scale=(0.5, 1.0)), Flip()),
            workers=12,
        ),
        optim=OptimConfig(
            lr=1.5e-4, final_lr=1e-6, warmup_steps=5000, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0
        ),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=2048, accumulate=8, epochs=1, precision="bf16"),
        checkpoint=CheckpointConfig(every_steps=2000, every_minutes=60, keep_last=2),
        evals=(
            RetrievalConfig(name="coco", source=held_out(), preprocess=whole(), every_steps=10_000),
            PerplexityConfig(name="words", source=held_out(), preprocess=whole(), every_steps=10_000),
            CaptioningConfig(
                name="captions", source=held_out(), preprocess=whole(), decoding="beam",
                every_steps=50_000,
            ),
            ReconstructionConfig(
                name="pixels", source=held_out(), preprocess=whole(), batch_size=256,
                every_steps=50_000,
            ),
        ),
    )  # fmt: skip


def whole() -> PreprocessConfig:
    """No crop: a caption describes the whole image, and an emoji fills its image."""
    return PreprocessConfig(crop=1.0)


def held_out() -> SourceConfig:
    return CocoCaptionsConfig(path="/data/coco", split="val2017")


def emoji(split: str, style: str = "twemoji", caption_key: str = "caption", **more: float) -> SourceConfig:
    return BundledConfig(path=style, split=split, caption_key=caption_key, **more)


def tiny() -> Config:
    known = emoji("train"), emoji("test")
    return Config(
        name="aurora_xl_tiny",
        model=AuroraConfig(
            image=SwinV2Config(size="P", image_size=64, patch_size=4, window=8, drop_path=0.05),
            text=DecoderConfig(size="P", vocab_size=1024, context=24),
            embed_dim=128,
        ),
        task=MultimodalConfig(tokenizer="emoji", pair_ratio=(3, 1), masked_image=2.0, mask_unit=8),
        data=DataConfig(
            train=(
                emoji("train"),
                emoji("train", caption_key=""),
                emoji("train", style="noto", caption_key=""),
            ),
            transforms=(RandomResizedCrop(scale=(0.8, 1.0)),),
            threads=2,
        ),
        optim=OptimConfig(lr=1.5e-3, final_lr=1e-6, warmup_steps=50, b1=0.9, b2=0.98, weight_decay=0.05, clip_norm=1.0),
        parallel=ParallelConfig(stage=2),
        train=TrainConfig(batch_size=128, accumulate=2, steps=480, precision="fp32"),
        checkpoint=CheckpointConfig(every_steps=120, keep_last=2),
        evals=(
            RetrievalConfig(
                name="unseen", source=emoji("combinations"), gallery=known, preprocess=whole(),
                every_steps=120,
            ),
            PerplexityConfig(
                name="words", source=emoji("combinations"), preprocess=whole(), every_steps=120
            ),
            CaptioningConfig(name="captions", source=emoji("combinations"), preprocess=whole()),
            ReconstructionConfig(name="pixels", source=emoji("combinations"), preprocess=whole()),
        ),
        telemetry=TelemetryConfig(log_every=10),
    )  # fmt: skip
