"""Everything that watches a run, as the one object the training loop talks to."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

import jax

from visionfm_jax.config import Config
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import OutputError
from visionfm_jax.parallel.targets import peak_flops
from visionfm_jax.telemetry.progress import Progress
from visionfm_jax.telemetry.trace import StepTrace
from visionfm_jax.telemetry.trackers import FAILED, FINISHED, STOPPED, open_trackers
from visionfm_jax.telemetry.watchdog import Watchdog
from visionfm_jax.telemetry.writers import MetricWriter
from visionfm_jax.train.sessions import Session


class RunMonitor:
    """Files and progress bar on the first process; on every one the signs of life for its watchdog and session."""

    def __init__(self, config: Config, folder: Path, start: int, watchdog: Watchdog, session: Session):
        first, telemetry = jax.process_index() == 0, config.telemetry
        self.peak = peak_flops(jax.devices()[0].device_kind)
        self.progress = Progress(config.total_steps, start, enabled=first and telemetry.progress)
        self.writer = None
        if first:
            trackers = open_trackers(telemetry.trackers, folder, to_dict(config), self.note)
            more = {"tensorboard": telemetry.tensorboard, "trackers": trackers}
            self.writer = MetricWriter(folder, start_step=start, note=self.note, **more)
        self.trace = StepTrace(telemetry.profile_steps, folder, self.note)
        self.watchdog, self.session, self._state = watchdog, session, STOPPED
        watchdog.beat(start)

    def dispatching(self, step: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of `step`, counted from 0."""
        return self.trace.dispatching(step)

    def step_done(self, step: int) -> None:
        """The device has finished `step`."""
        self.trace.finished(step)
        self.watchdog.beat(step)
        self.session.alive(step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write scalars; those of training steps also move the progress bar."""
        if "tflops_per_device" in metrics:
            mfu = metrics["tflops_per_device"] * 1e12 / self.peak if self.peak else None
            metrics = {**metrics, **({} if mfu is None else {"mfu": mfu}), **_device_memory()}
        if self.writer:
            self.writer.write(step, metrics)
        if "tflops_per_device" in metrics:
            shown = {k: metrics[k] for k in ("loss", "images_per_s", "tflops_per_device", "data_wait")}
            self.progress.update(step, mfu=metrics.get("mfu"), **shown)

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self.progress.note(text)

    def ends(self, finished: bool) -> None:
        """What trackers will be told: whether the run has reached its end, or was stopped before."""
        self._state = FINISHED if finished else STOPPED

    def close(self) -> None:
        """Flush files, free the terminal."""
        self.trace.close()
        self.progress.close()
        if self.writer:
            self.writer.close(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._state = FAILED if kind else self._state
        with contextlib.suppress(OutputError) if kind else contextlib.nullcontext():  # what came first is the cause
            self.close()


def _device_memory() -> dict[str, float]:
    """In use, and at the peak, of the first device of this process; {} where it does not count it, as a CPU."""
    found = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "device_memory_gib", "peak_bytes_in_use": "device_memory_peak_gib"}
    return {name: found[key] / 2**30 for key, name in names.items() if key in found}
