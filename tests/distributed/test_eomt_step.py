"""EoMT on any mesh: the same losses, and a few scenes learnt by heart, as class maps, objects and segments."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, STEPS = 8, 32, 240
SCENES = {
    truth: ScenesConfig(path="twemoji", truth=kind, scenes=BATCH, size=SIDE, most=2, seed=1)
    for truth, kind in (("semantic", "class_map"), ("instance", "masks"), ("panoptic", "masks"))
}


def trainer_of(truth: str, devices: int = 1, stage: int = 0, accumulate: int = 1, lr=3e-3) -> Trainer:
    config = Config(
        name="small",
        model=ViTConfig(width=32, depth=3, heads=2, mlp=64, patch_size=2, image_size=SIDE, drop_path=0.1),
        task=EomtConfig(truth=truth, num_classes=10, queries=8, most_masks=4, blocks=2),
        data=DataConfig(train=(SCENES[truth],)),
        optim=OptimConfig(lr=lr, warmup_steps=2, weight_decay=0.0),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, steps=STEPS, accumulate=accumulate, precision="fp32"),
    )
    config.validate()
    config.validate_devices(devices)
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def scenes(trainer: Trainer) -> dict[str, np.ndarray]:
    """Of which the first has no mask."""
    config = trainer.config
    fields, source = config.task.fields(config), open_source(config.data.train[0])
    fields.check(source)
    records = [dict(source[i]) for i in range(BATCH)]
    for name, value in records[0].items():
        if name == "class_map":
            value[:] = 255
        elif name != "image":
            records[0][name] = value[:0]
    rows = [{"image": r["image"], **fields({"size": (SIDE, SIDE), **r})} for r in records]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def first_steps(trainer: Trainer) -> list[dict]:
    params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
    state, seen = trainer.init().replace(params=params), []
    batch = to_global(trainer.mesh, scenes(trainer))
    for _ in range(2):
        state, metrics = trainer.step(state, batch)
        seen.append(jax.device_get(metrics))
    return seen


@pytest.mark.parametrize(("truth", "mesh"), [("semantic", (2, 1, 4)), ("instance", (4, 3, 2))])
def test_devices_and_micro_batches_change_nothing(truth, mesh):
    """Also where a micro-batch has no mask at all, and others more than others."""
    for a, b in zip(first_steps(trainer_of(truth, *mesh)), first_steps(trainer_of(truth)), strict=True):
        for name in ("loss", "grad_norm", "class_loss", "mask_loss", "dice_loss", "cut_masks", "masked_share"):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


def learnt(truth: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The scenes that were learnt, and what is predicted of them."""
    trainer = trainer_of(truth)
    rows, state, shares = scenes(trainer), trainer.init(), []
    batch = to_global(trainer.mesh, rows)
    for _ in range(STEPS):
        state, metrics = trainer.step(state, batch)
        assert metrics["finite"]
        shares.append(float(metrics["masked_share"]))
    assert shares[0] == 1
    assert shares[-1] == 0
    assert np.all(np.diff(shares) <= 0)
    return rows, jax.device_get(trainer.predict(state.params, batch))


def test_class_maps_are_learnt():
    rows, found = learnt("semantic")
    truth, guess = rows["class_map"][1:], found["class_map"][1:]
    ious = [((guess == c) & (truth == c)).sum() / ((guess == c) | (truth == c)).sum() for c in np.unique(truth)]
    assert np.mean(ious) >= 0.95
