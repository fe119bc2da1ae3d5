"""A run that trains a part of its parameters: of the others, nothing is kept, reduced or changed."""

from __future__ import annotations

import json

import chex
import jax
import numpy as np
import optax
import pytest
from small_run import batches, small_config
from test_stages import collectives

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError
from visionfm_jax.optim.adamw import make_optimizer
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.parallel.zero import select
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.initialise import starting_state
from visionfm_jax.train.step import Trainer, context_of, loss_of, with_keys

pytestmark = pytest.mark.usefixtures("quick_compiles")

HEAD, UPPER = ("head",), ("blocks", "head", "norm")  # UPPER: all but the patch embedding and the position table
STEPS = 4


def trainer_of(trained: tuple[str, ...], stage: int = 0, accumulate: int = 1, devices: int = 8, **more) -> Trainer:
    config = small_config(stage=stage, accumulate=accumulate, **more)
    config.model.depth, config.task.trained = 2, trained
    if trained == HEAD:
        config.optim.layer_decay = 1.0
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run(trainer: Trainer, state, data) -> tuple[list[dict], object]:
    seen = []
    for batch in data:
        state, metrics = trainer.step(state, to_global(trainer.mesh, batch))
        seen.append(jax.device_get(metrics))
    return seen, state


@pytest.fixture(scope="module", params=[HEAD, UPPER], ids=["head", "upper"])
def expected(request):
    """By gradients and moments of all parameters, of which those of frozen ones are 0 throughout."""
    trained = request.param
    trainer = trainer_of((), devices=1)
    trainer.config.optim.layer_decay = 1.0 if trained == HEAD else 0.75
    config, tx = trainer.config, make_optimizer(trainer.config.optim, trainer.config.total_steps)
    state, out = trainer.init(), []

    @jax.jit
    def gradients(state, batch):
        batch = with_keys(config, trainer.mesh, state.step, batch)
        context = context_of(config, trainer.task, trainer.zero, state, batch)
        loss = loss_of(config, trainer.task)
        return trainer.zero.loss_and_grads(loss, state.params, batch, 1, None, context)[::2]

    opt_state, before = tx.init(state.params), state.params
    for batch in batches(STEPS):
        rows, grads = gradients(state, to_global(trainer.mesh, batch))
        frozen = {name: jax.tree.map(np.zeros_like, part) for name, part in grads.items() if name not in trained}
        grads = {**grads, **frozen}
        updates, opt_state = tx.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, {**updates, **frozen})
        out.append((rows["loss"].mean(), optax.tree.norm(grads)))
        state = state.replace(step=state.step + 1, params=params)
    return trained, before, out, jax.device_get(state.params)


@pytest.mark.parametrize(("stage", "accumulate"), [(0, 1), (0, 2), (1, 1), (2, 2), (3, 1), (3, 2)])
def test_it_is_as_if_the_gradients_of_the_others_were_zero(expected, stage, accumulate):
    trained, before, out, params = expected
    trainer = trainer_of(trained, stage, accumulate)
    seen, state = run(trainer, trainer.init(), batches(STEPS))
    np.testing.assert_allclose([m["loss"] for m in seen], [loss for loss, _ in out], rtol=3e-6)
    np.testing.assert_allclose([m["grad_norm"] for m in seen], [norm for _, norm in out], rtol=2e-5)
    assert len(seen[0]["gradient_norms"]) == len(trainer.tensor_names)
    assert {name.partition(".")[0] for name in trainer.tensor_names} == set(trained)
    got = jax.device_get(state.params)
    chex.assert_trees_all_close(select(got, trained), select(params, trained), rtol=1e-3, atol=2e-4)
    others = [name for name in got if name not in trained]
    assert others
    for name in others:
        chex.assert_trees_all_equal(got[name], jax.device_get(before[name]))


def test_the_state_has_moments_and_averages_of_the_trained_parts_alone():
    trainer = trainer_of(HEAD, stage=2, accumulate=2)
    shapes, own = trainer.shapes, size(trainer.shapes.params["head"])
    assert shapes.ema.keys() == {"head"}
    assert size(shapes.opt_state) == 2 * own + 2  # the counts of Adam and of the schedule
    everything = trainer_of((), stage=2, accumulate=2)
    spared = size(shapes.params) - own
    assert size(everything.shapes) - size(shapes) == 3 * spared
    held, all_held = (t.zero.held_bytes(t.shapes.params, 2) for t in (trainer, everything))
    assert held[0] == all_held[0]
    assert held[1] == 4 * (size(shapes.params["head"]["kernel"]) // 8 + size(shapes.params["head"]["bias"]))


def test_nothing_of_the_others_is_reduced():
    gathered = 7
    for stage in (1, 2, 3):
        found = collectives(trainer_of(HEAD, stage, precision="bf16"))
        assert found["reduce-scatter", "bf16"] == 1
        assert found["all-gather", "bf16"] == gathered, "no layer is gathered again for a backward pass"


def test_it_continues_to_the_last_bit_and_is_evaluated_with_its_averages(tmp_path):
    data = batches(4)
    trainer = trainer_of(UPPER, stage=3)
    _, half = run(trainer, trainer.init(), data[:2])
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, half, {})
        assert not checkpoints.failed(wait=True)
        averaged = jax.device_get(half.averaged)
        _, whole = run(trainer, half, data[2:])
        restored = checkpoints.restore(trainer.shapes, trainer.shardings).what
        weights = checkpoints.restore_weights(trainer.shapes.params, trainer.shardings.params).what
    _, again = run(trainer, restored, data[2:])
    chex.assert_trees_all_equal(jax.device_get(again), jax.device_get(whole))
    chex.assert_trees_all_equal(jax.device_get(weights), averaged)
    assert not np.array_equal(averaged["head"]["kernel"], jax.device_get(whole.params["head"]["kernel"]))


def test_another_run_starts_from_its_averages_and_what_it_did_not_train(tmp_path):
    trainer = trainer_of(UPPER, stage=2)
    _, state = run(trainer, trainer.init(), batches(2))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, state, {})
        assert not checkpoints.failed(wait=True)
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(trainer.config)}))
    other = trainer_of(HEAD, stage=3)
    other.config.seed, other.config.checkpoint.weights = 1, str(tmp_path)
    with Checkpoints(tmp_path / "other", CheckpointConfig()) as checkpoints:
        start = starting_state(other, checkpoints)
    averaged = jax.device_get(state.averaged)
    chex.assert_trees_all_equal(jax.device_get(start.state.params), averaged)
    chex.assert_trees_all_equal(jax.device_get(start.state.ema), {"head": averaged["head"]})
    seen, after = run(other, start.state, batches(1))
    assert np.isfinite(seen[0]["loss"])
    assert not np.array_equal(jax.device_get(after.ema)["head"]["bias"], averaged["head"]["bias"])


def test_a_name_that_is_no_part_is_refused():
    with pytest.raises(ConfigError, match=r"task\.trained = \('neck',\): neck is no part .*; they have embed, "):
        trainer_of(("neck",))
