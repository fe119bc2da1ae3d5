"""Which task a configuration asks for."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from visionfm_jax.config import ClassificationConfig, Config, ContrastiveConfig
from visionfm_jax.models.layers import Prepare
from visionfm_jax.tasks.classification import Classification
from visionfm_jax.tasks.contrastive import Contrastive


class Task(Protocol):
    """An objective joined to its network; the trainer knows nothing else of either.

    Parameters reach `loss` and `predict` in usable form (`parallel.zero`): whole, but for scanned blocks, which
    the network makes whole by `prepare`. Rows are one device's. What a task returns per sample has the batch's
    rows first; the trainer logs its mean, or its maximum where the name ends in `_max`. `constrain` brings stored
    parameters back into their bounds after an update.
    """

    def __init__(self, config: Config, dtype: jnp.dtype, prepare: Prepare): ...
    def init(self, key: jax.Array) -> Any: ...
    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]: ...
    def loss(self, params: Any, batch: dict, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...
    def constrain(self, params: Any) -> Any: ...
    def predict(self, params: Any, batch: dict) -> dict[str, jax.Array]: ...
    @property
    def step_flops(self) -> float: ...


TASKS: dict[type, type[Task]] = {
    ClassificationConfig: Classification,
    ContrastiveConfig: Contrastive,
}
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


def make_task(config: Config, prepare: Prepare) -> Task:
    """The task of `config.task`, computing in `config.train.precision`."""
    return TASKS[type(config.task)](config, DTYPES[config.train.precision], prepare)
