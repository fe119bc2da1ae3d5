"""Training on what img2dataset wrote: two processes see the selected pairs in the order in which one sees them."""

import numpy as np
from real_tars import unpack
from runs import finish, losses, start, steps
from test_processes import finish_two, start_two

from visionfm_jax.data import select

STEPS = 5
CONFIG = """
from visionfm_jax.config import load
from visionfm_jax.models.backbones.vit import ViTConfig


def get_config(variant=""):
    config = load.load_file("configs/swinv2_g_clip.py:tiny")
    config.model.image = ViTConfig(size="P", depth=1, patch_size=8, image_size=16)  # compiled in a moment
    return config
"""
SMALL = [
    "--config.model.text.depth=1",
    "--config.model.text.context=16",
    "--config.data.train[0].kind=tars",
    "--config.data.transforms[1].operations=2",
    "--config.train.batch_size=16",
    f"--config.train.steps={STEPS}",
    "--config.train.precision=fp32",
    "--config.optim.warmup_steps=2",
    "--config.optim.lr=1e-6",  # Adam multiplies rounding by the rate; a loss shall tell of its batch alone
    "--config.evals=()",
    "--config.telemetry.log_every=1",
    "--config.telemetry.tensorboard=false",
]


def test_two_processes_train_on_tars_as_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes nearly all the time
    tars, pairs = unpack(tmp_path / "tars"), tmp_path / "good.pairs"
    assert select.select(str(tars), "similarity >= 0.25", pairs)["selected"] > 100
    config = tmp_path / "pairs.py"
    config.write_text(CONFIG)
    data = [f"--config={config}", f"--config.data.train[0].path={tars}", f"--config.data.train[0].selection={pairs}"]
    one, two = tmp_path / "one", tmp_path / "two"
    _, err = finish(start(one, *data, base=SMALL), one, seconds=400)
    assert "left out: 3 images with an empty caption: 0000" in err
    finish_two(start_two(two, *data, base=SMALL), two, 0, seconds=400)
    assert steps(one) == steps(two) == [STEPS]
    expected, got = losses(one), losses(two)
    assert list(got) == list(range(1, STEPS + 1))
    # At the chance of 1 in 16; other pairs in a batch would show in the second digit.
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-4)
    assert np.ptp(list(got.values())) > 1e-2
