"""fp16 on eight virtual devices: overflows move the loss scale and nothing else, and training is that of fp32."""

from __future__ import annotations

import chex
import jax
import numpy as np
import optax
import pytest
from small_run import BATCH, batches, small_config, trainer_on

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.optim import loss_scale
from visionfm_jax.optim.adamw import update_count
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

INTERVAL = 4
OVERFLOWS = {1, 2, 7, 8, 14}
# (scale, clean steps, hysteresis left) after each step, by hand from DeepSpeed's rule with a window of 4.
EXPECTED = [
    (2**16, 1, 2), (2**16, 0, 1), (2**15, 0, 1), (2**15, 1, 1), (2**15, 2, 1), (2**15, 3, 1), (2**16, 0, 2),
    (2**16, 0, 1), (2**15, 0, 1), (2**15, 1, 1), (2**15, 2, 1), (2**15, 3, 1), (2**16, 0, 2), (2**16, 1, 2),
    (2**16, 0, 1), (2**16, 1, 1),
]  # fmt: skip


def with_factor(trainer: Trainer) -> Trainer:
    """The trainer of a loss that is multiplied by the batch's `factor` (B,)."""
    plain = trainer.task.loss

    def loss(params: dict, rows: dict, keys: jax.Array, context: Context) -> tuple[jax.Array, dict, dict]:
        rows = dict(rows)
        factor = rows.pop("factor").mean()
        mean, *rest = plain(params, rows, keys, context)
        return mean * factor, *rest

    trainer.task.loss = loss
    return trainer


def batch_of(trainer: Trainer, step: int) -> dict:
    """Batch `step`; with a factor that no loss scale compensates where an overflow is wanted."""
    factor = np.full(BATCH, 1e12 if step in OVERFLOWS else 1, np.float32)
    return to_global(trainer.mesh, {**batches(step % 4 + 1)[-1], "factor": factor})


def run(trainer: Trainer, state: TrainState, steps: range) -> tuple[list[TrainState], list[dict]]:
    """The state before each step and after the last, on the host, and the metrics."""
    states, seen = [jax.device_get(state)], []
    for step in steps:
        state, metrics = trainer.step(state, batch_of(trainer, step))
        states.append(jax.device_get(state))
        seen.append(jax.device_get(metrics))
    return states, seen


@pytest.fixture(scope="module", autouse=True)
def _short_interval():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_scale, "INTERVAL", INTERVAL)
        yield


@pytest.fixture(scope="module", params=[0, 3])
def injected(request) -> tuple[int, Trainer, list[TrainState], list[dict]]:
    trainer = with_factor(trainer_on(8, stage=request.param, precision="fp16"))
    return request.param, trainer, *run(trainer, trainer.init(), range(len(EXPECTED)))


def test_an_overflow_moves_the_scale_and_nothing_else(injected):
    _, _, states, seen = injected
    updates = 0
    for step, (before, after, metrics) in enumerate(zip(states[:-1], states[1:], seen, strict=True)):
        scale = after.loss_scale
        assert (float(scale.scale), int(scale.clean), int(scale.hysteresis)) == EXPECTED[step]
        assert metrics["loss_scale"] == before.loss_scale.scale
        assert metrics["finite"] == (step not in OVERFLOWS)
        assert int(after.step) == step + 1
        if step in OVERFLOWS:
            kept = after.replace(step=before.step, loss_scale=before.loss_scale)
            chex.assert_trees_all_equal(kept, before)
            assert np.isfinite(metrics["loss"])
            assert not np.isfinite(metrics["gradient_norms"]).all()
        else:
            updates += 1
            moments = [optax.tree_utils.tree_get(s.opt_state, "mu")["head"]["kernel"] for s in (before, after)]
            assert not np.array_equal(*moments)
        assert int(update_count(after.opt_state)) == updates
    rates = [float(m["lr"]) for m in seen]
    for step in OVERFLOWS:
        assert rates[step + 1] == rates[step], "the schedule must wait"


_LOSSES: dict[int, list[float]] = {}


def test_stages_agree(injected):
    stage, _, _, seen = injected
    _LOSSES[stage] = [float(m["loss"]) for m in seen]
    if len(_LOSSES) == 2:
        np.testing.assert_allclose(_LOSSES[0], _LOSSES[3], rtol=2e-3)


def test_a_restored_run_is_the_same_to_the_last_bit(injected, tmp_path):
    stage, trainer, states, _ = injected
    half = 8  # between two overflows, with the hysteresis spent
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(half, jax.device_put(states[half], trainer.shardings), {})
        assert not checkpoints.failed(wait=True)
        state = checkpoints.restore(trainer.shapes, trainer.shardings).what
        chex.assert_trees_all_equal(jax.device_get(state), states[half])
        continued, _ = run(trainer, state, range(half, len(EXPECTED)))
        chex.assert_trees_all_equal(continued[-1], states[-1])

        # The precision may change: then the scale is left behind, or starts anew.
        other = trainer_on(8, stage=3 - stage, precision="bf16")
        state = checkpoints.restore(other.shapes, other.shardings).what
        assert state.loss_scale is None
        chex.assert_trees_all_equal(jax.device_get(state), states[half].replace(loss_scale=None))
        checkpoints.save(half + 1, state.replace(step=state.step + 1), {})
        assert not checkpoints.failed(wait=True)
        state = checkpoints.restore(trainer.shapes, trainer.shardings).what
        assert jax.tree.map(float, state.loss_scale) == loss_scale.LossScale(loss_scale.START, 0, loss_scale.HYSTERESIS)
        chex.assert_trees_all_equal(jax.device_get(state.params), states[half].params)
        trainer.step(state, batch_of(trainer, 0))


def test_sums_over_devices_have_no_less_room_than_one_device():
    """Eight devices bear the highest scale that one bears; with micro-batches, which are summed in fp32, one more."""

    def highest(trainer: Trainer) -> tuple[int, float]:
        for power in range(20, 15, -1):
            state = trainer.init()
            state = state.replace(loss_scale=state.loss_scale.replace(scale=jax.numpy.float32(2.0**power)))
            _, metrics = trainer.step(state, batch_of(trainer, 0))
            if metrics["finite"]:
                return power, float(metrics["grad_norm"])
        raise AssertionError("always an overflow")

    power, norm = highest(with_factor(trainer_on(1, stage=0, precision="fp16")))
    got, got_norm = highest(with_factor(trainer_on(8, stage=2, precision="fp16", accumulate=2)))
    assert 16 <= power <= got <= power + 1 < 20
    assert got_norm == pytest.approx(norm, rel=5e-3)


def test_precisions_agree(monkeypatch):
    """Over 30 steps the losses of bf16 stay within .3 % of fp32's, and those of fp16 within .1 %."""
    monkeypatch.setattr(loss_scale, "INTERVAL", 1000)
    curves = {}
    for precision in ("fp32", "bf16", "fp16"):
        config = small_config(stage=3, precision=precision)
        config.train.steps = 30
        trainer = Trainer(config, make_mesh(1, jax.devices()[:8]))
        state, losses = trainer.init(), []
        for step in range(30):
            batch = to_global(trainer.mesh, batches(step % 4 + 1)[-1])
            state, metrics = trainer.step(state, batch)
            assert metrics["finite"]
            losses.append(float(metrics["loss"]))
        curves[precision] = np.array(losses)
    assert curves["fp32"][-4:].mean() < curves["fp32"][:4].mean() - 0.1
    np.testing.assert_allclose(curves["bf16"], curves["fp32"], rtol=3e-3)
    np.testing.assert_allclose(curves["fp16"], curves["fp32"], rtol=1e-3)
