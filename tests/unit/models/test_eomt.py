"""EoMT: its masks of attention and when they are given up, its losses by definition, its truths, its FLOPs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange, repeat
from test_segmenter import run_of as segmenter_run

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Masks
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.losses.masks import Truth, Weights, mask_losses, set_losses
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.eomt import attention_mask, extra_flops, mask_shares, upsamplings
from visionfm_jax.models.layers import no_gather
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.tasks.task import make_task

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run_of(truth: str = "semantic", model: dict | None = None, **task) -> Config:
    run = segmenter_run()
    shape = {"width": 16, "depth": 3, "heads": 2, "mlp": 32, "patch_size": 8, "image_size": (32, 48)}
    run.model = ViTConfig(**shape | (model or {}))
    run.task = EomtConfig(truth=truth, **{"num_classes": 5, "queries": 6, "most_masks": 4, "blocks": 2} | task)
    return run


def test_masks_have_the_authors_stride():
    assert {side: side >> upsamplings(side) for side in (2, 4, 8, 14, 16, 28, 32)} == {
        2: 1, 4: 2, 8: 4, 14: 7, 16: 4, 28: 7, 32: 4
    }  # fmt: skip


def test_masked_attention_is_given_up_block_by_block():
    """As in the authors' configuration for COCO: 12 epochs of 7,392 steps, and the steps that it states."""
    starts, ends = np.array([14_782, 29_564, 44_346, 59_128]), np.array([29_564, 44_346, 59_128, 73_910])
    for step in (0, 14_782, 20_000, 44_346, 60_000, 73_910, 88_000):
        expected = (1 - np.clip((step - starts) / (ends - starts), 0, 1)) ** 0.9
        np.testing.assert_allclose(mask_shares(jnp.int32(step), 88_692, 4), expected, atol=1e-4)


def test_who_sees_whom():
    rng = np.random.default_rng(0)
    masks = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    seen = attention_mask(masks, (2, 3), 2, jnp.float32(1), keys)
    inside = rearrange(masks, "b (h p) (w q) n -> b n (h w) p q", p=2, q=2).mean((-2, -1)) > 0
    assert seen.shape == (2, 1, 11, 11)
    np.testing.assert_array_equal(seen[:, 0, :3, 5:], inside)
    assert seen[:, :, 3:].all()
    assert seen[:, :, :3, :5].all()
    assert attention_mask(masks, (2, 3), 2, jnp.float32(0), keys).all()
    some = attention_mask(-jnp.ones((2, 4, 6, 500)), (2, 3), 0, jnp.float32(0.3), keys)[:, 0, :500, 500:]
    hidden = ~some.any(-1)
    assert (some.all(-1) | hidden).all()
    assert 0.2 < hidden.mean() < 0.4
    assert (hidden[0] != hidden[1]).any()


def test_losses_are_those_of_pixels():
    """Of a logit for each pixel of a place, over those that count; by optax and by the definition of dice."""
    rng = np.random.default_rng(1)
    pixels = rng.random((2, 3, 6, 4)) < 0.4  # masks, places, pixels of a place
    pixels = pixels.reshape(2, 18, 4)
    counted = (rng.random((18, 4)) < 0.7) | pixels.any(0)
    logits = rng.normal(size=(18, 5)).astype(np.float32)
    truth = Truth(pixels.mean(-1, dtype=np.float32), counted.mean(-1, dtype=np.float32), np.zeros(2, int), np.ones(2))
    entropy, dice = map(np.asarray, mask_losses(logits, truth))
    of_pixels = repeat(logits, "s q -> q (s p)", p=4)
    weight = counted.reshape(-1)
    for m, mask in enumerate(pixels.reshape(2, -1)):
        for q, one in enumerate(of_pixels):
            each = np.asarray(optax.sigmoid_binary_cross_entropy(one, mask))
            assert float(entropy[m, q]) == pytest.approx((each * weight).sum() / weight.sum(), rel=1e-5)
            p = np.asarray(jax.nn.sigmoid(one)) * weight
            expected = 1 - (2 * (p * mask).sum() / 4 + 1) / ((p.sum() + mask.sum()) / 4 + 1)
            assert float(dice[m, q]) == pytest.approx(expected, rel=1e-5)


def test_queries_that_say_the_truth_have_no_loss():
    masks = np.eye(3, 12, dtype=np.float32)
    truth = Truth(masks, np.ones(12, np.float32), np.array([2, 0, 1]), np.array([True, True, False]))
    logits = np.full((4, 4), -20, np.float32)
    logits[[3, 1, 0, 2], [2, 0, 3, 3]] = 20
    said = np.full((12, 4), -20, np.float32)
    said[0, 3], said[1, 1] = 20, 20
    parts = jax.jit(set_losses, static_argnums=3)(logits, said, truth, Weights(2.0, 5.0, 5.0, 0.1))
    for name, part in parts.items():
        assert float(part) == pytest.approx(0, abs=1e-6), name
    logits[[0, 3]] = logits[[3, 0]]  # the query of the right class has another's mask
    parts = jax.jit(set_losses, static_argnums=3)(logits, said, truth, Weights(2.0, 5.0, 5.0, 0.1))
    assert float(sum(parts.values())) > 1


def test_classes_that_an_image_shows_are_its_masks():
    run = run_of()
    task = make_task(run, no_gather)
    rng = np.random.default_rng(2)
    shown = rng.choice([1, 3, 255], (2, 32, 48)).astype(np.uint8)
    shown[1] = rng.integers(0, 5, (32, 48))
    truth, cut = task._truth({"class_map": shown})
    assert truth.present.tolist() == [[True, True, False, False], [True] * 4]
    assert truth.labels[0, :2].tolist() == [1, 3]
    assert truth.labels[1].tolist() == [0, 1, 2, 3]
    assert cut.tolist() == [0, 1]
    for image, labels, masks in zip(shown, truth.labels, truth.masks, strict=True):
        for label, mask in zip(labels, masks, strict=True):
            np.testing.assert_allclose(mask.reshape(8, 12), places(image == label).mean(-1))
    np.testing.assert_allclose(truth.counted.reshape(2, 8, 12), places(shown < 255).mean(-1))


def places(pixels: np.ndarray) -> np.ndarray:
    return rearrange(pixels, "... (h p) (w q) -> ... h w (p q)", p=4, q=4)


def record_of(rng, objects: int, crowd=()) -> dict:
    return {
        "boxes": np.zeros((objects, 4)),
        "box_labels": rng.integers(0, 5, objects),
        "box_crowd": np.isin(np.arange(objects), crowd),
        "masks": rng.random((objects, 32, 48)) < 0.3,
        "size": (20, 48),
    }


@pytest.mark.parametrize("whole", [False, True])
def test_masks_of_objects(whole):
    """The fifth, a crowd, does not count, and neither does padding; the second has no other pixel; the last is cut."""
    rng = np.random.default_rng(3)
    record = record_of(rng, 7, crowd=[4])
    record["masks"][1, :20] &= record["masks"][4, :20]
    fields = Masks(5, 4, (32, 48), 4, whole)
    row = fields(record)
    assert {k: (np.shape(v), np.asarray(v).dtype) for k, v in row.items() if k != "objects"} == {
        k: (shape, np.dtype(dtype)) for k, (shape, dtype) in fields.spec.items() if k != "objects"
    }
    image = np.zeros((32, 48), bool)
    image[:20] = True
    image &= ~record["masks"][4]
    kept = [0, 2, 3, 5]
    assert row["objects"] == 5
    assert row["mask_labels"].tolist() == record["box_labels"][kept].tolist()
    np.testing.assert_array_equal(row["masks"], places(record["masks"][kept] & image).sum(-1))
    counted = image & record["masks"][[*kept, 6]].any(0) if whole else image
    np.testing.assert_array_equal(row["counted"], places(counted).sum(-1))
    none = fields(record_of(rng, 0))
    assert none["objects"] == 0
    assert none["counted"].any() == (not whole)


def test_records_without_masks_are_damaged():
    record = record_of(np.random.default_rng(0), 2)
    for change, says in (({"box_labels": np.array([0, 5])}, "not integers from 0 to 4"), ({"masks": None}, "no masks")):
        with pytest.raises(DamagedRecord, match=says):
            Masks(5, 4, (32, 48), 4, False)({k: v for k, v in (record | change).items() if v is not None})


def test_images_without_a_mask_teach_that_there_is_nothing():
    task = make_task(run_of("panoptic"), no_gather)
    batch = {k: np.zeros(s.shape, s.dtype) for k, s in task.batch_spec(2).items()}
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(params):
        _, parts, _ = task.loss(params, batch, keys, Context(jnp.int32(0), counts=task.counts(batch, keys)))
        return parts["loss"].mean(), parts

    (value, parts), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(task.init(jax.random.key(0)))
    assert value == pytest.approx(3 * 2 * parts["class_loss"].mean(), rel=0.5)
    assert not parts["mask_loss"].any()
    assert not parts["dice_loss"].any()
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert np.abs(gradient["head"]["queries"]).max() > 0


def test_images_without_a_mask_have_no_loss_where_their_queries_weigh_nothing():
    task = make_task(run_of("panoptic", no_object_weight=0.0), no_gather)
    batch = {k: np.zeros(s.shape, s.dtype) for k, s in task.batch_spec(2).items()}
    keys = jax.random.split(jax.random.key(0), 2)
    context = Context(jnp.int32(0), counts=task.counts(batch, keys))
    value, *_ = jax.jit(task.loss)(task.init(jax.random.key(0)), batch, keys, context)
    assert value == 0


def test_flops_are_those_that_XLA_counts():
    """Of one prediction without masked attention, beside the backbone's; XLA also counts sums and norms."""
    run = run_of(model={"width": 64, "mlp": 256}, queries=20)
    task = make_task(run, no_gather)
    images = jnp.zeros((1, 32, 48, 3))
    params = jax.eval_shape(task.init, jax.random.key(0))

    def counted(model) -> float:
        lowered = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, images)
        return lowered.cost_analysis()["flops"]

    ours = extra_flops(run.model, 5, 20, 2, 1)
    # A scan's body is counted once, and here there is one of all blocks, there are two of some each.
    theirs = counted(task.model) - counted(task.backbone)
    assert ours == pytest.approx(theirs, rel=0.35)
    assert task.step_flops == 3 * 2 * (run.model.flops + extra_flops(run.model, 5, 20, 2, 3))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("task.most_masks", {"most_masks": 7}),
        ("task.blocks", {"blocks": 4}),
        ("model.patch_size", {"model": {"patch_size": 1}}),
        ("model.pool", {"model": {"pool": "map"}}),
        ("model.window", {"model": {"window": 2, "global_blocks": 1}}),
    ],
)
def test_what_does_not_fit_is_refused(field, changes):
    run = run_of(**changes)
    assert {name for name, *_ in run.task.problems(run)} == {field}


def test_predictions_are_fp32_of_16_bit_weights():
    task = make_task(run_of(), no_gather)
    params = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    model = task.model.clone(dtype=jnp.bfloat16)
    out = jax.eval_shape(lambda p: model.apply({"params": p}, jnp.zeros((1, 32, 48, 3))), params)
    assert {a.dtype for a in out} == {jnp.dtype("float32")}
