"""A run small enough to compile often: shared by the tests of placement and of processes."""

from __future__ import annotations

import jax
import numpy as np

from visionfm_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train.step import Trainer

BATCH = 32


def small_config(stage: int = 3, accumulate: int = 1, replicas: int = 1, precision: str = "fp32") -> Config:
    config = Config(
        name="small",
        model=ViTConfig(size="P", image_size=16, patch_size=8),
        task=ClassificationConfig(num_classes=10),
        data=DataConfig(train=(TfdsConfig(path="-"),), augment=AugmentConfig(jitter=(0.4, 0.4, 0.4, 0.1))),
        optim=OptimConfig(warmup_steps=2, lr=3e-3, ema=0.9, layer_decay=0.75),
        parallel=ParallelConfig(stage=stage, replicas=replicas),
        train=TrainConfig(batch_size=BATCH, steps=20, accumulate=accumulate, precision=precision),
    )
    config.validate()
    return config


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {"image": rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8), "label": rng.integers(0, 10, BATCH, np.int32)}
        for _ in range(count)
    ]


def losses(trainer: Trainer, steps: int) -> tuple[list[float], list[float], object]:
    """Loss and gradient norm of each of `steps`, and the final state."""
    state, out, norms = trainer.init(), [], []
    for batch in batches(steps):
        state, metrics = trainer.step(state, to_global(trainer.mesh, batch))
        out.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    return out, norms, state


def trainer_on(devices: int, **kwargs) -> Trainer:
    config = small_config(**kwargs)
    return Trainer(config, make_mesh(config.parallel.replicas, jax.devices()[:devices]))
