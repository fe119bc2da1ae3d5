"""Evals of a run: which are due, and how they get their predictions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from visionfm_jax.config import Config, EvalConfig
from visionfm_jax.data.fields import check_classes
from visionfm_jax.evals.beats import Stopped, heard_by
from visionfm_jax.evals.eval import Eval, make_evals
from visionfm_jax.parallel.agreement import require_same
from visionfm_jax.parallel.mesh import to_global
from visionfm_jax.train.spikes import plain
from visionfm_jax.train.step import Trainer


def open_evals(config: Config, host: int, hosts: int) -> dict[str, Eval]:
    """As `make_evals`; all processes see the same data.

    Raises:
      ConfigError, DataError: as `make_evals`.
      StorageError: they do not.
    """
    evals = make_evals(config, host, hosts)
    require_same([[e.protocol, len(e.source)] for e in evals.values()], "evals")
    return evals


def check_labels(config: Config, evals: dict[str, Eval], trained: Sequence[str]) -> None:
    """Refuse evals on data whose labels mean other classes than `trained`, those of the task's training.

    Raises:
      DataError: as `check_classes`.
    """
    for i, e in enumerate(config.evals):
        if e.measures in ("labels", "boxes", "masks", "segments", "class_map"):
            check_classes(f"config.evals[{i}].source", evals[e.name].source, trained)


def due_evals(config: Config, step: int) -> list[EvalConfig]:
    """Those to run after `step`: at the last step all, before the first those of `at_start`."""
    if not step:
        return [e for e in config.evals if e.at_start]
    last = step == config.total_steps
    return [e for e in config.evals if last or (e.every_steps and step % e.every_steps == 0)]


def measure(
    trainer: Trainer,
    evals: dict[str, Eval],
    weights: Any,
    origin: dict[str, Any],
    goes_on: Callable[[int], object],
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The metrics of `evals`, as NAME/METRIC; None if a stop was requested before the end.

    Args:
      trainer, weights: that predict.
      evals: by name.
      origin: says what the weights are; the details of each eval begin with it and its metrics.
      goes_on: gets 1 at each batch, and 0 between the parts of what is computed afterwards (`beats.beat`).
      stop_requested: every process asks it equally often.
    """

    def listen(alike: bool, batches: int = 0) -> None:
        if (alike or jax.process_count() == 1) and stop_requested():
            raise Stopped
        goes_on(batches)

    def predict(batch: dict[str, np.ndarray], *what: Hashable) -> dict[str, np.ndarray]:
        listen(True, 1)
        return jax.device_get(trainer.predict(weights, to_global(trainer.mesh, batch), *what))

    scores: dict[str, float] = {}
    try:
        for name, eval_ in evals.items():
            with heard_by(listen):
                found = eval_.run(predict)
            eval_.details = {**origin, "metrics": plain(found), **eval_.details}
            scores |= {f"{name}/{k}": v for k, v in found.items()}
    except Stopped:
        return None
    return scores
