"""Two processes with gloo between them train as one does, stop together, and fail together."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import (
    BATCH,
    EVERY,
    STEPS,
    compiled_once,
    copy,
    finish,
    finish_processes,
    last_step,
    losses,
    once,
    run,
    samples,
    start,
    start_processes,
    steps,
    until,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Iterator[Path]:
    """An undisturbed run of one process with two devices."""
    with compiled_once(tmp_path_factory) as shared:
        yield once(shared / "whole", run)


def assert_same_losses(folder: Path, whole: Path, first: int = 1) -> None:
    """Of the steps from `first` on, each once; which also says that the data came in the same order."""
    expected, got = losses(whole), losses(folder)
    assert list(got) == list(range(1, STEPS + 1))
    later = range(first, STEPS + 1)
    np.testing.assert_allclose([got[s] for s in later][:5], [expected[s] for s in later][:5], rtol=1e-5)
    # Adam amplifies the order of summation with every step; another order of the data would show at once.
    np.testing.assert_allclose([got[s] for s in later], [expected[s] for s in later], rtol=1e-3)


def test_two_train_as_one_and_stop_when_one_is_told(tmp_path, whole):
    folder = tmp_path / "run"
    processes = start_processes(folder, 2)
    until(lambda: last_step(folder) >= EVERY + 2, processes[1])
    processes[1].send_signal(signal.SIGTERM)  # as a scheduler that reclaims one host
    (out, err), (quiet, _) = finish_processes(processes, folder, 75)
    saved = last_step(folder)
    assert "on 2 x cpu" in out
    assert steps(folder)[-1] == saved > EVERY
    assert samples(folder) == [[saved * BATCH // 2, 0]] * 2
    assert f"stopped after step {saved}: the state is saved" in err
    assert "vit_huge_tiny" not in quiet  # only the first process talks

    out, _ = run(folder)  # one process with two devices continues what two have saved
    assert f"starts from      step {saved} of its own folder" in out
    assert_same_losses(folder, whole)
    assert samples(folder) == [[STEPS * BATCH, 0]]


def test_two_continue_what_one_has_saved(tmp_path, whole):
    folder = copy(whole, tmp_path / "run", EVERY * 2)
    (out, _), _ = finish_processes(start_processes(folder, 2), folder)
    assert f"starts from      step {EVERY * 2} of its own folder" in out
    assert_same_losses(folder, whole, first=EVERY * 2 + 1)
    assert steps(folder)[-1] == STEPS


@pytest.mark.usefixtures("whole")
def test_two_measure_frozen_features_as_one(tmp_path, whole):
    """k-NN and a linear probe, of labelled images that the processes share."""
    for kind in ("knn", "linear_probe"):
        words = ["--mode=evaluate", f"--eval={kind}", "--data=bundled:twemoji", "--gallery=bundled:noto"]
        one, two = (copy(whole, tmp_path / f"{kind}{n}", STEPS) for n in (1, 2))
        finish(start(one, *words, base=[f"--config={one}"]), one)
        finish_processes(start_processes(two, 2, *words, base=[f"--config={two}"]), two)
        found = [json.loads((folder / f"eval_{kind}.json").read_text()) for folder in (one, two)]
        assert [details.pop("weights") for details in found] == [str(one), str(two)]
        assert found[0] == found[1]
        assert found[0]["metrics"]["top1"] > 0.5


def test_the_failure_of_one_ends_the_other(tmp_path):
    """The disk of one host goes away in the middle of training."""
    rng = np.random.default_rng(0)
    for host in ("0", "1"):
        for label in range(9):
            (tmp_path / host / str(label)).mkdir(parents=True)
            for i in range(8):
                image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
                image.save(tmp_path / host / str(label) / f"{i}.png")
    data = ["--config.data.train[0].kind=folder", "--config.data.train[1].kind=folder"]
    data += ["--config.data.train[0].split=", "--config.data.train[1].split="]
    own = tuple([f"--config.data.train[{i}].path={tmp_path / host}" for i in range(2)] for host in ("0", "1"))
    folder = tmp_path / "run"
    processes = start_processes(folder, 2, *data, "--config.train.steps=100000", own=own)
    try:
        until(lambda: last_step(folder) >= 3, processes[1])
        shutil.rmtree(tmp_path / "1")
        _, err = finish(processes[1], Path(f"{folder}-1"), code=2, seconds=60)
        assert "visionfm_jax: error: process 1: folder" in err
        assert "cannot be read" in err
        _, err = finish(processes[0], Path(f"{folder}-0"), code=2, seconds=30)
        assert f"visionfm_jax: error: process 0: process 1 on {socket.gethostname()} has ended with code 2: fol" in err
    finally:
        for process in processes:
            process.kill()
