"""Weights & Biases and MLflow, beside the run's own files, where `config.telemetry.trackers` lists them.

Project, server and account are those of the services' own settings: WANDB_PROJECT, WANDB_MODE, WANDB_API_KEY, …;
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, …. FOLDER/trackers.json keeps the services' names of the run, under which a
run that is continued goes on there. One that continues from a step before the last that was sent sends the steps
between again, and both have these twice, the newer values last. Both send in the background. A service that fails costs
its own record alone: training goes on, and metrics.jsonl has all of it.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from visionfm_jax.errors import ConfigError, one_line
from visionfm_jax.storage import read_bytes, write_text

KEPT = "trackers.json"
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # what pip installs
PROJECT = "visionfm_jax"  # where the services' settings name none
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"  # how a run ends


class Tracker(Protocol):
    """A service that keeps scalars by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, state: str) -> None:
        """Send what is left; the run is FINISHED, STOPPED (and may be continued) or FAILED."""


def open_trackers(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any], note: Callable[[str], None]
) -> dict[str, Tracker]:
    """Those that are listed, and that can be reached; `note` shows a line about another.

    Args:
      names: of `PACKAGES`.
      folder: of the run.
      settings: the run's configuration in plain values.
      note: shows a line to people.

    Raises:
      ConfigError: a package is not installed.
    """
    found: dict[str, Tracker] = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"config.telemetry.trackers = {tuple(names)}: {name} is not installed; pip install {PACKAGES[name]}"
            ) from error
        try:
            found[name] = {"wandb": WeightsAndBiases, "mlflow": MLflow}[name](folder, settings)
        except Exception as error:  # whatever a client of a service raises must not end a run
            note(f"{name}: {one_line(error)}; the run goes on without it")
    return found


class WeightsAndBiases:
    """A run of wandb."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        kept = _kept(folder)
        name = kept.get("wandb") or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=folder.name, id=name, resume="allow",
            dir=str(folder), config=dict(settings),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back to an earlier step
        _keep(folder, {**kept, "wandb": name})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=int(state != FINISHED))


class MLflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client, kept = MlflowClient(), _kept(folder)
        self._run = kept.get("mlflow", "")
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            there = self._client.get_experiment_by_name(name)
            experiment = there.experiment_id if there else self._client.create_experiment(name)
            self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
            _keep(folder, {**kept, "mlflow": self._run})
            fields = [Param(name, str(value)[:500]) for name, value in _leaves(settings)]
            for first in range(0, len(fields), 100):  # of a request
                self._client.log_batch(self._run, params=fields[first : first + 100])
        self._sent: Any = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._sent = self._client.log_batch(self._run, metrics=metrics, synchronous=False)

    def close(self, state: str) -> None:
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self._run, {FINISHED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}[state])


def _kept(folder: Path) -> dict[str, str]:
    """The services' names of the run; {}: none are kept."""
    try:
        value = json.loads(read_bytes(folder / KEPT) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _keep(folder: Path, names: Mapping[str, str]) -> None:
    write_text(folder / KEPT, json.dumps(names) + "\n")


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Fields by their paths, "optim.lr"."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{k}" if name else k, v) for k, v in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        items = [(f"{name}.{i}", v) for i, v in enumerate(value)]
    else:
        return [(name, value)]
    return [leaf for path, v in items for leaf in _leaves(v, path)]
