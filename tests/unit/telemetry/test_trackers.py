"""Weights & Biases and MLflow get what metrics.jsonl gets, offline; what fails costs its own record alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from visionfm_jax.errors import ConfigError
from visionfm_jax.telemetry import trackers
from visionfm_jax.telemetry.trackers import open_trackers
from visionfm_jax.telemetry.writers import MetricWriter, read_metrics

SETTINGS = {"name": "tiny", "optim": {"lr": 1e-3}, "evals": ({"name": "val"}, {"name": "test"})}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def write(folder, start, steps, notes):
    folder.mkdir(exist_ok=True)
    found = open_trackers(("mlflow", "wandb"), folder, SETTINGS, notes.append)
    with MetricWriter(folder, start_step=start, tensorboard=False, trackers=found, note=notes.append) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "val/top1": math.nan if step == 2 else 0.5})


def test_both_get_the_scalars_and_a_continued_run_goes_on(tmp_path):
    from mlflow import MlflowClient

    notes, folder = [], tmp_path / "run"
    write(folder, 0, (1, 2), notes)
    kept = json.loads((folder / "trackers.json").read_text())
    write(folder, 2, (3,), notes)
    assert notes == []
    assert json.loads((folder / "trackers.json").read_text()) == kept
    assert len(read_metrics(folder)) == 3

    client = MlflowClient()
    run = client.get_run(kept["mlflow"])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params == {"name": "tiny", "optim.lr": "0.001", "evals.0.name": "val", "evals.1.name": "test"}
    losses = {m.step: m.value for m in client.get_metric_history(kept["mlflow"], "loss")}
    assert losses == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}

    files = list(folder.glob(f"wandb/offline-run-*/run-{kept['wandb']}.wandb"))
    assert files
    assert all(b"val/top1" in file.read_bytes() for file in files)


def test_a_service_that_fails_costs_its_own_record_alone(tmp_path, monkeypatch):
    class Failing:
        def write(self, step, values):
            raise ConnectionError("no route to host\nat all")

        def close(self):
            raise AssertionError("it is closed, and was dropped")

    notes = []
    with MetricWriter(tmp_path, tensorboard=False, trackers={"wandb": Failing()}, note=notes.append) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 2
    assert len(notes) == 1
    assert notes[0].startswith("wandb: no route to host")
    assert "\n" not in notes[0]

    def refused(folder, settings):
        raise TimeoutError("the server does not answer")

    monkeypatch.setattr(trackers, "MLflow", refused)
    assert open_trackers(("mlflow",), tmp_path, SETTINGS, notes.append) == {}
    assert notes[1] == "mlflow: the server does not answer; the run goes on without it"


def test_a_package_that_is_missing_is_named_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ConfigError, match=r"trackers = \('mlflow',\): mlflow is not installed; pip install mlflow-skinny"
    ):
        open_trackers(("mlflow",), tmp_path, SETTINGS, print)


def test_nothing_is_imported_that_is_not_asked_for():
    code = "import sys, visionfm_jax.telemetry.monitor; assert not {'wandb', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
