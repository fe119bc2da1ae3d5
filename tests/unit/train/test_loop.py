"""Saving before evaluating, a stop in the middle of an evaluation, and metrics that do not notice an interruption."""

from __future__ import annotations

import contextlib
import errno
import os
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path import atomicity

from visionfm_jax.config import CheckpointConfig, Config, TelemetryConfig, TrainConfig
from visionfm_jax.data.loader import DamageLog
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import CheckpointError, DataError, StorageError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.parallel.mesh import make_mesh, of_all_hosts
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.telemetry.writers import MetricWriter, read_metrics
from visionfm_jax.train import checkpoint
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.loop import Hooks, train
from visionfm_jax.train.state import TrainState

TOTAL = 12


class Damaged:
    """A source of which the log names records."""

    name = "damaged"

    def __len__(self) -> int:
        return 1000

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int):
        raise DamagedRecord(f"record {index} cannot be read")


class Toy:
    """A run of `TOTAL` steps whose state is a number, in `folder`; each call of `start` is a start of the command."""

    def __init__(self, folder: Path, log_every: int = 5, evaluate_at: tuple[int, ...] = (), save_every: int = 3):
        self.folder, self.evaluate_at, self.save_every = folder, evaluate_at, save_every
        self.protocols = {"val": "0123abcd"}
        self.damaged_from, self.max_damaged = TOTAL, 0.0  # from this step on one of 16 samples is
        self.config = Config(
            name="toy",
            model=ViTConfig(),
            task=ClassificationConfig(),
            train=TrainConfig(batch_size=2, steps=TOTAL),
            telemetry=TelemetryConfig(log_every=log_every),
        )

    def start(self, stop_after: int | None = None, evaluate=lambda step, state: {"val/top1": step / TOTAL}) -> bool:
        """Train on; returns whether that was the end."""

        def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
            weight = 0.9 * state.params["w"] + batch["x"].mean()
            finite, losses = jnp.asarray(True), jnp.zeros(2)
            metrics = {
                "loss": weight,
                "grad_norm": weight,
                "finite": finite,
                "losses": losses,
                "gradient_norms": losses,
            }
            return state.replace(step=state.step + 1, params={"w": weight}), metrics

        task = types.SimpleNamespace(batch_spec=lambda size: {"x": None}, step_flops=1.0)
        trainer = types.SimpleNamespace(config=self.config, mesh=make_mesh(1, jax.devices()[:1]), step=step, task=task)
        with Checkpoints(self.folder, CheckpointConfig()) as checkpoints:
            state, record = TrainState(jnp.asarray(0), {"w": jnp.asarray(1.0)}, (), None), {}
            if checkpoints.latest():
                found = checkpoints.restore(*shapes_of(state))
                state, record = found.what, found.record
            asked = [int(state.step)]
            damage = DamageLog(
                [Damaged()], self.max_damaged, batch_size=16, start_step=asked[0], counts=record.get("samples", ())
            )

            def stop() -> bool:
                asked[0] += 1
                return asked[0] == stop_after

            with MetricWriter(self.folder, start_step=int(state.step), tensorboard=False) as writer:
                monitor = types.SimpleNamespace(
                    dispatching=lambda s: contextlib.nullcontext(),
                    step_done=lambda s: None,
                    log=writer.write,
                    note=print,
                )
                hooks = Hooks(
                    monitor=monitor,
                    eval_due=lambda done: done in self.evaluate_at,
                    evaluate=evaluate,
                    protocols=lambda step: self.protocols,
                    stop_requested=stop,
                    save_due=lambda done: done % self.save_every == 0,
                    describe=lambda *_: "",
                    batch_seen=damage.see,
                    counts=lambda: {"samples": of_all_hosts(damage.counts)},
                    keep=lambda *_: "",
                )
                batches = map(self.batch, range(int(state.step), TOTAL))
                return train(trainer, state, batches, checkpoints, hooks, record)[1]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        damaged = (np.arange(16) == 3) & (step >= self.damaged_from)
        source, record = np.zeros(16, int), 16 * step + np.arange(16)
        return {"x": np.full(16, step / 7, np.float32), "damaged": damaged, "source": source, "record": record}

    def saved(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdigit())

    def scored(self) -> list[int]:
        return [s for s in self.saved() if (self.folder / "checkpoints" / str(s) / "scores.json").exists()]

    def metrics(self) -> list[dict]:
        """Without what clocks say."""
        clocks = ("images_per_s", "tflops_per_device", "data_wait")
        return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(self.folder)]


def shapes_of(state: TrainState) -> tuple[TrainState, TrainState]:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.eval_shape(lambda: state), jax.tree.map(lambda _: here, state)


def test_damaged_samples_are_judged_over_the_whole_run(tmp_path):
    """However often it is interrupted, a run is refused where it would have been."""
    errors = {}
    for name, stops in {"whole": (), "stopped": (1, 2, 5, 7), "killed": ()}.items():
        run = Toy(tmp_path / name)
        run.damaged_from, run.max_damaged = 2, 0.01
        for stop in stops:
            assert not run.start(stop_after=stop)
        with pytest.raises(DataError, match=r"max_damaged = 0\.01") as error:
            run.start()
        if name == "killed":  # it was saved every third step: the steps since then are judged again
            with pytest.raises(DataError, match=r"max_damaged = 0\.01") as error:
                run.start()
        errors[name] = str(error.value).partition("%")[0]
    assert errors == dict.fromkeys(errors, "8 of 160 samples (5.00")


def test_the_state_is_saved_before_it_is_evaluated(tmp_path):
    run = Toy(tmp_path, evaluate_at=(4, TOTAL))
    seen = []

    def evaluate(step, state):
        seen.append((step, any(p.name.startswith(str(step)) for p in (tmp_path / "checkpoints").iterdir())))
        return {"val/top1": 0.5}

    assert run.start(evaluate=evaluate)
    assert seen == [(4, True), (TOTAL, True)]


def test_an_evaluation_that_fails_at_the_end_costs_no_step(tmp_path):
    run = Toy(tmp_path, evaluate_at=(TOTAL,), save_every=100)

    def fails(step, state):
        assert run.saved() == [TOTAL]  # whole, under its final name
        raise RuntimeError("a broken image")

    with pytest.raises(RuntimeError, match="a broken image"):
        run.start(evaluate=fails)
    assert run.start()
    assert run.metrics()[-1] == {"step": TOTAL, "val/top1": 1.0}
    assert run.scored() == [TOTAL]
    assert run.start(evaluate=fails)  # it has its scores: not evaluated again
    assert [row["step"] for row in run.metrics() if "val/top1" in row] == [TOTAL]


def test_scores_of_another_protocol_do_not_count(tmp_path):
    run = Toy(tmp_path, evaluate_at=(TOTAL,))
    assert run.start()
    run.protocols = {"val": "4567cdef"}  # another crop, say
    assert run.start(evaluate=lambda step, state: {"val/top1": 0.25})
    assert run.metrics()[-1] == {"step": TOTAL, "val/top1": 0.25}


@pytest.mark.parametrize("at", [4, TOTAL])
def test_an_evaluation_that_was_cut_off_comes_first_at_the_next_start(tmp_path, at):
    whole, run = (Toy(tmp_path / name, evaluate_at=(4, TOTAL)) for name in ("whole", "run"))
    assert whole.start()
    assert not run.start(evaluate=lambda step, state: None if step == at else {"val/top1": step / TOTAL})
    assert run.saved()[-1] == at
    assert run.start()
    assert run.scored()[-1] == TOTAL
    assert run.metrics() == whole.metrics()


@pytest.mark.parametrize("stop_after", [3, 4, 7, 10, TOTAL])
def test_the_averages_do_not_notice_an_interruption(tmp_path, stop_after):
    whole, run = Toy(tmp_path / "whole"), Toy(tmp_path / "run")
    assert whole.start()
    assert run.start(stop_after=stop_after) == (stop_after == TOTAL)
    assert run.saved()[-1] == stop_after
    assert run.start()
    assert run.metrics() == whole.metrics()
    assert [row["step"] for row in run.metrics()] == [5, 10, TOTAL]


@pytest.fixture
def faulty(monkeypatch):
    """Storage whose next `count` saves fail when they are given their final name; and the pauses that were made."""
    pauses, rename = [], atomicity.AtomicRenameTemporaryPath.finalize
    monkeypatch.setattr(checkpoint.time, "sleep", pauses.append)

    def of(count: int, error: OSError):
        left = [count]

        async def finalize(self, *arguments, **named):
            if self.get_final().name.isdigit() and left[0]:
                left[0] -= 1
                raise error
            return await rename(self, *arguments, **named)

        monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", finalize)
        return pauses

    return of


def test_a_passing_fault_of_the_storage_is_outlasted(tmp_path, faulty, capsys):
    whole, run = (Toy(tmp_path / name, evaluate_at=(4, TOTAL)) for name in ("whole", "run"))
    assert whole.start()
    pauses = faulty(3, OSError(errno.ESTALE, os.strerror(errno.ESTALE)))
    assert run.start()
    assert pauses == [1, 2, 4]
    assert capsys.readouterr().err.count("Stale file handle; trying again in ") == 3
    assert run.saved()[-1] == TOTAL
    assert run.metrics() == whole.metrics()


def test_a_fault_that_stays_ends_the_run_with_a_code_that_is_requeued(tmp_path, faulty):
    pauses = faulty(100, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(StorageError, match=r"saving .*: .*Input/output error") as caught:
        Toy(tmp_path).start()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 71
    assert pauses == [1, 2, 4, 8, 16, 32]


def test_a_full_disk_is_not_tried_again(tmp_path, faulty):
    pauses = faulty(100, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="the disk is full; free space and start again") as caught:
        Toy(tmp_path).start()
    assert caught.value.exit_code == 74
    assert pauses == []


def test_a_run_shorter_than_the_interval_logs_its_loss(tmp_path):
    run = Toy(tmp_path, log_every=50)
    assert run.start()
    (row,) = run.metrics()
    assert row["step"] == TOTAL
    assert np.isfinite(row["loss"])
