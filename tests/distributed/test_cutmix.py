"""CutMix: boxes of two images exchanged, and both labels by their shares, on any mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.data.augment import normalize, swap_pairs
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.errors import ConfigError
from visionfm_jax.losses.classification import softmax_cross_entropy
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.classification import ClassificationConfig, Draws, pair_boxes
from visionfm_jax.tasks.task import split_keys
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, CLASSES = 16, 16, 5


def config_of(accumulate: int = 1, stage: int = 0, batch: int = BATCH, **task) -> Config:
    return Config(
        name="cut",
        model=ViTConfig(width=16, depth=1, heads=2, mlp=32, patch_size=4, image_size=SIDE, drop_path=0.0),
        task=ClassificationConfig(num_classes=CLASSES, label_smoothing=0.1, **task),
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=batch, steps=10, accumulate=accumulate, precision="fp32"),
    )


def first_losses(devices: int = 1, **change) -> np.ndarray:
    """(2, B), of two steps."""
    config = config_of(**change)
    config.validate()
    config.validate_devices(devices)
    trainer = Trainer(config, make_mesh(1, jax.devices()[:devices]))
    params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
    state, rng, losses = trainer.init().replace(params=params), np.random.default_rng(0), []
    for _ in range(2):
        batch = {
            "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
            "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        }
        state, metrics = trainer.step(state, to_global(trainer.mesh, batch))
        losses.append(jax.device_get(metrics["losses"]))
    return np.stack(losses)


def test_devices_and_micro_batches_change_nothing():
    expected = first_losses(cutmix=1.0)
    assert not np.allclose(expected, first_losses(), rtol=1e-3)
    for devices, stage, accumulate in ((2, 3, 4), (8, 2, 1)):
        got = first_losses(devices, stage=stage, accumulate=accumulate, cutmix=1.0)
        np.testing.assert_allclose(got, expected, rtol=2e-5, err_msg=f"{devices} devices, stage {stage}")


def test_the_loss_is_of_both_labels_by_the_share_of_pixels():
    """Against the definition, pair by pair."""
    config = config_of(cutmix=0.7)
    task = config.task.make(config, jnp.float32, lambda x: x)
    params = weights(jax.eval_shape(task.init, jax.random.key(0)))
    rng, keys = np.random.default_rng(1), jax.random.split(jax.random.key(3), 4)
    batch = {"image": rng.integers(0, 256, (4, SIDE, SIDE, 3), np.uint8), "label": jnp.array([0, 1, 2, 2])}
    mean, out, _ = task.loss(params, batch, keys, None)

    cut = np.asarray(pair_boxes(split_keys(Draws, keys).cutmix, (SIDE, SIDE), 0.7))
    images = batch["image"].copy()
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        images[row][cut[row]] = batch["image"][other][cut[row]]
    logits = task.model.apply({"params": params}, normalize(images, config.data.augment))
    expected = []
    for row, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        both = [float(softmax_cross_entropy(logits[row][None], batch["label"][r][None], 0.1)[0]) for r in (row, other)]
        share = 1 - cut[row].mean()
        expected.append(share * both[0] + (1 - share) * both[1])
    assert 0 < cut[0].mean() < 1
    np.testing.assert_allclose(out["loss"], expected, rtol=1e-5)
    assert float(mean) == pytest.approx(np.mean(expected), rel=1e-5)


def test_boxes_are_random_and_of_the_share_that_was_drawn():
    keys = jax.random.split(jax.random.key(0), 4096)
    boxes = np.asarray(pair_boxes(keys, (32, 48), 1.0))
    np.testing.assert_array_equal(boxes[::2], boxes[1::2])
    boxes = boxes[::2]
    rows, columns = boxes.any(2), boxes.any(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & columns[:, None])  # rectangles
    at_an_edge = rows[:, [0, -1]].any(1) | columns[:, [0, -1]].any(1)
    whole = boxes[~at_an_edge]
    assert len(whole) > 200
    sides = whole.any(2).mean(1), whole.any(1).mean(1)
    np.testing.assert_allclose(*sides, atol=1.01 / 32 + 1.01 / 48)  # of the image's shape
    # A uniform share and centre; of a side s on average s - s²/4 lies within the edges.
    draws = np.random.default_rng(0).random(100_000) ** 0.5
    assert boxes.mean() == pytest.approx(((draws - draws**2 / 4) ** 2).mean(), abs=0.015)
    assert len(np.unique(boxes.mean((1, 2)))) > 300  # of those that the pixels allow


def test_neighbours_change_places():
    np.testing.assert_array_equal(swap_pairs(jnp.arange(6)), [1, 0, 3, 2, 5, 4])


def test_odd_rows_are_refused():
    config = config_of(batch=6, accumulate=2, cutmix=1.0)
    with pytest.raises(ConfigError, match=r"train\.batch_size = 6.*2 images to mix"):
        config.validate_devices(1)
