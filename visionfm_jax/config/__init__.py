"""The configuration of a run: `schema` says what there is, `load` brings it in from a file and flags.

Config files import from here and from nowhere else, so they load wherever Python does.
"""

from visionfm_jax.config.schema import (
    AugmentConfig,
    AuroraConfig,
    CheckpointConfig,
    ClassificationConfig,
    ClipConfig,
    Config,
    ContrastiveConfig,
    DataConfig,
    DecoderConfig,
    EvalConfig,
    MultimodalConfig,
    OptimConfig,
    ParallelConfig,
    PreprocessConfig,
    SourceConfig,
    SwinV2Config,
    TelemetryConfig,
    TextConfig,
    TrainConfig,
    ViTConfig,
)

__all__ = [
    "AugmentConfig",
    "AuroraConfig",
    "CheckpointConfig",
    "ClassificationConfig",
    "ClipConfig",
    "Config",
    "ContrastiveConfig",
    "DataConfig",
    "DecoderConfig",
    "EvalConfig",
    "MultimodalConfig",
    "OptimConfig",
    "ParallelConfig",
    "PreprocessConfig",
    "SourceConfig",
    "SwinV2Config",
    "TelemetryConfig",
    "TextConfig",
    "TrainConfig",
    "ViTConfig",
]
