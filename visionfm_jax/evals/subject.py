"""What an eval needs to know, and is given, of the model it measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visionfm_jax.config import Config, EvalConfig
from visionfm_jax.errors import ConfigError

# This host's rows of an evaluation batch, and which of the task's predictions, if it has several -> the task's
# `predict` for all hosts' rows, and all else of the batch but images and texts: `label`, `mask`, `record`, ….
Predict = Callable[..., dict[str, np.ndarray]]


def require_prediction(config: EvalConfig, run: Config, prediction: str) -> None:
    """Refuse a run whose task cannot predict what an eval measures.

    Raises:
      ConfigError: it lacks `prediction`, one of `TaskConfig.predictions`.
    """
    if prediction not in run.task.predictions:
        there = ", ".join(sorted(run.task.predictions))
        raise ConfigError(
            f"config.evals {config.name!r}: kind {config.kind!r} measures the {prediction} of a task, and "
            f"{type(run.task).__name__} predicts {there}; set another kind, or remove the eval"
        )
