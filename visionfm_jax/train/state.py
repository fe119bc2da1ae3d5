"""Everything a run must remember: the contents of a checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from visionfm_jax.config import Config
from visionfm_jax.optim import loss_scale
from visionfm_jax.parallel.mesh import REPLICATED
from visionfm_jax.parallel.zero import Zero, select
from visionfm_jax.tasks.task import Task


@struct.dataclass
class TrainState:
    """A run between two steps.

    `step` is also the position in the data: step s consumes samples [s * batch_size, (s + 1) * batch_size).
    """

    step: jax.Array  # int32
    params: Any  # fp32
    opt_state: Any  # fp32, of the parts that are trained
    ema: Any  # fp32 EMA weights of these, which are the teacher of a task that has one; or None
    loss_scale: Any = None  # optim.loss_scale.LossScale in fp16
    task_state: Any = None  # the task's own arrays between steps (`tasks.task.Task`), or None

    @property
    def averaged(self) -> Any:
        """The EMA weights, with the parameters where there are none: what is evaluated, and the teacher."""
        return self.params if self.ema is None else {**self.params, **self.ema}


def init_state(task: Task, tx: optax.GradientTransformation, config: Config) -> TrainState:
    """The state of step 0; under `jax.eval_shape` it costs nothing at any size."""
    params = task.init(jax.random.key(config.seed))
    trained = select(params, config.task.trained)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=tx.init(trained),
        ema=trained if config.optim.ema or task.momentum else None,
        loss_scale=loss_scale.init() if config.train.precision == "fp16" else None,
        task_state=task.init_state(),
    )


def state_shardings(state: TrainState, tx: optax.GradientTransformation, zero: Zero) -> TrainState:
    """Where each part of a state (or its shapes) is stored: anything shaped like the parameters, as they are; the
    task's own arrays by the same rule."""
    specs = zero.state_specs
    trained = select(specs, zero.trained)
    opt_specs = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state.opt_state, trained, transform_non_params=lambda _: REPLICATED
    )
    ema = None if state.ema is None else trained
    scale = jax.tree.map(lambda _: REPLICATED, state.loss_scale)
    return zero.shardings(TrainState(REPLICATED, specs, opt_specs, ema, scale, zero.specs_of(state.task_state)))
