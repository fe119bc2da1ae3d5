"""A run that is interrupted and continued is the run that nothing disturbed, to the last bit."""

from __future__ import annotations

import json
import random
import signal
import time

import numpy as np
import pytest
from runs import (
    BATCH,
    EVERY,
    STEPS,
    assert_identical,
    copy,
    files,
    finish,
    last_step,
    losses,
    only_error,
    run,
    samples,
    signal_after,
    start,
    state,
    steps,
)

from visionfm_jax.config.load import from_arguments
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.loader import train_loader
from visionfm_jax.data.sources import open_source


def test_interrupted_three_times_is_the_same_run(tmp_path, whole):
    seed = time.time_ns() % 10_000
    print("seed of the interruptions:", seed)
    at = sorted(random.Random(seed).sample(range(3, STEPS - 12), 3))
    folder = tmp_path / "run"

    process = start(folder)
    signal_after(process, folder, at[0], signal.SIGTERM)
    out, err = finish(process, folder, code=75)
    saved = last_step(folder)
    assert "starts from      scratch, seed 0" in out
    assert f"stopped after step {saved}: the state is saved, the same command continues" in err
    assert steps(folder)[-1] == saved

    process = start(folder)
    signal_after(process, folder, max(at[1], saved + 1), signal.SIGINT)
    out, _ = finish(process, folder, code=130)
    assert f"starts from      step {saved} of its own folder" in out
    saved = last_step(folder)
    assert steps(folder)[-1] == saved

    process = start(folder)
    signal_after(process, folder, max(at[2], saved + 1), signal.SIGKILL)
    finish(process, folder, code=-signal.SIGKILL)

    newest = steps(folder)[-1]
    out, err = run(folder)
    assert f"starts from      step {newest} of its own folder" in out
    assert f"step {STEPS}/{STEPS}" in err

    assert_identical(state(folder), state(whole))
    assert losses(folder) == losses(whole)
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert samples(folder) == samples(whole) == [[STEPS * BATCH, 0]]


@pytest.mark.parametrize(
    ("devices", "arguments"),
    [(1, ["--config.parallel.stage=0"]), (4, ["--config.parallel.stage=1", "--config.parallel.replicas=2"])],
)
def test_continues_on_other_devices_and_another_stage(tmp_path, whole, devices, arguments):
    folder = copy(whole, tmp_path / "run", EVERY)
    out, _ = run(folder, *arguments, devices=devices)
    assert f"on {devices} x cpu" in out
    assert f"starts from      step {EVERY} of its own folder" in out
    expected, got = losses(whole), losses(folder)
    assert expected.keys() == got.keys()
    later = range(EVERY + 1, STEPS + 1)
    np.testing.assert_allclose([got[s] for s in later][:5], [expected[s] for s in later][:5], rtol=1e-5)
    # Adam amplifies the order of summation with every step; another order of the data would show at once.
    np.testing.assert_allclose([got[s] for s in later], [expected[s] for s in later], rtol=1e-3)


def test_the_data_depend_on_the_step_alone():
    config, _ = from_arguments(["--config=configs/vit_huge.py:tiny"])
    sources = [open_source(s) for s in config.data.train]

    def batch(step: int, host: int = 0, hosts: int = 1, skip: int = 0) -> dict[str, np.ndarray]:
        with train_loader(
            config.data, image_size=16, batch_size=BATCH, seed=0, start_step=step - skip, host=host, hosts=hosts,
            sources=sources, fields=Labels(10),
        ) as batches:  # fmt: skip
            for _ in range(skip):
                next(batches)
            return {k: v.copy() for k, v in next(batches).items()}

    whole, continued = batch(EVERY, skip=EVERY), batch(EVERY)
    halves = [batch(EVERY, host, hosts=2) for host in (0, 1)]
    for name, values in whole.items():
        np.testing.assert_array_equal(continued[name], values)
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), values)


def test_other_data_than_those_of_the_run_are_refused(tmp_path, whole):
    first = copy(whole, tmp_path / "first", EVERY)
    kept = json.loads((first / "data.json").read_text())
    kept["sources"][0]["records"] += 1  # as if one had been removed since
    (first / "data.json").write_text(json.dumps(kept))
    before = files(first)
    _, err = run(tmp_path / "second", f"--config.checkpoint.resume={first}", code=2)
    line = only_error(err)
    assert f"not the data that the run in {first} was trained on: " in line
    assert " records were there, " in line
    assert f"with its weights by config.checkpoint.weights='{first}'" in line
    assert files(first) == before
    assert not (tmp_path / "second/data.json").exists()


def test_weights_alone_start_a_new_run_from_the_averaged_ones(tmp_path, whole):
    folder = tmp_path / "run"
    arguments = [f"--config.checkpoint.weights={whole}", "--config.checkpoint.every_steps=1", "--config.train.steps=5"]
    out, _ = run(folder, *arguments, "--config.checkpoint.keep_last=9")
    assert f"starts from      the weights of {whole}" in out
    assert list(losses(folder)) == [1, 2, 3, 4, 5]
    before, after = state(whole), state(folder, 1)  # the learning rate of the first step of a warm-up is 0
    for name in after:
        if name.startswith("['params']"):
            averaged = name.replace("params", "ema", 1)
            assert after[name].tobytes() == before[averaged].tobytes() != before[name].tobytes()
            np.testing.assert_allclose(after[averaged], before[averaged], rtol=1e-6, atol=1e-9)
    # From here on its own checkpoints come first.
    out, _ = run(folder, *arguments)
    assert "starts from      step 5 of its own folder" in out
