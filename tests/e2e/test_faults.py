"""Damage, a full disk, a second run, values that are not finite: one clear line each, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runs import (
    BATCH,
    EVERY,
    SMALL,
    STEPS,
    assert_identical,
    copy,
    files,
    finish,
    last_step,
    losses,
    only_error,
    run,
    signal_after,
    start,
    state,
    steps,
    until,
)

from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.spikes import kept_step

UNBOUNDED = [f"--config={Path(__file__).with_name('overflowing.py')}", *SMALL[1:]]


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, whole):
    folder = copy(whole, tmp_path / "run", STEPS)
    before = files(folder)
    _, err = run(folder, "--config.model.patch_size=4", code=74)
    head, *lines = err.splitlines()
    assert head.startswith(f"visionfm_jax: error: {folder}/checkpoints/{STEPS} belongs to another model")
    assert "config.workdir" in head
    assert "  other shape:            params.embed.kernel (192, 96) there, (48, 96) here" in lines
    # As the weights of another run, without averaged ones here, and with a class token more.
    new = tmp_path / "new"
    _, err = run(new, f"--config.checkpoint.weights={folder}", "--config.model.pool=cls", code=2)
    assert "do not fit the model: only here: cls_token; other shapes: pos_embed " in only_error(err)
    assert files(folder) == before


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, whole):
    folder = copy(whole, tmp_path / "run", EVERY, EVERY * 2)
    newest = folder / "checkpoints" / str(EVERY * 2)
    data = largest(newest)
    intact = data.read_bytes()
    remedy = f'move it away to continue from step {EVERY}, or set config.checkpoint.on_damage="older"'
    for damage in (lambda: os.truncate(data, 1000), data.unlink):
        damage()
        before = files(folder)
        line = only_error(run(folder, code=74)[1])
        assert f"{newest} is damaged: " in line
        assert line.endswith(remedy)
        assert len(line) < 500
        assert files(folder) == before
    data.write_bytes(intact)
    (newest / "default" / "_METADATA").unlink()
    assert remedy in only_error(run(folder, code=74)[1])

    newest.rename(folder / "damaged")  # the remedy
    (folder / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp").mkdir()  # what a crash leaves of a save
    out, _ = run(folder)
    assert f"starts from      step {EVERY} of its own folder" in out
    assert_identical(state(folder), state(whole))
    assert steps(folder) == [EVERY, EVERY * 2, STEPS]


def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, whole):
    folder = copy(whole, tmp_path / "run", EVERY)
    # Files beyond a mebibyte cannot be written; metrics and logs still can.
    process = start(folder, prefix=["bash", "-c", 'ulimit -f 1024; exec "$@"', "-"])
    line = only_error(finish(process, folder, code=74)[1])
    assert "the disk is full; free space and start again: earlier checkpoints are intact" in line
    assert steps(folder) == [EVERY]
    assert ": CheckpointError: " in (folder / "report.html").read_text()

    out, _ = run(folder)
    assert f"starts from      step {EVERY} of its own folder" in out
    assert_identical(state(folder), state(whole))


def test_a_second_run_in_the_folder_is_refused(tmp_path, whole):
    folder, second = tmp_path / "run", tmp_path / "second"
    second.symlink_to(folder)
    first = start(folder)
    until(lambda: last_step(folder) >= 1, first)
    first.send_signal(signal.SIGSTOP)  # so that it is still there when the second comes
    try:
        before = files(folder)
        _, err = run(second, code=2)
        assert "another run is using" in only_error(err)
        assert files(folder) == before
    finally:
        first.send_signal(signal.SIGCONT)
    finish(first, folder)
    assert_identical(state(folder), state(whole))


@pytest.fixture
def overflowing(tmp_path) -> list[str]:
    """Black images, on which training is fine, and one bright one, which the normalisation lets overflow."""
    images = np.zeros((BATCH * 4, 16, 16), np.uint8)
    images[37] = 255
    # One archive, so that the order is that of a single source; the second of `tiny` gets next to no weight.
    np.savez(tmp_path / "train.npz", image=images, label=np.arange(len(images)) % 9)
    source = f"--config.data.train[0].kind=numpy --config.data.train[0].path={tmp_path} --config.data.train[1].kind="
    source += f"numpy --config.data.train[1].path={tmp_path} --config.data.train[1].weight=1e-6"
    # About the smallest normal number: black stays 0, white becomes so large that the first norm overflows.
    mean, std = "--config.data.augment.mean=(0.,0.,0.)", "--config.data.augment.std=(1.2e-38,1.2e-38,1.2e-38)"
    alone = "--config.task.cutmix=0."  # so that one image of the batch is the cause
    rest = [alone, "--config.data.augment.jitter=(0.,0.,0.,0.)", "--config.optim.warmup_steps=2"]
    return [*source.split(), mean, std, *rest]


def start_unbounded(folder: Path, *arguments: str) -> subprocess.Popen:
    return start(folder, *arguments, base=UNBOUNDED)


def run_unbounded(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    return finish(start_unbounded(folder, *arguments), folder, code)


def test_a_value_that_is_not_finite(tmp_path, overflowing):
    arguments = [*overflowing, "--config.train.steps=12", "--config.checkpoint.every_steps=2"]
    folder = tmp_path / "stop"
    line = only_error(run_unbounded(folder, *arguments, code=4)[1])
    assert "not finite" in line
    assert line.count("train.npz[") == line.count("train.npz[37];") == 1
    assert "first in the gradient of blocks.attn." in line
    assert 'config.train.on_nonfinite="skip"' in line
    bad = int(line.partition("error: step ")[2].partition(":")[0])
    assert steps(folder)[-1] == bad // 2 * 2
    assert all(np.isfinite(v).all() for v in state(folder).values())
    assert f"kept in {folder}/spikes/step-{bad:08}.jsonl, visionfm replay --step={bad} runs it again" in line
    head, samples = kept_step(folder, bad)
    assert head["kind"] == "not finite"
    assert [s["key"] for s in samples if not np.isfinite(s["loss"])] == ["train.npz[37]"]
    assert f": TrainingError: step {bad}: loss nan" in (folder / "report.html").read_text()

    before = files(folder)
    out, _ = run_unbounded(
        folder,
        *arguments,
        "--mode=replay",
        f"--step={bad}",
        "--config.train.on_nonfinite=skip",
        "--config.optim.lr=0.7",
    )
    assert "\n  as in the run    optim.lr: 0.7 -> " in out
    assert "\n  changed          train.on_nonfinite: stop -> skip\n" in out
    assert "\n  in the run       not finite, the same to the last bit\n" in out
    assert "\n  first not finite forward pass, output of blocks[0].ln1; the input of blocks[0].ln1 is finite\n" in out
    assert re.search(r"\n  samples          \d+ = numpy .*train.npz\[37\] \(loss nan\)\n", out)
    after = files(folder)
    new = after.keys() - before.keys()
    assert {name: after[name] for name in before} == before
    assert new == {f"replay/step-{bad:08}/{name}" for name in ("statistics.json", "layers.png", "samples.png")}
    statistics = json.loads(after[f"replay/step-{bad:08}/statistics.json"])
    assert [s["key"] for s in statistics["suspects"]] == ["train.npz[37]"]
    assert (
        next(layer["layer"] for layer in statistics["layers"] if layer["forward"]["bad"]) == "output of blocks[0].ln1"
    )

    # Continued with the other rule: the bright image of each of the three epochs is left out.
    _, err = run_unbounded(folder, *arguments, "--config.train.on_nonfinite=skip")
    skipped = [line for line in err.splitlines() if line.startswith("skipped step ")]
    assert skipped[0].startswith(f"skipped step {bad}: ")
    assert read_metrics(folder)[-1]["skipped_steps"] == len(skipped) == 3
    assert sorted(losses(folder)) == list(range(1, 13))
    assert all(np.isfinite(v).all() for v in state(folder).values())


def test_weights_that_are_not_finite_end_a_run_that_skips(tmp_path):
    arguments = ["--config.optim.lr=1e30", "--config.optim.clip_norm=0", "--config.train.on_nonfinite=skip"]
    line = run_unbounded(tmp_path / "run", *arguments, code=4)[1].splitlines()[-1]
    assert "51 steps in a row were skipped: lower config.optim.lr" in line


def test_overflows_of_fp16_are_ordinary_and_a_killed_run_keeps_the_scale(tmp_path, overflowing):
    arguments = [*overflowing, "--config.train.precision=fp16", "--config.train.steps=12"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    _, err = run_unbounded(whole, *arguments)
    skipped = [line for line in err.splitlines() if line.startswith("skipped step ")]
    assert len(skipped) == 3  # one in each epoch, whatever on_nonfinite says
    assert ": overflow at loss scale 65536, first in the gradient of " in skipped[0]
    assert "train.npz[37]" in skipped[0]
    rows = read_metrics(whole)
    assert [rows[0]["loss_scale"], rows[-1]["skipped_steps"]] == [65536, 3]

    process = start_unbounded(folder, *arguments, "--config.checkpoint.every_steps=1")
    signal_after(process, folder, 4, signal.SIGKILL)
    finish(process, folder, code=-signal.SIGKILL)
    run_unbounded(folder, *arguments)
    assert_identical(state(folder), state(whole))
    assert state(folder)["['loss_scale']['scale']"] == 65536 / 4  # the hysteresis, then two halvings


def test_an_overflow_at_the_floor_of_the_loss_scale_stops_with_advice(tmp_path):
    folder, fp16 = tmp_path / "run", "--config.train.precision=fp16"
    bright = "--config.data.augment.std=(1e-6,1e-6,1e-6)"  # every image is beyond fp16
    _, err = run_unbounded(folder, fp16, bright, "--config.checkpoint.every_steps=4", code=4)
    *_, line = [line for line in err.splitlines() if not line.startswith("step ")]
    assert line.startswith("visionfm_jax: error: step 17: overflow at loss scale 1, its floor, first in the gradient")
    assert line.endswith('; lower config.optim.lr, or set config.train.precision="bf16"')
    assert err.count("skipped step ") == 17
    assert steps(folder)[-1] == 16

    remedy = "--config.train.precision=bf16"
    run_unbounded(folder, bright, remedy, "--config.train.steps=20")  # from where it was
    assert not any("loss_scale" in name for name in state(folder))
    assert sorted(losses(folder))[-1] == 20
