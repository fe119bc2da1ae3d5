"""Detection on any mesh: the same losses, divided by the objects of the whole batch; and it learns."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals.kinds import BoxesConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.detection import DetectionConfig
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, STEPS = 8, 32, 700


def config_of(stage: int = 0, accumulate: int = 1, **task) -> Config:
    settings = {"queries": 12, "many_queries": 24, "copies": 4, "most_objects": 5, "detections": 20} | task
    return Config(
        name="small",
        model=ViTConfig(size="P", depth=2, image_size=SIDE, patch_size=8),
        task=DetectionConfig(
            num_classes=2, width=48, heads=4, mlp=96, encoder_depth=1, decoder_depth=2, **settings
        ),
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(lr=1e-3, warmup_steps=10, weight_decay=0.0),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, steps=STEPS, accumulate=accumulate, precision="fp32"),
    )  # fmt: skip


@functools.cache
def trainer_of(devices: int, stage: int, accumulate: int) -> Trainer:
    config = config_of(stage, accumulate)
    config.validate()
    config.validate_devices(devices)
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def batch_of(objects: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Red and green rectangles on grey, which do not overlap; images of different sizes on the canvas."""
    rng = np.random.default_rng(0)
    batch = {
        "image": np.full((BATCH, SIDE, SIDE, 3), 128, np.uint8),
        "boxes": np.zeros((BATCH, 5, 4), np.float32),
        "box_labels": np.zeros((BATCH, 5), np.int32),
        "objects": np.array(objects, np.int32),
        "size": np.array([(SIDE, SIDE if i % 3 else 24) for i in range(BATCH)], np.int32),
    }
    for i, count in enumerate(objects):
        for j, place in enumerate(rng.permutation(4)[: min(count, 5)]):
            left, top = 12 * (place % 2) + rng.integers(0, 4), 16 * (place // 2) + rng.integers(0, 5)
            width, height, label = *rng.integers(6, 9, 2), rng.integers(2)
            batch["boxes"][i, j] = left, top, left + width, top + height
            batch["box_labels"][i, j] = label
            batch["image"][i, top : top + height, left : left + width] = (220, 20, 20) if label else (20, 200, 20)
    return batch


@functools.cache
def one_step(devices: int, stage: int, accumulate: int) -> dict[str, np.ndarray]:
    """Of random weights, and with as many objects in each part of the batch as in no other."""
    trainer = trainer_of(devices, stage, accumulate)
    params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
    batch = batch_of((4, 0, 1, 2, 3, 7, 1, 0))
    # Places of one colour have equal scores, of which rounding would choose the queries.
    batch["image"] = (
        np.random.default_rng(1).integers(0, 256, batch["image"].shape, np.uint8) // 2 + batch["image"] // 2
    )
    batch = to_global(trainer.mesh, batch)
    return jax.device_get(trainer.step(trainer.init().replace(params=params), batch)[1])


@pytest.mark.parametrize("case", [(4, 3, 2), (2, 1, 1)])
def test_micro_batches_and_devices_change_nothing(case):
    expected, found = one_step(1, 0, 1), one_step(*case)
    assert expected["cut_objects"] == pytest.approx(2 / 8)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=3e-5)
    for name in ("loss", "class_loss", "box_loss", "giou_loss", "proposal_loss", "cut_objects"):
        assert found[name] == pytest.approx(expected[name], rel=3e-5), name
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_batch_without_objects():
    trainer = trainer_of(1, 0, 1)
    _, metrics = trainer.step(trainer.init(), to_global(trainer.mesh, batch_of((0,) * BATCH)))
    assert metrics["finite"]
    assert metrics["box_loss"] == metrics["giou_loss"] == 0
    assert metrics["class_loss"] > 0


def test_rectangles_are_found():
    """Overfit: as many of the best detections as there are objects are these, with class and box."""
    trainer, batch = trainer_of(1, 0, 1), batch_of((4, 0, 1, 2, 3, 4, 1, 2))
    state, rows = trainer.init(), to_global(trainer.mesh, batch)
    for _ in range(STEPS):
        state, metrics = trainer.step(state, rows)
    assert metrics["box_loss"] < 0.05  # of the last layer; the loss has all layers and copies
    out = jax.device_get(trainer.predict(state.params, rows, "boxes"))
    assert out["boxes"].shape == (BATCH, 20, 4)
    assert (np.diff(out["scores"]) <= 0).all()
    found = 0
    for i, count in enumerate(batch["objects"]):
        for box, label in zip(out["boxes"][i, :count], out["box_labels"][i, :count], strict=True):
            here = batch["box_labels"][i, :count] == label
            found += (overlaps(box, batch["boxes"][i, :count]) * here).max(initial=0) > 0.5
    assert found >= 0.95 * batch["objects"].sum()
    features = trainer.predict(state.params, rows, "features")["features"]
    assert features.shape == (BATCH, trainer.config.model.features)


def overlaps(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union."""
    sides = np.clip(np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2]), 0, None)
    both, (own, areas) = sides.prod(1), ((b[..., 2:] - b[..., :2]).prod(-1) for b in (box, others))
    return both / (own + areas - both)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"most_objects": 13}, "config.task.most_objects = 13: is more than task.queries = 12"),
        ({"copies": 5}, "config.task.many_queries = 24: must be at least task.copies x task.most_objects = 25"),
        ({"queries": 62}, "config.task.queries = 62: with task.many_queries = 24, is more than the 85 proposals"),
        ({"queries": 0}, "config.task.queries = 0: must lie in"),
        (
            {"stride": 5},
            "config.task.stride = 5: must be a power of two: maps are upsampled by factors of two; set 4 or 8",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(task, says):
    with pytest.raises(ConfigError) as caught:
        config_of(**task).validate()
    assert says in str(caught.value)


def test_evals_on_images_of_too_few_proposals_are_refused():
    config = config_of()
    config.evals = (BoxesConfig(source=TfdsConfig(path="-"), image_size=16),)
    config.validate()
    config.evals = (BoxesConfig(source=TfdsConfig(path="-"), image_size=8),)
    with pytest.raises(ConfigError, match=r"config.evals\[0\].image_size = 8: has 7 proposals, and task.queries = 12"):
        config.validate()
