"""The trace of some steps, which XProf opens: RUN/profile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax

from visionfm_jax.errors import one_line

SUBFOLDER = "profile"


class StepTrace:
    """Begins where the first of its steps is dispatched, and ends when the device has finished the last.

    Every process writes a file of its own. What goes wrong here costs the trace, not the run.

    Args:
      steps: the first and the last, counted from 0; (0, 0): none.
      folder: the run's.
      note: for lines for people.
    """

    def __init__(self, steps: tuple[int, int], folder: Path, note: Callable[[str], None]):
        self._first, self._last = steps
        self._folder, self._note = folder / SUBFOLDER, note
        self._left, self._runs = steps != (0, 0), False

    def dispatching(self, step: int) -> contextlib.AbstractContextManager:
        """Around the dispatch of `step`, which the trace names."""
        if self._left and self._first <= step <= self._last:
            self._left = False
            self._runs = self._try(lambda: jax.profiler.start_trace(self._folder))
        return jax.profiler.StepTraceAnnotation("train", step_num=step) if self._runs else contextlib.nullcontext()

    def finished(self, steps: int) -> None:
        """The device has finished this many steps of the run."""
        if self._runs and steps > self._last:
            self.close()

    def close(self) -> None:
        """End the trace if it still runs."""
        if self._runs:
            self._runs = False
            if self._try(jax.profiler.stop_trace):
                self._note(f"a trace is written to {self._folder}; xprof --logdir={self._folder} shows it")

    def _try(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except (RuntimeError, OSError, ValueError) as error:  # another trace runs, or the disk is full
            self._note(f"no trace of steps: {one_line(error)}")
            return False
        return True
