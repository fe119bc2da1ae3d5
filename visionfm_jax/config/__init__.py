"""The configuration of a run: `schema` says what there is, `load` brings it in from a file and flags.

A model and a task have their own classes, beside their implementation in `models` and `tasks`.
"""

from visionfm_jax.config.schema import (
    AugmentConfig,
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    NetworkConfig,
    OptimConfig,
    ParallelConfig,
    PhotometricConfig,
    PreprocessConfig,
    SourceConfig,
    TaskConfig,
    TelemetryConfig,
    TrainConfig,
    Transform,
)

__all__ = [
    "AugmentConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "NetworkConfig",
    "OptimConfig",
    "ParallelConfig",
    "PhotometricConfig",
    "PreprocessConfig",
    "SourceConfig",
    "TaskConfig",
    "TelemetryConfig",
    "TrainConfig",
    "Transform",
]
