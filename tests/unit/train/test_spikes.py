"""Spikes: noticed by the loop, kept with their samples, bounded in number, and never the end of a run by themselves."""

from __future__ import annotations

import contextlib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.config import Config, TrainConfig
from visionfm_jax.errors import DataError, TrainingError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train import spikes
from visionfm_jax.train.loop import SPIKE_AFTER, Hooks, train
from visionfm_jax.train.spikes import KEPT, SpikeFolder, kept_step
from visionfm_jax.train.state import TrainState

BATCH = 4
VALUES = {"loss": 1.0, "grad_norm": 2.0, "gradient_norms": {"head": 2.0}}  # of a step


class Letters:
    """A source of 26 records."""

    name = "letters"

    def __len__(self) -> int:
        return 26

    def key(self, index: int) -> str:
        return "abcdefghijklmnopqrstuvwxyz"[index]


def batch_of(step: int) -> dict:
    record = (step * BATCH + np.arange(BATCH)) % 26
    return {"image": np.zeros((BATCH, 1)), "source": np.zeros(BATCH, int), "record": record, "damaged": record == 25}


def run(folder: Path, norms: dict[int, float], *, steps: int, start: int = 0, record=None, **metrics) -> list[str]:
    """Train a toy whose gradient norms are 1 and those given; returns the notes."""
    config = Config(
        name="toy",
        model=ViTConfig(),
        task=ClassificationConfig(),
        train=TrainConfig(batch_size=BATCH, steps=steps, on_nonfinite=metrics.pop("on", "stop")),
    )

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        number = int(state.step)
        norm = norms.get(number, 1.0)
        losses = jnp.array([1.0, 2.0, 9.0 if norm > 1 else 3.0, 0.5]) + (0 if np.isfinite(norm) else np.nan)
        values = {"loss": losses.mean(), "grad_norm": norm, "finite": np.isfinite(norm), "losses": losses, **metrics}
        return state.replace(step=number + 1), values | {"gradient_norms": jnp.array([0.1, norm])}

    trainer = types.SimpleNamespace(
        config=config, mesh=make_mesh(1, jax.devices()[:1]), step=step,
        tensor_names=["embed.kernel", "head.kernel"],
        task=types.SimpleNamespace(batch_spec=lambda size: {"image": None}, step_flops=1.0),
    )  # fmt: skip
    notes: list[str] = []
    monitor = types.SimpleNamespace(
        dispatching=lambda s: contextlib.nullcontext(),
        step_done=lambda s: None,
        log=lambda s, m: None,
        note=notes.append,
    )
    hooks = Hooks(
        monitor=monitor, eval_due=lambda s: False, evaluate=lambda s, state: {},
            protocols=lambda s: {}, stop_requested=lambda: False,
        save_due=lambda s: False, describe=lambda step, batch, rows: f"rows {rows.tolist()}",
        batch_seen=lambda batch: None, counts=lambda: {}, keep=SpikeFolder(folder, [Letters()]).keep,
    )  # fmt: skip
    saved = {}
    checkpoints = types.SimpleNamespace(
        latest=lambda: None, failed=lambda wait=False: False,
        save=lambda step, state, record: saved.update(record),
    )  # fmt: skip
    state = TrainState(jnp.asarray(start), {}, (), None)
    train(trainer, state, map(batch_of, range(start, steps)), checkpoints, hooks, record)
    run.saved = saved
    return notes


def test_a_spike_is_noted_and_kept_with_its_samples(tmp_path):
    before = SPIKE_AFTER - 1
    notes = run(tmp_path, {before: 10.5, 80: 10.5, 90: 9.9, 95: 30.0}, steps=100)
    assert len(notes) == 2  # not before there is a usual value, and not by less than ten times
    assert notes[0] == (
        "step 80: gradient norm 10.5 is 10 times its usual value, most of it in head.kernel; the largest losses are of "
        f"rows [2, 1, 0]; kept in {tmp_path}/spikes/step-00000080.jsonl, visionfm replay --step=80 runs it again"
    )
    head, rows = kept_step(tmp_path, 80)
    assert head.pop("gradient_norms") == {"embed.kernel": pytest.approx(0.1), "head.kernel": 10.5}
    assert head == {"step": 80, "kind": "spike", "loss": 3.125, "grad_norm": 10.5, "usual_grad_norm": 1.0}
    assert [row["sample"] for row in rows] == [320, 321, 322, 323]
    assert [row["record"] for row in rows] == [320 % 26, 321 % 26, 322 % 26, 323 % 26]
    assert [row["key"] for row in rows] == ["i", "j", "k", "l"]
    assert [row["loss"] for row in rows] == [1, 2, 9, 0.5]
    assert kept_step(tmp_path, 81) is None


def test_the_record_that_took_a_damaged_ones_place_is_named(tmp_path):
    SpikeFolder(tmp_path, [Letters()]).keep(spikes.SPIKE, 6, VALUES, np.zeros(BATCH), batch_of(6))
    assert [row["key"] for row in kept_step(tmp_path, 6)[1]] == ["y", "a", "a", "b"]  # z is damaged


def test_what_is_usual_outlives_an_interruption(tmp_path):
    run(tmp_path, {}, steps=70)
    assert len(run(tmp_path, {71: 11.0}, steps=80, start=70, record=run.saved)) == 1
    assert len(run(tmp_path, {71: 11.0}, steps=80, start=70)) == 0


def test_a_step_that_is_not_finite_is_kept(tmp_path):
    with pytest.raises(
        TrainingError, match=r"kept in .*step-00000002.jsonl, visionfm replay --step=2 runs it again; conf"
    ):
        run(tmp_path, {2: float("nan")}, steps=5)
    head, rows = kept_step(tmp_path, 2)
    assert head["kind"] == "not finite"
    assert np.isnan([head["loss"], head["grad_norm"], head["gradient_norms"]["head.kernel"], rows[0]["loss"]]).all()
    assert "NaN" not in (tmp_path / "spikes" / "step-00000002.jsonl").read_text()  # which is no JSON
    notes = run(tmp_path, {3: float("inf")}, steps=5, on="skip")
    assert notes[0].startswith("skipped step 3: ")
    assert kept_step(tmp_path, 3)[0]["grad_norm"] == float("inf")


def test_overflows_of_fp16_crowd_nothing_out(tmp_path):
    run(tmp_path, {1: float("nan")}, steps=3, on="skip")
    run(tmp_path, dict.fromkeys(range(3 * KEPT), float("inf")), steps=3 * KEPT, loss_scale=1024.0)
    assert kept_step(tmp_path, 1)[0]["kind"] == "not finite"
    names = sorted(path.name for path in (tmp_path / "spikes").iterdir())
    kept = [*range(KEPT // 2), *range(3 * KEPT - KEPT // 2, 3 * KEPT)]  # the first and the latest
    assert names == [*(f"overflow-{step:08}.jsonl" for step in kept), "step-00000001.jsonl"]
    assert kept_step(tmp_path, 95)[0]["loss_scale"] == 1024
    run(tmp_path, {40: float("inf")}, steps=41, start=40, loss_scale=512.0)  # continued from before the latest
    assert kept_step(tmp_path, 40)[0]["loss_scale"] == 512
    with pytest.raises(TrainingError, match=r"its floor, .*kept in .*/step-00000002.jsonl, .*; lower config.optim.lr"):
        run(tmp_path, {2: float("inf")}, steps=3, loss_scale=1.0)


def test_each_process_writes_what_it_has_loaded(tmp_path):
    losses = np.arange(2.0 * BATCH)
    for host in (0, 1):
        SpikeFolder(tmp_path, [Letters()], host, 2).keep(spikes.SPIKE, 3, VALUES, losses, batch_of(host))
    text = (tmp_path / "spikes" / "step-00000003.process-1.jsonl").read_text()
    assert '"sample": 28, "source": "letters", "record": 4, "key": "e", "loss": 4.0' in text.splitlines()[1]
    assert [row["sample"] for row in kept_step(tmp_path, 3)[1]] == [24, 25, 26, 27]


@pytest.mark.parametrize(
    "damage",
    [lambda text: "", lambda text: text[:70], lambda text: text.replace("2.0", '"two"', 1), lambda text: "[1]\n" + text,
     lambda text: text.replace('"kind"', '"kin"'), lambda text: text.replace('"loss": 3', '"los": 3'),
     lambda text: "[" * 100_000, lambda text: text.replace("{", "{\x00", 1)],
)  # fmt: skip
def test_a_damaged_file_of_a_step_is_one_line(tmp_path, damage):
    SpikeFolder(tmp_path, [Letters()]).keep(spikes.SPIKE, 3, VALUES, np.arange(BATCH), batch_of(3))
    path = tmp_path / "spikes" / "step-00000003.jsonl"
    assert kept_step(tmp_path, 3)
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match=rf"^{path} is damaged or cannot be read: .+$"):
        kept_step(tmp_path, 3)


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "spikes").write_text("in the way")
    notes = run(tmp_path, {80: 11.0}, steps=90)
    assert notes[0].endswith("spikes/step-00000080.jsonl cannot be written: File exists")
