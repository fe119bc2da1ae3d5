"""What watches a run does not hide how the run has ended."""

import types

import pytest

from visionfm_jax.config import Config
from visionfm_jax.config.schema import TelemetryConfig, TrainConfig
from visionfm_jax.errors import OutputError, TrainingError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.telemetry.monitor import RunMonitor
from visionfm_jax.train.sessions import Session


def test_a_full_disk_does_not_take_the_place_of_an_error(tmp_path, monkeypatch):
    config = Config(
        name="m",
        model=ViTConfig(),
        task=ClassificationConfig(),
        train=TrainConfig(steps=2),
        telemetry=TelemetryConfig(tensorboard=False, progress=False),
    )

    def full(state):
        raise OutputError("cannot write metrics.jsonl")

    watchdog = types.SimpleNamespace(beat=lambda step: None)
    monitor = RunMonitor(config, tmp_path, 0, watchdog, Session(None, 0, devices=1))
    monkeypatch.setattr(monitor.writer, "close", full)
    with pytest.raises(TrainingError), monitor:
        raise TrainingError("the loss is not finite")
    with pytest.raises(OutputError), monitor:
        pass
