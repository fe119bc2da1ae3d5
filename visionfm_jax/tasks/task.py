"""The interface between the trainer and an objective."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.parallel.context import Context


class Task(Protocol):
    """An objective joined to its network; the trainer knows nothing else of either.

    Parameters reach `loss` and `predict` in usable form (`parallel.zero`): whole, but for scanned blocks, which
    the network makes whole by `gather_params`. Rows are one device's. What a task returns per sample has the batch's
    rows first; the trainer logs its mean, or its maximum where the name ends in `_max`. `constrain` brings stored
    parameters back into their bounds after an update.

    What lasts from step to step, and what is known of the whole batch before its losses are, is handed to `loss` as a
    `Context`. `Stateless` answers for tasks that need none of it:
      momentum: step -> momentum of the teacher, the average of the parameters after each step; None: no teacher. It is
        stored in place of `optim.ema`'s average, and is what evaluations measure.
      init_state: the task's own arrays at step 0; None: none.
      counts: sums over these rows by which losses are divided: of boxes, words, ….
      update: the state of the next step, from this one's and the means over the global batch of what `loss` returns
        last, of which scalars are logged as well.
    """

    momentum: Callable[[jax.Array], jax.Array] | None

    def init(self, key: jax.Array) -> Any: ...
    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]: ...
    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]: ...
    def init_state(self) -> Any: ...
    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]: ...
    def update(self, state: Any, means: dict[str, jax.Array]) -> Any: ...
    def constrain(self, params: Any) -> Any: ...
    def predict(self, params: Any, batch: dict, what: Hashable = ...) -> dict[str, jax.Array]: ...
    @property
    def step_flops(self) -> float: ...


class Stateless:
    """The part of a `Task` by which nothing but its parameters lasts from step to step."""

    momentum = None

    def init_state(self) -> Any:
        """No arrays."""
        return None

    def counts(self, batch: dict, keys: jax.Array) -> dict[str, jax.Array]:
        """None."""
        del batch, keys
        return {}

    def update(self, state: Any, means: dict[str, jax.Array]) -> Any:
        """What there was."""
        del means
        return state


def loaded(run: Config, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What the loader gives a task that sees one image a row: uint8 images (B, H, W, 3), and the task's fields."""
    spec = {"image": ((*height_width(run.model.image_size), 3), jnp.uint8), **run.task.fields(run).spec}
    return {name: jax.ShapeDtypeStruct((batch_size, *shape), dtype) for name, (shape, dtype) in spec.items()}


class ContrastTask(Task, Protocol):
    """A task of which a part compares every row with all rows of the global batch.

    `loss` is `join` of what `forward` gives for the rows themselves and `contrast` for what it compares, and its last
    result is `forward`'s. So that micro-batches are compared with all of the batch (`parallel.accumulate`), every array
    of `embed`, which is the first result of `forward` alone, has rows first, and `contrast` takes any number of them.
    `contrast_weight` times its mean is its part of the loss.
    """

    contrast_weight: float

    def embed(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> dict[str, jax.Array]: ...
    def forward(self, params: Any, batch: dict, keys: jax.Array, context: Context) -> tuple[dict, dict, dict]: ...
    def contrast(self, embedded: dict[str, jax.Array], context: Context) -> jax.Array: ...
    def join(self, own: dict[str, jax.Array], contrast: jax.Array) -> dict[str, jax.Array]: ...


_Keys = TypeVar("_Keys", bound=tuple)


def split_keys(uses: type[_Keys], keys: jax.Array) -> _Keys:
    """Keys (B,) of samples, split into one for each field of the NamedTuple `uses`, (B,) each."""
    split = jax.vmap(lambda key: jax.random.split(key, len(uses._fields)))(keys)
    return uses(*(split[:, i] for i in range(split.shape[1])))


DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}


def make_task(config: Config, gather_params: GatherParams) -> Task:
    """The task of `config.task`, computing in `config.train.precision`."""
    return config.task.make(config, DTYPES[config.train.precision], gather_params)
