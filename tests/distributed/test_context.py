"""What a step hands to a task: a teacher, the task's own state, and counts of the whole batch."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from small_run import batches, small_config
from test_stages import collectives

from visionfm_jax.data.augment import normalize
from visionfm_jax.parallel.mesh import FSDP, REPLICATED, make_mesh, to_global
from visionfm_jax.tasks.classification import Classification
from visionfm_jax.train import step
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


class Distillation(Classification):
    """The student's logits follow the teacher's, centred, on images of some labels alone, whose number divides.

    What centres them is a running mean, and that of a queue of the last steps' means.
    """

    def momentum(self, step):
        return 0.5 + 0.1 * step

    def init_state(self):
        return {"centre": jnp.ones(10), "queue": jnp.ones((16, 10))}

    def counts(self, batch, keys):
        return {"chosen": self._chosen(batch).sum()}

    def update(self, state, means):
        queue = jnp.concatenate([state["queue"][1:], means["centre"][None]])
        return {"centre": 0.5 * state["centre"] + 0.5 * means["centre"], "queue": queue}

    def loss(self, params, batch, keys, context):
        images = normalize(batch["image"], self.config.data.augment)
        centre = context.state["centre"] + context.state["queue"].mean(0)
        target = jax.nn.softmax(self._logits(context.teacher, images) - centre)
        logits, chosen = self._logits(params, images), self._chosen(batch)
        share = chosen / context.counts["chosen"]
        loss = len(images) * share * -(target * jax.nn.log_softmax(logits)).sum(-1)
        means = {"centre": share @ logits, "entropy": share @ -(target * jnp.log(target)).sum(-1)}
        return loss.mean(), {"loss": loss}, means

    def _chosen(self, batch):
        return batch["label"] < 4  # other numbers of them in every part of the batch


@pytest.fixture(autouse=True)
def _distillation(monkeypatch):
    monkeypatch.setattr(step, "make_task", lambda config, gather: Distillation(config, jnp.float32, gather))


def weights(shapes):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes)


@functools.cache
def trainer_of(devices: int, stage: int, accumulate: int) -> Trainer:
    config = small_config(stage=stage, accumulate=accumulate)
    config.optim.ema, config.model.depth = 0.0, 2
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def started(trainer: Trainer):
    state = trainer.init()
    at = trainer.shardings
    return state.replace(
        params=jax.device_put(weights(trainer.shapes.params), at.params),
        ema=jax.device_put(jax.tree.map(lambda p: 0.7 * p, weights(trainer.shapes.params)), at.ema),
    )


def two_steps(*case: int):
    """The states before and after each step, and the metrics of each."""
    trainer = trainer_of(*case)
    state, states, metrics = started(trainer), [], []
    for batch in batches(2):
        states.append(jax.device_get(state))
        state, seen = trainer.step(state, to_global(trainer.mesh, batch))
        metrics.append(jax.device_get(seen))
    return [*states, jax.device_get(state)], metrics


def test_micro_batches_and_devices_change_nothing():
    states, metrics = two_steps(1, 0, 1)
    assert {"entropy", "loss"} <= metrics[0].keys()
    assert "centre" not in metrics[0]
    got_states, got = two_steps(8, 3, 2)
    for a, b in zip(got, metrics, strict=True):
        np.testing.assert_allclose(a["losses"], b["losses"], rtol=3e-5)
        for name in ("loss", "entropy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=3e-6), name
        np.testing.assert_allclose(a["gradient_norms"], b["gradient_norms"], rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(got_states[-1].task_state, states[-1].task_state, rtol=1e-5)
    # Adam divides by the root of tiny second moments: after the first update, which is none, weights are equal.
    chex.assert_trees_all_close(got_states[1].ema, states[1].ema, rtol=1e-6)


def test_the_teacher_is_the_average_by_its_schedule():
    states, _ = two_steps(1, 0, 1)
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        m = 0.5 + 0.1 * i
        expected = jax.tree.map(lambda old, new, m=m: m * old + (1 - m) * new, before.ema, after.params)
        chex.assert_trees_all_close(after.ema, expected, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(states[1].task_state["centre"], states[2].task_state["centre"])


def test_a_step_that_is_not_finite_changes_neither_teacher_nor_state():
    trainer = trainer_of(8, 3, 2)
    state = started(trainer)
    state = state.replace(params=jax.tree.map(lambda p: p * jnp.nan, state.params))
    before = jax.device_get(state)
    after, metrics = trainer.step(state, to_global(trainer.mesh, batches(1)[0]))
    assert not metrics["finite"]
    chex.assert_trees_all_equal(jax.device_get(after.replace(step=before.step)), before)


def test_teacher_and_state_are_stored_as_the_parameters_are_and_have_no_gradient():
    trainer = trainer_of(8, 3, 1)
    chex.assert_trees_all_equal(trainer.shardings.ema, trainer.shardings.params)
    specs = {name: sharding.spec for name, sharding in trainer.shardings.task_state.items()}
    assert specs == {"centre": REPLICATED, "queue": PartitionSpec(FSDP, None)}
    found = collectives(trainer)
    matrices, in_blocks = 7, 4
    assert found["reduce-scatter", "f32"] == matrices
    # Of the student, once more in the backward pass what is in a layer; of the teacher, once.
    assert found["all-gather", "f32"] == (matrices + in_blocks) + matrices
