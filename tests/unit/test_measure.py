"""Evaluation between the training loop and the evals."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.errors import CheckpointError, ConfigError
from visionfm_jax.main import measure, other_run
from visionfm_jax.parallel.mesh import make_mesh


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

    scores = measure(trainer, evals, None, {}, lambda: None, stop)
    done = sum(e.batches for e in evals.values())
    if stop_at is None:
        assert (scores, done) == ({"one/top1": 0.5, "two/top1": 0.5}, 20)
    else:
        assert (scores, done) == (None, stop_at - 1)


def test_a_folder_without_a_run_is_a_wrong_setting_one_without_checkpoints_a_fault(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.workdir = .*: there is no such folder"):
        other_run(CheckpointConfig(), str(tmp_path / "mistyped"), "workdir")
    with pytest.raises(CheckpointError, match=r"config\.checkpoint\.weights = .*: holds no complete checkpoint"):
        other_run(CheckpointConfig(), str(tmp_path), "checkpoint.weights")
