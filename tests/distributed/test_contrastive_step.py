"""The contrastive training step: over meshes and stages as on one device, its augmentations, its logit scale."""

import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import (
    AugmentConfig,
    Config,
    DataConfig,
    OptimConfig,
    ParallelConfig,
    TrainConfig,
)
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.backbones.swin_v2 import SIZES, SwinV2Config, SwinV2Size
from visionfm_jax.models.clip import MAX_SCALE, ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.contrastive import ContrastiveConfig, mix_pairs, pair_shares
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIZE, LENGTH, END = 16, 32, 8, 99
STEPS = 3


def small_config(
    stage: int = 3,
    replicas: int = 1,
    precision: str = "fp32",
    loss: str = "softmax",
    mixup: float = 0.2,
    drop_path: float = 0.3,
    jitter: bool = True,
) -> Config:
    config = Config(
        name="small",
        model=ClipConfig(
            image=SwinV2Config(size="small", image_size=SIZE, window=4, drop_path=drop_path),
            text=TextConfig(size="P", vocab_size=END + 1, context=LENGTH, end_token=END),
            embed_dim=16,
        ),
        task=ContrastiveConfig(loss=loss, mixup=mixup),
        data=DataConfig(
            train=(TfdsConfig(path="-"),),
            augment=AugmentConfig(jitter=(0.2, 0.2, 0.2, 0.1) if jitter else (0, 0, 0, 0)),
        ),
        optim=OptimConfig(warmup_steps=10, lr=2e-3),
        parallel=ParallelConfig(stage=stage, replicas=replicas),
        train=TrainConfig(batch_size=BATCH, steps=200, precision=precision),
    )
    config.validate_devices(8)
    return config


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    text = rng.integers(1, END, (count, BATCH, LENGTH), np.int32)
    for row in text.reshape(-1, LENGTH):
        end = rng.integers(2, LENGTH)
        row[end:] = [END, *[0] * (LENGTH - end - 1)]
    return [
        {"image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8), "text": text[step]} for step in range(count)
    ]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    SIZES["small"] = SwinV2Size(8, (2, 1, 1, 1), (1, 1, 2, 2))
    yield
    del SIZES["small"]


@functools.cache
def trainer_on(devices: int, **changes: Any) -> Trainer:
    config = small_config(**changes)
    return Trainer(config, make_mesh(config.parallel.replicas, jax.devices()[:devices]))


@functools.cache
def losses(steps: int, devices: int, **changes: Any) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of each step, on three batches again and again."""
    trainer = trainer_on(devices, **changes)
    state, out, norms, rows = trainer.init(), [], [], batches(3)
    for step in range(steps):
        state, metrics = trainer.step(state, to_global(trainer.mesh, rows[step % 3]))
        out.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    return jax.device_get(out), jax.device_get(norms)


@pytest.mark.parametrize(("stage", "replicas"), [(2, 1), (3, 2)])
def test_losses_equal_those_of_one_device(stage, replicas):
    """Every device holds 2 of 16 rows, contrasts them with all, and mixes, jitters and drops blocks by sample."""
    expected, norms = losses(STEPS, 1, stage=0)
    got, got_norms = losses(STEPS, 8, stage=stage, replicas=replicas)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    np.testing.assert_allclose(got_norms, norms, rtol=1e-4)
    assert len(set(map(float, expected))) == STEPS


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_agree_over_100_steps(precision):
    """Within 5 % over the second half of 100 steps; in fp16 the first ones go to finding the loss scale."""
    (expected, _), (got, _) = losses(100, 1, stage=0), losses(100, 1, stage=0, precision=precision)
    assert np.mean(got[50:]) == pytest.approx(np.mean(expected[50:]), rel=0.05)
    assert np.mean(expected[50:]) < 0.2 * expected[0]  # most of what there is to learn is learnt


def test_the_sigmoid_loss_of_all_devices():
    """Every device's rows against everybody's texts, by hand from the embeddings."""
    trainer = trainer_on(8, loss="sigmoid", mixup=0.0, drop_path=0.0, jitter=False)
    params, batch = trainer.init().params, batches(1)[0] | {"key": jax.random.split(jax.random.key(0), BATCH)}
    loss = trainer.zero.apply(
        lambda p, b, c: trainer.task.loss(p, b, b["key"], c)[1]["loss"], params, batch, Context(0)
    )
    out = jax.device_get(trainer.predict(params, to_global(trainer.mesh, batches(1)[0])))
    z = 10 * out["image_embedding"].astype(np.float64) @ out["text_embedding"].T - 10
    np.testing.assert_allclose(loss, np.log1p(np.exp(np.where(np.eye(BATCH), -z, z))).sum(1), rtol=1e-4)


@pytest.mark.parametrize(("before", "bound"), [(7.0, MAX_SCALE), (-3.0, 0.0)])
def test_logit_scale_is_clamped_after_the_step(before, bound):
    trainer = trainer_on(1, stage=0)
    state = trainer.init()
    state = state.replace(params={**state.params, "scale": jnp.float32(before)})
    state, metrics = trainer.step(state, to_global(trainer.mesh, batches(1)[0]))
    assert float(metrics["logit_scale"]) == pytest.approx(np.exp(before), rel=1e-5)  # it was used as it was
    assert float(state.params["scale"]) == pytest.approx(bound, abs=1e-6)


def test_embeddings_have_length_1_and_other_entries_pass_through():
    trainer = trainer_on(1, stage=0)
    state = trainer.init()
    batch = batches(1)[0] | {"mask": np.arange(BATCH, dtype=np.float32)}
    both = jax.device_get(trainer.predict(state.params, to_global(trainer.mesh, batch)))
    assert both.keys() == {"image_embedding", "text_embedding", "mask"}
    for name in ("image_embedding", "text_embedding"):
        np.testing.assert_allclose(np.linalg.norm(both[name], axis=1), 1, rtol=1e-5)
    texts = {"text": batch["text"], "mask": batch["mask"]}
    alone = jax.device_get(trainer.predict(state.params, to_global(trainer.mesh, texts)))
    assert alone.keys() == {"text_embedding", "mask"}
    chex.assert_trees_all_close(alone, {k: both[k] for k in alone}, rtol=1e-5, atol=1e-6)


def test_pairs_are_mixed_by_one_share_each():
    keys = jax.random.split(jax.random.key(0), 4096)
    share = np.asarray(pair_shares(keys, 0.2))
    np.testing.assert_array_equal(share[::2], share[1::2])
    assert len(np.unique(share)) > 1500
    assert share.mean() == pytest.approx(0.5, abs=0.03)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)  # of Beta(a, a)
    images = jnp.stack([jnp.full((2, 2, 3), v) for v in (1.0, 2.0, 10.0, 30.0)])
    mixed = mix_pairs(images, jnp.array([1.0, 1.0, 0.25, 0.25]))
    np.testing.assert_allclose(mixed[:, 0, 0, 0], [1, 2, 25, 15])
