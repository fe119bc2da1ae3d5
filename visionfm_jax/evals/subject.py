"""What an eval needs to know, and is given, of the model it measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from visionfm_jax.config import Config, EvalConfig
from visionfm_jax.errors import ConfigError

# This host's rows of an evaluation batch, and which of the task's predictions, if it has several -> the task's
# `predict` for all hosts' rows, and all else of the batch but images and texts: `label`, `mask`, `record`, ….
Predict = Callable[..., dict[str, np.ndarray]]


def require_task(config: EvalConfig, run: Config, *tasks: type) -> None:
    """Refuse a run of another task than one of `tasks`, classes of `config.schema`.

    Raises:
      ConfigError: that the eval's kind cannot measure.
    """
    if not isinstance(run.task, tasks):
        raise ConfigError(
            f"config.evals {config.name!r}: kind {config.kind!r} is for a task of "
            f"{' or '.join(task.__name__ for task in tasks)}, not of "
            f"{type(run.task).__name__}; set another kind, or remove the eval"
        )
