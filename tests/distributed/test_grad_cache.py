"""Micro-batches contrasted with all of the batch: loss, gradients and memory of the step, beside those without them.

Equal to fp32 rounding means: of every tensor, the gradients' difference has at most 1e-5 of the gradient's norm (and
1e-7 of that of all, for tensors whose gradient is zero but for rounding). Blocks are dropped, patches and words hidden,
words guessed without the image and images mixed, by sample: another draw in the second pass would show.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones.swin_v2 import SIZES, SwinV2Config, SwinV2Size
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer, make_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIZE, LENGTH, WORDS, WIDTH = 32, 32, 8, 32, 16
TASKS = {
    "aurora": MultimodalConfig(tokenizer="-", mask_unit=8, image_dropout=0.3),
    "mixed": ContrastiveConfig(mixup=0.2),
    "sigmoid": ContrastiveConfig(loss="sigmoid"),
    "plain": ContrastiveConfig(mixup=0.2, grad_cache=False),
}


class Kept(NamedTuple):
    """The state of a transformation that keeps the gradients."""

    grads: Any


KEEP = optax.chain(  # the step asks the schedule for the count of updates
    optax.GradientTransformation(Kept, lambda grads, state, _: (grads, Kept(grads))),
    optax.scale_by_schedule(lambda count: 1.0),
)


class Step(NamedTuple):
    """What one step gives."""

    losses: np.ndarray  # (B,)
    grads: Any


def config_of(task: str, batch: int, accumulate: int, stage: int) -> Config:
    image = SwinV2Config(size="single", image_size=SIZE, patch_size=2, window=4, drop_path=0.3)
    if task == "aurora":
        text = DecoderConfig(size="P", vocab_size=WORDS, context=LENGTH)
        model = AuroraConfig(image=image, text=text, embed_dim=WIDTH)
    else:
        text = TextConfig(size="P", vocab_size=WORDS, context=LENGTH, end_token=2)
        model = ClipConfig(image=image, text=text, embed_dim=WIDTH)
    config = Config(
        name=task,
        model=model,
        task=TASKS[task],
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(warmup_steps=2),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=batch, steps=20, accumulate=accumulate, precision="fp32"),
    )
    return config


def rows(task: str, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    text = rng.integers(5, WORDS, (batch, LENGTH), np.int32)
    text[:, 0] = 1
    for row in text:
        end = rng.integers(3, LENGTH)
        row[end:] = [2, *[0] * (LENGTH - end - 1)]
    if task == "aurora":
        text[3::4] = 0  # a bare image
    return {"image": rng.integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8), "text": text}


def weights(shapes: Any) -> Any:
    """Parameters that leave nothing at zero, the same whatever the mesh."""
    rng = np.random.default_rng(1)

    def one(path: tuple, leaf: Any) -> np.ndarray:
        value = rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)
        return value + np.float32(path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(one, shapes)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    SIZES["single"] = SwinV2Size(8, (1, 1, 1, 1), (1, 1, 2, 2))
    yield
    del SIZES["single"]
    compiled.cache_clear()


@functools.cache
def compiled(task: str, accumulate: int = 1, devices: int = 1, stage: int = 2, batch: int = BATCH) -> tuple[Any, tuple]:
    """The program from weights and rows to `Step`, and these."""
    config = config_of(task, batch, accumulate, stage)
    config.validate_devices(devices)
    trainer = Trainer(config, make_mesh(1, jax.devices()[:devices]))
    step = make_step(config, trainer.task, KEEP, trainer.zero)

    def losses_and_grads(params: Any, batch: dict) -> Step:
        state, metrics = step(TrainState(jnp.int32(0), params, KEEP.init(params), None), batch)
        return Step(metrics["losses"], state.opt_state[0].grads)

    params = jax.device_put(weights(trainer.shapes.params), trainer.zero.shardings(trainer.zero.state_specs))
    arguments = params, to_global(trainer.mesh, rows(task, batch))
    lowered = jax.jit(losses_and_grads).lower(*arguments)
    return lowered.compile(), arguments


@functools.cache
def step_of(*case: Any) -> Step:
    program, arguments = compiled(*case)
    return jax.device_get(program(*arguments))


def memory(*case: Any) -> int:
    """Bytes that a step needs beside its arguments."""
    return compiled(*case)[0].memory_analysis().temp_size_in_bytes


def norms(grads: Any) -> np.ndarray:
    return np.array([np.linalg.norm(np.float64(g)) for g in jax.tree.leaves(grads)])


def differences(a: Any, b: Any) -> np.ndarray:
    """Of each tensor, relative to that of `b`."""
    size = norms(b)
    return norms(jax.tree.map(np.subtract, a, b)) / (size + 1e-2 * np.linalg.norm(size))


@pytest.mark.parametrize(("task", "devices", "stage"), [("aurora", 2, 2), ("mixed", 4, 3), ("sigmoid", 1, 2)])
def test_micro_batches_change_nothing(task, devices, stage):
    got, expected = step_of(task, 4, devices, stage), step_of(task)
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    assert got.losses.mean(dtype=np.float64) == pytest.approx(expected.losses.mean(dtype=np.float64), rel=1e-6)
    assert differences(got.grads, expected.grads).max() < 1e-5


def test_micro_batches_contrasted_alone_are_another_loss():
    """Of fewer texts to tell apart; so the test above can fail."""
    got, expected = step_of("plain", 4), step_of("mixed")
    assert got.losses.mean() < 0.9 * expected.losses.mean()
    assert differences(got.grads, expected.grads).max() > 0.1


def test_memory_grows_with_the_micro_batch_not_with_the_batch():
    few, many = memory("aurora", 4, 2, 2), memory("aurora", 16, 2, 2, 4 * BATCH)
    assert many < 1.1 * few
    assert memory("aurora") > 2 * many  # which has half as many rows on a device
