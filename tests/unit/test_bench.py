"""`visionfm bench --with-data`, around a step that does nothing; tests/unit/test_layers.py runs `bench` without it."""

import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax import bench
from visionfm_jax.cli import data
from visionfm_jax.config.load import load_file
from visionfm_jax.data.sources.kinds import FolderConfig
from visionfm_jax.errors import DataError
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.parallel.targets import peak_flops
from visionfm_jax.train.step import Trainer

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.py"


def test_the_runs_batches_are_timed_with_the_step_and_without():
    trainer, seen = Trainer(load_file(str(CONFIG)), make_mesh(1)), []

    def step(state: int, batch: dict[str, jax.Array]) -> tuple[int, dict]:
        seen.append({k: (v.shape, v.dtype) for k, v in batch.items()})
        return state + 1, {"loss": jnp.zeros(())}

    opened = data.open_data(trainer.config, trainer.task)
    found = bench.measure_with_data(trainer, opened, step, 0, 1e-3, steps=3, warmup=1)
    assert seen == [{k: (v.shape, v.dtype) for k, v in bench.synthetic_batch(trainer).items()}] * 5
    assert found["images_per_s_of_loader"] > 0
    assert found["images_per_s_with_data"] > 0
    assert (found["bound_by"], found["workers"], found["threads"]) == ("step", 0, 2)


def test_a_batch_of_which_an_epoch_has_too_many_steps(monkeypatch, capsys):
    monkeypatch.setattr(bench.cluster, "initialize", lambda: (0, 1))
    monkeypatch.setattr(bench, "measure", lambda config, *_, **__: {"batch": config.train.batch_size})
    assert bench.main(["--config=vit_huge", "--config.train.batch_size=2"]) == 0
    assert capsys.readouterr().out == '{"batch": 2}\n'


def test_data_that_cannot_be_opened_cost_no_compile(monkeypatch, tmp_path):
    config = load_file(str(CONFIG))
    config.data.train = (FolderConfig(path=str(tmp_path / "nowhere")),)
    monkeypatch.setattr(bench, "Trainer", lambda *_: SimpleNamespace(task=None, mesh=None))
    monkeypatch.setattr(bench, "check_card", lambda *_: None)
    with pytest.raises(DataError, match="nowhere"):
        bench.measure(config, with_data=True)


def test_a_step_at_the_peak_of_its_card_says_how_many_images_it_takes():
    def demand(platform: str, kind: str) -> float:
        device = SimpleNamespace(platform=platform, device_kind=kind)
        mesh = SimpleNamespace(devices=np.array([device, device]), size=2)
        config = SimpleNamespace(train=SimpleNamespace(batch_size=64))
        return data.demand_of(SimpleNamespace(config=config, mesh=mesh, task=SimpleNamespace(step_flops=1e15)))

    seconds = 1e15 / 2 / peak_flops("NVIDIA H100 80GB HBM3")
    assert demand("gpu", "NVIDIA H100 80GB HBM3") == pytest.approx(64 / seconds)
    assert demand("gpu", "a card of tomorrow") == math.inf
    assert demand("cpu", "cpu") == 0  # its cores are the step's


def test_what_bounds_step_and_loader_together():
    assert bench.bound(100, 300, 95) == "step"
    assert bench.bound(300, 100, 95) == "loader"
    assert bench.bound(100, 300, 80).startswith("what step and loader share: cores")
