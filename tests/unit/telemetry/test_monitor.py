"""What watches a run: it does not hide how the run has ended, and logs the memory of the device."""

import types

import jax
import pytest

from visionfm_jax.config import Config
from visionfm_jax.config.schema import TelemetryConfig, TrainConfig
from visionfm_jax.errors import OutputError, TrainingError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.telemetry.monitor import RunMonitor
from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.sessions import Session


@pytest.fixture
def monitor(tmp_path):
    config = Config(
        name="m",
        model=ViTConfig(),
        task=ClassificationConfig(),
        train=TrainConfig(steps=2),
        telemetry=TelemetryConfig(tensorboard=False, progress=False),
    )
    watchdog = types.SimpleNamespace(beat=lambda step: None)
    return RunMonitor(config, tmp_path, 0, watchdog, Session(None, 0, devices=1))


def test_a_full_disk_does_not_take_the_place_of_an_error(monitor, monkeypatch):
    def full(state):
        raise OutputError("cannot write metrics.jsonl")

    monkeypatch.setattr(monitor.writer, "close", full)
    with pytest.raises(TrainingError), monitor:
        raise TrainingError("the loss is not finite")
    with pytest.raises(OutputError), monitor:
        pass


def test_the_memory_of_a_device_that_counts_it_is_logged_with_each_step(monitor, tmp_path, monkeypatch):
    metrics = {"loss": 1.0, "images_per_s": 2.0, "tflops_per_device": 3.0, "data_wait": 0.0}
    with monitor:
        monitor.log(1, metrics)  # of a CPU
        device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**29})
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        monitor.log(2, metrics)
        monitor.log(2, {"val/top1": 0.5})
    cpu, gpu, evaluation = read_metrics(tmp_path)
    assert cpu == {"step": 1, **metrics}
    assert gpu == {"step": 2, **metrics, "device_memory_gib": 1.0, "device_memory_peak_gib": 1.5}
    assert evaluation == {"step": 2, "val/top1": 0.5}
