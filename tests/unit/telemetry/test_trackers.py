"""Weights & Biases and MLflow get what metrics.jsonl gets, offline; what fails costs its own record alone."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import subprocess
import sys
import time
import types

import pytest

from visionfm_jax.config import load
from visionfm_jax.config.schema import TelemetryConfig
from visionfm_jax.errors import ConfigError, TrainingError, UserError
from visionfm_jax.telemetry import trackers
from visionfm_jax.telemetry.monitor import RunMonitor
from visionfm_jax.telemetry.page import write_page
from visionfm_jax.telemetry.trackers import open_trackers
from visionfm_jax.telemetry.writers import MetricWriter, read_metrics
from visionfm_jax.train.folder import RunFolder
from visionfm_jax.train.sessions import Session

SETTINGS = {"name": "tiny", "optim": {"lr": 1e-3}, "evals": ({"name": "val"}, {"name": "test"})}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


def write(folder, start, steps, notes, scale=1.0, error=None):
    import wandb

    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        time.sleep(1)  # wandb names its folders by the second
    found = open_trackers(("mlflow", "wandb"), folder, SETTINGS, notes.append)
    writer = MetricWriter(folder, start_step=start, tensorboard=False, trackers=found, note=notes.append)
    with contextlib.suppress(TrainingError), writer:
        for step in steps:
            writer.write(step, {"loss": scale / step, "val/top1": math.nan if step == 2 else 0.5})
        if error:
            raise error
    wandb.teardown()  # its service ends with the process of a run


def records(folder):
    """What the files of wandb hold: the rows of metrics, oldest first, and the exit codes."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, codes = [], []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in logged(file.read_bytes()):
            record = Record.FromString(data)
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            rows += [{k: json.loads(v) for k, v in items.items()}] if items else []
            codes += [record.exit.exit_code] if record.HasField("exit") else []
    return rows, codes


def logged(content):
    """The entries of a log of LevelDB, behind 7 bytes of W&B's: each in pieces (CRC, length, type) within blocks."""
    entry, at = b"", 7
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # what is left of a block has no room for a piece
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        entry, at = entry + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield entry
            entry = b""


def test_both_get_the_scalars_also_of_a_run_that_fails_and_goes_on_from_an_earlier_step(tmp_path):
    from mlflow import MlflowClient

    notes, folder, client = [], tmp_path / "run", MlflowClient()
    write(folder, 0, (1, 2, 3), notes, error=TrainingError("the loss is not finite"))
    kept = json.loads((folder / "trackers.json").read_text())
    run = client.get_run(kept["mlflow"])
    assert (run.info.run_name, run.info.status) == ("run", "FAILED")
    assert run.data.params == {"name": "tiny", "optim.lr": "0.001", "evals.0.name": "val", "evals.1.name": "test"}
    found = open_trackers(("mlflow",), folder, SETTINGS, notes.append)
    assert client.get_run(kept["mlflow"]).info.status == "RUNNING"
    found["mlflow"].close("stopped")
    assert client.get_run(kept["mlflow"]).info.status == "KILLED"

    write(folder, 1, (2, 3), notes, scale=10.0)
    assert notes == []
    assert json.loads((folder / "trackers.json").read_text()) == kept
    assert len(read_metrics(folder)) == 3
    assert client.get_run(kept["mlflow"]).info.status == "FINISHED"
    last = {m.step: m.value for m in client.get_metric_history(kept["mlflow"], "loss")}
    assert last == {1: 1.0, 2: 5.0, 3: pytest.approx(10 / 3)}
    rows, codes = records(folder)
    assert [(row["step"], round(row["loss"], 2)) for row in rows] == [(1, 1), (2, 0.5), (3, 0.33), (2, 5), (3, 3.33)]
    assert all("val/top1" in row for row in rows)
    assert codes == [1, 0]


def test_a_run_continues_in_a_folder_with_the_files_of_a_tracker(tmp_path):
    config, _ = load.from_arguments(["--config=quickstart", f"--config.workdir={tmp_path}/run"])
    config.telemetry = TelemetryConfig(trackers=("wandb",), tensorboard=False, progress=False)
    watch = types.SimpleNamespace(beat=lambda step: None), Session(None, 0, devices=1)
    with RunFolder(config, owner=True) as folder, RunMonitor(config, folder.path, 0, *watch) as monitor:
        monitor.log(1, {"loss": 1.0})
    assert any(path.is_symlink() for path in (folder.path / "wandb").iterdir())
    with RunFolder(config, owner=True):
        assert write_page([folder.path], tmp_path / "report.html").is_file()
    assert records(folder.path)[1] == [1]  # stopped, as nobody has said that it was finished
    (folder.path / "wandb").rename(tmp_path / "wandb")
    (folder.path / "wandb").symlink_to(tmp_path / "wandb")
    with pytest.raises(UserError, match="wandb: is a link"):
        RunFolder(config, owner=True)


def test_a_service_that_fails_costs_its_own_record_alone(tmp_path, monkeypatch):
    class Failing:
        def write(self, step, values):
            raise ConnectionError("no route to host\nat all")

        def close(self, state):
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
