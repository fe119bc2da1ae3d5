"""The training loop."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np

from visionfm_jax.errors import TrainingError
from visionfm_jax.optim.loss_scale import FLOOR
from visionfm_jax.parallel.mesh import to_global
from visionfm_jax.train import spikes
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer

# How many steps the host runs ahead of the device: reading a step's outcome then never leaves the device idle.
LAG = 2
# Skipped steps in a row after which `on_nonfinite="skip"` gives up: the weights themselves are the cause by then.
MAX_SKIPPED = 50
# A gradient norm this many times the median of the steps before is noted, and kept with its samples.
SPIKE, SPIKE_WINDOW, SPIKE_AFTER = 10.0, 256, 64


class Monitor(Protocol):
    """The interface to what a person sees; `telemetry.monitor` implements it."""

    def dispatching(self, step: int) -> AbstractContextManager:
        """Around the dispatch of `step`, counted from 0."""

    def step_done(self, step: int) -> None:
        """The device has finished `step`, counted from 1."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Scalars of `step`, among them loss, images_per_s and data_wait."""

    def note(self, text: str) -> None:
        """A line for people."""


@dataclasses.dataclass
class Hooks:
    """The functions that the loop calls and does not know, all handed in by the entry point."""

    monitor: Monitor
    eval_due: Callable[[int], bool]  # whether any eval is due after this many steps
    evaluate: Callable[[int, TrainState], dict[str, float] | None]  # the metrics of those that are; None: cut off
    protocols: Callable[[int], dict[str, str]]  # by which the evals that are due after this many steps measure
    stop_requested: Callable[[], bool]  # asked on every host at every step: a signal has come
    save_due: Callable[[int], bool]  # by steps or minutes, the same answer on every host
    describe: Callable[[int, dict, np.ndarray], str]  # step, host batch, row numbers -> which samples they are
    batch_seen: Callable[[dict], None]  # each host batch: counts damaged records
    counts: Callable[[], dict[str, Any]]  # what has been counted, saved beside the state; called on every host; JSON
    keep: Callable[[str, int, dict, np.ndarray, dict], str]  # a spike: as `spikes.SpikeFolder.keep`


@dataclasses.dataclass
class _Pending:
    step: int
    metrics: dict[str, Any]
    batch: dict[str, np.ndarray]


def train(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[dict],
    checkpoints: Checkpoints,
    hooks: Hooks,
    record: dict[str, Any] | None = None,
) -> tuple[TrainState, bool]:
    """Train from `state.step` to the end, or until a stop is requested; returns the state and whether it is the end.

    A state is saved before it is evaluated, so that neither a signal nor an error in an evaluation costs a step. An
    evaluation that was cut off is the first thing that the next start does.

    Args:
      record: what was saved beside `state`.

    Raises:
      TrainingError: a non-finite loss or gradient, if the configuration says stop; in fp16, with the loss scale at
        its floor.
      DataError, CheckpointError, StorageError: from the loader and the checkpoints.
    """
    total = trainer.config.total_steps
    fields = trainer.task.batch_spec(1).keys()
    start = saved = int(state.step)
    window = _Window(trainer, hooks, record or {})

    def save_surely() -> None:
        """Wait until the state just saved is on disk, and save it again where that fails for the moment."""
        while checkpoints.failed(wait=True):
            checkpoints.save(saved, state, {**window.record(), **hooks.counts()})

    def evaluated() -> bool:
        """Measure and note the scores of the state just saved; False: cut off."""
        scores = hooks.evaluate(saved, state)
        if scores is None:
            return False
        save_surely()
        checkpoints.attach(saved, scores, hooks.protocols(saved))
        hooks.monitor.log(saved, scores)
        window.restart_clock()  # evaluation is not training time
        return True

    stop = False
    if checkpoints.latest() == start <= total and hooks.eval_due(start):
        scores, protocols = checkpoints.scores(start)
        if scores and protocols == hooks.protocols(start):
            hooks.monitor.log(start, scores)
        else:
            stop = not evaluated()

    for step in range(start, start if stop else total):
        with window.waiting_for_data():
            batch = next(batches)
        hooks.batch_seen(batch)
        with hooks.monitor.dispatching(step):
            state, metrics = trainer.step(state, to_global(trainer.mesh, {k: batch[k] for k in fields}))
        window.add(_Pending(step, metrics, batch))
        again = checkpoints.failed()

        done = step + 1
        stop, due = hooks.stop_requested(), hooks.eval_due(done)
        if stop or due or done == total or hooks.save_due(done) or again:
            window.settle(0)
            checkpoints.save(done, state, {**window.record(), **hooks.counts()})
            saved = done
        if due and not stop:
            if done == total:
                save_surely()  # whatever happens to the last evaluation
            stop = not evaluated()
        if stop:
            break

    window.settle(0)
    save_surely()
    evaluation_cut = stop and hooks.eval_due(saved)
    finished = saved >= total and not evaluation_cut  # beyond it where a finished run was shortened
    if not finished:
        hooks.monitor.note(f"stopped after step {saved}: the state is saved, the same command continues from there")
    return state, finished


class _Window:
    """Steps the device may still be busy with, and the averages of the current logging interval."""

    def __init__(self, trainer: Trainer, hooks: Hooks, record: dict[str, Any]):
        self.trainer, self.hooks = trainer, hooks
        self.pending: collections.deque[_Pending] = collections.deque()
        self.skipped: int = record.get("skipped", 0)  # since the run began
        self.skipped_in_a_row: int = record.get("skipped_in_a_row", 0)
        self.losses: list[float] = record.get("losses", [])  # since the last line of metrics
        self.norms = collections.deque(record.get("norms", []), maxlen=SPIKE_WINDOW)
        self.restart_clock()

    def record(self) -> dict[str, Any]:
        """What continues beside the state, so that metrics are those of a run that nothing interrupted; JSON."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {**counts, "losses": [*self.losses], "norms": [*self.norms]}

    def restart_clock(self) -> None:
        self.steps, self.began, self.waited = 0, time.monotonic(), 0.0

    def waiting_for_data(self) -> _Waiting:
        return _Waiting(self)

    def add(self, item: _Pending) -> None:
        self.pending.append(item)
        self.settle(LAG)

    def settle(self, lag: int) -> None:
        """Wait for all but the last `lag` steps, and account for them."""
        while len(self.pending) > lag:
            item = self.pending.popleft()
            loss, norm, finite = jax.device_get([item.metrics[k] for k in ("loss", "grad_norm", "finite")])
            self.hooks.monitor.step_done(item.step + 1)
            self.steps += 1
            if finite:
                self.losses.append(float(loss))
                self.skipped_in_a_row = 0
                self._watch_for_spikes(item, float(norm))
            else:
                self._not_finite(item)
            done, config = item.step + 1, self.trainer.config
            if done % config.telemetry.log_every == 0 or done == config.total_steps:
                self._log(item)

    def _log(self, item: _Pending) -> None:
        scalars = {k: float(v) for k, v in jax.device_get(item.metrics).items() if np.ndim(v) == 0 and k != "finite"}
        seconds = time.monotonic() - self.began
        config = self.trainer.config
        steps = self.steps or 1
        scalars |= {
            "loss": float(np.mean(self.losses)) if self.losses else float("nan"),
            "images_per_s": steps * config.train.batch_size / seconds,
            "tflops_per_device": steps * self.trainer.task.step_flops / seconds / self.trainer.mesh.size / 1e12,
            "data_wait": self.waited / seconds,
            "skipped_steps": self.skipped,
        }
        self.hooks.monitor.log(item.step + 1, scalars)
        self.losses.clear()
        self.restart_clock()

    def _watch_for_spikes(self, item: _Pending, norm: float) -> None:
        """Name the step, the tensor and the samples of a gradient far larger than those before."""
        usual = float(np.median(self.norms)) if len(self.norms) >= SPIKE_AFTER else np.inf
        self.norms.append(norm)
        if norm <= SPIKE * usual:
            return
        metrics = jax.device_get(item.metrics)
        tensor = self.trainer.tensor_names[int(np.argmax(metrics["gradient_norms"]))]
        who = self.hooks.describe(item.step, item.batch, np.argsort(-metrics["losses"])[:3])
        kept = self._keep(spikes.SPIKE, item, metrics, {"usual_grad_norm": usual})
        self.hooks.monitor.note(
            f"step {item.step}: gradient norm {norm:.3g} is {norm / usual:.0f} times its usual value, "
            f"most of it in {tensor}; the largest losses are of {who}; {kept}"
        )

    def _keep(self, kind: str, item: _Pending, metrics: dict[str, Any], more: dict[str, Any]) -> str:
        """Write down what is known of the step; where it lies, for people."""
        values = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0 and k != "finite"}
        values["gradient_norms"] = dict(zip(self.trainer.tensor_names, metrics["gradient_norms"].tolist(), strict=True))
        return self.hooks.keep(kind, item.step, {**values, **more}, metrics["losses"], item.batch)

    def _not_finite(self, item: _Pending) -> None:
        """Name the step, the first bad tensor and the samples; stop or go on as configured, in fp16 by the scale."""
        metrics = jax.device_get(item.metrics)
        paths = self.trainer.tensor_names
        bad = [p for p, n in zip(paths, metrics["gradient_norms"], strict=True) if not np.isfinite(n)]
        rows = np.flatnonzero(~np.isfinite(metrics["losses"]))
        where = (
            f"first in the gradient of {bad[0]} ({len(bad)} of {len(paths)} tensors)" if bad else "in the loss alone"
        )
        who = self.hooks.describe(item.step, item.batch, rows if len(rows) else np.arange(len(metrics["losses"])))
        who = who if len(rows) else f"no single one of {who}, as each loss is finite"
        self.skipped += 1
        scale = float(metrics.get("loss_scale", FLOOR))
        kept = self._keep(spikes.OVERFLOW if scale > FLOOR else spikes.NOT_FINITE, item, metrics, {})
        if "loss_scale" in metrics:
            self._overflow(item.step, scale, f"{where}; {who}; {kept}" if len(rows) else f"{where}; {kept}")
            return
        values = f"loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}"
        text = f"step {item.step}: {values}: not finite, {where}; {who}; {kept}"
        self.skipped_in_a_row += 1
        if self.trainer.config.train.on_nonfinite == "stop":
            raise TrainingError(f'{text}; config.train.on_nonfinite="skip" would leave such steps out')
        if self.skipped_in_a_row > MAX_SKIPPED:
            raise TrainingError(f"{text}; {self.skipped_in_a_row} steps in a row were skipped: lower config.optim.lr")
        self.hooks.monitor.note(f"skipped {text}")

    def _overflow(self, step: int, scale: float, where: str) -> None:
        """In fp16 an overflow is how the loss scale finds its size; only one that no scale prevents is a fault."""
        if scale <= FLOOR:
            raise TrainingError(
                f"step {step}: overflow at loss scale {scale:.0f}, its floor, {where}; lower config.optim.lr, or set "
                'config.train.precision="bf16"'
            )
        self.hooks.monitor.note(f"skipped step {step}: overflow at loss scale {scale:.0f}, {where}")


@dataclasses.dataclass
class _Waiting:
    window: _Window

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.window.waited += time.monotonic() - self.began
