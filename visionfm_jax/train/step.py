"""One training step: a pure function of the state and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from visionfm_jax.config import Config, rules
from visionfm_jax.optim import loss_scale
from visionfm_jax.optim.adamw import make_optimizer, schedule, update_count
from visionfm_jax.parallel.accumulate import GradCache, LossFn
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import BATCH, REPLICATED
from visionfm_jax.parallel.zero import Zero, gather_params, select
from visionfm_jax.tasks.task import DTYPES, Task, make_task
from visionfm_jax.train.fused_attention import with_attention
from visionfm_jax.train.state import TrainState, init_state, state_shardings

Metrics = dict[str, Any]
AUGMENT = 1  # the use of the seed beside initialisation


class Trainer:
    """A configuration made into compiled-on-first-use functions on a mesh; what `main` and `bench` run.

    Attributes:
      task, tx, zero: objective, optimiser, placement.
      shapes: the state's `jax.ShapeDtypeStruct`s.
      shardings: where each part of the state is stored.
      init: () -> state, laid out.
      step: (state, batch) -> (state, metrics); consumes the state it is given.
      predict: (params, evaluation batch, and which of the task's predictions, if it has several) -> these, and all of
        the batch but images and texts, for all rows on every host.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.task = make_task(config, gather_params)
        self.tx = make_optimizer(config.optim, config.total_steps)
        self.shapes = jax.eval_shape(lambda: init_state(self.task, self.tx, config))
        dtype, trained = DTYPES[config.train.precision], config.task.trained
        self.zero = Zero(mesh, config.parallel.stage, self.shapes.params, dtype, trained)
        self.shardings = state_shardings(self.shapes, self.tx, self.zero)
        self.init = jax.jit(lambda: init_state(self.task, self.tx, config), out_shardings=self.shardings)

        fields = ("image", "text")  # what embeddings are of: large, and known to the host that has loaded them

        def predict(what: tuple, params: Any, rows: dict) -> dict:
            return {k: v for k, v in rows.items() if k not in fields} | self.task.predict(params, rows, *what)

        self.predict = self.over_rows(predict)

    @functools.cached_property
    def step_config(self) -> Config:
        """Of the step: with the attention that these devices run where the configuration has "auto"."""
        return with_attention(self.config, self.mesh, lambda config: Trainer(config, self.mesh).traced())

    @property
    def attention(self) -> dict[str, str]:
        """By network, the kind that the step computes."""
        return {name: network.attention for name, network in self.step_config.model.networks().items()}

    @functools.cached_property
    def step(self) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
        """Made at its first use: who only predicts needs none of what a step asks of devices."""
        # "auto" is XLA's where nobody chose
        same = self.step_config.model == self.config.model or "cudnn" not in self.attention.values()
        task = self.task if same else make_task(self.step_config, gather_params)
        return jax.jit(
            make_step(self.step_config, task, self.tx, self.zero),
            in_shardings=(self.shardings, NamedSharding(self.mesh, BATCH)),
            out_shardings=(self.shardings, NamedSharding(self.mesh, REPLICATED)),
            donate_argnums=0,
            compiler_options=self._compiler_options,
        )

    @property
    def _compiler_options(self) -> dict[str, int]:
        """Those of XLA that follow from the configuration.

        Where layers are no loop, XLA would join the scatters of all gradients into one at the end of the step, beside
        which nothing computes. Joined, they are to be no larger than that of the largest layer, which runs beside the
        backward pass of the next. Not with several micro-batches: in their loop XLA hides one large scatter better.
        """
        layer, config = self.zero.layer_bytes(self.shapes.params), self.config
        unrolled = not all(network.scan_layers for network in config.model.networks().values())
        if not layer or not unrolled or config.train.accumulate > 1:
            return {}
        return {"xla_gpu_reduce_scatter_combine_threshold_bytes": layer}

    def traced(self) -> Any:
        """The jaxpr of a step."""
        spec = self.task.batch_spec(self.config.train.batch_size)
        batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype) for k, s in spec.items()}
        return self.step.trace(self.shapes, batch).jaxpr

    def over_rows(self, function: Callable[[tuple, Any, dict], dict]) -> Callable[..., dict]:
        """`function` of (what, params, rows), compiled; called as (params, batch, *what), it gives all rows everywhere.

        `what` is hashable, and a program is compiled for each.
        """
        return jax.jit(
            lambda params, batch, *what: self.zero.apply(functools.partial(function, what), params, batch),
            in_shardings=(self.shardings.params, NamedSharding(self.mesh, BATCH)),
            out_shardings=NamedSharding(self.mesh, REPLICATED),
            static_argnums=2,
        )

    @property
    def tensor_names(self) -> list[str]:
        """Of the parameters that have gradients, in tree order: "blocks.attn.qkv.kernel"."""
        leaves = jax.tree_util.tree_leaves_with_path(select(self.shapes.params, self.zero.trained))
        return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def check_card(config: Config, mesh: Mesh) -> None:
    """Whether the devices of `mesh` run the step, before all that a run prepares for it.

    Raises:
      ConfigError: they do not.
    """
    device = mesh.devices.flat[0]  # CPUs have no compute capability
    rules.check(rules.card_problems(config, device.device_kind, getattr(device, "compute_capability", "")))


def make_step(
    config: Config, task: Task, tx: optax.GradientTransformation, zero: Zero
) -> Callable[[TrainState, dict], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics), to be jitted.

    A step whose loss or gradient is not finite changes nothing but the step number and, in fp16, the loss scale, so
    that no state is ever spoiled; whether the run goes on is the loop's decision. Metrics are scalars, except
    `gradient_norms`, one per trained tensor in tree order, and `losses` (B,): they name the culprits when something
    is not finite.
    """
    lr = schedule(config.optim, config.total_steps)
    loss_fn, momentum = loss_of(config, task), task.momentum or (lambda step: config.optim.ema)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, Metrics]:
        batch = with_keys(config, zero.mesh, state.step, batch)
        scale = state.loss_scale.scale if state.loss_scale else None
        parts = state.params, batch, config.train.accumulate, scale, context_of(config, task, zero, state, batch)
        per_sample, means, grads = zero.loss_and_grads(loss_fn, *parts)

        metrics = {k: v.max() if k.endswith("_max") else v.mean() for k, v in per_sample.items()}
        metrics |= {k: v for k, v in means.items() if not v.ndim}
        norms = jnp.stack([jnp.sqrt(jnp.sum(g * g)) for g in jax.tree.leaves(grads)])
        metrics |= {"grad_norm": jnp.linalg.norm(norms), "lr": lr(update_count(state.opt_state))}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        trained = select(state.params, zero.trained)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        params = task.constrain({**state.params, **optax.apply_updates(trained, updates)})
        if (ema := state.ema) is not None:
            ema = optax.incremental_update(select(params, zero.trained), ema, 1 - momentum(state.step))

        task_state = task.update(state.task_state, means)
        new = state.replace(params=params, opt_state=opt_state, ema=ema, task_state=task_state)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state).replace(step=state.step + 1)
        metrics |= update_ratios(select(new.params, zero.trained), trained)
        if state.loss_scale:
            new = new.replace(loss_scale=loss_scale.update(state.loss_scale, finite))
            metrics["loss_scale"] = scale  # of this step
        return new, {**metrics, "finite": finite, "gradient_norms": norms, "losses": per_sample["loss"]}

    return step


def update_ratios(new: dict, old: dict) -> Metrics:
    """The norm of each group's change over that of its parameters, by the tree's first names.

    Of the parameters as they are after the step, not of the optimiser's update: with a second use of that XLA writes
    it, in fp32, and reads it again, where all else of a parameter's update is one pass. The barrier keeps the second
    norm out of that pass, for which XLA would copy the parameters. So a head that was zero has the ratio 1 once.
    """
    out, after = {}, jax.lax.optimization_barrier(new)
    for group, params in new.items():
        size = optax.tree.norm(after[group])
        ratio = optax.tree.norm(optax.tree.sub(params, old[group])) / jnp.where(size > 0, size, 1)
        out[f"update_ratio/{group}"] = jnp.where(size > 0, ratio, 0)  # still zero
    return out


def context_of(config: Config, task: Task, zero: Zero, state: TrainState, batch: dict) -> Context:
    """What the loss of a batch that carries its keys is handed, with the teacher as it is stored."""
    micro_batches = zero.mesh.size * config.train.accumulate
    counts = zero.total(lambda rows: task.counts(*_without_keys(rows)), batch)
    counts = {name: count / micro_batches for name, count in counts.items()}
    return Context(state.step, state.averaged if task.momentum else None, state.task_state, counts)


def _without_keys(rows: dict) -> tuple[dict, jax.Array]:
    return {k: v for k, v in rows.items() if k != "key"}, rows["key"]


def loss_of(config: Config, task: Task) -> LossFn | GradCache:
    """The task's loss of rows that carry their keys (`with_keys`), as `Zero.loss_and_grads` takes it."""
    if config.train.accumulate > 1 and config.task.loss_scope == "batch":
        return GradCache(
            embed=lambda params, rows, context: task.embed(params, *_without_keys(rows), context),
            forward=lambda params, rows, context: task.forward(params, *_without_keys(rows), context),
            contrast=task.contrast,
            weight=task.contrast_weight,
            join=task.join,
        )
    return lambda params, rows, context: task.loss(params, *_without_keys(rows), context)


def with_keys(config: Config, mesh: Mesh, step: jax.Array, batch: dict) -> dict:
    """The batch of a step, and in it the `key` (B,) of each sample."""
    seed = jax.random.fold_in(jax.random.key(config.seed), AUGMENT)
    keys = sample_keys(seed, step, config.train.batch_size)
    return {**batch, "key": jax.lax.with_sharding_constraint(keys, NamedSharding(mesh, BATCH))}


def sample_keys(seed: jax.Array, step: jax.Array, batch_size: int) -> jax.Array:
    """Keys (B,) of the samples [step * B, (step + 1) * B), each from its global index alone.

    A long run has more than 2^32 samples, so that the index is two 32-bit words, multiplied by halves: B <= 2^16.
    """
    step, size = step.astype(jnp.uint32), jnp.uint32(batch_size)
    lower, upper = (step & 0xFFFF) * size, (step >> 16) * size
    low = lower + (upper << 16)
    high = (upper >> 16) + (low < lower)
    index = low + jnp.arange(batch_size, dtype=jnp.uint32)
    high = high + (index < low)
    return jax.vmap(lambda h, i: jax.random.fold_in(jax.random.fold_in(seed, h), i))(high, index)
