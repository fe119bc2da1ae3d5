"""The interface of evals, and those that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.sources import Source
from visionfm_jax.errors import ConfigError, DataError

# This host's rows of an evaluation batch, and which of the task's predictions, if it has several -> the task's
# `predict` for all hosts' rows, and all else of the batch but images and texts: `label`, `mask`, `record`, ….
Predict = Callable[..., dict[str, np.ndarray]]


class Eval(Protocol):
    """A measurement, made by its `EvalConfig.make`, which opens its data before training starts."""

    source: Source  # the held-out data
    protocol: str  # hex digits, equal where numbers can be compared; empty: the configuration says it all
    pictured: dict[str, Any]  # after a run, on host 0: what `telemetry.pictures.draw` shows, or nothing
    details: dict[str, Any]  # after a run: what JSON shall keep beside the metrics, or nothing

    def run(self, predict: Predict) -> dict[str, float]: ...


def make_evals(run: Config, host: int, hosts: int) -> dict[str, Eval]:
    """The evals of `run.evals` by name.

    Raises:
      DataError: a dataset that cannot serve.
    """
    out = {}
    for i, config in enumerate(run.evals):
        try:
            out[config.name] = config.make(run, host, hosts)
        except DataError as error:
            raise DataError(f"config.evals[{i}]: {error}") from error
    return out


def check_best_metric(run: Config) -> None:
    """Where states are kept by a metric, one of the evals must have it; known before any data is opened.

    Raises:
      ConfigError: none has.
    """
    if not run.checkpoint.keep_best:
        return
    metrics = {config.name: config.metrics for config in run.evals}
    name, _, metric = run.checkpoint.best_metric.partition("/")
    if name not in metrics:
        wrong, near = f"names none of the evals {list(metrics)}", "EVAL/METRIC"
    elif metric not in metrics[name]:
        wrong, near = f"eval {name!r} has no such metric of which higher is better", f"{name}/{metrics[name][0]}"
    else:
        return
    raise ConfigError(
        f"config.checkpoint.best_metric = {run.checkpoint.best_metric!r}: {wrong}; set {near}, or "
        "config.checkpoint.keep_best=0"
    )
