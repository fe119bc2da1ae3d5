"""A ViT with windows on any mesh: the same losses, and every layer's statistics."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_run import batches, losses, small_config

from visionfm_jax.parallel.mesh import make_mesh, to_global
from visionfm_jax.train.layer_statistics import OUTPUT, LayerStatistics
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")


def trainer_of(devices: int, stage: int, accumulate: int = 1, **model) -> Trainer:
    """Maps of 4 x 4 patches, in windows of 3 x 3 but for the second and the fourth block."""
    config = small_config(stage, accumulate)
    fields = {"patch_size": 4, "depth": 4, "window": 3, "global_blocks": 2, "drop_path": 0.2, "registers": 1, **model}
    for name, value in fields.items():
        setattr(config.model, name, value)
    config.validate()
    return Trainer(config, make_mesh(1, jax.devices()[:devices]))


@pytest.fixture(scope="module")
def one_device():
    return losses(trainer_of(1, 0), 3)[:2]


@pytest.mark.parametrize(("stage", "accumulate"), [(0, 2), (1, 1), (2, 1), (3, 2)])
def test_losses_equal_those_of_one_device(one_device, stage, accumulate):
    got = losses(trainer_of(8, stage, accumulate), 3)[:2]
    np.testing.assert_allclose(got[0], one_device[0], rtol=2e-6)
    np.testing.assert_allclose(got[1], one_device[1], rtol=2e-5)
    assert one_device[0] != losses(trainer_of(1, 0, window=0), 3)[0]


def test_blocks_of_a_group_have_their_own_statistics():
    trainer = trainer_of(2, 3, drop_path=0.0)
    state = trainer.init()
    batch = batches(1)[0]
    layers = {str(layer): layer for layer in LayerStatistics(trainer)(state, to_global(trainer.mesh, batch), 0)}
    assert [name for name in layers if name.endswith("]") and name.startswith(OUTPUT)] == [
        f"{OUTPUT} blocks[{i}]" for i in range(4)
    ]
    assert len({layers[f"{OUTPUT} blocks[{i}]"].forward.rms for i in range(4)}) == 4
