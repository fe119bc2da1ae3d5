"""Segmentation on any mesh: the same losses, and a few images learnt by heart."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from test_context import weights

from visionfm_jax.config import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from visionfm_jax.config.limits import OneOf
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.tasks.segmentation import SegmentationConfig
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

BATCH, SIDE, CLASSES = 8, 32, 4


@pytest.fixture(scope="module", autouse=True)
def _small():
    swin_v2.SIZES["small"] = swin_v2.SwinV2Size(16, (1, 1, 1, 1), (1, 1, 2, 2))
    sizes, SwinV2Config.limits["size"] = SwinV2Config.limits["size"], OneOf(tuple(swin_v2.SIZES))
    yield
    SwinV2Config.limits["size"] = sizes
    del swin_v2.SIZES["small"]


BACKBONES = {
    "vit": lambda: ViTConfig(width=32, depth=2, heads=2, mlp=64, patch_size=4, image_size=SIDE, drop_path=0.1),
    "swin_v2": lambda: SwinV2Config(size="small", patch_size=2, image_size=SIDE, window=4, drop_path=0.0),
}


def trainer_of(backbone: str, devices: int = 1, stage: int = 0, accumulate: int = 1, lr=3e-3, **task) -> Trainer:
    config = Config(
        name="small",
        model=BACKBONES[backbone](),
        task=SegmentationConfig(num_classes=CLASSES, channels=16, auxiliary_channels=16, **task),
        data=DataConfig(train=(TfdsConfig(path="-"),)),
        optim=OptimConfig(lr=lr, warmup_steps=2, weight_decay=0.1),
        parallel=ParallelConfig(stage=stage),
        train=TrainConfig(batch_size=BATCH, steps=60, accumulate=accumulate, precision="fp32"),
    )
    config.validate()
    config.validate_devices(devices)
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


def scenes() -> dict[str, np.ndarray]:
    """Noisy images of one colour a class, class by class of 8 x 8 pixels; the first has no label, others a few none."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, CLASSES, (BATCH, SIDE // 8, SIDE // 8)).repeat(8, 1).repeat(8, 2)
    colours = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])
    images = colours[classes] + rng.normal(scale=15, size=(BATCH, SIDE, SIDE, 3))
    classes[0], classes[1, :20] = 255, 255
    return {"image": images.clip(0, 255).astype(np.uint8), "class_map": classes.astype(np.uint8)}


def first_steps(trainer: Trainer) -> list[dict]:
    params = jax.device_put(weights(trainer.shapes.params), trainer.shardings.params)
    state, seen = trainer.init().replace(params=params), []
    for _ in range(2):
        state, metrics = trainer.step(state, to_global(trainer.mesh, scenes()))
        seen.append(jax.device_get(metrics))
    return seen


def test_devices_and_micro_batches_change_nothing():
    """Also where a micro-batch has no label at all, and others more than others."""
    expected = first_steps(trainer_of("vit", head="upernet"))
    for mesh in ((2, 1, 4), (4, 3, 2)):
        got = first_steps(trainer_of("vit", *mesh, head="upernet"))
        for a, b in zip(got, expected, strict=True):
            for name in ("loss", "grad_norm", "auxiliary_loss", "accuracy"):
                assert a[name] == pytest.approx(b[name], rel=1e-5), (mesh, name)
    assert expected[0]["losses"].max() > 0


def overfit(backbone: str, lr: float, steps: int = 60, **task) -> float:
    """The mIoU of the labelled pixels, on the scenes that were learnt."""
    trainer, rows = trainer_of(backbone, lr=lr, **task), scenes()
    state = trainer.init()
    before = jax.device_get(state.params)
    for _ in range(steps):
        state, metrics = trainer.step(state, to_global(trainer.mesh, rows))
        assert metrics["finite"]
    if task.get("frozen"):  # weight decay included
        same = jax.tree.map(np.array_equal, before, jax.device_get(state.params))
        moved = {name for name, part in same.items() if not jax.tree.all(part)}
        assert moved == {"head"}
    truth = rows.pop("class_map")
    found = np.asarray(trainer.predict(state.params, to_global(trainer.mesh, rows), "class_map")["class_map"])
    assert found.dtype == np.int32
    scored = []
    for c in range(CLASSES):
        here, there = (found == c) & (truth < 255), truth == c
        scored.append((here & there).sum() / (here | there).sum())
    return float(np.mean(scored))


@pytest.mark.parametrize(
    ("backbone", "task", "lr"),
    [
        ("vit", {"head": "linear"}, 5e-3),
        ("vit", {"head": "upernet"}, 5e-3),
        ("swin_v2", {"head": "linear", "frozen": True}, 5e-2),
    ],
)
def test_overfits(backbone, task, lr):
    assert overfit(backbone, lr, **task) >= 0.95
