"""EoMT on any mesh: the same losses, and a few scenes learnt by heart, as class maps, objects and segments."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.evals.kinds import InstancesConfig, MeanIouConfig, PanopticConfig
from visionfm_jax.evals.run import measure, open_evals
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.telemetry.pictures import draw
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, STEPS = 8, 32, 160
SCENES = {
    truth: ScenesConfig(path="twemoji", truth=kind, scenes=BATCH, size=SIDE, most=2, seed=1)
    for truth, kind in (("semantic", "class_map"), ("instance", "masks"), ("panoptic", "masks"))
}


def trainer_of(truth: str, devices: int = 1, stage: int = 0, accumulate: int = 1, evals: tuple = ()) -> Trainer:
    config = Config(
        name="small",
        model=ViTConfig(width=32, depth=3, heads=2, mlp=64, patch_size=2, image_size=SIDE, drop_path=0.1),
        task=EomtConfig(truth=truth, num_classes=10, queries=8, most_masks=4, blocks=2),
        data=DataConfig(train=(SCENES[truth],)),
        optim=OptimConfig(lr=3e-3, warmup_steps=2, weight_decay=0.0),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, steps=STEPS, accumulate=accumulate, precision="fp32"),
        evals=evals,
    )
    config.validate()
    config.validate_devices(devices)
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def scenes(trainer: Trainer, without: int | None = None) -> dict[str, np.ndarray]:
    """The batch of all; one of them `without` a mask."""
    config = trainer.config
    fields, source = config.task.fields(config), open_source(config.data.train[0])
    fields.check(source)
    records = [dict(source[i]) for i in range(BATCH)]
    if without is not None:
        none = {"class_map": lambda a: np.full_like(a, 255), "image": lambda a: a}
        records[without] = {k: none.get(k, lambda a: a[:0])(a) for k, a in records[without].items()}
    rows = [{"image": r["image"], **fields({"size": (SIDE, SIDE), **r})} for r in records]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def first_steps(trainer: Trainer) -> list[dict]:
    params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
    state, seen = trainer.init().replace(params=params), []
    batch = to_global(trainer.mesh, scenes(trainer, without=0))
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


@pytest.mark.parametrize(
    ("truth", "eval_config", "metrics"),
    [
        ("semantic", MeanIouConfig, ("miou", "pixel_accuracy")),
        ("instance", InstancesConfig, ("ap", "ap50")),
        ("panoptic", PanopticConfig, ("pq", "rq")),
    ],
)
def test_scenes_are_learnt(truth, eval_config, metrics, tmp_path):
    """As the evals of a run measure it."""
    trainer = trainer_of(truth, evals=(eval_config(name="own", source=SCENES[truth]),))
    state, shares = trainer.init(), []
    batch = to_global(trainer.mesh, scenes(trainer))
    for _ in range(STEPS):
        state, measured = trainer.step(state, batch)
        assert measured["finite"]
        shares.append(float(measured["masked_share"]))
    assert (shares[0], shares[-1]) == (1, 0)
    assert np.all(np.diff(shares) <= 0)
    evals = open_evals(trainer.config, 0, 1)
    found = measure(trainer, evals, state.params, {}, lambda n: None)
    assert found["own/images"] == BATCH
    for name in metrics:
        assert found[f"own/{name}"] >= 0.95, found
    drawn = draw(evals["own"].pictured, tmp_path, "own", truth)
    assert len(drawn) == {"semantic": 2, "instance": 3, "panoptic": 2}[truth]
