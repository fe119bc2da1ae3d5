"""Backbones under tasks that no recipe joins, and a backbone and an objective of a user's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange, reduce
from flax import linen as nn

from visionfm_jax.config import (
    BackboneConfig,
    Config,
    DataConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)
from visionfm_jax.config.limits import ImageSize, Limits, OneOf, Range, height_width
from visionfm_jax.data.augment import normalize
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.transforms import MultiCrop, Views
from visionfm_jax.errors import ConfigError
from visionfm_jax.models.aurora import AuroraConfig
from visionfm_jax.models.backbones import Features, Hidden, swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.decoder import DecoderConfig
from visionfm_jax.models.layers import dense
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.planning.compiled import inputs_of
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.multimodal import MultimodalConfig
from visionfm_jax.tasks.self_distillation import SelfDistillationConfig
from visionfm_jax.tasks.task import Stateless
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIZE, LENGTH, END = 8, (32, 48), 6, 30


@dataclass(kw_only=True)
class ToyConfig(BackboneConfig):
    """Two layers on patches, as a user would add it: nothing of the package knows of it."""

    channels: int = 16
    patch_size: int = 8
    image_size: ImageSize = SIZE
    attention: str = "xla"
    remat: str = "none"

    limits: ClassVar[Limits] = {"channels": Range(1, 64), "patch_size": Range(1, 64), "image_size": Range(1, 64)}

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,)

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.channels,)

    @property
    def features(self) -> int:
        return self.channels

    @property
    def embed_width(self) -> int:
        return self.channels

    @property
    def flops(self) -> float:
        patches = math.prod(side // self.patch_size for side in height_width(self.image_size))
        return 2.0 * patches * (3 * self.patch_size**2 + self.channels) * self.channels

    def make(self, dtype, gather_params) -> Toy:
        return Toy(self, dtype)


class Toy(nn.Module):
    config: ToyConfig
    dtype: Any

    @nn.compact
    def __call__(self, images, keys=None, hidden=None) -> Features:
        P = self.config.patch_size
        x = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=P, q=P)
        x = dense(x, self.config.channels, self.dtype, "embed")
        if hidden is not None:
            x = jnp.where(hidden.where[..., None], hidden.token, x)
        normed = nn.LayerNorm(name="norm")(dense(nn.relu(x), self.config.channels, self.dtype, "mix"))
        return Features((x,), normed, normed[:, 0, :0], normed.mean((1, 2)))


BACKBONES = {
    "vit": lambda: ViTConfig(width=32, depth=2, heads=2, mlp=64, patch_size=8, image_size=SIZE, drop_path=0.1),
    "swin_v2": lambda: SwinV2Config(size="small", patch_size=2, image_size=SIZE, window=2, drop_path=0.1),
    "toy": ToyConfig,
}
SMALL = swin_v2.SwinV2Size(8, (1, 1, 1, 1), (1, 1, 2, 2))
TEXT = {"size": "P", "vocab_size": END + 1, "context": LENGTH, "end_token": END}
TASKS = {
    "classification": lambda image: (image, ClassificationConfig(num_classes=5)),
    "contrastive": lambda image: (
        ClipConfig(image=image, text=TextConfig(**TEXT), embed_dim=16), ContrastiveConfig(mixup=0.2),
    ),
    "multimodal": lambda image: (
        AuroraConfig(image=image, text=DecoderConfig(**TEXT), embed_dim=16),
        MultimodalConfig(tokenizer="emoji", pair_ratio=(1, 1), mask_unit=16),
    ),
    "self_distillation": lambda image: (
        image,
        SelfDistillationConfig(prototypes=32, head_hidden=32, head_bottleneck=16, teacher_momentum=(0.9, 1.0)),
    ),
}  # fmt: skip
VIEWS = MultiCrop(views=(Views(size=SIZE), Views(name="local", size=16, count=2)))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    swin_v2.SIZES["small"] = SMALL
    sizes, SwinV2Config.limits["size"] = SwinV2Config.limits["size"], OneOf(tuple(swin_v2.SIZES))
    yield
    SwinV2Config.limits["size"] = sizes
    del swin_v2.SIZES["small"]


def run_of(model, task, views=VIEWS) -> Config:
    config = Config(
        name="cell",
        model=model,
        task=task,
        data=DataConfig(
            train=(TfdsConfig(path="-"),), transforms=(views,) if isinstance(task, SelfDistillationConfig) else ()
        ),
        optim=OptimConfig(warmup_steps=1, lr=3e-3),
        train=TrainConfig(batch_size=BATCH, steps=50, precision="fp32"),
    )
    config.validate()
    config.validate_devices(2)
    return config


def batch(trainer: Trainer) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for name, spec in trainer.task.batch_spec(BATCH).items():
        out[name] = rng.integers(0, 256 if spec.dtype == np.uint8 else 5, spec.shape).astype(spec.dtype)
    if "text" in out:
        out["text"][:, -1] = END
    return out


def losses(trainer: Trainer, steps: int) -> tuple[list[float], Any]:
    state, rows, out = trainer.init(), batch(trainer), []
    for _ in range(steps):
        state, metrics = trainer.step(state, to_global(trainer.mesh, rows))
        out.append(float(metrics["loss"]))
        assert metrics["finite"]
    return out, state


# The other cells are the recipes', which have tests of their own.
@pytest.mark.parametrize(
    ("backbone", "task"),
    [
        ("vit", "contrastive"),
        ("vit", "multimodal"),
        ("swin_v2", "classification"),
        ("swin_v2", "self_distillation"),
        ("toy", "contrastive"),
    ],
)
def test_every_task_trains_on_every_backbone(backbone, task):
    trainer = Trainer(run_of(*TASKS[task](BACKBONES[backbone]())), make_mesh(1, jax.devices()[:2]))
    found, state = losses(trainer, 12)
    assert np.mean(found[-3:]) < 0.95 * found[0]
    moved = jax.tree.map(lambda p: bool(jnp.any(p != 0)), optax.tree.get(state.opt_state, "mu"))
    assert all(jax.tree.leaves(moved)), moved  # a gradient reaches every parameter
    if task in ("contrastive", "self_distillation"):
        return
    what, result = {"classification": ("labels", "probability"), "multimodal": ("masked_image", "pixel_error")}[task]
    for height, width in (SIZE, (SIZE[1], 2 * SIZE[0])):  # and an evaluation on images of another size
        rows = batch(trainer) | {"record": np.arange(BATCH, dtype=np.int32)}
        rows["image"] = np.resize(rows["image"], (BATCH, height, width, 3))
        assert np.isfinite(trainer.predict(state.params, to_global(trainer.mesh, rows), what)[result]).all()


@pytest.mark.parametrize(
    ("backbone", "size", "classes", "total"),
    [(ViTConfig, {}, 21_841, 658_740_561), (SwinV2Config, {}, 21_841, 2_997_843_680 + 4097 * 21_841)],
)
def test_full_size_classifiers(backbone, size, classes, total):
    config = run_of(backbone(**size), ClassificationConfig(num_classes=classes))
    shapes = Trainer(config, make_mesh(1, jax.devices()[:2])).shapes.params
    assert sum(p.size for p in jax.tree.leaves(shapes)) == total


FULL_SIZE = {
    "contrastive": lambda image: (ClipConfig(image=image), ContrastiveConfig()),
    "self_distillation": lambda image: (image, SelfDistillationConfig()),
}


# Of SwinV2 this takes minutes; the steps of vit_huge and swinv2_g_clip are compiled by tests of their own.
@pytest.mark.full_size
@pytest.mark.parametrize("task", FULL_SIZE)
def test_full_size_steps_are_traced(task):
    """All that `plan` does before it compiles."""
    model, objective = FULL_SIZE[task](ViTConfig())
    views = MultiCrop(views=(Views(size=224), Views(name="local", size=112, count=8)))
    trainer = Trainer(run_of(model, objective, views), make_mesh(1, jax.devices()[:2]))
    state, metrics = trainer.step.trace(*inputs_of(trainer, BATCH)).out_info
    assert sum(p.size for p in jax.tree.leaves(state.params)) > 6e8
    assert metrics["loss"].shape == ()


def test_the_features_of_backbones_have_the_shapes_that_their_configurations_say():
    for make in BACKBONES.values():
        config = make()
        module = config.make(jnp.float32, lambda p: p)
        images = jnp.zeros((2, *SIZE, 3))
        found = jax.eval_shape(lambda module=module, x=images: module.init_with_output(jax.random.key(0), x)[0])
        sides = [tuple(side // stride for side in SIZE) for stride in config.strides]
        assert [m.shape for m in found.maps] == [(2, *s, w) for s, w in zip(sides, config.widths, strict=True)]
        assert found.normed.shape == found.maps[-1].shape
        assert found.prefix.shape == (2, 0, config.widths[-1])
        assert found.pooled.shape == (2, config.features)


def token_of(module) -> jax.Array:
    return jnp.ones(module.config.embed_width)


def test_hidden_patches_are_not_seen():
    for make in BACKBONES.values():
        config = make()
        module = config.make(jnp.float32, lambda p: p)
        images = jax.random.normal(jax.random.key(0), (1, *SIZE, 3))
        params = jax.jit(module.init)(jax.random.key(1), images)
        grid = [side // config.patch_size for side in SIZE]
        where = jnp.zeros((1, *grid), bool).at[:, : grid[0] // 2].set(True)
        other = images.at[:, : SIZE[0] // 2].add(1.0)
        run = jax.jit(lambda x, where, p=params, m=module: m.apply(p, x, None, Hidden(token_of(m), where)).pooled)
        np.testing.assert_array_equal(run(images, where), run(other, where))
        assert jnp.any(run(images, ~where) != run(other, ~where))


def test_a_hidden_feature_hides_all_patches_that_it_stands_for():
    model, config = TASKS["self_distillation"](BACKBONES["swin_v2"]())
    task = Trainer(run_of(model, config), make_mesh(1, jax.devices()[:2])).task
    stride = model.strides[-1]
    views = jax.random.normal(jax.random.key(0), (2, 1, *SIZE, 3))
    other = views.at[:, :, :stride, stride : 2 * stride].add(1.0)
    hidden = jnp.zeros((2, 1, SIZE[0] // stride, SIZE[1] // stride), bool).at[:, :, 0, 1].set(True)
    params = jax.jit(task.init)(jax.random.key(1))
    run = jax.jit(lambda views, hidden: task._encode(params, views, hidden=hidden).normed)
    np.testing.assert_array_equal(run(views, hidden), run(other, hidden))
    assert jnp.any(run(views, ~hidden) != run(other, ~hidden))


# An objective of a user's own: the mean colour of an image.


@dataclass(kw_only=True)
class ColourConfig(TaskConfig):
    """Predict an image's mean colour from its features."""

    weight: float = 1.0

    limits: ClassVar[Limits] = {"weight": Range(0, 10)}
    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"colours"})

    def problems(self, run: Config) -> list:
        if run.data.augment.mean == (0.0,) * 3:
            return [("data.augment.mean", (0.0,) * 3, "is no mean of colours", "set the data's")]
        return []

    def fields(self, run: Config) -> Labels:
        return Labels(2)

    def make(self, run: Config, dtype, gather_params) -> Colour:
        return Colour(run, dtype, gather_params)


class Regressor(nn.Module):
    backbone: nn.Module

    @nn.compact
    def __call__(self, images, keys=None):
        return nn.Dense(3, name="colour")(self.backbone(images, keys).pooled)


class Colour(Stateless):
    def __init__(self, run: Config, dtype, gather_params):
        self.run, self.model = run, Regressor(run.model.make(dtype, gather_params))

    def init(self, key):
        return self.model.init(key, jnp.zeros((1, *SIZE, 3)))["params"]

    def batch_spec(self, batch_size):
        return {"image": jax.ShapeDtypeStruct((batch_size, *SIZE, 3), jnp.uint8)}

    def loss(self, params, batch, keys, context):
        images = normalize(batch["image"], self.run.data.augment)
        error = self.model.apply({"params": params}, images, keys) - reduce(images, "b h w c -> b c", "mean")
        loss = self.run.task.weight * (error**2).sum(-1)
        return loss.mean(), {"loss": loss}, {}

    def constrain(self, params):
        return params

    def predict(self, params, batch, what="colours"):
        return {"colour": self.model.apply({"params": params}, normalize(batch["image"], self.run.data.augment))}

    @property
    def step_flops(self):
        return 3 * self.run.model.flops * BATCH


def test_an_objective_of_ones_own_needs_nothing_of_the_package_changed():
    found, _ = losses(Trainer(run_of(ToyConfig(), ColourConfig()), make_mesh(1, jax.devices()[:2])), 12)
    assert found[-1] < 0.7 * found[0]


def test_the_rules_of_ones_own_classes_are_kept():
    run = run_of(ToyConfig(), ColourConfig())
    run.model.channels, run.task.weight = 65, 11.0
    with pytest.raises(ConfigError, match=r"config.model.channels = 65.*\n.*config.task.weight = 11"):
        run.validate()
    run = run_of(ToyConfig(), ColourConfig())
    run.data.augment.mean = (0.0,) * 3
    with pytest.raises(ConfigError, match=r"is no mean of colours; set the data's"):
        run.validate()
    run.model = ClipConfig()
    with pytest.raises(ConfigError, match=r"cannot be trained by task = ColourConfig; set model to a BackboneConfig"):
        run.validate()
