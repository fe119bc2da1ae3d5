"""Evaluation between the training loop and the evals."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from visionfm_jax.config import CheckpointConfig, Config
from visionfm_jax.errors import CheckpointError, ConfigError
from visionfm_jax.evals.beats import beat
from visionfm_jax.evals.run import measure
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import REPLICATED, make_mesh
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.initialise import other_run, weights_to_evaluate
from visionfm_jax.train.state import TrainState


class Counting:
    """An eval of ten batches."""

    def __init__(self):
        self.batches, self.details = 0, {}

    def run(self, predict):
        for i in range(10):
            assert predict({"x": np.full(4, i)})["x"].tolist() == [i] * 4
            self.batches += 1
        return {"top1": 0.5}


@pytest.mark.parametrize("stop_at", [1, 7, 13, 20, None])
def test_a_stop_ends_it_between_two_batches_without_scores(stop_at):
    trainer = types.SimpleNamespace(mesh=make_mesh(1, jax.devices()[:1]), predict=lambda weights, batch, *what: batch)
    evals = {"one": Counting(), "two": Counting()}
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] == stop_at

    scores = measure(trainer, evals, None, {"step": 3}, lambda n: None, stop)
    done = sum(e.batches for e in evals.values())
    if stop_at is None:
        assert (scores, done) == ({"one/top1": 0.5, "two/top1": 0.5}, 20)
        assert evals["two"].details == {"step": 3, "metrics": {"top1": 0.5}}
    else:
        assert (scores, done) == (None, stop_at - 1)


class Computing:
    """An eval that computes for long after its only batch."""

    def __init__(self):
        self.parts, self.details = 0, {}

    def run(self, predict):
        predict({"x": np.zeros(4)})
        for _ in range(5):
            beat(alike=False)
            self.parts += 1
        return {"top1": 0.5}


def test_a_long_computation_goes_on_and_ends_at_a_stop():
    trainer = types.SimpleNamespace(mesh=make_mesh(1, jax.devices()[:1]), predict=lambda weights, batch, *what: batch)
    seen, computing = [], Computing()
    assert measure(trainer, {"one": computing}, None, {}, seen.append) == {"one/top1": 0.5}
    assert seen == [1, 0, 0, 0, 0, 0]
    computing = Computing()
    assert measure(trainer, {"one": computing}, None, {}, seen.append, lambda: len(seen) >= 9) is None
    assert computing.parts == 2
    beat()  # outside of a measurement


def test_processes_that_beat_unlike_each_other_ask_for_no_stop(monkeypatch):
    """They would agree at different places, and wait for each other for ever."""
    trainer = types.SimpleNamespace(mesh=make_mesh(1, jax.devices()[:1]), predict=lambda weights, batch, *what: batch)
    asked, computing = [], Computing()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("visionfm_jax.evals.run.to_global", lambda mesh, batch: batch)
    assert measure(trainer, {"one": computing}, None, {}, lambda n: None, lambda: bool(asked.append(1)))
    assert (len(asked), computing.parts) == (1, 5)


def test_a_folder_without_a_run_is_a_wrong_setting_one_without_checkpoints_a_fault(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.workdir = .*: there is no such folder"):
        other_run(CheckpointConfig(), str(tmp_path / "mistyped"), "workdir")
    with pytest.raises(CheckpointError, match=r"config\.checkpoint\.weights = .*: holds no complete checkpoint"):
        other_run(CheckpointConfig(), str(tmp_path), "checkpoint.weights")


def test_weights_of_another_run_are_evaluated_where_the_own_folder_has_none(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"

    shapes = {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}
    mesh = make_mesh(1, jax.devices()[:1])
    trees = types.SimpleNamespace(params=shapes), types.SimpleNamespace(params={"w": NamedSharding(mesh, REPLICATED)})

    def evaluated(weights: str) -> str:
        config = Config(
            name="a",
            model=ViTConfig(),
            task=ClassificationConfig(),
            workdir=str(own),
            checkpoint=CheckpointConfig(weights=weights),
        )
        found = weights_to_evaluate(
            types.SimpleNamespace(config=config, shapes=trees[0], shardings=trees[1], mesh=mesh)
        )
        assert found.step == 3
        np.testing.assert_array_equal(found.params["w"], np.ones(4))
        return found.name

    def save(folder) -> None:
        state = TrainState(step=jnp.int32(3), params={"w": jnp.ones(4)}, opt_state=(), ema=None)
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            checkpoints.save(3, state, {})

    save(other)
    assert evaluated(str(other)) == str(other)
    with pytest.raises(ConfigError, match=r"config\.workdir = .*own': there is no such folder"):
        evaluated("")
    (own / "checkpoints").mkdir(parents=True)  # of a run that was stopped before its first checkpoint
    assert evaluated(str(other)) == str(other)
    with pytest.raises(CheckpointError, match=r"config\.workdir = .*own': holds no complete checkpoint"):
        evaluated("")
    save(own)
    assert evaluated(str(other)) == str(own)
