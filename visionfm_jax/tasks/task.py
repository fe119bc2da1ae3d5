"""What the trainer knows of an objective."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from visionfm_jax.config import Config
from visionfm_jax.models.layers import Prepare


class Task(Protocol):
    """An objective joined to its network; the trainer knows nothing else of either.

    Parameters reach `loss` and `predict` in usable form (`parallel.zero`): whole, but for scanned blocks, which
    the network makes whole by `prepare`. Rows are one device's. What a task returns per sample has the batch's
    rows first; the trainer logs its mean, or its maximum where the name ends in `_max`. `constrain` brings stored
    parameters back into their bounds after an update.
    """

    def init(self, key: jax.Array) -> Any: ...
    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]: ...
    def loss(self, params: Any, batch: dict, keys: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]: ...
    def constrain(self, params: Any) -> Any: ...
    def predict(self, params: Any, batch: dict, what: Hashable = ...) -> dict[str, jax.Array]: ...
    @property
    def step_flops(self) -> float: ...


class ContrastTask(Task, Protocol):
    """A task of which a part compares every row with all rows of the global batch.

    `loss` is `join` of what `forward` gives for the rows themselves and `contrast` for what it compares. So that micro-
    batches are compared with all of the batch (`parallel.accumulate`), every array of `embed`, which is the first
    result of `forward` alone, has rows first, and `contrast` takes any number of them. `contrast_weight` times its
    mean is its part of the loss.
    """

    contrast_weight: float

    def embed(self, params: Any, batch: dict, keys: jax.Array) -> dict[str, jax.Array]: ...
    def forward(self, params: Any, batch: dict, keys: jax.Array) -> tuple[dict, dict]: ...
    def contrast(self, embedded: dict[str, jax.Array]) -> jax.Array: ...
    def join(self, own: dict[str, jax.Array], contrast: jax.Array) -> dict[str, jax.Array]: ...


DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


def make_task(config: Config, prepare: Prepare) -> Task:
    """The task of `config.task`, computing in `config.train.precision`."""
    return config.task.make(config, DTYPES[config.train.precision], prepare)
