"""Heads of segmentation: their arithmetic, their FLOPs, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import Config, DataConfig, OptimConfig, TrainConfig
from visionfm_jax.data.fields import ClassMap
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.losses.segmentation import pixel_cross_entropy
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.layers import no_gather
from visionfm_jax.models.segmenter import average_pool
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.segmentation import SegmentationConfig
from visionfm_jax.tasks.task import make_task

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run_of(model=None, **task) -> Config:
    return Config(
        name="small",
        model=model or ViTConfig(width=32, depth=2, heads=2, mlp=64, patch_size=8, image_size=(32, 48)),
        task=SegmentationConfig(**{"num_classes": 5, "channels": 8, "auxiliary_channels": 4} | task),
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(batch_size=2, steps=10, precision="fp32"),
    )


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_average_pool_is_the_mean_of_bins_by_definition(side):
    x = np.random.default_rng(side).normal(size=(2, 7, 4, 3)).astype(np.float32)

    def bins(length: int) -> list[slice]:
        return [slice(int(np.floor(i * length / side)), int(np.ceil((i + 1) * length / side))) for i in range(side)]

    expected = np.stack([np.stack([x[:, r, c].mean((1, 2)) for c in bins(4)], 1) for r in bins(7)], 1)
    np.testing.assert_allclose(average_pool(x, side), expected, rtol=1e-5, atol=1e-6)


def test_pixels_without_class_do_not_count():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5, 6)).astype(np.float32)
    classes = rng.integers(0, 6, (3, 4, 5))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -np.take_along_axis(log_p, classes[..., None], -1)[..., 0]
    right = logits.argmax(-1) == classes
    for none, dtype in ((255, np.uint8), (-1, np.int32), (65_535, np.int32)):
        out = rng.random(classes.shape) < 0.3
        out[2] = True  # of one image nothing counts
        loss, hits = jax.jit(pixel_cross_entropy)(logits, np.where(out, none, classes).astype(dtype))
        np.testing.assert_allclose(loss, np.where(out, 0, each).sum((1, 2)), rtol=1e-5)
        np.testing.assert_array_equal(hits, (right & ~out).sum((1, 2)))


def test_no_labelled_pixel_at_all_is_no_loss():
    config = run_of()
    task = make_task(config, no_gather)
    batch = {k: np.zeros(s.shape, s.dtype) for k, s in task.batch_spec(2).items()}
    batch["class_map"][:] = 255
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(params):
        return task.loss(params, batch, keys, Context(jnp.int32(0), counts=task.counts(batch, keys)))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(task.init(jax.random.key(0)))
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


SWIN = SwinV2Config(size="P", image_size=64, patch_size=4, window=4)


@pytest.mark.parametrize(("model", "head"), [(None, "linear"), (None, "upernet"), (SWIN, "upernet")])
def test_flops_of_heads_are_those_that_XLA_counts(model, head):
    """Of products and convolutions: XLA leaves out what falls on the padding of a convolution, and counts the rest."""
    task = make_task(config := run_of(model, head=head, channels=64), no_gather)
    backbone = config.model
    images = jnp.zeros((1, *task._size, 3))
    params = jax.eval_shape(task.init, jax.random.key(0))
    maps = jax.eval_shape(lambda p: task.backbone.apply({"params": p}, images), params).maps
    apply = lambda p, maps: task.model.make_head().apply({"params": p}, maps)  # noqa: E731
    counted = jax.jit(apply).lower(params["head"], maps).cost_analysis()["flops"]
    ours = task.step_flops / config.train.batch_size / 3 - backbone.flops
    assert ours == pytest.approx(counted, rel=0.25)


def test_frozen_counts_the_backbone_once():
    run = run_of(head="linear")
    whole = make_task(run, no_gather).step_flops
    run.task.frozen = True
    assert whole - make_task(run, no_gather).step_flops == pytest.approx(2 * run.model.flops * 2)


def test_what_does_not_fit_is_refused():
    run = run_of(frozen=True)
    run.optim.layer_decay = 0.75
    assert {name for name, *_ in run.task.problems(run)} == {"optim.layer_decay"}


def test_class_maps_keep_their_classes_and_what_has_none():
    field = ClassMap(300, (2, 2))
    assert field.spec == {"class_map": ((2, 2), np.int32)}
    row = field({"class_map": np.array([[0, 299], [65_535, 1]], np.uint16)})["class_map"]
    assert row.tolist() == [[0, 299], [-1, 1]]
    assert row.dtype == np.int32
    assert ClassMap(2, (1, 2))({"class_map": np.array([[-1, 1]])})["class_map"].tolist() == [[255, 1]]
    for record, says in (({}, "no class_map"), ({"class_map": np.array([[2, 0]])}, "class 2")):
        with pytest.raises(DamagedRecord, match=says):
            ClassMap(2, (1, 2))(record)
