"""Self-distillation on any mesh: the same losses, a teacher that follows, states that continue to the last bit."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.transforms import MultiCrop, Views
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.self_distillation import SelfDistillationConfig
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, LOCAL, STEPS = 16, 16, 8, 40


def config_of(stage: int = 0, accumulate: int = 1, **task) -> Config:
    views = Views(name="global", size=SIDE), Views(name="local", size=LOCAL, count=2)
    settings = {"koleo": 0.0, "targets": "centring", "freeze_steps": 1} | task
    return Config(
        name="small",
        model=ViTConfig(size="P", depth=2, image_size=SIDE, patch_size=4, pool="cls", registers=1, drop_path=0.2),
        task=SelfDistillationConfig(
            prototypes=32, head_hidden=32, head_bottleneck=16, temperature_warmup_steps=10, **settings
        ),
        data=DataConfig(train=(TfdsConfig(path="-"),), transforms=(MultiCrop(views=views),)),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, steps=STEPS, accumulate=accumulate, precision="fp32"),
    )


@functools.cache
def trainer_of(devices: int, *settings) -> Trainer:
    config = config_of(*settings)
    config.validate()
    config.validate_devices(devices)
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def batch_of(trainer: Trainer, step: int):
    """Views that are alike: each image is of one colour, with noise."""
    rng = np.random.default_rng(step)
    colours = rng.integers(0, 256, (BATCH, 1, 1, 1, 3))
    shapes = {"global": (2, SIDE, SIDE, 3), "local": (2, LOCAL, LOCAL, 3)}
    noisy = {k: (colours + rng.normal(scale=20, size=(BATCH, *s))).clip(0, 255) for k, s in shapes.items()}
    return to_global(trainer.mesh, {k: v.astype(np.uint8) for k, v in noisy.items()})


def steps(trainer: Trainer, state, which: range):
    seen = []
    for step in which:
        state, metrics = trainer.step(state, batch_of(trainer, step))
        seen.append(jax.device_get(metrics))
    return state, seen


def test_micro_batches_and_devices_change_nothing():
    """With centring, whose mean over hidden patches divides by their number in the whole batch."""
    found = {}
    for case in ((1, 0, 1), (4, 3, 2)):
        trainer = trainer_of(*case)
        state = trainer.init()
        params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
        state = state.replace(params=params, ema=jax.tree.map(jnp.copy, params))
        state, seen = steps(trainer, state, range(2))
        found[case] = seen, jax.device_get((state.task_state, state.ema))
    (expected, (centres, _)), (got, (got_centres, _)) = found.values()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-4)
        for name in ("loss", "image_loss", "patch_loss", "target_entropy"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name
    chex.assert_trees_all_close(got_centres, centres, rtol=1e-4, atol=1e-6)
    assert all(np.abs(centre).max() > 0 for centre in centres.values())


def test_the_loss_falls_and_the_run_continues_to_the_last_bit(tmp_path):
    trainer = trainer_of(1, 0, 1)
    state, seen = steps(trainer, trainer.init(), range(STEPS))
    assert np.mean([s["loss"] for s in seen[-5:]]) < 0.95 * np.mean([s["loss"] for s in seen[:5]])
    assert 0 < seen[-1]["target_entropy"] < np.log(32)

    state, _ = steps(trainer, trainer.init(), range(2))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(2, state, {})
        assert not checkpoints.failed(wait=True)
        again = checkpoints.restore(trainer.shapes, trainer.shardings).what
    state, seen = steps(trainer, state, range(2, 4))
    again, seen_again = steps(trainer, again, range(2, 4))
    chex.assert_trees_all_equal(jax.device_get((state, seen)), jax.device_get((again, seen_again)))
    assert not np.array_equal(state.ema["mask_token"], state.params["mask_token"])


def test_prototypes_of_views_are_frozen_at_first():
    trainer = trainer_of(1, 0, 1)
    _, (first, second) = steps(trainer, trainer.init(), range(2))
    at = trainer.tensor_names.index("image_head.prototypes")
    assert first["gradient_norms"][at] == 0 < second["gradient_norms"][at]
    assert first["gradient_norms"][trainer.tensor_names.index("patch_head.prototypes")] > 0


def test_without_a_warm_up_the_teachers_temperature_is_the_last():
    for steps, expected in ((0, [0.07, 0.07]), (100, [0.04, 0.055])):
        config = config_of()
        config.task.temperature_warmup_steps = steps
        task = Trainer(config, make_mesh(1, jax.devices()[:1])).task
        np.testing.assert_allclose([task._temperature(step) for step in (0, 50)], expected, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    config = config_of()
    config.optim.ema, config.task.mask_share, config.data.transforms = 0.9, (0.5, 0.1), ()
    problems = {name for name, *_ in config.task.problems(config)}
    assert problems == {"optim.ema", "task.mask_share", "data.transforms"}
    config.model = SwinV2Config(size="P", image_size=SIDE, patch_size=4, window=4)  # a feature stands for 32 pixels
    assert "model.image_size" in {name for name, *_ in config.task.problems(config)}
    assert config_of(koleo=0.1).task.rows[0] == 2
